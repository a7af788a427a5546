"""All pairs of unit vectors that reach a cosine, and the rows that a greedy pass keeps: exact, on CPU and GPU.

The first 127 principal components of two vectors and the product of the lengths of what is left bound their cosine from
above (Cauchy-Schwarz). That bound is one inner product of 128 numbers, computed with few bits and a margin for their
rounding; the few pairs that reach the threshold by it are computed again in float32 from the whole vectors. Blocks are
small enough to be read while they are in the cache.

The bits are those of half precision or, where that is faster, whole numbers of 8 bits. Let h be the components of a
vector, r the length of what is left, u a unit, q = round(h / u), and e the largest |h - u q| of all vectors. Then
<x, y> <= <h, h'> + r r' <= u² <q, q'> + r r' + e |u q| + e |u q'| + e², where |u q| <= 1 + e; and r r' is at most u²
times the sum of ceil(r / 2u) ceil(r' / 2u) over four numbers, which are part of the inner product. So a pair whose
product of whole numbers stays below (threshold - 2 e (1 + e) - e²) / u² cannot reach the threshold.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from ..run.devices import keep_memory, local_device, mixed_precision, one_core_each, type_of
from ..run.files import let_go
from ..run.progress import progress_to

NEAR = 0.8  # cosine from which on one prompt must not judge what has seen the other
WIDTH = 128  # numbers a row that the bound is made from: of 64 to 256 the fastest (docs/log.md)
LENGTHS = 4  # of these the length of what is left, in whole numbers, which a single one could not hold
BLOCK, TALL, WIDE = 8192, 2048, 2048  # rows whose fate is found at once; rows and columns of a product
SAMPLE = 20_000  # rows from which principal components are computed
ON_GPU = 8192, 65_536  # such rows and columns there
LET_GO = 16_384  # pairs computed again, of rows in a mapped file, before their pages are let go
CHECKED, CHECKED_ON_GPU = 512, 262_144  # pairs computed again at once: within a CPU's cache, a T4's memory
ROUNDING = 1e-4  # more than float32 loses in three sums of at most 384 products, 2.3e-5 each
LISTED = 1_000_000  # pairs in Python lists at once
UNIT = 1e-3  # by which a squared length may differ from 1
LARGEST = 127  # of whole numbers of 8 bits
TINY = 1e-4  # added to a difference of squared lengths, for the same reason


class Pairs(NamedTuple):
    """Pairs of rows, ordered by `later`, then `earlier`: int64 (m,), int64 (m,), float32 (m,)."""

    later: np.ndarray
    earlier: np.ndarray
    cosine: np.ndarray

    def at(self, threshold: float | np.float32) -> Pairs:
        """Those that reach a threshold."""
        enough = self.cosine >= np.float32(threshold)
        return Pairs(*(column[enough] for column in self))


def leaders(
    vectors: np.ndarray, threshold: float, fixed: int = 0, folder: Path | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Greedy pass: a row is kept exactly if no earlier kept row has a float32 cosine >= threshold with it.

    Hence no two kept rows reach the threshold, and each other row has a witness that is kept. Fates differ between
    machines only for pairs within about 1e-6 of the threshold, where float32 itself is ambiguous.

    Args:
        vectors: float32 unit vectors (n, d), in order of preference; of a memory-mapped file, opened with mode "c",
            little is in memory at once.
        threshold: Least cosine.
        fixed: So many first rows are kept whatever they resemble.
        folder: For decided blocks, from which the same call continues after a kill; with it a bar shows how far it is.

    Returns:
        leader: int64 (n,), the first kept row that each row resembles; kept rows are their own.
        cosine: float32 (n,), the cosine with it; 1 for kept rows.

    Raises:
        ValueError: If a vector is not of length 1, or the threshold not in (0, 1].
    """
    search = _Search(vectors, threshold)
    leader, cosine = np.arange(len(vectors)), np.ones(len(vectors), np.float32)
    kept, count = np.arange(len(vectors)), fixed
    coarse = search.coarse  # its first `count` rows become those of `kept`; they are never more than were looked at
    decided = None
    if folder:
        from .decided import Decided

        decided = Decided(folder, vectors, threshold, fixed)

    def settle(found: Pairs) -> None:
        gone, which = first_kept(found)
        leader[gone], cosine[gone] = found.earlier[which], found.cosine[which]

    watched = progress_to(len(vectors) - fixed, "compare") if folder else nullcontext(lambda finished: None)
    with one_core_each(search.device) as threads, watched as advance:
        for start in range(fixed, len(vectors), BLOCK):
            block = slice(start, min(start + BLOCK, len(vectors)))
            rows = np.arange(block.start, block.stop)
            if not (decided and decided.read(block, leader, cosine)):
                settle(search.pairs(threads, rows, coarse[block], kept[:count], coarse[:count]))
                left = rows[leader[rows] == rows]
                own = coarse[torch.from_numpy(left)]
                settle(search.pairs(threads, left, own, left, own))
                if decided:
                    decided.keep(block, leader, cosine)
            stay = rows[leader[rows] == rows]
            end = count + len(stay)
            kept[count:end], coarse[count:end] = stay, coarse[torch.from_numpy(stay)]
            count = end
            advance(len(rows))
    return leader, cosine


