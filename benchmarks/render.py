"""Rendering: what the stage adds to bare pipeline calls, and how fast embedded scenes are drawn.

python benchmarks/render.py [--rounds 5] [--count 250]     prints tables and writes benchmarks/render.json

Stable Diffusion: a tiny random pipeline of the real classes, 768 px, on this machine's CPU. The baseline is the loop
that one would write: call the pipeline on a batch, downsize, save the PNG, next batch. Both load nothing, get the same
rows in the same batches and must leave the same files. Each round runs one after the other in turn.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
from PIL import Image
from turns import ratio

from image_to_prompts import render
from image_to_prompts.data import metadata
from image_to_prompts.embedded import grammar, scenes
from image_to_prompts.run import devices

ROOT = Path(__file__).resolve().parents[1]
BATCH, STEPS = 4, 4
Interval = tuple[float, float]


def frame_of(count: int, seed: int) -> pd.DataFrame:
    """Metadata of so many grammar prompts."""
    prompts = dict.fromkeys(grammar.prompt(seed, i) for i in range(2 * count))
    return metadata.with_keys(pd.DataFrame({"prompt": list(prompts)[:count]}), Path("benchmark"))


def bare_loop(pipeline: object, frame: pd.DataFrame, folder: Path) -> None:
    """Baseline: pipeline calls, nothing checked, nothing noted, everything in turn."""
    import torch

    from image_to_prompts.render import stable_diffusion

    for start in range(0, len(frame), BATCH):
        rows = frame.iloc[start : start + BATCH]
        images = pipeline(
            prompt=rows["prompt"].tolist(),
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in rows["seed"]],
            num_inference_steps=STEPS,
            guidance_scale=stable_diffusion.GUIDANCE,
            height=768,
            width=768,
        ).images
        for name, image in zip(rows["image_name"], images, strict=True):
            image.resize((512, 512), Image.Resampling.LANCZOS).save(folder / name, compress_level=1)


def recorded(function: Callable, intervals: list[Interval]) -> Callable:
    """`function`, noting when it ran."""

    def wrapper(*arguments: object, **named: object) -> object:
        start = time.perf_counter()
        try:
            return function(*arguments, **named)
        finally:
            intervals.append((start, time.perf_counter()))

    return wrapper


def overlap(inner: list[Interval], outer: list[Interval]) -> float:
    """Share of the time of `inner` that lies within `outer`."""
    total = sum(end - start for start, end in inner)
    shared = sum(max(0.0, min(e, end) - max(s, start)) for s, e in inner for start, end in outer)
    return shared / total


def diffusion(rounds: int, count: int) -> dict:
    """Seconds of the bare loop and of the stage, in turns, and how much of the encoding ran beside the pipeline."""
    sys.path.insert(0, str(ROOT / "tests"))
    from tiny_models import save_diffusion

    from image_to_prompts.render import stable_diffusion  # here, for the processes that draw import this module too

    seconds: dict[str, list[float]] = {"bare loop": [], "stage": []}
    encoding: list[Interval] = []
    drawing: list[Interval] = []
    with tempfile.TemporaryDirectory() as name:
        weights = save_diffusion(Path(name) / "sd2", "v_prediction", 96)
        pipeline = stable_diffusion.load(weights)
        stable_diffusion.load = lambda path, fast, *_: pipeline
        stable_diffusion.finish = recorded(stable_diffusion.finish, encoding)
        stable_diffusion.StableDiffusionBackend.call = recorded(stable_diffusion.StableDiffusionBackend.call, drawing)
        bare_loop(pipeline, frame_of(BATCH, 99), Path(name))  # warm-up
        for number in range(rounds):
            frame = frame_of(count, number)
            folders = {way: Path(name) / f"{way} {number}" for way in seconds}
            metadata.write_table(Path(name) / "m.csv", frame)
            for way in sorted(seconds, reverse=bool(number % 2)):
                folders[way].mkdir()
                start = time.perf_counter()
                if way == "stage":
                    values = {"backend": "sd2", "weights": weights, "steps": STEPS, "batch_size": BATCH, "quiet": True}
                    render.run(render.Config(metadata=Path(name) / "m.csv", out=folders[way], **values))
                else:
                    bare_loop(pipeline, frame, folders[way])
                seconds[way].append(time.perf_counter() - start)
            for file in frame["image_name"]:
                assert (folders["stage"] / file).read_bytes() == (folders["bare loop"] / file).read_bytes(), file
    ratios = [ours / bare for ours, bare in zip(seconds["stage"], seconds["bare loop"], strict=True)]
    return {
        "images": count,
        "batch": BATCH,
        "steps": STEPS,
        "seconds": seconds,
        "stage / bare loop": spread(ratios),
        "times as fast": ratio(seconds, "bare loop", "stage"),
        "share of encoding beside the pipeline": overlap(encoding, drawing),
        "seconds encoding / seconds in the pipeline": sum(b - a for a, b in encoding) / sum(b - a for a, b in drawing),
    }


def draw_only(frame: pd.DataFrame, _: Path) -> None:
    """Baseline of the scenes: drawing in this process, nothing written."""
    for prompt, seed in zip(frame["prompt"], frame["seed"], strict=True):
        scenes.picture(prompt, seed)


def stage(workers: int) -> Callable[[pd.DataFrame, Path], None]:
    """The stage with a number of workers, everything written."""

    def run(frame: pd.DataFrame, folder: Path) -> None:
        metadata.write_table(folder / "m.csv", frame)
        render.run(render.Config(metadata=folder / "m.csv", out=folder / "images", workers=workers))

    return run


def embedded(rounds: int, count: int, cores: int) -> dict:
    """Images a second of the embedded renderer."""
    ways = {"drawing alone, 1 process": draw_only, "stage, 1 worker": stage(1), f"stage, {cores} workers": stage(cores)}
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds):
        frame = frame_of(count, number)
        for name, way in ways.items():
            with tempfile.TemporaryDirectory() as folder:
                scenes.sprite.cache_clear()
                start = time.perf_counter()
                way(frame, Path(folder))
                rates[name].append(len(frame) / (time.perf_counter() - start))
    return {"images": count, "images a second": {name: spread(r) for name, r in rates.items()}}


def spread(values: list[float]) -> dict[str, float]:
    """Least, median and greatest."""
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--count", type=int, default=250, help="embedded scenes a round")
    parser.add_argument("--diffusion-count", type=int, default=24, help="Stable Diffusion images a round")
    options = parser.parse_args()
    cores = devices.cores()
    result = {
        "machine": platform.processor() or platform.machine(),
        "cores": cores,
        "stable diffusion": diffusion(options.rounds, options.diffusion_count),
        "embedded": embedded(options.rounds, options.count, cores),
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")
    sd = result["stable diffusion"]
    print(f"Stable Diffusion, tiny pipeline: {sd['images']} images, batch {BATCH}, {options.rounds} rounds in turn")
    for way, values in sd["seconds"].items():
        print(f"{way:28}" + "".join(f"{value:8.2f}" for value in values) + "  s")
    slower = sd["stage / bare loop"]
    print(f"{'stage / bare loop':28}{slower['min']:8.3f}{slower['median']:8.3f}{slower['max']:8.3f}  min median max")
    print(f"{'encoding beside pipeline':28}{sd['share of encoding beside the pipeline']:8.0%}  of its time")
    print(f"embedded scenes, images a second, {options.count} prompts, {options.rounds} rounds (min / median / max)")
    for name, r in result["embedded"]["images a second"].items():
        print(f"{name:28}{r['min']:8.1f}{r['median']:8.1f}{r['max']:8.1f}")


if __name__ == "__main__":
    main()
