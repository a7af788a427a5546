"""The known prompts nearest to a vector: an index of any number of prompts, exact, in memory-mapped files.

A scan in half precision finds every prompt that may be among the nearest; those few are computed again in float32. Up
to some million prompts no index structure is needed: a million take a thousand queries a second and a half, two cores.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import filelock
import numpy as np
import torch

from ..data import metadata
from ..models import text_cache, text_encoder
from ..models.metrics import unit
from ..run.devices import keep_memory, local_device, one_core_each
from ..run.files import atomic_path
from ..run.resume import Stamp
from .near_pairs import ROUNDING, half_of_unit, places, product, reaches

if TYPE_CHECKING:
    import pyarrow as pa

log = logging.getLogger(__name__)
TILE, CHUNK = 2048, 16  # rows of a product, of which a CPU holds two in its cache; products between two looks at limits
TILE_ON_GPU, CHUNK_ON_GPU = 65_536, 1
ASKED = 1024  # queries at once
FIRST, FIRST_ON_GPU = 4096, 131_072  # rows whose best cosines give the first limits
RUN = 64  # of them that follow each other: single ones would be read one by one
GATHERED = 512  # pairs computed again at once
LONGEST = 1.001  # length of a unit vector that was rounded to float16
ERROR = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 0.0}
"""Unit roundoff (half the gap after 1); a product of unit vectors is off by it three times: twice in, once out."""


@dataclass(frozen=True)
class Index:
    """Prompts and their embeddings, both on the disk.

    Attributes:
        prompts: An Arrow array of n texts, none twice.
        vectors: float32 (n, 384), unit length; of a bank float16.
    """

    prompts: pa.Array | pa.ChunkedArray
    vectors: np.ndarray | Parts

    def some(self, count: int) -> list[str]:
        """At most so many of the prompts, evenly spaced."""
        rows = np.arange(0, len(self.prompts), max(1, -(-len(self.prompts) // count)))
        return [self.prompts[row].as_py() for row in rows.tolist()]

    def search(self, queries: np.ndarray, count: int = 10) -> list[list[tuple[str, float]]]:
        """The prompts nearest to each query, float32 (m, 384), with their cosines, best first."""
        rows, cosines = nearest(queries, self.vectors, count)
        return [
            [(self.prompts[row].as_py(), cosine) for row, cosine in zip(*both, strict=True)]
            for both in zip(rows.tolist(), cosines.tolist(), strict=True)
        ]


def open_index(csvs: Sequence[Path]) -> Index:
    """The index of the prompts of metadata CSVs, built on first use and kept in the folder of `text_cache`.

    It is built anew when a file has changed, whereby only prompts that no stage has embedded before are embedded.

    Args:
        csvs: Files with a `prompt` column.

    Raises:
        UserError: If one cannot be read; see `metadata.read_prompts`.
    """
    import pyarrow as pa

    names = [str(path.resolve()) for path in csvs]
    folder = text_cache.path().parent / "index" / hashlib.sha256("\n".join(names).encode()).hexdigest()[:32]
    texts, vectors = folder / "prompts.arrow", folder / "vectors.npy"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(folder / ".lock"):  # one process builds, and nobody opens one file without the other
            stamp = Stamp(folder / ".index.done", "index", {"encoder": text_encoder.NAME}, csvs)
            if not all(path.is_file() for path in csvs) or not stamp.is_current():
                stamp.claim([texts, vectors])
                build(_prompts(csvs), texts, vectors)
                stamp.write([texts, vectors])
            return Index(read_texts(texts).combine_chunks(), np.load(vectors, mmap_mode="c"))
    except OSError as error:  # a cache may do without a disk
        log.warning("%s: the index is not kept: %s (%s names another folder)", folder, error, text_cache.FOLDER)
        prompts = _prompts(csvs)
        return Index(pa.array(prompts, pa.large_string()), text_encoder.encode(prompts))


def _prompts(csvs: Sequence[Path]) -> list[str]:
    """The prompts of CSVs, none twice."""
    prompts = list(dict.fromkeys(prompt for path in csvs for prompt in metadata.read_prompts(path)["prompt"]))
    log.info("index of %d prompts of %s", len(prompts), ", ".join(map(str, csvs)))
    return prompts


def build(prompts: list[str], texts: Path, vectors: Path) -> None:
    """Writes the two files of an index."""
    text_encoder.encode_to(vectors, prompts)
    write_texts(texts, prompts)


def write_texts(path: Path, prompts: Sequence[str]) -> None:
    """Writes prompts as an Arrow file, atomically."""
    import pyarrow as pa

    table = pa.table({"prompt": pa.array(prompts, pa.large_string())})
    with atomic_path(path) as part, pa.ipc.new_file(str(part), table.schema) as file:
        file.write_table(table)


def read_texts(path: Path) -> pa.ChunkedArray:
    """What `write_texts` wrote, mapped into memory; raises OSError or pyarrow's ArrowInvalid for a damaged file."""
    import pyarrow as pa

    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()["prompt"]