def first_kept(found: Pairs) -> tuple[list[int], list[int]]:
    """What a greedy pass drops, given all pairs of some rows with each other, or with rows that are kept.

    Returns:
        Rows that are dropped, and for each the number of its pair with the first kept row.
    """
    gone: dict[int, int] = {}
    for start in range(0, len(found.later), LISTED):
        rows, others = (column[start : start + LISTED].tolist() for column in (found.later, found.earlier))
        for number, (row, other) in enumerate(zip(rows, others, strict=True), start):
            if other not in gone and row not in gone:
                gone[row] = number
    return list(gone), list(gone.values())


def pairs(vectors: np.ndarray, threshold: float) -> Pairs:
    """All pairs of rows whose float32 cosine reaches the threshold.

    Args:
        vectors: float32 unit vectors (n, d).
        threshold: Least cosine.

    Raises:
        ValueError: As `leaders`.
    """
    search = _Search(vectors, threshold)
    everything = np.arange(len(vectors))
    found = []
    with one_core_each(search.device) as threads:
        for start in range(0, len(vectors), BLOCK):
            end = min(start + BLOCK, len(vectors))
            rows, coarse = everything[start:end], search.coarse[start:end]
            found.append(search.pairs(threads, rows, coarse, everything[:end], search.coarse[:end]))
    return joined(found)


def between(vectors: np.ndarray, others: np.ndarray, threshold: float) -> Pairs:
    """All pairs of a vector and one of others that reach a cosine.

    Args:
        vectors: float32 unit vectors (n, d).
        others: float32 unit vectors (m, d).
        threshold: Least cosine.

    Returns:
        `later` are rows of `vectors`, `earlier` rows of `others`.

    Raises:
        ValueError: As `leaders`.
    """
    return joined(_between(vectors, others, threshold))


def near(vectors: np.ndarray, others: np.ndarray, threshold: float) -> np.ndarray:
    """Which vectors reach a cosine with one of others: bool (n,); see `between`."""
    found = np.zeros(len(vectors), bool)
    for pairs in _between(vectors, others, threshold):
        found[pairs.later] = True
    return found


def _between(vectors: np.ndarray, others: np.ndarray, threshold: float) -> Iterator[Pairs]:
    """The pairs of `between`, block by block."""
    search, count = _Search(np.concatenate([others, vectors]), threshold), len(others)
    with one_core_each(search.device) as threads:
        for start in range(count, count + len(vectors), BLOCK):
            rows = np.arange(start, min(start + BLOCK, count + len(vectors)))
            coarse = search.coarse[start : rows[-1] + 1]
            found = search.pairs(threads, rows, coarse, np.arange(count), search.coarse[:count])
            yield found._replace(later=found.later - count)


def joined(parts: Iterable[Pairs]) -> Pairs:
    """Several sets of pairs in one, in the same order."""
    none = Pairs(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))
    return Pairs(*(np.concatenate(columns) for columns in zip(none, *parts, strict=True)))


