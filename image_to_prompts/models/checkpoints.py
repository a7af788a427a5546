"""The image-to-embedding model, and checkpoints: a folder with model.safetensors and config.json."""

from __future__ import annotations

import contextlib
import json
import logging
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..run.errors import UserError
from ..run.files import write_json, write_tensors, write_text
from ..run.resume import check_whole, writing
from . import backbones, freezing, metrics
from .text_encoder import DIMENSION

if TYPE_CHECKING:
    import torch
    from torch import nn


log = logging.getLogger(__name__)
FILES = ("model.safetensors", "config.json", "README.md")  # of a checkpoint


@dataclass
class Checkpoint:
    """A loaded checkpoint.

    Attributes:
        model: The model, in eval mode.
        spec: Its backbone.
        config: All of config.json, metrics included.
        mean: float32 (384,), the mean target of the training rows, as a unit vector.
    """

    model: nn.Module
    spec: backbones.Spec
    config: dict[str, Any]
    mean: np.ndarray


def build(spec: backbones.Spec, empty: bool = False) -> nn.Module:
    """Builds the model: normalisation, backbone, linear head to 384.

    It maps uint8 images (n, 3, s, s) to float32 (n, 384), not normalised; `features(images)` gives the head's input.

    Args:
        spec: The backbone.
        empty: Whether the backbone's parameters get no memory yet; `backbones.fill` gives them some.

    Raises:
        UserError: If the backbone cannot take inputs of this size.
    """
    import torch
    from accelerate import init_empty_weights
    from torch import nn

    with torch.device("meta"):
        pixels = torch.zeros(1, 3, spec.image_size, spec.image_size)
        try:
            width = backbones.build(spec).eval()(pixels).shape[-1]
        except (AssertionError, RuntimeError, ValueError, ZeroDivisionError) as error:
            said = f"{spec.name} cannot take inputs of {spec.image_size} px: {error}; give another size"
            raise UserError(" ".join(said.split())) from error

    class PromptModel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            with init_empty_weights() if empty else contextlib.nullcontext():
                self.backbone = backbones.build(spec).eval()
            self.width = width
            self.head = nn.Linear(width, DIMENSION)
            self.to(memory_format=torch.channels_last)
            self.register_buffer("pixel_mean", 255 * torch.tensor(spec.mean).view(1, 3, 1, 1), persistent=False)
            self.register_buffer("pixel_std", 255 * torch.tensor(spec.std).view(1, 3, 1, 1), persistent=False)

        def features(self, images: torch.Tensor) -> torch.Tensor:
            return self.backbone((images.to(self.pixel_mean.dtype) - self.pixel_mean) / self.pixel_std)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.head(self.features(images)).float()

        def train(self, mode: bool = True) -> nn.Module:
            freezing.set_training(self, mode)
            return self

    return PromptModel()


def pretrained(spec: backbones.Spec, path: Path | None = None) -> nn.Module:
    """The model of `build` with the backbone's pretrained weights; see `backbones.load_pretrained`."""
    import torch

    model = build(spec, empty=True)
    backbones.load_pretrained(model.backbone, spec, path)
    return model.to(memory_format=torch.channels_last)


def fit_head(
    model: nn.Module, features: np.ndarray, targets: np.ndarray, text: tuple[np.ndarray, np.ndarray] | None = None
) -> None:
    """Sets the linear head to the ridge regression of targets on frozen features: a linear probe in closed form.

    Starting from a fitted head keeps the first steps from wrecking the features (LP-FT, Kumar et al. 2022; used by the
    2nd, 3rd and 5th teams).

    Args:
        model: From `build`.
        features: float32 (n, width), the frozen backbone's.
        targets: float32 (n, 384).
        text: Weight (width, 384) and bias (384,) of a head from text alone: the regression adds to it, if it does
            better so on a tenth of the rows.
    """
    import torch

    weight, bias = metrics.ridge(features, targets)
    if text is not None and _helps(text, features, targets):
        added, more = metrics.ridge(features, targets, before=features @ text[0] + text[1])
        weight, bias = text[0] + added, text[1] + more
    with torch.no_grad():
        model.head.weight.copy_(torch.from_numpy(weight.T.astype(np.float32)))
        model.head.bias.copy_(torch.from_numpy(bias.astype(np.float32)))


def _helps(text: tuple[np.ndarray, np.ndarray], features: np.ndarray, targets: np.ndarray) -> bool:
    """Whether a ridge regression that adds to a head from text does better on a tenth of the rows than one alone."""
    asked = np.arange(len(features)) % 10 == 5
    known, truth, before = features[~asked], targets[~asked], features @ text[0] + text[1]
    alone, added = metrics.ridge(known, truth), metrics.ridge(known, truth, before=before[~asked])
    scores = [
        metrics.mean_cosine(features[asked] @ alone[0] + alone[1], targets[asked]),
        metrics.mean_cosine(features[asked] @ added[0] + added[1] + before[asked], targets[asked]),
    ]
    log.info("head on a tenth of the rows: from images alone %.4f, from the bank's texts and images %.4f", *scores)
    return scores[1] > scores[0]


def again(found: Checkpoint, spec: backbones.Spec) -> nn.Module:
    """The model of a checkpoint for inputs of another size or of other colours."""
    import torch

    model = build(spec, empty=True)
    backbones.fill(model.backbone, backbones.resampled(found.model.backbone.state_dict(), model.backbone), Path())
    backbones.fill(model.head, found.model.head.state_dict(), Path())
    return model.to(memory_format=torch.channels_last).eval()