class Stored:
    """An array (n, d) in a .npy file, of which rows are read when they are asked for.

    Of a file that is mapped into memory every page that was read counts as memory, that of a bank more than there is.
    """

    def __init__(self, path: Path) -> None:
        """Reads the head of the file; raises ValueError or OSError if it is none, or shorter than its head says."""
        mapped = np.load(path, mmap_mode="r", allow_pickle=False)
        self.path, self.shape, self.dtype, self.start = path, mapped.shape, mapped.dtype, mapped.offset
        self.file = path.open("rb")

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        """Rows from one number to another, or by their numbers."""
        if isinstance(rows, slice):
            first, last, _ = rows.indices(len(self))
            found = np.empty((max(0, last - first), self.shape[1]), self.dtype)
            self._read(found.reshape(-1).view(np.uint8).data, first)
            return found
        found = np.empty((len(rows), self.shape[1]), self.dtype)
        memory, size = found.reshape(-1).view(np.uint8).data, self.shape[1] * self.dtype.itemsize
        for place, row in enumerate(rows.tolist()):
            self._read(memory[place * size : (place + 1) * size], row)
        return found

    def _read(self, memory: memoryview, row: int) -> None:
        """Fills bytes with those of the rows from `row` on."""
        done, start = 0, self.start + row * self.shape[1] * self.dtype.itemsize
        while done < len(memory):  # a call reads at most 2 GB
            count = os.preadv(self.file.fileno(), [memory[done:]], start + done)
            if not count:
                raise OSError(errno.EIO, "shorter than its head says", str(self.path))
            done += count


class Parts:
    """Arrays of one width, one below the other, as one: the files of a bank."""

    def __init__(self, arrays: Sequence[np.ndarray | Stored]) -> None:
        """Takes at least one array (n, d)."""
        self.arrays, self.ends = arrays, np.cumsum([len(one) for one in arrays])
        self.starts = self.ends - [len(one) for one in arrays]
        self.shape, self.dtype = (int(self.ends[-1]), arrays[0].shape[1]), arrays[0].dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        """Rows from one number to another, or by their numbers."""
        if isinstance(rows, slice):
            first, last, _ = rows.indices(len(self))
            inside = zip(self.arrays, first - self.starts, last - self.starts, strict=True)
            found = [one[max(low, 0) : high] for one, low, high in inside if low < len(one) and high > 0]
            return found[0] if len(found) == 1 else np.concatenate([np.empty((0, self.shape[1]), self.dtype), *found])
        taken = np.empty((len(rows), self.shape[1]), self.dtype)
        part = np.searchsorted(self.ends, rows, "right")
        for number in np.unique(part):
            mine = part == number
            taken[mine] = self.arrays[number][rows[mine] - self.starts[number]]
        return taken


