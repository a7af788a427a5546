"""Fine-tuning: a training step of ConvNeXt-XXLarge (random weights) beside the reference's own loop.

python benchmarks/finetune.py [--rounds 3] [--batch 2]     prints a table and writes benchmarks/finetune.json

The reference's step, written anew from its description: float32, contiguous memory, the whole model in training mode,
minus mean cosine, gradient norm clipped at 1, AdamW. Ours is `finetune.train_epoch` on the same model, images and
targets. Both freeze the same tensors. They run in turns in one process, each after a step that does not count.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch
from accelerate import Accelerator

from image_to_prompts import backbones, finetune, progress
from image_to_prompts import model as models
from image_to_prompts.devices import mixed_precision


def reference_step(model: torch.nn.Module, images: torch.Tensor, targets: torch.Tensor, optimizer: object) -> None:
    """One step as the reference takes it."""
    torch.nn.Module.train(model.backbone, True)
    predicted = model(images)
    loss = -torch.nn.functional.cosine_similarity(predicted, targets).mean()
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--backbone", default="open_clip:convnext_xxlarge")
    options = parser.parse_args()
    progress.set_quiet(True)
    torch.manual_seed(0)
    model = models.build(backbones.describe(options.backbone, options.size))
    backbones.unfreeze_last_quarter(model.backbone)
    accelerator = Accelerator(mixed_precision=mixed_precision(torch.device("cpu")), cpu=True)
    config = finetune.Config(epochs=1000, batch_size=options.batch, learning_rate=5e-5)
    images = torch.randint(0, 256, (options.batch, 3, options.size, options.size), dtype=torch.uint8)
    targets = torch.nn.functional.normalize(torch.randn(options.batch, 384), dim=1)
    loader = [(images, torch.arange(options.batch))]
    plain = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 5e-5, weight_decay=1e-4)
    optimizer = accelerator.prepare(plain)

    def reference() -> None:
        reference_step(model, images, targets, plain)

    def ours() -> None:
        with (
            accelerator.autocast()
        ):  # what `prepare` wraps around the model, which cannot be taken off and put on again
            finetune.train_epoch(accelerator, model, loader, targets, optimizer, 1, config)

    seconds: dict[str, list[float]] = {"reference's step": [], "ours": []}
    for number in range(options.rounds + 1):
        for way, step in (("reference's step", reference), ("ours", ours)):
            model.to(memory_format=torch.channels_last if way == "ours" else torch.contiguous_format)
            start = time.perf_counter()
            step()
            if number:  # the first round warms up
                seconds[way].append(time.perf_counter() - start)
    ratios = [a / b for a, b in zip(seconds["reference's step"], seconds["ours"], strict=True)]
    result = {
        "machine": platform.processor() or platform.machine(),
        "backbone": options.backbone,
        "image_size": options.size,
        "batch": options.batch,
        "precision": accelerator.mixed_precision,
        "seconds": seconds,
        "times as fast": {"min": min(ratios), "median": statistics.median(ratios), "max": max(ratios)},
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")
    print(
        f"{options.backbone}, {options.size} px, batch {options.batch}, {accelerator.mixed_precision}: seconds a step"
    )
    for way, values in seconds.items():
        print(f"{way:20}" + "".join(f"{value:8.2f}" for value in values))
    print(f"times as fast: min {min(ratios):.2f}, median {statistics.median(ratios):.2f}, max {max(ratios):.2f}")


if __name__ == "__main__":
    main()
