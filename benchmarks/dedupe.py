"""Seconds to deduplicate embeddings at cosine 0.8, vectors given: the exact engine, its peers, and the bare products.

python benchmarks/dedupe.py real  [--prompts FILE] [--rounds 3]      all of them on real prompts, and exactness
python benchmarks/dedupe.py kept                                     what semhash and FAISS's inverted index miss
python benchmarks/dedupe.py large [--rows 250000 1000000]            the exact engine on more rows
                                  [--beside CHECKOUT]                and, in turns, that of another checkout
                                  [--mapped]                         of a mapped file alone, as for many millions

Peers: FAISS's flat index with 1,000 neighbours a row (the reference), its range search with the greedy pass, and
semhash (`python -m pip install semhash`). Each has a process of its own and the OpenBLAS kernel that was fastest for it
on a part of the rows; OPENBLAS_CORETYPE must be set before a process starts. `large` makes its rows of real ones:
copies mirrored along random principal axes, which keeps every copy's cosines and the covariance of the whole; the
quantiles of the nearest neighbours' cosines are printed for both. Figures go to benchmarks/dedupe.json.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Literal

import encode
import numpy as np
from turns import Prepared, in_turns, lines, ratio

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

CORES = ("", "Haswell", "SkylakeX", "Zen", "SapphireRapids")
THRESHOLD = 0.8
PART = 8_000


def flat(file: Path) -> Prepared:
    import faiss

    vectors = np.load(file)

    def run() -> int:
        index = faiss.IndexFlatIP(vectors.shape[1])
        index.add(vectors)
        cosines, _ = index.search(vectors, min(1000, len(vectors)))
        return int(((cosines >= THRESHOLD).sum(1) == 1).sum())

    return run


def range_search(file: Path) -> Prepared:
    from plain_dedupe import leaders

    vectors = np.load(file)
    return lambda: int((leaders(vectors, THRESHOLD)[0] == np.arange(len(vectors))).sum())


def semhash(file: Path) -> Prepared:
    from semhash import SemHash

    vectors = np.load(file)
    records = [str(row) for row in range(len(vectors))]

    def run() -> list[int]:
        found = SemHash.from_embeddings(vectors, records, None).self_deduplicate(threshold=THRESHOLD)
        return [int(row) for row in found.selected]

    return run


def exact(file: Path, checkout: Path | None = None, mode: Literal["c"] | None = None) -> Prepared:
    name = "search.near_pairs"
    if checkout:
        sys.path.insert(0, str(checkout))
        if not (checkout / "image_to_prompts" / "search").is_dir():
            name = "dedupe.exact"  # where it was before the modules moved
    near_pairs = importlib.import_module(f"image_to_prompts.{name}")
    vectors = np.load(file, mmap_mode=mode)
    return lambda: int((near_pairs.leaders(vectors, THRESHOLD)[0] == np.arange(len(vectors))).sum())


def bare(file: Path) -> Prepared:
    """The matrix products alone that the exact engine computes, with nothing done to their results."""
    import torch

    from image_to_prompts.run.devices import one_core_each
    from image_to_prompts.search import near_pairs

    vectors = np.load(file)
    kept = near_pairs.leaders(vectors, THRESHOLD)[0] == np.arange(len(vectors))
    search = near_pairs._Search(vectors, THRESHOLD)
    coarse, stay = search.coarse, search.coarse[torch.from_numpy(kept)]
    before = np.concatenate([[0], np.cumsum(kept)])
    tall, wide, block = near_pairs.TALL, near_pairs.WIDE, near_pairs.BLOCK
    buffers = [torch.empty(tall, wide, dtype=search.limit.dtype) for _ in range(4)]  # two threads use two of them

    def tile(job: tuple[int, int, int]) -> None:
        top, left, right = job
        rows, others = coarse[top : top + tall], stay[left:right]
        room = buffers[left // wide % len(buffers)].view(-1)
        near_pairs.product(rows, others.T, room[: len(rows) * len(others)].view(len(rows), -1))

    def run() -> int:
        jobs = []
        for top in range(0, len(coarse), tall):
            end = before[min(top // block * block + block, len(coarse))]
            jobs += [(top, left, min(left + wide, end)) for left in range(0, end, wide)]
        with one_core_each(coarse.device) as threads:
            list(threads.map(tile, jobs))
        return len(jobs)

    return run


def kernel(way: Callable[[Path], Prepared], part: Path) -> str:
    """The OpenBLAS kernel that is fastest for a way."""
    tried = {core: (way, (part,), {"OPENBLAS_CORETYPE": core}) for core in CORES}
    seconds, _ = in_turns(tried, 2)
    return min(seconds, key=lambda core: min(seconds[core]))


def grown(vectors: np.ndarray, rows: int, file: Path | None = None) -> np.ndarray:
    """More rows with the nearest-neighbour cosines of real ones, in memory or in a file: see the module's text."""
    rng = np.random.default_rng(0)
    axes = np.linalg.eigh(vectors.T @ vectors)[1][:, ::-1]
    along = vectors @ axes
    signs = [rng.choice([-1.0, 1.0], len(axes)).astype(np.float32) for _ in range(len(vectors), rows, len(vectors))]
    order, shape = np.argsort(rng.permutation(rows)), (rows, vectors.shape[1])
    found = np.lib.format.open_memmap(file, "w+", np.float32, shape) if file else np.empty(shape, np.float32)
    for one in signs:
        one[0] = 1  # the mean stays
    for number, part in enumerate(chain([vectors], ((along * one) @ axes.T for one in signs))):
        places = order[number * len(vectors) : (number + 1) * len(vectors)]
        found[places] = (part / np.linalg.norm(part, axis=1, keepdims=True))[: len(places)]
    return found


