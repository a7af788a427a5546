"""Fine-tuning beside the reference's own loop, on the same model, data and machine.

python benchmarks/finetune.py step loss epoch loader      one, several or all (left out); --rounds 3
Prints tables and writes benchmarks/finetune.json.

step    ConvNeXt-XXLarge with random weights at 512 px: a training step of the reference (float32, contiguous memory,
        the whole tower in training mode, minus mean cosine, gradient norm clipped at 1, AdamW on every batch), of ours,
        and of ours when a step accumulates 4 batches; and with cached features.
loss    A smaller ConvNeXt: loss after 50 steps of the reference's loop and of ours, five seeds each.
epoch   The embedded profile's model: an epoch with cached features, without where images lie in memory, and without
        where they are read from PNG files.
memory  Each recipe's tower at full size with random weights: the peak that `--dry-run` predicts from steps of 2 and 4
        images beside that of a step of 3 and of 5 (of small towers more), each in a process of its own.
loader  Images a second: the reference's loader (Pillow, torchvision transforms, float32, processes) and ours (threads).

The reference's parts are written anew from their description. Ways run in turns; those with large models each in a
process of its own.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd
from turns import Prepared, in_turns, lines, ratio, record

LEARNING_RATE, WEIGHT_DECAY = 5e-5, 1e-4


def data(count: int, size: int, seed: int = 0) -> tuple[Any, Any]:
    """Random images, uint8 (count, 3, size, size), and unit targets, float32 (count, 384)."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)
    return images, torch.nn.functional.normalize(torch.randn(count, 384, generator=generator), dim=1)


def reference_loop(model: Any) -> Any:
    """The reference's step, as a function of images and targets; returns the loss, 1 - mean cosine."""
    import torch

    model.to(memory_format=torch.contiguous_format)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], LEARNING_RATE, weight_decay=WEIGHT_DECAY
    )

    def step(images: Any, targets: Any) -> float:
        torch.nn.Module.train(model.backbone, True)
        loss = -torch.nn.functional.cosine_similarity(model(images), targets).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return 1 + loss.item()

    return step


def build(backbone: str, size: int, seed: int = 0) -> Any:
    """The model with random weights, its last quarter unfrozen."""
    import torch

    from image_to_prompts.models import backbones, checkpoints, freezing

    torch.manual_seed(seed)
    model = checkpoints.build(backbones.describe(backbone, size))
    freezing.unfreeze(model.backbone)
    return model


def trainer(
    backbone: str,
    size: int,
    batch: int,
    accumulated: int = 1,
    cached: bool = False,
    how: Mapping[str, Any] = MappingProxyType({}),
    device: Any = "cpu",
    images: int = 0,
) -> Any:
    """Our trainer over so many random images, and what it is fed: (trainer, images or features, rows)."""
    import torch

    from image_to_prompts import finetune
    from image_to_prompts.models import backbones, freezing
    from image_to_prompts.models.fast_layers import faster
    from image_to_prompts.run import progress
    from image_to_prompts.training import dataset, frozen_features, loop
    from image_to_prompts.training import model as models

    progress.set_quiet(True)
    count = images or batch * accumulated
    sizes = {
        "backbone": backbone,
        "image_size": size,
        "batch_size": batch * accumulated,
        "micro_batch": batch,
        "epochs": 1000,
    }
    config = finetune.Config(**{"learning_rate": LEARNING_RATE, **how, **sizes})
    accelerator = models.accelerator_for(True)
    spec = backbones.describe(backbone, size)
    with torch.device(device):  # a GPU draws random numbers faster
        model, _ = models.build(spec, accelerator, pretrained=False, train_from=config.train_from)
    pixels, targets = data(count, size)
    trained = faster(model)
    if cached:
        pixels = torch.cat([frozen_features.activations(model, part) for part in pixels.split(4)]).float()
        trained = frozen_features.over_cache(model)
    names = pd.DataFrame({"image_name": [str(i) for i in range(count)]})
    every = np.arange(count)
    rows = dataset.Rows(names, [], targets.numpy(), every, every, 0, np.ones(count, np.float32))
    found = loop.Trainer(accelerator, model, trained, None, rows, config, Path())
    freezing.set_training(trained, True)
    return found, pixels, torch.arange(count)


def prepare_reference(backbone: str, size: int, batch: int, steps: int) -> Prepared:
    from image_to_prompts.run import devices

    device = devices.process_state().device
    step = reference_loop(build(backbone, size).to(device))
    images, targets = (part.to(device) for part in data(batch, size))
    return lambda: [step(images, targets) for _ in range(steps)]


def prepare_ours(backbone: str, size: int, batch: int, accumulated: int, cached: bool) -> Prepared:
    ours, images, rows = trainer(backbone, size, batch, accumulated, cached)
    images = images.to(ours.accelerator.device)
    return lambda: ours.read(ours.begin(images, rows, len(rows), 0.0))


