"""The image-to-embedding model, and checkpoints: a folder with model.safetensors and config.json."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import backbones, evaluate
from .errors import UserError
from .files import atomic_path, make_folder, write_json
from .text_encoder import DIMENSION

if TYPE_CHECKING:
    import torch
    from torch import nn

PENALTIES = (0.1, 1.0, 10.0, 100.0, 1000.0)  # of the ridge regression, relative to the mean feature variance


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


def build(spec: backbones.Spec) -> nn.Module:
    """Builds the model: normalisation, backbone, linear head to 384.

    It maps uint8 images (n, 3, s, s) to float32 (n, 384), not normalised; `features(images)` gives the head's input.
    """
    import torch
    from torch import nn

    class PromptModel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = backbones.build(spec)
            with torch.no_grad():
                self.backbone.eval()
                width = self.backbone(torch.zeros(1, 3, spec.image_size, spec.image_size)).shape[-1]
            self.head = nn.Linear(width, DIMENSION)
            self.to(memory_format=torch.channels_last)
            self.register_buffer("pixel_mean", 255 * torch.tensor(spec.mean).view(1, 3, 1, 1), persistent=False)
            self.register_buffer("pixel_std", 255 * torch.tensor(spec.std).view(1, 3, 1, 1), persistent=False)

        def features(self, images: torch.Tensor) -> torch.Tensor:
            return self.backbone((images.to(self.pixel_mean.dtype) - self.pixel_mean) / self.pixel_std)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.head(self.features(images)).float()

        def train(self, mode: bool = True) -> nn.Module:
            backbones.set_training(self, mode)
            return self

    return PromptModel()


def fit_head(model: nn.Module, features: np.ndarray, targets: np.ndarray) -> None:
    """Sets the linear head to the ridge regression of targets on frozen features: a linear probe in closed form.

    Starting from a fitted head keeps the first steps from wrecking the features (LP-FT, Kumar et al. 2022; used by the
    2nd, 3rd and 5th teams). The penalty is chosen on a tenth of the rows.

    Args:
        model: From `build`.
        features: float32 (n, width), the frozen backbone's.
        targets: float32 (n, 384).
    """
    import torch

    x = features.astype(np.float64)
    centre, middle = x.mean(0), targets.mean(0)
    held_out = np.arange(len(x)) % 10 == 0

    def fit(rows: np.ndarray, penalty: float) -> np.ndarray:
        inner = x[rows] - centre
        gram = inner.T @ inner
        gram[np.diag_indices_from(gram)] += penalty * np.trace(gram) / len(gram) + 1e-9
        return np.linalg.solve(gram, inner.T @ (targets[rows] - middle))

    def held_out_score(penalty: float) -> float:
        predicted = (x[held_out] - centre) @ fit(~held_out, penalty) + middle
        return evaluate.mean_cosine(predicted, targets[held_out])

    weight = fit(np.ones(len(x), bool), max(PENALTIES, key=held_out_score))
    with torch.no_grad():
        model.head.weight.copy_(torch.from_numpy(weight.T.astype(np.float32)))
        model.head.bias.copy_(torch.from_numpy((middle - centre @ weight).astype(np.float32)))


def save(folder: Path, model: nn.Module, config: dict[str, Any], mean: np.ndarray) -> None:
    """Writes a checkpoint; config.json comes last, so that a folder with one is complete.

    Args:
        folder: Where.
        model: From `build`.
        config: `backbone` (a `Spec` as dict) and whatever describes data and metrics.
        mean: float32 (384,), the mean target.
    """
    import torch
    from safetensors.torch import save_file

    make_folder(folder)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    with atomic_path(folder / "model.safetensors") as part:
        save_file({**state, "mean_target": torch.from_numpy(mean)}, part)
    write_json(folder / "config.json", config)


def load(folder: Path) -> Checkpoint:
    """Loads a checkpoint folder.

    Raises:
        UserError: If a file is missing or damaged, or the weights have another shape than config.json says.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise UserError(f"{folder / name}: no such file; --checkpoint takes a folder that finetune wrote")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        spec = backbones.Spec(**config["backbone"])
        state = load_file(folder / "model.safetensors")
        mean = state.pop("mean_target").numpy()
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"{folder}: not a checkpoint of this project: {error!r}; run finetune again") from error
    model = build(spec)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        detail = str(error).splitlines()[1].strip()
        raise UserError(f"{folder}: weights of another shape than config.json says: {detail}") from error
    return Checkpoint(model.eval(), spec, config, mean)