def initialise(model: nn.Module, spec: backbones.Spec, folder: Path) -> None:
    """Puts a checkpoint's weights into a model from `build`.

    Raises:
        UserError: If the folder holds no checkpoint, or one of another backbone or image size.
    """
    found = load(folder)
    if found.spec.name != spec.name:
        raise UserError(f"{folder}: a checkpoint of {found.spec.name}, not {spec.name}; correct --init or --backbone")
    backbones.fill(model, found.model.state_dict(), folder, "; correct --init or --image-size")


def save(folder: Path, model: nn.Module, config: dict[str, Any], mean: np.ndarray) -> None:
    """Writes a checkpoint; config.json comes last, so that a folder with one is complete.

    Args:
        folder: Where.
        model: From `build`.
        config: `backbone` (a `Spec` as dict) and whatever describes data and metrics.
        mean: float32 (384,), the mean target.
    """
    import torch

    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    write_tensors(folder / "model.safetensors", {**state, "mean_target": torch.from_numpy(mean)})
    write_text(folder / "README.md", card(config))
    write_json(folder / "config.json", config)


def card(config: dict[str, Any]) -> str:
    """The model card: what a checkpoint is, what it was trained on, how well it does, how to load it."""
    if "ensemble" in config:
        title, module = f"ensemble of {', '.join(config['ensemble']['arrays'])}", "ensemble"
    else:
        title, module = f"{config['backbone']['name']} at {config['backbone']['image_size']} px", "models.checkpoints"
    rows = {"profile": config.get("profile", "unknown")}
    rows |= {f"rows, {side}": count for side, count in config.get("rows", {}).items()}
    rows |= {name: value for name, value in config.get("settings", {}).items() if value != ""}
    rows |= {name: f"{value:.4g}" for name, value in config.get("metrics", {}).items()}
    lines = [f"| {name.replace('_', ' ')} | {value} |" for name, value in rows.items()]
    lines += [f"| data, SHA-256 of {Path(csv).name} | `{sha[:16]}` |" for csv, sha in config.get("data", {}).items()]
    table = "\n".join(lines)
    text = Path(__file__).with_name("card.md").read_text(encoding="utf-8")
    return text.format(title=title, module=module, table=table, revision=config.get("revision") or "unknown")


def revision() -> str:
    """Git revision of this checkout, "" outside one."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():  # installed, perhaps within the checkout of something else
        return ""
    asked = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(asked, cwd=root, capture_output=True, text=True, check=False).stdout.strip()


def import_reference(file: Path, spec: backbones.Spec, out: Path) -> Checkpoint:
    """Converts a `.pt` or `.pth` state dict of the reference's network: an image tower and a linear layer to 384.

    The tower's names may carry any prefix (`module.`, `model.visual.`); the head is whatever has 384 rows and the
    tower's width. The mean target is not in such files; the prediction for a grey image takes its place.

    Args:
        file: The file; nothing in it is unpickled but tensors.
        spec: The backbone it was trained with.
        out: Checkpoint folder to write.

    Returns:
        The checkpoint, as `load` gives it.

    Raises:
        UserError: If the file is no state dict, or one of another backbone.
    """
    import torch

    state = backbones.read_state(file)
    model = build(spec).eval()
    names = list(model.backbone.state_dict())
    prefixes = {key.removesuffix(names[0]) for key in state if key.endswith(names[0])}
    fitting = [prefix for prefix in prefixes if all(prefix + name in state for name in names)]
    width = model.head.weight.shape[1]
    weights = [key for key, value in state.items() if tuple(value.shape) == (DIMENSION, width)]
    if not fitting or not weights:
        missing = "its head of 384 rows" if fitting else f"its tensors ({names[0]} and the like)"
        raise UserError(f"{file}: no checkpoint of {spec.name}: without {missing}; correct --backbone")
    prefix, weight = min(fitting, key=len), weights[-1]
    bias = state.get(weight.removesuffix("weight") + "bias", torch.zeros(DIMENSION))
    tower = {name: state[prefix + name] for name in names}
    backbones.fill(model.backbone, tower, file, "; correct --backbone or --image-size")
    with torch.no_grad():
        model.head.weight.copy_(state[weight])
        model.head.bias.copy_(bias)
        grey = torch.full((1, 3, spec.image_size, spec.image_size), 128, dtype=torch.uint8)
        mean = metrics.unit(model(grey).numpy())[0]
    with writing(out / ".import.done", "import-checkpoint", [out / name for name in FILES], [file]):
        save(out, model, {"backbone": spec.to_dict(), "imported": file.name, "profile": "full"}, mean)
    return load(out)


def read(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What config.json and model.safetensors of a checkpoint folder hold.

    Raises:
        UserError: If one is missing, damaged, or no such file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    check_whole(folder, "config.json", "model.safetensors")
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8")), load_file(folder / "model.safetensors")
    except FileNotFoundError as error:
        raise UserError(f"{error.filename or folder}: no such file; give a checkpoint's folder") from error
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{folder}: not a checkpoint of this project: {error}; train it again") from error


def load(folder: Path) -> Checkpoint:
    """Loads a checkpoint folder.

    Raises:
        UserError: If a file is missing or damaged, or the weights have another shape than config.json says.
    """
    import torch

    config, state = read(folder)
    try:
        spec = backbones.Spec(**config["backbone"])
        mean = state.pop("mean_target").numpy()
        model = build(spec, empty=True)
    except (KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"{folder}: not a checkpoint of an image tower: {error!r}; run finetune again") from error
    backbones.fill(model, state, folder, "; run finetune again")
    model.to(memory_format=torch.channels_last)
    return Checkpoint(model.eval(), spec, config, mean)
