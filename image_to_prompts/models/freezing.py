"""Which part of a backbone trains: its layers in ordered groups, the last ones unfrozen."""

from __future__ import annotations

from itertools import takewhile
from typing import TYPE_CHECKING

from ..run.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import nn

# open_clip's own towers have no group matcher; these patterns follow its module names.
TOWER_GROUPS = {
    "stem": r"^(?:conv\d|bn\d|class_embedding|positional_embedding|ln_pre)",
    "blocks": [
        (r"^transformer\.resblocks\.(\d+)", None),
        (r"^layer(\d)\.(\d+)", None),
        (r"^(?:ln_post|proj|attn_pool|attnpool)", (99999,)),  # joins the last block, as timm's matchers do
    ],
}


def layer_groups(backbone: nn.Module) -> list[list[str]]:
    """Parameter names of a backbone in ordered groups from input to output.

    timm models, inside open_clip or not, are grouped by their own `group_matcher`; parameters of an open_clip
    projection behind a timm trunk form no group and always train.

    Raises:
        UserError: For a model of transformers.
    """
    from timm.models import group_parameters

    if not hasattr(backbone, "trunk") and hasattr(backbone, "model"):
        raise UserError("transformers: backbones have no layer groups to unfreeze; take timm: or open_clip:")
    trunk, prefix = (backbone.trunk, "trunk.") if hasattr(backbone, "trunk") else (backbone, "")
    matcher = trunk.group_matcher() if hasattr(trunk, "group_matcher") else TOWER_GROUPS
    groups = group_parameters(trunk, matcher)
    return [[prefix + name for name in groups[key]] for key in sorted(groups)]


def _frozen_groups(backbone: nn.Module) -> list[list[str]]:
    groups = layer_groups(backbone)
    return groups[: len(groups) - max(1, len(groups) // 4)]


def rates(backbone: nn.Module, decay: float) -> dict[str, float]:
    """How much of the learning rate each parameter gets: the last group of layers all, each before it `decay` times.

    The head, and what belongs to no group, get all of it. Layer-wise decay, as in Dong et al. 2022 (arXiv 2212.06138).
    """
    groups = layer_groups(backbone)
    return {name: decay ** (len(groups) - 1 - place) for place, group in enumerate(groups) for name in group}


def stages(backbone: nn.Module, first: int = -1) -> list[nn.Module]:
    """The last modules of the stages that stay frozen whole, by whose outputs images are told apart (see `doubt`).

    Where no stage ends before the trained part, as in vision transformers, modules in its first half. Where less than
    half of the groups stays frozen, those before the last quarter, as they are after the training.

    Args:
        backbone: The backbone.
        first: See `unfreeze`.
    """
    groups, count = layer_groups(backbone), len(_frozen_groups(backbone))
    if first >= len(groups) // 2:
        count = min(first, count)
    modules = dict(backbone.named_modules())
    paths = [_common([name.split(".") for name in group]) for group in groups]
    inside = [path.rpartition(".")[0] for path in paths]
    whole = [n for n in range(count) if inside[n] and inside[n] not in inside[n + 1 :]]
    chosen = [paths[n] for n in whole or [count * part // 8 for part in (2, 3, 4)]]
    return [modules[path] for path in dict.fromkeys(chosen) if path and path in modules]


def _common(paths: list[list[str]]) -> str:
    """The beginning that dotted paths have in common."""
    return ".".join(parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False)))


def unfreeze(backbone: nn.Module, first: int = -1) -> list[str]:
    """Freezes a backbone but for its layer groups from `first` on, and an open_clip projection.

    Args:
        backbone: The backbone.
        first: Number of the first group that trains, from 0; -1: the last floor(n / 4) of n groups train. For
            ConvNeXt-XXLarge these are the reference's 88 of 379 tensors.

    Returns:
        Names of the parameters that train.

    Raises:
        UserError: If there are not so many groups.
    """
    groups = layer_groups(backbone)
    if first >= len(groups):
        raise UserError(
            f"--train-from {first}: this backbone has {len(groups)} groups of layers; give 0 to {len(groups) - 1}"
        )
    frozen = {name for group in (_frozen_groups(backbone) if first < 0 else groups[:first]) for name in group}
    trained = []
    for name, parameter in backbone.named_parameters():
        parameter.requires_grad_(name not in frozen)
        if name not in frozen:
            trained.append(name)
    return trained


def set_training(module: nn.Module, training: bool) -> None:
    """Like `module.train(training)`, but modules all of whose parameters are frozen stay in eval mode.

    Modules without parameters (dropout, stochastic depth) follow the module that holds them.
    """
    parameters = list(module.parameters())
    if parameters:
        training = training and any(parameter.requires_grad for parameter in parameters)
    module.training = training
    for child in module.children():
        set_training(child, training)


def half_frozen(module: nn.Module, dtype: torch.dtype) -> None:
    """Keeps the frozen matrices and convolutions in `dtype`, the type in which autocast would use them.

    The outputs under autocast stay the same, the weights take half the memory and are not cast again at every step.
    What stays as it is gets memory of its own: loaded tensors lie in their file (`backbones.read_state`).
    """
    import torch
    from torch import nn

    for layer in module.modules():
        frozen = not any(parameter.requires_grad for parameter in layer.parameters())
        if frozen and isinstance(layer, (nn.Linear, nn.Conv2d)) and dtype != torch.float32:
            layer.to(dtype)
            continue
        for tensor in (*layer.parameters(recurse=False), *layer.buffers(recurse=False)):
            tensor.data = tensor.data.clone()


def trained_tail(backbone: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The part of a backbone that still has to run when the frozen part's output is known.

    Frozen children are replaced by identities in a shallow copy, so the trained modules are shared with `backbone`.
    That is right where data passes straight from module to module, as in timm's convolutional networks; callers
    compare both once before they rely on it.

    Returns:
        tail: Maps what enters the first trained module to the backbone's features.
        first: The first trained module; what enters it is what to store.
    """
    from torch import nn

    from .fast_layers import faster, rebuilt

    firsts: list[nn.Module] = []

    def without_frozen(child: nn.Module) -> nn.Module | None:
        trainable = [parameter.requires_grad for parameter in child.parameters()]
        if trainable and not any(trainable):
            return nn.Identity()
        if trainable and all(trainable):
            firsts.append(child)
        return None

    return faster(rebuilt(backbone, without_frozen)), firsts[0]
