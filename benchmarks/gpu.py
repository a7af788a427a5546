"""What a GPU does, each beside the reference's way of doing it; Kaggle's `benchmark` kernel runs it once.

python benchmarks/gpu.py [--weights DIR] [--out benchmarks/gpu.json]   `make bench-table` makes docs of it

render   Seconds an image of Stable Diffusion 2 at 768 px: one image a call and saved before the next, 50 steps of DDIM
         in half precision; and the render stage, with 50 steps of DDIM and with --fast.
train    Seconds an image of a training step of ConvNeXt-XXLarge at 512 px, last quarter unfrozen, random weights.
infer    Seconds an image of the same model, decoding included.
encode   Seconds a thousand prompts of all-MiniLM-L6-v2: sentence-transformers at the reference's batch, and ours.
dedupe   Seconds for 20,000 random vectors at cosine 0.8: FAISS with 1,000 neighbours a row, and ours.

Ways run in turns in one process, after one time that does not count. --small takes tiny sizes, to see that it runs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import finetune
import infer
import numpy as np
import pandas as pd
from PIL import Image

from image_to_prompts import render
from image_to_prompts.data import metadata
from image_to_prompts.embedded import grammar
from image_to_prompts.models import text_cache, text_encoder, weights
from image_to_prompts.render import stable_diffusion
from image_to_prompts.run import devices
from image_to_prompts.run import progress as bars
from image_to_prompts.search import near_pairs


@dataclass
class Sizes:
    """How much of everything."""

    images: int = 16
    steps: int = 0
    backbone: str = "open_clip:convnext_xxlarge"
    image_size: int = 512
    batch: int = 8
    inferred: int = 128
    prompts: int = 10_000
    vectors: int = 20_000
    rounds: int = 3


SMALL = Sizes(2, 2, "open_clip:convnext_tiny", 64, 2, 4, 64, 500, 2)


def in_turns(ways: dict[str, Callable[[], Any]], rounds: int, per: float) -> dict[str, list[float]]:
    """Seconds of each round over `per`, in turns, after one that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if number:
                seconds[name].append((time.perf_counter() - start) / per)
    return seconds


def bench_render(sizes: Sizes, folder: Path, path: Path | None) -> dict[str, list[float]]:
    import torch

    found = weights.locate("stable-diffusion-2", path)
    prompts = [grammar.prompt(0, i) for i in range(sizes.images)]
    frame = metadata.with_keys(pd.DataFrame({"prompt": prompts}).drop_duplicates(), Path("benchmark"))
    metadata.write_table(folder / "m.csv", frame)
    pipelines = {fast: stable_diffusion.load(found, fast) for fast in (False, True)}
    stable_diffusion.load = lambda path, fast, *_: pipelines[fast]

    def one_by_one() -> None:
        for name, prompt, seed in zip(frame["image_name"], frame["prompt"], frame["seed"], strict=True):
            image = pipelines[False](
                prompt,
                generator=torch.Generator("cpu").manual_seed(seed),
                num_inference_steps=sizes.steps or 50,
                height=768,
                width=768,
            ).images[0]
            image.resize((512, 512), Image.Resampling.LANCZOS).save(folder / name)

    def stage(fast: bool) -> Callable[[], Any]:
        def run() -> None:
            with tempfile.TemporaryDirectory() as out:
                values = {"backend": "sd2", "weights": found, "steps": sizes.steps, "fast": fast, "quiet": True}
                render.run(render.Config(metadata=folder / "m.csv", out=Path(out), **values))

        return run

    ways = {"reference": one_by_one, "ours": stage(False), "ours --fast": stage(True)}
    return in_turns(ways, sizes.rounds, len(frame))


def bench_train(sizes: Sizes, *_: Any) -> dict[str, list[float]]:
    model = (sizes.backbone, sizes.image_size, sizes.batch)
    ways = {
        "reference": finetune.prepare_reference(*model, 1),
        "ours": finetune.prepare_ours(*model, 1, False),
    }
    return in_turns(ways, sizes.rounds, sizes.batch)


def bench_infer(sizes: Sizes, folder: Path, *_: Any) -> dict[str, list[float]]:
    files = [folder / f"{i}.png" for i in range(sizes.inferred)]
    for i, file in enumerate(files):
        Image.effect_noise((512, 512), 10 + i % 90).convert("RGB").save(file)
    model = (sizes.backbone, sizes.image_size, sizes.batch, files)
    return in_turns({"reference": infer.reference(*model), "ours": infer.ours(*model)}, sizes.rounds, len(files))


def uncached(prompts: list[str]) -> None:
    """Embeds prompts that no run before has."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ[text_cache.FOLDER] = folder
        text_encoder.encode(prompts, fast=True)


def bench_encode(sizes: Sizes, *_: Any) -> dict[str, list[float]]:
    prompts = [grammar.prompt(1, i) for i in range(sizes.prompts)]
    encoder = text_encoder.load()
    ways = {
        "reference": lambda: encoder.encode(prompts, batch_size=512, show_progress_bar=False),
        "ours": lambda: uncached(prompts),
    }
    return in_turns(ways, sizes.rounds, len(prompts) / 1000)


def bench_dedupe(sizes: Sizes, *_: Any) -> dict[str, list[float]]:
    import faiss

    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(sizes.vectors, 384)).astype(np.float32)
    vectors[1::10] = vectors[::10] + 0.3 * vectors[1::10]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)

    def neighbours() -> None:
        index = faiss.IndexFlatIP(384)
        index.add(vectors)
        index.search(vectors, min(1000, sizes.vectors))

    return in_turns({"reference": neighbours, "ours": lambda: near_pairs.leaders(vectors, 0.8)}, sizes.rounds, 1)


PARTS = {
    "render": (bench_render, "s an image"),
    "train": (bench_train, "s an image"),
    "infer": (bench_infer, "s an image"),
    "encode": (bench_encode, "s a 1,000 prompts"),
    "dedupe": (bench_dedupe, "s for 20,000 vectors"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, help="Stable Diffusion 2; left out: Kaggle input, then hub")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    import torch

    bars.set_quiet(True)
    device = devices.process_state().device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"no GPU ({device.type})"
    result: dict[str, Any] = {"device": name, "small": options.small, "torch": torch.__version__, "parts": {}}
    failed = []
    for part, (bench, unit) in PARTS.items():
        with tempfile.TemporaryDirectory() as folder:
            try:
                seconds = bench(SMALL if options.small else Sizes(), Path(folder), options.weights)
            except Exception as error:  # the other parts are worth having
                print(f"{part}: failed: {error!r}", flush=True)
                failed.append(part)
                continue
        result["parts"][part] = {"unit": unit, "seconds": seconds}
        for way, values in seconds.items():
            print(f"{part:8} {way:12}" + "".join(f"{value:10.4f}" for value in values) + f"  {unit}", flush=True)
        options.out.write_text(json.dumps(result, indent=2) + "\n")
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
