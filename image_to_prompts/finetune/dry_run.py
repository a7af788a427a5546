"""What a training would do, need and take, found out without doing it: `finetune --dry-run`."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import torch
from torch import nn

from ..data.rows import ImageRows
from ..models import backbones, freezing, metrics
from ..models.fast_layers import faster
from ..models.text_encoder import DIMENSION
from ..run.devices import gather, rank_and_processes
from ..run.progress import short
from ..training import dataset, frozen_features, loop
from ..training import model as models

PROBE = 2  # images of a small step, beside one of twice as many: the difference is what an image's activations take
# Added to the sum of the tensors. On CPUs a share: an allocator cannot use all the memory between them, but gradients
# take the place of activations; the peaks of the recipes were 8 % below to 24 % above the sum. On GPUs what cuBLAS and
# cuDNN work in; there the peaks were 11 % below the sum to 0.1 GB above it (docs/log.md).
FRAGMENTATION, WORKSPACES = 0.05, 64_000_000
BYTES, OPTIMIZER_COPIES = 4, 2  # what trains is float32; AdamW keeps two moments a trained parameter


@dataclass(frozen=True)
class Plan:
    """The plan of a training.

    Attributes:
        counts: Of `groups` of layers, `tensors` and `parameters`: how many train, and how many there are.
        memory: Bytes at the peak of a step: `weights`, `gradients`, `optimizer`, the `activations` kept for the way
            back, and the `overhead` that is usual.
        micro: Images at once.
        free: Bytes free on the device before the model was there.
        steps: Steps of the whole training.
        seconds: Seconds a step, measured; None where it would not fit.
    """

    counts: dict[str, tuple[int, int]]
    memory: dict[str, int]
    micro: int
    free: int
    steps: int
    seconds: float | None

    @property
    def needed(self) -> int:
        """Bytes at the peak of a step."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        """Whether that is free."""
        return self.needed <= self.free

    def __str__(self) -> str:
        took = "not measured" if self.seconds is None else f"{self.seconds:.2f} s each"
        memory = ", ".join(f"{part} {size / 1e9:.2f}" for part, size in self.memory.items())
        lines = [f"{what:11} {some:,} of {every:,} train" for what, (some, every) in self.counts.items()]
        lines += [
            f"memory      {self.needed / 1e9:.2f} GB of {self.free / 1e9:.2f} GB free: {memory} ({self.micro} at once)",
            f"steps       {self.steps:,}, {took}",
        ]
        if self.seconds is not None:
            hours = short(self.steps * self.seconds / 3600)
            lines.append(f"hours       {hours}, without validation and frozen features")
        if not self.fits:
            lines.append("too large: lower --micro-batch or --image-size")
        return "\n".join(lines)


def free_memory(device: torch.device) -> int:
    """Bytes free on a GPU, else in main memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def make(spec: backbones.Spec, rows: int, schedule: loop.Schedule, processes: int = 0) -> Plan:
    """Builds the model with random weights, counts, and measures a step at the batch size if it fits.

    Args:
        spec: Its backbone.
        rows: Rows that would train.
        schedule: How it would train.
        processes: How many would train; 0: as many as there are now.
    """
    _, there = rank_and_processes()
    processes = processes or there
    micro = schedule.micro_batch or -(-schedule.batch_size // processes)
    accelerator = models.accelerator_for(schedule.precision == "auto")
    free, again = free_memory(accelerator.device), schedule.grad_checkpointing
    model, trained_names = models.build(
        spec, accelerator, pretrained=False, grad_checkpointing=again, train_from=schedule.train_from
    )
    images = torch.randint(0, 256, (2 * PROBE, 3, spec.image_size, spec.image_size), dtype=torch.uint8)
    trained = faster(model)
    if schedule.cache_features:
        trained = frozen_features.over_cache(model)
        images = frozen_features.activations(model, images.to(accelerator.device)).float()
    images = images[torch.arange(max(micro, 2 * PROBE)) % (2 * PROBE)]
    made_up = _random_rows(len(images))
    trainer = loop.Trainer(accelerator, model, trained, ImageRows([], spec.image_size), made_up, schedule, Path())
    freezing.set_training(trained, True)

    def step(count: int) -> None:
        trainer.read(trainer.begin(images[:count], torch.arange(count), count, 0.0))

    few, more = (kept_by(model, partial(step, count)) for count in (PROBE, 2 * PROBE))
    memory = needed(model, round(few + (micro - PROBE) * (more - few) / PROBE), average=schedule.ema > 0)
    steps = schedule.epochs * math.ceil(rows / schedule.batch_size)
    plan = Plan(_counts(model, trained_names), memory, micro, free, steps, None)
    if not all(gather([plan.fits], there)):  # or one process would wait for another in the step below
        return plan
    times = []
    for _ in range(2):
        start = time.perf_counter()
        step(micro)
        if accelerator.device.type == "cuda":
            torch.cuda.synchronize(accelerator.device)
        times.append(time.perf_counter() - start)
    return replace(plan, seconds=min(times) * schedule.batch_size / (micro * processes))


def needed(model: nn.Module, activations: int, average: bool = False) -> dict[str, int]:
    """Bytes at the peak of a step, by what they are for.

    Args:
        model: The model.
        activations: Bytes of those that are kept for the way back.
        average: Whether a moving average of the weights is kept.
    """
    numbers = sum(p.numel() for p in model.parameters() if p.requires_grad)
    weights = sum(p.nbytes for p in model.parameters())
    optimizer = OPTIMIZER_COPIES * BYTES * numbers
    parts = {"weights": weights, "gradients": BYTES * numbers, "optimizer": optimizer, "activations": activations}
    parts |= {"average": BYTES * numbers} if average else {}
    on_gpu = next(model.parameters()).device.type == "cuda"
    return {**parts, "overhead": WORKSPACES if on_gpu else round(FRAGMENTATION * sum(parts.values()))}


def _counts(model: nn.Module, trained_names: list[str]) -> dict[str, tuple[int, int]]:
    """Of groups of layers, tensors and parameters: how many train, and how many there are."""
    groups, tensors = freezing.layer_groups(model.backbone), list(model.parameters())
    own = [p for p in tensors if p.requires_grad]
    return {
        "groups": (sum(not set(trained_names).isdisjoint(group) for group in groups), len(groups)),
        "tensors": (len(own), len(tensors)),
        "parameters": (sum(p.numel() for p in own), sum(p.numel() for p in tensors)),
    }


def _random_rows(count: int) -> dataset.Rows:
    targets = metrics.unit(np.random.default_rng(0).normal(size=(count, DIMENSION)))
    names = pd.DataFrame({"image_name": [str(i) for i in range(count)], "prompt": ""})
    nobody = np.empty(0, int)
    return dataset.Rows(names, [], targets, nobody, nobody, 0, np.ones(count, np.float32))


def kept_by(model: nn.Module, step: Callable[[], None]) -> int:
    """Bytes that a step keeps between its passes forward and backward, parameters not counted."""
    kept: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(kept.values())
