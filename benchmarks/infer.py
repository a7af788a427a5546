"""Inference beside the reference's: ConvNeXt-XXLarge with random weights at 512 px, PNG files to 384 numbers an image.

python benchmarks/infer.py [--images 8] [--rounds 3]      prints a table and writes benchmarks/infer.json

The reference (written anew from its description) encodes every picture as JPEG first, reads that, and runs the tower
in float32 on contiguous memory. Ours is `predictors.predict`. Both read the same PNG files, in turns, each in a process
of its own. The cosines compare our predictions with those of the same weights in float32 on the same PNG files.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from turns import Prepared, in_turns, lines, ratio


def checkpoint(backbone: str, size: int) -> Any:
    """A checkpoint with random weights, not on disk."""
    import torch

    from image_to_prompts.models import backbones, checkpoints

    torch.manual_seed(0)
    spec = backbones.describe(backbone, size)
    return checkpoints.Checkpoint(checkpoints.build(spec).eval(), spec, {}, np.ones(384, np.float32))


def read(files: list[Path], size: int, as_jpeg: bool) -> Any:
    """uint8 (n, 3, size, size); through a JPEG file, as the reference does, or not."""
    import torch
    from PIL import Image

    from image_to_prompts.data.rows import fit

    batch = []
    for file in files:
        picture = Image.open(file).convert("RGB")
        if as_jpeg:
            picture.save(file.with_suffix(".jpg"))
            picture = Image.open(file.with_suffix(".jpg"))
        batch.append(fit(picture, size))
    return torch.from_numpy(np.stack(batch))


def reference(backbone: str, size: int, batch: int, files: list[Path], as_jpeg: bool = True) -> Prepared:
    import torch

    from image_to_prompts.run import devices

    device = devices.process_state().device
    model = checkpoint(backbone, size).model.to(device, memory_format=torch.contiguous_format)

    def predict() -> np.ndarray:
        with torch.no_grad():
            parts = [files[start : start + batch] for start in range(0, len(files), batch)]
            return torch.cat([model(read(part, size, as_jpeg).to(device)).cpu() for part in parts]).numpy()

    return predict


def ours(backbone: str, size: int, batch: int, files: list[Path]) -> Prepared:
    from image_to_prompts.encode.backbone import BackboneEncoder
    from image_to_prompts.predict import predictors
    from image_to_prompts.run import progress

    progress.set_quiet(True)
    loaded = checkpoint(backbone, size)
    predictor = predictors.Predictor(loaded.mean, [BackboneEncoder(loaded.model, loaded.spec)])
    viewing = predictors.Viewing(("whole",), batch)
    return lambda: predictors.predict(predictor, files, viewing).vectors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--backbone", default="open_clip:convnext_xxlarge")
    options = parser.parse_args()
    from PIL import Image

    with tempfile.TemporaryDirectory() as folder:
        rng = np.random.default_rng(0)
        files = [Path(folder) / f"{i}.png" for i in range(options.images)]
        for file in files:
            small = Image.fromarray(rng.integers(0, 255, (24, 24, 3), dtype=np.uint8))
            small.resize((512, 512), Image.Resampling.BICUBIC).save(file)
        arguments = (options.backbone, options.size, options.batch, files)
        ways = {"reference": (reference, arguments, {}), "ours": (ours, arguments, {})}
        seconds, memory = in_turns(ways, options.rounds)
        exact, found = reference(*arguments, as_jpeg=False)(), ours(*arguments)()
    cosines = (exact * found).sum(1) / np.linalg.norm(exact, axis=1) / np.linalg.norm(found, axis=1)
    fast = ratio(seconds, "reference", "ours")
    print(f"{options.backbone}, {options.size} px, {options.images} images in batches of {options.batch}: seconds")
    print(lines(seconds, memory, "reference"))
    print(f"cosine to float32: at least {cosines.min():.6f}")
    settings = {name: getattr(options, name) for name in ("backbone", "size", "images", "batch")}
    result = {"machine": platform.processor() or platform.machine(), **settings, "seconds": seconds, "peak GB": memory}
    result |= {"times as fast": fast, "least cosine to float32": float(cosines.min())}
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
