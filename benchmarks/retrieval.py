"""A thousand queries over a million prompts: FAISS's flat index, and ours from memory-mapped files.

python benchmarks/retrieval.py [--count 1000000] [--queries 1000] [--rounds 5]     prints a table, writes retrieval.json

The vectors are those of prompts, each repeated with noise until there are enough; the queries are means of three, as
predictions lie between prompts. Each way has a process of its own; they run in turns. Ours reads the file anew.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder, options.count, options.queries)
        os.environ.pop("OPENBLAS_CORETYPE", None)  # FAISS's own BLAS is faster without
        ways = {"FAISS, flat": (theirs, (folder,), {}), "ours": (ours, (folder,), {})}
        seconds, memory = in_turns(ways, options.rounds)
        right, found = theirs(folder)()[0], ours(folder)()[1]
    print(f"{options.count:,} prompts, {options.queries:,} queries, {NEAREST} nearest: seconds")
    print(lines(seconds, memory, "FAISS, flat"))
    differ = float(np.abs(right - found).max())
    print(f"largest difference of a cosine {differ:.1e}")
    result = {"prompts": options.count, "queries": options.queries, "seconds": seconds, "peak GB": memory}
    result |= {"times as fast": ratio(seconds, "FAISS, flat", "ours"), "largest difference": differ}
    record(__file__, "nearest", result)


if __name__ == "__main__":
    main()
