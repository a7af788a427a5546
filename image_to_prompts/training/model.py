"""The model that `finetune` trains: on its device, in its precision, its last layers unfrozen."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..models import backbones, checkpoints, freezing
from ..run.devices import mixed_precision, only_cpus, process_state, type_of

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn


def accelerator_for(mixed: bool) -> Accelerator:
    """The device or devices, with mixed precision where the hardware has it and `mixed` is set."""
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.state import AcceleratorState

    # A notebook may train twice in one process, in different precisions; without this the second is refused.
    getattr(AcceleratorState, "_reset_state", lambda: None)()
    precision = mixed_precision(process_state().device) if mixed else "no"
    shared = DistributedDataParallelKwargs(gradient_as_bucket_view=True)  # of several processes: no second gradients
    return Accelerator(cpu=only_cpus(), mixed_precision=precision, kwargs_handlers=[shared])


def build(
    spec: backbones.Spec,
    accelerator: Accelerator,
    seed: int = 0,
    init: Path | None = None,
    weights: Path | None = None,
    pretrained: bool = True,
    grad_checkpointing: bool = False,
    train_from: int = -1,
) -> tuple[nn.Module, list[str]]:
    """The model on the device, its last groups of layers unfrozen, frozen matrices in the type of mixed precision.

    Args:
        spec: Its backbone.
        accelerator: Device and precision.
        seed: Of the head's weights, and of the backbone's where none are loaded.
        init: Checkpoint folder to start from.
        weights: File or folder of backbone weights; None: wherever they are found.
        pretrained: Whether to load weights at all.
        grad_checkpointing: Compute activations twice to keep fewer of them.
        train_from: See `freezing.unfreeze`.

    Returns:
        The model, and the names of the backbone's parameters that train.

    Raises:
        UserError: If the weights are nowhere or of another shape.
    """
    import torch

    torch.manual_seed(seed)
    model = checkpoints.pretrained(spec, weights) if pretrained and init is None else checkpoints.build(spec)
    if init is not None:
        checkpoints.initialise(model, spec, init)
    names = freezing.unfreeze(model.backbone, train_from)
    freezing.half_frozen(model, type_of(accelerator.mixed_precision))
    if grad_checkpointing:
        model.backbone.set_grad_checkpointing(True)
    return model.to(accelerator.device), names
