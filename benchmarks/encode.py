"""Prompts a second of all-MiniLM-L6-v2: sentence-transformers at its best batch size, and ours, exact and fast.

python benchmarks/encode.py [--prompts FILE] [--count 4000] [--rounds 5]      prints a table and writes encode.json

FILE has a prompt a line and may be gzipped; without one the grammar of `generate` writes them. Nothing comes from the
cache. Each way has a process of its own; they run in turns.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import platform
import tempfile
from pathlib import Path

import numpy as np
from turns import Prepared, in_turns, lines, ratio

REAL = Path(__file__).resolve().parents[2] / "shared" / "data" / "real_prompts.txt.gz"
BATCHES = (16, 32, 64, 128)


def read(file: Path | None, count: int | None = None) -> list[str]:
    """Prompts, `count` of them taken at random."""
    if file is None:
        from image_to_prompts.embedded import grammar

        return [grammar.prompt(1, i) for i in range(count or 20_000)]
    with (gzip.open if file.suffix == ".gz" else open)(file, "rt", encoding="utf-8") as stream:
        prompts = stream.read().splitlines()
    rows = np.sort(np.random.default_rng(0).permutation(len(prompts))[:count])
    return [prompts[row] for row in rows]


def theirs(prompts: list[str], batch: int) -> Prepared:
    from sentence_transformers import SentenceTransformer

    from image_to_prompts.models import text_encoder, weights

    model = SentenceTransformer(str(weights.locate(text_encoder.NAME)))
    return lambda: model.encode(prompts, batch_size=batch, normalize_embeddings=True, show_progress_bar=False)


def ours(prompts: list[str], fast: bool) -> Prepared:
    from image_to_prompts.models import text_cache, text_encoder

    def encode() -> np.ndarray:
        with tempfile.TemporaryDirectory() as folder:
            os.environ[text_cache.FOLDER] = folder
            return text_encoder.encode(prompts, fast=fast)

    return encode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=Path, default=REAL if REAL.is_file() else None)
    parser.add_argument("--count", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    prompts = read(options.prompts, options.count)
    few = prompts[: len(prompts) // 4]
    tried = {f"batch {size}": (theirs, (few, size), {}) for size in BATCHES}
    seconds, _ = in_turns(tried, 2)
    best = min(BATCHES, key=lambda size: min(seconds[f"batch {size}"]))
    name = f"sentence-transformers, batch {best}"
    ways = {
        name: (theirs, (prompts, best), {}),
        "ours, float32": (ours, (prompts, False), {}),
        "ours, fast": (ours, (prompts, True), {}),
    }
    seconds, memory = in_turns(ways, options.rounds)
    right = theirs(prompts, best)()
    cosines = {
        way: float((ours(prompts, fast)() * right).sum(1).min())
        for way, fast in (("ours, float32", False), ("ours, fast", True))
    }
    print(f"{len(prompts)} prompts: seconds")
    print(lines(seconds, memory, name))
    for way, cosine in cosines.items():
        print(f"{way}: least cosine to sentence-transformers {cosine:.6f}")
    result = {"machine": platform.processor() or platform.machine(), "prompts": len(prompts), "seconds": seconds}
    result |= {"times as fast": {way: ratio(seconds, name, way) for way in cosines}, "least cosine": cosines}
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
