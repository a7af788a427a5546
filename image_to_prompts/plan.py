"""What a training would do, need and take, found out without doing it: `finetune --dry-run`."""

from __future__ import annotations

import contextlib
import math
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from . import backbones, dataset, frozen, metadata
from . import model as models
from .devices import autocast
from .progress import short

if TYPE_CHECKING:
    import torch
    from torch import nn

    from .finetune import Config

PROBE = 2  # images of the small step that tells what an image's activations take; batch normalisation needs two
BYTES, OPTIMIZER_COPIES = 4, 2  # float32 everywhere; AdamW keeps two moments a trained parameter


@dataclass(frozen=True)
class Plan:
    """The plan of a training.

    Attributes:
        groups: Layer groups of the backbone.
        trained_groups: How many of them train, counted from the output.
        tensors: Tensors of the model.
        trained_tensors: How many of them train.
        parameters: Numbers in them.
        trained_parameters: How many of them train.
        activations: Bytes that a step keeps for the way back, at this batch size.
        free: Bytes free on the device before the model was there.
        steps: Steps of the whole training.
        seconds: Seconds a step, measured; None where it would not fit.
    """

    groups: int
    trained_groups: int
    tensors: int
    trained_tensors: int
    parameters: int
    trained_parameters: int
    activations: int
    free: int
    steps: int
    seconds: float | None

    @property
    def weights(self) -> int:
        """Bytes of the weights."""
        return BYTES * self.parameters

    @property
    def gradients(self) -> int:
        """Bytes of the gradients."""
        return BYTES * self.trained_parameters

    @property
    def optimizer(self) -> int:
        """Bytes of the optimizer's state."""
        return OPTIMIZER_COPIES * self.gradients

    @property
    def needed(self) -> int:
        """Bytes at the peak of a step."""
        return self.weights + self.gradients + self.optimizer + self.activations

    @property
    def fits(self) -> bool:
        """Whether that is free."""
        return self.needed <= self.free

    def __str__(self) -> str:
        took = "not measured" if self.seconds is None else f"{self.seconds:.2f} s each"
        parts = ("weights", "gradients", "optimizer", "activations")
        memory = ", ".join(f"{part} {getattr(self, part) / 1e9:.2f}" for part in parts)
        lines = [
            f"groups      {self.trained_groups} of {self.groups} train",
            f"tensors     {self.trained_tensors} of {self.tensors} train",
            f"parameters  {self.trained_parameters / 1e6:,.1f}M of {self.parameters / 1e6:,.1f}M train",
            f"memory      {self.needed / 1e9:.2f} GB of {self.free / 1e9:.2f} GB free: {memory}",
            f"steps       {self.steps:,}, {took}",
        ]
        if self.seconds is not None:
            hours = short(self.steps * self.seconds / 3600)
            lines.append(f"hours       {hours}, without validation and frozen features")
        if not self.fits:
            lines.append("too large: lower --batch-size or --image-size")
        return "\n".join(lines)


def free_memory(device: torch.device) -> int:
    """Bytes free on a GPU, else in main memory."""
    import torch

    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return psutil.virtual_memory().available


def train_rows(config: Config) -> int:
    """Rows that would train; where a table has no folds, seven of eight, as `dataset.load_rows` makes eight."""
    count = 0
    for csv in dataset.tables(config.metadata, config.images):
        frame = metadata.read(csv)
        count += int((frame["fold"] != config.fold).sum()) if "fold" in frame else len(frame) * 7 // 8
    return count


def _step(model: nn.Module, inputs: torch.Tensor, mixed: bool) -> int:
    """One forward and backward pass, which leaves gradients; returns the bytes that were kept between the two."""
    import torch
    from torch.nn.functional import cosine_similarity

    kept: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    precision = autocast(inputs.device) if mixed else contextlib.nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), precision:
        predicted = model(inputs).float()
        loss = (1 - cosine_similarity(predicted, torch.ones_like(predicted))).mean()
    loss.backward()
    return sum(kept.values())


def make(config: Config) -> Plan:
    """Builds the model with random weights, counts, and measures a step at the batch size if it fits.

    Args:
        config: Settings of `finetune`; images need not be there, the metadata must.

    Raises:
        UserError: On an unknown backbone or bad metadata.
    """
    import torch
    from accelerate import PartialState

    device = PartialState().device
    mixed = config.precision == "auto"
    rows = train_rows(config)
    free = free_memory(device)
    model = models.build(backbones.describe(config.backbone, config.image_size))
    groups = backbones.layer_groups(model.backbone)
    trained_names = set(backbones.unfreeze_last_quarter(model.backbone))
    model.to(device)
    tensors = list(model.parameters())
    trained = [p for p in tensors if p.requires_grad]
    numbers, trained_numbers = (sum(p.numel() for p in some) for some in (tensors, trained))

    size = config.image_size
    inputs = torch.randint(0, 256, (PROBE, 3, size, size), dtype=torch.uint8, device=device)
    step_model: nn.Module = model
    if config.cache_features:
        step_model, inputs = _over_cache(model, inputs)
    backbones.set_training(step_model, True)
    activations = _step(step_model, inputs, mixed) * config.batch_size // PROBE
    plan = Plan(
        groups=len(groups),
        trained_groups=sum(not trained_names.isdisjoint(group) for group in groups),
        tensors=len(tensors),
        trained_tensors=len(trained),
        parameters=numbers,
        trained_parameters=trained_numbers,
        activations=activations,
        free=free,
        steps=config.epochs * math.ceil(rows / config.batch_size),
        seconds=None,
    )
    if not plan.fits:
        return plan
    optimizer = torch.optim.AdamW(trained, 0.0)
    batch = inputs[np.arange(config.batch_size) % PROBE]
    times = []
    for _ in range(3):  # the first one warms up
        start = time.perf_counter()
        _step(step_model, batch, mixed)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return replace(plan, seconds=min(times[1:]))


def _over_cache(model: nn.Module, inputs: torch.Tensor) -> tuple[nn.Module, torch.Tensor]:
    """What trains when the frozen part's output is cached, and that output for `inputs`."""
    import torch

    tail, first = backbones.trained_tail(model.backbone)
    model.eval()
    with torch.no_grad(), frozen.entering(first) as taken:
        model.features(inputs)
    return torch.nn.Sequential(tail, model.head), taken[0].to(inputs.device).float()
