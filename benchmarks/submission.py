"""The competition's 16,000 images through the submission path: memory, time, and what a time limit leaves.

python benchmarks/submission.py [--images 16000]      prints a table and writes benchmarks/submission.json

Small images (96 px) and a small image size (64 px) keep the computing short: what is measured is everything around it,
listing, loading, writing and validating, and the memory of the whole. A second run has a third of the first one's time.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from image_to_prompts import infer
from image_to_prompts.infer import submission
from image_to_prompts.models import backbones, checkpoints
from image_to_prompts.run import progress


def peak() -> float:
    """GB that this process had at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=16_000)
    options = parser.parse_args()
    progress.set_quiet(True)
    with tempfile.TemporaryDirectory() as name:
        folder, rng = Path(name), np.random.default_rng(0)
        (folder / "images").mkdir()
        for i in range(options.images):
            small = Image.fromarray(rng.integers(0, 255, (6, 6, 3), dtype=np.uint8))
            small.resize((96, 96)).save(folder / "images" / f"{i:08x}.png", compress_level=1)
        spec = backbones.describe("timm:tf_efficientnet_lite2", 64)
        model = checkpoints.pretrained(spec)
        checkpoints.save(
            folder / "checkpoint",
            model,
            {"backbone": spec.to_dict(), "profile": "full"},
            np.eye(384, dtype=np.float32)[0],
        )
        config = infer.Config(images=folder / "images", checkpoint=(folder / "checkpoint",), views=("whole",))
        config.out = folder / "a.csv"
        before, start = peak(), time.perf_counter()
        infer.run(config)
        seconds = time.perf_counter() - start
        start = time.perf_counter()
        assert submission.check(config.out, config.images) == options.images
        checking = time.perf_counter() - start
        found = {"images": options.images, "seconds": seconds, "seconds of validation": checking}
        found |= {"peak GB before": before, "peak GB": peak(), "GB of the file": config.out.stat().st_size / 1e9}

        config.out = folder / "b.csv"
        config.max_hours = (time.monotonic() - progress.BEGUN + seconds / 3) / 3600
        start = time.perf_counter()
        short = infer.run(config)
        assert submission.check(config.out, config.images) == options.images
        found |= {"limit, seconds": seconds / 3, "stopped after": time.perf_counter() - start}
        found["not reached"] = short.unreached
    for key, value in found.items():
        print(f"{key:24}{value:10.2f}" if isinstance(value, float) else f"{key:24}{value:10,d}")
    each = (seconds + checking) / options.images
    print(f"around the model: at most {16_000 * each / 60:.1f} minutes of 9 hours for 16,000 images at this rate")
    result = {"machine": platform.processor() or platform.machine(), **found}
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