def nearest(queries: np.ndarray, vectors: np.ndarray | Stored | Parts, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows of largest cosine.

    Args:
        queries: float32 (m, d), of any length.
        vectors: float32 or float16 (n, d) unit vectors, memory-mapped or not; float16 ones are taken as they stand.
        count: How many rows a query; fewer if there are fewer.

    Returns:
        int64 (m, count) rows, best first, the earlier of equals first; float32 (m, count) cosines.
    """
    count = min(count, len(vectors))
    if not count:
        return np.empty((len(queries), 0), np.int64), np.empty((len(queries), 0), np.float32)
    found = [_nearest(unit(queries[i : i + ASKED]), vectors, count) for i in range(0, len(queries), ASKED)]
    none = np.empty((0, count), np.int64), np.empty((0, count), np.float32)
    rows, cosines = (np.concatenate(part) for part in zip(none, *found, strict=True))
    return rows, cosines


def _nearest(queries: np.ndarray, vectors: np.ndarray | Stored | Parts, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The same for at most `ASKED` unit vectors."""
    device = local_device()
    tile, chunk, first = TILE_ON_GPU, CHUNK_ON_GPU, FIRST_ON_GPU
    if device.type == "cpu":
        keep_memory()
        tile, chunk, first = TILE, CHUNK, FIRST
    kind = half_of_unit(device)
    coarse = torch.from_numpy(queries).to(device, kind).T.contiguous()
    lost = ROUNDING * max(1, queries.shape[1] / text_encoder.DIMENSION)  # by sums, the longer the more
    margin = 2 * (LONGEST * ((1 + ERROR[kind]) ** 3 - 1) + lost)  # by which the nearest may seem farther than another

    def cosines_of(rows: np.ndarray) -> torch.Tensor:
        exact = torch.from_numpy(rows).to(device)
        # From float16 to bf16 by itself takes five times as long on a CPU.
        return product(exact.float().to(kind), coarse)

    def candidates(start: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Queries, rows and coarse cosines that reach the limits."""
        cosines = cosines_of(vectors[start : start + tile])
        row, query = places(reaches(cosines, limits))
        return query, row + start, cosines[torch.from_numpy(row), torch.from_numpy(query)].float().cpu().numpy()

    runs = -(-max(first, count) // RUN)
    begins = [len(vectors) * run // runs for run in range(runs)] if len(vectors) > runs * RUN else []
    sample = np.concatenate([vectors[start : start + RUN] for start in begins]) if begins else vectors[0 : len(vectors)]
    limits = cosines_of(sample).float().topk(count, dim=0).values[-1] - margin
    best = np.full((len(queries), count), -np.inf, np.float32)
    found = []
    with one_core_each(device) as threads:
        for start in range(0, len(vectors), tile * chunk):
            tiles = range(start, min(start + tile * chunk, len(vectors)), tile)
            some = [np.concatenate(column) for column in zip(*threads.map(candidates, tiles), strict=True)]
            best = _merged(best, some[0], some[2])
            limits = torch.maximum(limits, torch.from_numpy(best[:, -1]).to(device) - margin)
            may = some[2] >= limits.cpu().numpy()[some[0]]
            found.append([column[may] for column in some])
        query, row, cosine = (np.concatenate(column) for column in zip(*found, strict=True))
        may = cosine >= limits.cpu().numpy()[query]
        query, row, cosine = query[may], row[may], cosine[may]

        def again(some: slice) -> None:
            near = vectors[row[some]].astype(np.float32, copy=False)
            np.einsum("ij,ij->i", near, queries[query[some]], out=cosine[some])

        list(threads.map(again, (slice(start, start + GATHERED) for start in range(0, len(row), GATHERED))))
    order = np.lexsort((row, -cosine, query))
    order = order[np.searchsorted(query[order], np.arange(len(queries)))[:, None] + np.arange(count)]
    return row[order], cosine[order]


def _merged(best: np.ndarray, query: np.ndarray, cosine: np.ndarray) -> np.ndarray:
    """The best cosines of each query, (m, count) in falling order, among those before and new ones."""
    count = best.shape[1]
    order = np.lexsort((-cosine, query))
    query, cosine = query[order], cosine[order]
    place = np.arange(len(query)) - np.searchsorted(query, query)
    new = np.full_like(best, -np.inf)
    new[query[place < count], place[place < count]] = cosine[place < count]
    return -np.sort(-np.concatenate([best, new], 1), axis=1)[:, :count]