def quantiles(vectors: np.ndarray) -> list[float]:
    from image_to_prompts.dedupe.result import sampled

    return [round(float(value), 3) for value in np.quantile(sampled(vectors, 0.7)[0], (0.05, 0.25, 0.5, 0.75, 0.95))]


def real(options: argparse.Namespace, vectors: np.ndarray, folder: Path) -> dict[str, object]:
    whole, part = folder / "whole.npy", folder / "part.npy"
    np.save(whole, vectors)
    np.save(part, vectors[:PART])
    peers = {"flat index, 1,000 neighbours": flat, "range search, greedy": range_search, "semhash": semhash}
    ways, cores = {}, {}
    for name, way in peers.items():
        cores[name] = kernel(way, part)
        ways[name] = (way, (whole,), {"OPENBLAS_CORETYPE": cores[name]})
        print(f"{name}: OpenBLAS kernel {cores[name] or 'of its own choice'}", flush=True)
    ways |= {"exact": (exact, (whole,), {}), "bare products": (bare, (whole,), {})}
    seconds, memory = in_turns(ways, options.rounds)
    first = next(iter(peers))
    print(f"{len(vectors)} rows: seconds, times as fast as the flat index")
    print(lines(seconds, memory, first))
    fast = {name: ratio(seconds, name, "exact") for name in [*peers, "bare products"]}
    for name, values in fast.items():
        print("exact engine, times as fast as {}: {min:.2f} {median:.2f} {max:.2f}".format(name, **values))
    from plain_dedupe import leaders

    from image_to_prompts.search import near_pairs as engine

    checked = {}
    for what, rows in {"real": vectors, "made of real ones": grown(vectors, 100_000)}.items():
        same = np.array_equal(engine.leaders(rows, THRESHOLD)[0], leaders(rows, THRESHOLD)[0])
        checked[f"{len(rows)} {what}"] = same
        print(f"{len(rows)} rows, {what}: same leaders as float32 range search: {same}", flush=True)
    return {"rows": len(vectors), "kernels": cores, "seconds": seconds, "peak GB": memory} | {
        "times as fast": fast,
        "same as float32": checked,
    }