def bench_step(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds for one batch, without and with accumulation, and with cached features."""
    model, several = (options.backbone, options.size, options.batch), options.accumulated
    result: dict[str, Any] = {"backbone": options.backbone, "image_size": options.size, "batch": options.batch}
    pairs = [("ours", 1, False), ("ours, cached features", 1, True), ("ours, accumulating", several, False)]
    for name, batches, cached in pairs[: 2 if several == 1 else 3]:  # two large models at a time fit into 24 GB
        ways = {
            "reference": (prepare_reference, (*model, batches), {}),
            name: (prepare_ours, (*model, batches, cached), {}),
        }
        seconds, memory = in_turns(ways, options.rounds)
        print(f"{options.backbone}, {options.size} px, batch {options.batch}: seconds for {batches} batches")
        print(lines(seconds, memory, "reference"), flush=True)
        result[name] = {"batches": batches, "seconds": seconds, "peak GB": memory}
        result[name]["times as fast"] = ratio(seconds, "reference", name)
    return result


def bench_loss(options: argparse.Namespace) -> dict[str, Any]:
    """Loss after 50 steps over 40 images in batches of 8; a seed sets the first weights and the order."""
    import torch

    backbone, size, batch, steps = "open_clip:convnext_tiny", 96, 8, 50
    images, targets = data(40, size)
    losses: dict[str, list[float]] = {"reference": [], "ours": []}
    ours, pictures, _ = trainer(backbone, size, 40)
    for seed in range(5):
        chosen = [np.random.default_rng((seed, i)).permutation(40)[:batch] for i in range(steps)]
        step = reference_loop(build(backbone, size, seed))
        found = [step(images[rows], targets[rows]) for rows in chosen]
        losses["reference"].append(statistics.mean(found[-5:]))
        ours.model.load_state_dict(build(backbone, size, seed).state_dict())
        ours.optimizer.state.clear()
        begun = (ours.begin(pictures[rows], torch.from_numpy(rows), batch, 0.0) for rows in chosen)
        found = [ours.read(one)[0] / batch for one in begun]
        losses["ours"].append(statistics.mean(found[-5:]))
    print(f"{backbone}, {size} px, batch {batch}: mean loss of steps 46 to 50, by seed")
    for way, values in losses.items():
        spread = f"mean {statistics.mean(values):.4f}, deviation {statistics.stdev(values):.4f}"
        print(f"{way:10}" + "".join(f"{value:9.4f}" for value in values) + f"  {spread}")
    return {"backbone": backbone, "image_size": size, "batch": batch, "steps": steps, "loss": losses}


def _predicted(name: str, sizes: tuple[int, ...]) -> list[float]:
    """GB that `--dry-run` predicts for a step of a recipe with so many images at once."""
    from image_to_prompts import finetune
    from image_to_prompts.finetune import dry_run, recipes
    from image_to_prompts.models import backbones

    dry_run.free_memory = lambda device: 0  # so that nothing but the two small steps is tried
    found = []
    for micro in sizes:
        config = finetune.Config(**{**recipes.flags(name, "full"), "micro_batch": micro})
        spec = backbones.describe(config.backbone, config.image_size)
        found.append(dry_run.make(spec, config.batch_size, config).needed / 1e9)
    return found


def _measured(name: str, micro: int) -> float:
    """GB at the peak of a step of a recipe, beyond the process with its libraries."""
    import psutil
    from turns import peak

    from image_to_prompts.finetune import recipes

    how = {**recipes.flags(name, "full")}
    small, images, rows = trainer("timm:tf_efficientnet_lite0", 32, 4)  # loads what training needs
    small.read(small.begin(images, rows, len(rows), 0.0))
    before = psutil.Process().memory_info().rss / 1e9
    backbone, size = how.pop("backbone"), how.pop("image_size")
    ours, images, rows = trainer(backbone, size, micro, cached=how["cache_features"], how=how)
    for count in (1, micro):  # after a first small one the optimizer has its moments
        ours.read(ours.begin(images[:count], rows[:count], count, 0.0))
    return peak() - before


def bench_memory(options: argparse.Namespace) -> dict[str, Any]:
    """Peak of a step, as predicted and as measured."""
    import multiprocessing

    from image_to_prompts.finetune import recipes

    def apart(do: Any, *arguments: Any) -> Any:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            return pool.apply(do, arguments)

    result: dict[str, Any] = {}
    for name, recipe in recipes.RECIPES.items():
        sizes = {"vit-b": (12, 24), "embedded": (64, 160)}.get(name, (3, 5))
        for micro, predicted in zip(sizes, apart(_predicted, name, sizes), strict=True):
            measured = apart(_measured, name, micro)
            off = predicted / measured - 1
            result[f"{name}, {micro} images"] = {"predicted": predicted, "measured": measured, "off": off}
            said = f"predicted {predicted:6.2f} GB, measured {measured:6.2f}, {off:+.1%}"
            print(f"{name:13} {recipe.image_size} px {micro:3} images: {said}", flush=True)
    return result


def scenes(folder: Path, count: int) -> list[Path]:
    """Embedded scenes as PNG files."""
    from image_to_prompts import generate, profiles, render
    from image_to_prompts.run import folders

    run = folders.open_run(folder, "embedded")
    generate.run(profiles.default_config("generate", run, "embedded", count=count))
    found = render.run(profiles.default_config("render", run, "embedded", metadata=run.prompts))
    return [run.images / file for file in found["file"]]


class InMemory:
    """Decoded images."""

    def __init__(self, rows: Any) -> None:
        self.items, self.collate, self.epoch = [rows[i] for i in range(len(rows))], rows.collate, 0

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, row: int) -> Any:
        return self.items[row]


def bench_epoch(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of an epoch of the embedded model over scenes, in three ways."""
    from image_to_prompts import finetune
    from image_to_prompts.data.rows import ImageRows
    from image_to_prompts.models import backbones
    from image_to_prompts.models.fast_layers import faster
    from image_to_prompts.run import progress
    from image_to_prompts.training import dataset, frozen_features, loop
    from image_to_prompts.training import model as models

    progress.set_quiet(True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = scenes(folder, options.images)
        count = len(files)
        rows_images = ImageRows(files, 224)
        every = np.arange(count)
        names = pd.DataFrame({"image_name": [file.name for file in files]})
        rows = dataset.Rows(names, files, data(count, 1)[1].numpy(), every, every, 0, np.ones(count, np.float32))
        epochs = {}
        for way in ("from files", "from memory", "cached features"):
            config = finetune.Config(epochs=1000, cache_features=way == "cached features")
            accelerator = models.accelerator_for(True)
            model, _ = models.build(backbones.describe(config.backbone, 224), accelerator)
            trained, source = faster(model), rows_images
            if way == "cached features":
                _, _, source = frozen_features.features(model, rows_images, every, [], accelerator.device, folder, True)
                trained = frozen_features.over_cache(model)
            elif way == "from memory":
                source = InMemory(rows_images)
            epochs[way] = loop.Trainer(accelerator, model, trained, source, rows, config, folder / way)
        seconds: dict[str, list[float]] = {way: [] for way in epochs}
        for number in range(options.rounds + 1):
            for way, ours in epochs.items():
                ours.standing = loop.Standing(epoch=number + 1)
                start = time.perf_counter()
                ours.epoch()
                if number:
                    seconds[way].append(time.perf_counter() - start)
    fast = {way: ratio(seconds, way, "cached features") for way in ("from memory", "from files")}
    print(f"an epoch of {count} scenes, EfficientNet-Lite2 at 224 px, batch 32: seconds")
    for way, values in seconds.items():
        times = "  cached is {min:.2f} {median:.2f} {max:.2f} times as fast".format(**fast[way]) if way in fast else ""
        print(f"{way:16}" + "".join(f"{value:8.2f}" for value in values) + times)
    return {"images": count, "seconds": seconds, "cached, times as fast": fast}


def reference_batches(files: list[Path], size: int, batch: int, workers: int) -> Iterator[Any]:
    """The reference's loader: Pillow, then torchvision's resize, crop, tensor and normalisation, in processes."""
    from torch.utils.data import DataLoader, Dataset
    from torchvision import transforms

    change = transforms.Compose(
        [
            transforms.Resize(size, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(size),
            transforms.ToTensor(),
            transforms.Normalize((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
        ]
    )

    class Files(Dataset):
        def __len__(self) -> int:
            return len(files)

        def __getitem__(self, row: int) -> Any:
            from PIL import Image

            return change(Image.open(files[row]).convert("RGB"))

    return iter(DataLoader(Files(), batch, num_workers=workers))


def bench_loader(options: argparse.Namespace) -> dict[str, Any]:
    """Images a second of 512-px PNG files, resized to 384 px."""
    from image_to_prompts.data.rows import ImageRows, load

    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        files = scenes(Path(name), options.images)
        order = [list(range(start, min(start + 32, len(files)))) for start in range(0, len(files), 32)]
        for workers in (1, 2):
            ways = {
                "reference": lambda workers=workers: reference_batches(files, 384, 32, workers),
                "ours": lambda workers=workers: load(ImageRows(files, 384), order, workers),
            }
            seconds: dict[str, list[float]] = {way: [] for way in ways}
            for number in range(options.rounds + 1):
                for way, batches in ways.items():
                    start = time.perf_counter()
                    assert sum(1 for _ in batches()) == len(order)
                    if number:
                        seconds[way].append(time.perf_counter() - start)
            rates = {way: [len(files) / value for value in values] for way, values in seconds.items()}
            print(f"loader, {workers} workers: images a second")
            for way, values in rates.items():
                print(f"{way:10}" + "".join(f"{value:8.0f}" for value in values))
            fast = ratio(seconds, "reference", "ours")
            print("times as fast {min:.2f} {median:.2f} {max:.2f}".format(**fast))
            result[f"{workers} workers"] = {"images a second": rates, "times as fast": fast}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {
        "step": bench_step,
        "loss": bench_loss,
        "epoch": bench_epoch,
        "memory": bench_memory,
        "loader": bench_loader,
    }
    parser.add_argument("parts", nargs="*", default=list(parts))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--accumulated", type=int, default=4)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--backbone", default="open_clip:convnext_xxlarge")
    options = parser.parse_args()
    for part in options.parts:
        record(__file__, part, parts[part](options))


if __name__ == "__main__":
    main()
