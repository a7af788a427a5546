"""The frozen part of a backbone: run once, it gives the baselines, the fitted head and, if wanted, cached features."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from . import backbones, evaluate
from .dataset import Rows
from .errors import UserError
from .files import atomic_path
from .images import ImageRows

if TYPE_CHECKING:
    import torch
    from torch import nn

log = logging.getLogger(__name__)
KNN_ROWS = 20_000  # a baseline needs no more training rows than this
TOLERANCE = 0.05  # relative; bf16 has three digits


@dataclass
class Baselines:
    """What needs no training: frozen features and the scores of two simple predictors.

    Attributes:
        features: float32 (m, width) of readable training rows.
        targets: float32 (m, 384) of the same rows.
        mean: float32 (384,), their mean as a unit vector.
        k: Neighbours of the kNN, chosen on the validation fold.
        scores: Validation scores `constant` and `knn`.
    """

    features: np.ndarray
    targets: np.ndarray
    mean: np.ndarray
    k: int
    scores: dict[str, float]


class CachedRows:
    """A dataset like `images.ImageRows` whose items are what enters the trained part: (float tensor, row)."""

    def __init__(self, activations: torch.Tensor, position: np.ndarray) -> None:
        """Takes activations (m, ...) and, for each row of the whole set, its position among them."""
        self.activations, self.position = activations, position

    def __len__(self) -> int:
        return len(self.position)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
        return self.activations[self.position[row]].float(), row

    @staticmethod
    def collate(items: list[tuple[torch.Tensor, int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Batches items."""
        from torch.utils.data import default_collate

        return default_collate(items)


def features(
    model: nn.Module, images: ImageRows, only: np.ndarray, device: torch.device, cache: Path | None
) -> tuple[np.ndarray, CachedRows | None, nn.Module]:
    """Runs the pretrained backbone over images once.

    Args:
        model: From `model.build`, its last quarter unfrozen.
        images: The images.
        only: Row numbers to run.
        device: Where to compute.
        cache: File that keeps the results for a resumed run and asks for cached activations; None: neither.

    Returns:
        float32 (len(images), width), NaN in rows that are broken or not asked for; the cached activations of the
        readable rows or None; and the module to train: the model, or head and trained part over cached activations.
    """
    import torch
    from safetensors.torch import load_file, save_file

    model.eval()
    if cache is None:
        return evaluate.extract(model.features, images, 32, device, only=only), None, model
    tail, first = backbones.trained_tail(model.backbone)
    trained = torch.nn.Sequential(tail, model.head)
    if cache.is_file():
        stored = load_file(cache)
        activations, found = stored["activations"], stored["features"].numpy()
    else:
        with entering(first) as taken:
            found = evaluate.extract(model.features, images, 32, device, only=only)
        if not taken:
            raise UserError("no image can be read; check --images")
        activations = torch.cat(taken)
        _compare(tail, activations, found[only], device)
        log.info("cached features: %.0f MB", activations.nbytes / 1e6)
        with atomic_path(cache) as part:
            save_file({"activations": activations.contiguous(), "features": torch.from_numpy(found)}, part)
    position = np.full(len(images), -1)
    readable = only[np.isfinite(found[only, 0])]
    position[readable] = np.arange(len(readable))
    return found, CachedRows(activations, position), trained


@contextlib.contextmanager
def entering(module: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Collects what enters a module, on the CPU, one tensor a forward pass."""
    taken: list[torch.Tensor] = []
    hook = module.register_forward_pre_hook(lambda module, inputs: taken.append(inputs[0].cpu().clone()))
    try:
        yield taken
    finally:
        hook.remove()


def _compare(tail: nn.Module, activations: torch.Tensor, found: np.ndarray, device: torch.device) -> None:
    """Checks on a few images that the trained part over cached activations gives what the whole backbone gave."""
    import torch

    whole = found[np.isfinite(found[:, 0])][:8]
    with torch.inference_mode():
        again = tail(activations[:8].float().to(device)).cpu().numpy()
    if again.shape != whole.shape or np.abs(again - whole).max() > TOLERANCE * np.abs(whole).max():
        raise UserError("this backbone's frozen part cannot be cached; run without --cache-features")


def baselines(found: np.ndarray, rows: Rows) -> Baselines:
    """Scores what needs no training.

    Args:
        found: float32 (n, width) from `features`.
        rows: The rows, of which only those with features count.

    Raises:
        UserError: If no training or no validation image could be read.
    """
    train, valid = (side[np.isfinite(found[side, 0])] for side in (rows.train, rows.valid))
    if not len(train) or not len(valid):
        raise UserError(f"{len(train)} training and {len(valid)} validation images can be read; check --images")
    targets, truth = rows.targets[train], rows.targets[valid]
    mean = evaluate.unit(targets.mean(0))
    k = evaluate.best_k(found[valid], truth, found[train], targets)
    knn = evaluate.nearest_mean(found[valid], found[train], targets, k)
    scores = {"constant": evaluate.constant_score(mean, truth), "knn": evaluate.mean_cosine(knn, truth)}
    return Baselines(found[train], targets, mean, k, scores)


def save(path: Path, base: Baselines) -> None:
    """Writes the kNN baseline's features (float16) and targets beside a checkpoint."""
    from safetensors.numpy import save_file

    with atomic_path(path) as part:
        save_file({"features": base.features.astype(np.float16), "targets": base.targets}, part)


def knn_score(folder: Path, spec: backbones.Spec, k: int, files: list[Path], targets: np.ndarray) -> float:
    """Score of the kNN baseline of a checkpoint folder on other images.

    Args:
        folder: Checkpoint with baselines.safetensors.
        spec: Its backbone, whose pretrained weights are loaded again.
        k: Neighbours.
        files: Images.
        targets: float32 (len(files), 384).
    """
    from accelerate import PartialState
    from safetensors.numpy import load_file

    from . import model as models

    stored = load_file(folder / "baselines.safetensors")
    model = models.build(spec)
    backbones.load_pretrained(model.backbone, spec)
    device = PartialState().device
    model.to(device).eval()
    found = evaluate.extract(model.features, ImageRows(files, spec.image_size), 32, device)
    readable = np.isfinite(found[:, 0])
    predicted = evaluate.nearest_mean(found[readable], stored["features"].astype(np.float32), stored["targets"], k)
    return evaluate.mean_cosine(predicted, targets[readable])
