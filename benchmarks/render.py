"""Embedded renderer: images a second with PNGs written, by workers, and beside the drawing alone in one process.

python benchmarks/render.py [--count 400]     prints a table and writes benchmarks/render.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import pandas as pd

from image_to_prompts import metadata, render
from image_to_prompts.generate import grammar
from image_to_prompts.render.scenes import SceneBackend, sprite


def draw_only(frame: pd.DataFrame, _: Path) -> None:
    """Baseline: the backend in this process, nothing written."""
    SceneBackend()(frame["prompt"].tolist(), frame["seed"].tolist())


def stage(workers: int):
    """The stage with a number of workers, everything written."""

    def run(frame: pd.DataFrame, folder: Path) -> None:
        metadata.write_table(folder / "m.csv", frame)
        render.run(render.Config(metadata=folder / "m.csv", out=folder / "images", workers=workers))

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    ways = {"drawing alone, 1 process": draw_only, "stage, 1 worker": stage(1), f"stage, {cores} workers": stage(cores)}
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(options.rounds):
        prompts = [grammar.prompt(round_, i) for i in range(options.count)]
        frame = metadata.with_keys(pd.DataFrame({"prompt": prompts}).drop_duplicates(), Path("benchmark"))
        for name, way in ways.items():
            with tempfile.TemporaryDirectory() as folder:
                sprite.cache_clear()
                start = time.perf_counter()
                way(frame, Path(folder))
                rates[name].append(len(frame) / (time.perf_counter() - start))
    result = {
        "machine": platform.processor() or platform.machine(),
        "cores": cores,
        "count": options.count,
        "images_per_second": {
            name: {"min": min(r), "median": statistics.median(r), "max": max(r)} for name, r in rates.items()
        },
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")
    print(f"images a second, {options.count} prompts, {options.rounds} rounds (min / median / max)")
    for name, r in result["images_per_second"].items():
        print(f"{name:28}{r['min']:7.1f}{r['median']:7.1f}{r['max']:7.1f}")


if __name__ == "__main__":
    main()