def kept(options: argparse.Namespace, vectors: np.ndarray, folder: Path) -> dict[str, object]:
    """What each way keeps, beside the law: near pairs that stay, and rows dropped for nothing that is kept."""
    from image_to_prompts.search import near_pairs, with_faiss

    file, everything, found = folder / "whole.npy", np.arange(len(vectors)), {"rows": len(vectors)}
    np.save(file, vectors)
    ways = {
        "exact": lambda: np.flatnonzero(near_pairs.leaders(vectors, THRESHOLD)[0] == everything),
        "FAISS's inverted index": lambda: np.flatnonzero(with_faiss.leaders(vectors, THRESHOLD)[0] == everything),
        "semhash": semhash(file),
    }
    pairs = near_pairs.pairs(vectors, THRESHOLD)
    for name, way in ways.items():
        stays = np.isin(everything, way())
        later, earlier = stays[pairs.later], stays[pairs.earlier]
        witnessed = stays.copy()
        witnessed[pairs.later[earlier]] = witnessed[pairs.earlier[later]] = True
        found[name] = {
            "kept": int(stays.sum()),
            "near pairs that stay": int((later & earlier).sum()),
            "dropped without a near row that stays": int((~witnessed).sum()),
        }
        print(f"{name}: {found[name]}", flush=True)
    return found


def large(options: argparse.Namespace, vectors: np.ndarray, folder: Path) -> dict[str, object]:
    found: dict[str, object] = {"quantiles, real": quantiles(vectors)}
    print(f"nearest neighbours' cosines, quantiles .05 .25 .5 .75 .95: real {found['quantiles, real']}")
    for rows in options.rows:
        file = folder / f"{rows}.npy"
        size = grown(vectors, rows, file).nbytes / 1e9
        found[f"quantiles, {rows}"] = quantiles(np.load(file, mmap_mode="c"))
        ways = {} if options.mapped else {"exact": (exact, (file,), {})}
        ways["mapped"] = (exact, (file, None, "c"), {})
        if options.beside:
            ways["beside"] = (exact, (file, options.beside.resolve()), {})
        seconds, memory = in_turns(ways, options.rounds, warm=False)
        found[str(rows)] = {"seconds": seconds, "peak GB": memory, "GB of the vectors": size}
        for way, taken in seconds.items():
            said = ", ".join(f"{value:.0f}" for value in taken)
            print(f"{rows} rows, quantiles {found[f'quantiles, {rows}']}, {way}: {said} s,", end=" ")
            print(f"peak {memory[way]:.1f} GB, of which {size:.1f} are the vectors", flush=True)
        if options.beside:
            found[f"{rows}, times as fast as before"] = fast = ratio(seconds, "beside", "exact")
            print("times as fast as beside: {min:.2f} {median:.2f} {max:.2f}".format(**fast), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("real", "kept", "large"))
    parser.add_argument("--prompts", type=Path, default=encode.REAL if encode.REAL.is_file() else None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, nargs="+", default=(250_000, 1_000_000))
    parser.add_argument("--beside", type=Path)
    parser.add_argument("--mapped", action="store_true", help="large: of a mapped file alone")
    parser.add_argument("--folder", type=Path, help="where the rows lie; left out: a temporary one")
    options = parser.parse_args()
    os.environ.pop("OPENBLAS_CORETYPE", None)
    from image_to_prompts.models import text_encoder

    vectors = text_encoder.encode(encode.read(options.prompts))
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        found = {"real": real, "kept": kept, "large": large}[options.what](options, vectors, Path(folder))
    file = Path(__file__).with_suffix(".json")
    result = json.loads(file.read_text()) if file.is_file() else {}
    result |= {"machine": platform.processor() or platform.machine()}
    result[options.what] = result.get(options.what, {}) | found
    file.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