def product(rows: torch.Tensor, others: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Matrix product of halves or of 8-bit whole numbers, on a CPU into `out` if that is given.

    Halves are summed in float32 on GPUs too; as halves they would round more than margins allow.
    """
    if rows.device.type == "cpu":
        return (torch._int_mm if rows.dtype == torch.int8 else torch.mm)(rows, others, out=out)
    flags = torch.backends.cuda.matmul
    before = flags.allow_fp16_reduced_precision_reduction
    flags.allow_fp16_reduced_precision_reduction = False
    try:
        return rows @ others
    finally:
        flags.allow_fp16_reduced_precision_reduction = before


def half_of_unit(device: torch.device) -> torch.dtype:
    """The half precision in which numbers of unit vectors are multiplied: float16 loses an eighth of what bf16 does."""
    return torch.float16 if device.type == "cuda" else type_of(mixed_precision(device))


def reaches(values: torch.Tensor, limit: torch.Tensor, out: np.ndarray | None = None) -> np.ndarray | torch.Tensor:
    """`values >= limit`, on a CPU by NumPy, which is several times as fast as PyTorch.

    Args:
        values: (n, m), of any floating type, or int32.
        limit: One, or m of them; rounded up to the type of `values` if that is a floating one.
        out: bool (n, m) to write to, on a CPU.
    """
    rounded = limit.to(values.dtype)
    if values.is_floating_point():
        rounded = torch.where(rounded < limit, torch.nextafter(rounded, torch.full_like(rounded, 2)), rounded)
    if values.device.type != "cpu":
        return values >= rounded
    if values.dtype == torch.bfloat16:  # NumPy has none; above 0 whole numbers of the same bits are in the same order
        values = values.view(torch.int16)
        rounded = torch.where(rounded > 0, rounded.view(torch.int16), -(2**15))
    return np.greater_equal(values.numpy(), rounded.numpy(), out=out)


def places(there: np.ndarray | torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of what is true in a bool array (n, m), most of which is false."""
    if not isinstance(there, np.ndarray):
        return tuple(column.cpu().numpy() for column in torch.nonzero(there, as_tuple=True))
    flat = there.reshape(-1)
    whole = len(flat) // 8 * 8
    eights = np.flatnonzero(flat[:whole].view(np.uint64) != 0)  # of bools NumPy finds them seven times as fast
    eight, within = np.nonzero(flat[:whole].reshape(-1, 8)[eights])
    return np.divmod(np.append(eights[eight] * 8 + within, whole + np.flatnonzero(flat[whole:])), there.shape[1])


def fast_int8(device: torch.device) -> bool:
    """Whether whole numbers of 8 bits multiply faster than halves: on CPUs with AVX-512's VNNI, but not with AMX."""
    there = [getattr(torch.cpu, f"_is_{name}_supported", lambda: False)() for name in ("vnni", "amx_tile")]
    return device.type == "cpu" and hasattr(torch, "_int_mm") and there == [True, False]


class _Search:
    """Vectors, what bounds their cosines, and the least bound to look at."""

    def __init__(self, vectors: np.ndarray, threshold: float) -> None:
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold {threshold} is not in (0, 1]")
        self.device = local_device()
        if self.device.type == "cpu":
            keep_memory()
        self.kind = torch.int8 if fast_int8(self.device) else half_of_unit(self.device)
        self.threshold = np.float32(threshold)
        self.vectors, self.looked = np.ascontiguousarray(vectors, np.float32), 0
        self.exact = torch.from_numpy(self.vectors).to(self.device)
        if not all(((part.pow(2).sum(1) - 1).abs() < UNIT).all() for part in self._blocks()):
            raise ValueError("a vector is not of length 1")
        error, unit = self._bound()
        margin = 2 * error * (1 + error) + error**2 + ROUNDING
        if self.kind == torch.int8:
            self.limit = torch.tensor(math.floor((float(self.threshold) - margin) / unit**2), dtype=torch.int32)
        else:
            # Rounding keeps order: a product that reaches the limit reaches the rounded one when it is rounded itself.
            limit = torch.tensor(float(self.threshold) - margin, dtype=self.kind)
            self.limit = torch.nextafter(limit, torch.tensor(-2.0, dtype=self.kind))
        self.buffers = threading.local()

    def _bound(self) -> tuple[float, float]:
        """Fills `coarse`; returns the largest length of what rounding took from a row, and the unit of its numbers."""
        count, whole = len(self.exact), self.kind == torch.int8
        sample = torch.cat([self.exact[:0], *(part[:: max(1, count // SAMPLE)].clone() for part in self._blocks())])
        lengths = LENGTHS if whole else 1
        axes = torch.linalg.eigh((sample.T @ sample).cpu().double())[1].flip(1)[:, : WIDTH - lengths]
        if whole:  # turned, so that all numbers are about as large, and one unit serves them all
            turn = torch.randn(axes.shape[1], axes.shape[1], generator=torch.Generator().manual_seed(0)).double()
            axes = axes @ torch.linalg.qr(turn)[0]
        axes = axes.float().to(self.device)
        unit = 1.0
        if whole and count:
            parts = (self._parts(part, axes, lengths) for part in self._blocks())
            unit = max(part.abs().max().item() for part in parts) / LARGEST
        self.coarse = torch.empty(count, axes.shape[1] + lengths, dtype=self.kind, device=self.device)
        largest = 0.0
        for start, exact in zip(range(0, count, BLOCK), self._blocks(), strict=True):
            parts = self._parts(exact, axes, lengths)
            head, rest = parts[:, :-lengths], parts[:, -lengths:]
            if whole:
                rounded = torch.cat([(head / unit).round(), (rest / unit).ceil()], 1).clamp_max(LARGEST).to(self.kind)
            else:
                up = torch.nextafter(rest.to(self.kind), torch.full_like(rest, 2, dtype=self.kind))
                rounded = torch.cat([head.to(self.kind), up], 1)
            self.coarse[start : start + BLOCK] = rounded
            lost = rounded[:, :-lengths].float() * unit - head
            largest = max(largest, lost.norm(dim=1).max().item())
        return largest, unit

    def _blocks(self) -> Iterator[torch.Tensor]:
        """The vectors, `BLOCK` at once."""
        for start in range(0, len(self.exact), BLOCK):
            yield self.exact[start : start + BLOCK]
            let_go(self.vectors)

    def _parts(self, rows: torch.Tensor, axes: torch.Tensor, lengths: int) -> torch.Tensor:
        """Rows along axes, and the length of what is left of each, spread over some numbers."""
        head = rows @ axes if self.device.type == "cpu" else (rows.double() @ axes.double()).float()  # never in TF32
        rest = (rows.pow(2).sum(1) - head.pow(2).sum(1) + TINY).clamp_min(TINY).div(lengths).sqrt()
        return torch.cat([head, rest[:, None].expand(-1, lengths)], 1)

    def pairs(
        self,
        threads: ThreadPoolExecutor,
        rows: np.ndarray,
        coarse_rows: torch.Tensor,
        others: np.ndarray,
        coarse_others: torch.Tensor,
    ) -> Pairs:
        """Pairs of `rows` with earlier ones among `others`; both ascend, their coarse vectors beside them."""
        tall, wide = (TALL, WIDE) if self.device.type == "cpu" else ON_GPU
        jobs = [
            (slice(top, top + tall), slice(left, left + wide))
            for top in range(0, len(rows), tall)
            for left in range(0, len(others), wide)
            if others[left] < rows[min(top + tall, len(rows)) - 1]
        ]

        def tile(job: tuple[slice, slice]) -> Pairs:
            high, wide = job
            at, to = self._candidates(coarse_rows[high], coarse_others[wide])
            return self._check(rows[high][at], others[wide][to])

        found = joined(threads.map(tile, jobs))
        order = np.lexsort((found.earlier, found.later))
        return Pairs(*(column[order] for column in found))

    def _candidates(self, rows: torch.Tensor, others: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Rows and columns of a block whose bound reaches the limit."""
        if self.device.type != "cpu":
            return places(reaches(product(rows, others.T), self.limit.to(self.device)))
        if not hasattr(self.buffers, "product"):
            self.buffers.product = torch.empty(TALL * WIDE, dtype=self.limit.dtype)
            self.buffers.enough = np.empty(TALL * WIDE, bool)
        shape = (len(rows), len(others))
        size = len(rows) * len(others)
        bounds, enough = self.buffers.product[:size].view(shape), self.buffers.enough[:size].reshape(shape)
        return places(reaches(product(rows, others.T, bounds), self.limit, enough))

    def _check(self, later: np.ndarray, earlier: np.ndarray) -> Pairs:
        """Those of some pairs whose float32 cosine reaches the threshold."""
        below = earlier < later
        later, earlier = later[below], earlier[below]
        cosine, on_cpu = np.empty(len(later), np.float32), self.device.type == "cpu"
        for start in range(0, len(later), at_once := CHECKED if on_cpu else CHECKED_ON_GPU):
            some = slice(start, start + at_once)
            if on_cpu:
                np.einsum("ij,ij->i", self.vectors[later[some]], self.vectors[earlier[some]], out=cosine[some])
            else:
                one, other = (torch.from_numpy(rows[some]).to(self.device) for rows in (later, earlier))
                cosine[some] = torch.linalg.vecdot(self.exact[one], self.exact[other]).cpu().numpy()
        self.looked += len(later)
        if self.looked > LET_GO:
            self.looked = 0
            let_go(self.vectors)
        return Pairs(later, earlier, cosine).at(self.threshold)
