"""A thousand queries over a million prompts: FAISS's flat index, and ours from memory-mapped files.

python benchmarks/retrieval.py [nearest] [bank] [--count 1000000] [--queries 1000] [--rounds 5]
Prints tables and writes retrieval.json.

nearest  The ten nearest of float32 vectors of 384 numbers.
bank     The 60 nearest of float16 vectors of 512 numbers, as CLIP's are kept, in two files, a tenth as many queries;
         FAISS is given a block of them after the other (`faiss.knn`), as float32. And ours over ten times as many.

The vectors are those of prompts, each repeated with noise until there are enough; the queries are means of three, as
predictions lie between prompts. Each way has a process of its own; they run in turns. Ours reads the file anew.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from encode import REAL, read
from turns import Prepared, in_turns, lines, ratio, record

NOISE = 0.6  # length of what is added to a unit vector
NEAREST = 10


def make(folder: Path, count: int, queries: int) -> None:
    """Writes `vectors.npy` and `queries.npy`."""
    from image_to_prompts.models import metrics, text_encoder

    known = text_encoder.encode(read(REAL if REAL.is_file() else None, 20_000), fast=True)
    rng = np.random.default_rng(0)
    kept = np.lib.format.open_memmap(folder / "vectors.npy", "w+", np.float32, (count, known.shape[1]))
    for start in range(0, count, len(known)):
        noise = rng.standard_normal(known.shape, np.float32) * np.float32(NOISE / known.shape[1] ** 0.5)
        kept[start : start + len(known)] = metrics.unit(known + noise)[: count - start]
    kept.flush()
    means = known[rng.integers(0, len(known), (queries, 3))].mean(1)
    np.save(folder / "queries.npy", metrics.unit(means))


def theirs(folder: Path) -> Prepared:
    import faiss

    index = faiss.IndexFlatIP(np.load(folder / "queries.npy").shape[1])
    index.add(np.load(folder / "vectors.npy"))
    queries = np.load(folder / "queries.npy")
    return lambda: index.search(queries, NEAREST)


def ours(folder: Path) -> Prepared:
    from image_to_prompts.search import nearest

    queries = np.load(folder / "queries.npy")
    return lambda: nearest.nearest(queries, np.load(folder / "vectors.npy", mmap_mode="c"), NEAREST)


WIDTH, DEEP, BLOCK = 512, 60, 65_536  # of a bank: numbers a row, rows asked for, rows a block of FAISS


def make_bank(folder: Path, count: int, queries: int) -> None:
    """Writes two files of random unit vectors around 20,000 centres, and `asked.npy`, near to some of them."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((20_000, WIDTH), np.float32) / np.float32(WIDTH**0.5)
    for number, rows in enumerate((count // 3, count - count // 3)):
        kept = np.lib.format.open_memmap(folder / f"bank-{number}.npy", "w+", np.float16, (rows, WIDTH))
        for start in range(0, rows, BLOCK):
            some = centres[rng.integers(0, len(centres), min(BLOCK, rows - start))]
            some = some + rng.standard_normal(some.shape, np.float32) * np.float32(NOISE / WIDTH**0.5)
            kept[start : start + len(some)] = some / np.linalg.norm(some, axis=1, keepdims=True)
        kept.flush()
    asked = centres[rng.integers(0, len(centres), (queries, 3))].mean(1)
    np.save(folder / "asked.npy", asked / np.linalg.norm(asked, axis=1, keepdims=True))


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("bank-*.npy"))


def block_wise(folder: Path) -> Prepared:
    import faiss

    queries = np.load(folder / "asked.npy")

    def search() -> np.ndarray:
        best = np.full((len(queries), DEEP), -np.inf, np.float32)
        for part in (np.load(file, mmap_mode="c") for file in files(folder)):
            for start in range(0, len(part), BLOCK):
                block = part[start : start + BLOCK].astype(np.float32)
                found, _ = faiss.knn(queries, block, DEEP, metric=faiss.METRIC_INNER_PRODUCT)
                best = -np.sort(-np.concatenate([best, found], 1), axis=1)[:, :DEEP]
        return best

    return search


def ours_in_bank(folder: Path) -> Prepared:
    from image_to_prompts.search import nearest

    queries = np.load(folder / "asked.npy")
    return lambda: nearest.nearest(queries, nearest.Parts([nearest.Stored(file) for file in files(folder)]), DEEP)


def told(title: str, slow: str, found: tuple[Any, ...], cosines: tuple[np.ndarray, np.ndarray]) -> dict[str, Any]:
    """Prints what `in_turns` found, and how far cosines are from the right ones; both for the JSON file."""
    seconds, memory = found
    differ = float(np.abs(cosines[0] - cosines[1]).max())
    print(f"{title}: seconds\n{lines(seconds, memory, slow)}\nlargest difference of a cosine {differ:.1e}")
    fast = ratio(seconds, slow, "ours")
    return {"seconds": seconds, "peak GB": memory, "times as fast": fast, "largest difference": differ}


def bench_bank(options: argparse.Namespace) -> None:
    count, queries, ten = options.count, options.queries // 10, "ours, ten times as many"
    with tempfile.TemporaryDirectory() as name, tempfile.TemporaryDirectory() as other:
        folder, large = Path(name), Path(other)
        make_bank(folder, count, queries)
        make_bank(large, 10 * count, queries)
        os.environ.pop("OPENBLAS_CORETYPE", None)
        ways = {"faiss.knn": (block_wise, (folder,), {}), "ours": (ours_in_bank, (folder,), {})}
        found = in_turns({**ways, ten: (ours_in_bank, (large,), {})}, options.rounds)
        cosines = block_wise(folder)(), ours_in_bank(folder)()[1]
    title = f"{count:,} float16 rows of {WIDTH}, {queries:,} queries, {DEEP} nearest"
    result = {"rows": count, "queries": queries, **told(title, "faiss.knn", found, cosines)}
    record(__file__, "bank", {**result, "ten times as many, times": ratio(found[0], ten, "ours")})


def bench_nearest(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder, options.count, options.queries)
        os.environ.pop("OPENBLAS_CORETYPE", None)  # FAISS's own BLAS is faster without
        ways = {"FAISS, flat": (theirs, (folder,), {}), "ours": (ours, (folder,), {})}
        found = in_turns(ways, options.rounds)
        cosines = theirs(folder)()[0], ours(folder)()[1]
    title = f"{options.count:,} prompts, {options.queries:,} queries, {NEAREST} nearest"
    result = {"prompts": options.count, "queries": options.queries}
    record(__file__, "nearest", {**result, **told(title, "FAISS, flat", found, cosines)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["nearest", "bank"])
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    for part in options.parts:
        {"nearest": bench_nearest, "bank": bench_bank}[part](options)


if __name__ == "__main__":
    main()
