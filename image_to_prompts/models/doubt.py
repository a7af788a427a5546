"""Which images a checkpoint knows: how far each one's statistics lie from those of the images it was trained on.

The frozen part of a backbone is looked at in a few places; of each channel the mean and the deviation over the picture
count. Their distance is Mahalanobis' (Lee et al. 2018, "A simple unified framework for detecting out-of-distribution
samples"), with the covariance of the leading principal components and one variance for all others. Features behind the
last layer, blind for what no training showed them, separate photographs from scenes far worse (docs/log.md).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..run.files import read_tensors, write_tensors
from .metrics import unit

if TYPE_CHECKING:
    import torch
    from torch import nn

FILE = "doubt.safetensors"  # in a checkpoint's folder
COMPONENTS, SHRINKAGE = 128, 0.1  # of the covariance; its other part is that of independent numbers
SURE = 98  # per cent of the validating images that are familiar
STARTS, REACHES = (1.25, 1.5, 2.0), (0.1, 0.2, 0.4, 0.8, 1.6)  # tried, see `pulled`


@dataclass(frozen=True)
class Doubt:
    """What tells familiar images from strange ones.

    Attributes:
        mean, scale: float32 (d,), of the statistics of the training images.
        axes: float32 (d, k), principal components of what is standardised so.
        variances: float32 (k + 1,), of each of them, and of what is left.
        border: float32 (1,), the distance at which images begin to be strange.
        pull: float32 (2,), from which strangeness on, and up to how much more, predictions are drawn to the mean, see
            `pulled`; (1, 0): they are not.
    """

    mean: np.ndarray
    scale: np.ndarray
    axes: np.ndarray
    variances: np.ndarray
    border: np.ndarray
    pull: np.ndarray

    @classmethod
    def fit(cls, known: np.ndarray, valid: np.ndarray) -> Doubt:
        """Fits it.

        Args:
            known: float32 (n, d), statistics of the images that trained.
            valid: float32 (m, d), of the validating ones, by which the border is drawn.
        """
        import torch

        mean, scale = known.mean(0), known.std(0) + 1e-6
        left = torch.from_numpy((known - mean) / scale)
        torch.manual_seed(0)  # the components are found from random vectors
        count = min(COMPONENTS, max(1, len(left) // 4), left.shape[1])  # what is left stands for images not seen
        _, sizes, axes = torch.svd_lowrank(left, count, niter=8)
        own = sizes.pow(2) / len(left)
        rest = (left.pow(2).sum() / len(left) - own.sum()).clamp_min(0) / max(1, left.shape[1] - count)
        variances = (1 - SHRINKAGE) * torch.cat([own, rest[None]]) + SHRINKAGE
        one, none = np.ones(1, np.float32), np.array([1, 0], np.float32)
        found = cls(mean, scale, axes.numpy(), variances.numpy(), one, none)
        return replace(found, border=np.percentile(found.strangeness(valid), SURE).astype(np.float32)[None])

    def strangeness(self, statistics: np.ndarray) -> np.ndarray:
        """Float32 (n,): distances of images from those that are known, 1 at the border; above 1 an image is strange."""
        standard = (statistics - self.mean) / self.scale
        along = np.einsum("ij,jk->ik", standard, self.axes)  # row by row: a product's rounding depends on its size
        rest = np.maximum(np.square(standard).sum(1) - np.square(along).sum(1), 0)
        squares = (np.square(along) / self.variances[:-1]).sum(1) + rest / self.variances[-1]
        return (np.sqrt(squares) / self.border).astype(np.float32)

    def save(self, folder: Path) -> None:
        """Writes it into a checkpoint's folder."""
        write_tensors(folder / FILE, {one.name: np.ascontiguousarray(getattr(self, one.name)) for one in fields(self)})


def load(folder: Path) -> Doubt | None:
    """The doubt of a checkpoint; None where it has none."""
    return Doubt(**read_tensors(folder / FILE, "train it again")) if (folder / FILE).is_file() else None


def pulled(vectors: np.ndarray, mean: np.ndarray, strangeness: np.ndarray, pull: Sequence[float]) -> np.ndarray:
    """Predictions, those of strange images drawn to the mean prediction.

    Args:
        vectors: float32 (n, 384), unit vectors.
        mean: float32 (384,).
        strangeness: float32 (n,); NaN where it is not known, so that the prediction stays.
        pull: From which strangeness on they are drawn, and how much more makes the mean of them.
    """
    start, reach = pull
    if not reach:
        return vectors
    share = np.nan_to_num(np.clip((strangeness - start) / reach, 0, 1))[:, None]
    return unit((1 - share) * vectors + share * mean)


def best_pull(
    vectors: np.ndarray, mean: np.ndarray, strangeness: np.ndarray, targets: np.ndarray
) -> tuple[float, float]:
    """The pull with which predictions come nearest to the truth; (1, 0) if nothing is gained."""

    def score(pull: tuple[float, float]) -> float:
        return float((pulled(vectors, mean, strangeness, pull) * targets).sum(1).mean())

    return max([(1.0, 0.0), *product(STARTS, REACHES)], key=score)


@contextlib.contextmanager
def looking(modules: Sequence[nn.Module]) -> Iterator[list[torch.Tensor]]:
    """Collects the statistics of what modules give.

    Yields:
        A list that gets float32 (n, channels) tensors while a batch passes: of each module means, then deviations.
    """
    seen: list[torch.Tensor] = []

    def look(_: nn.Module, __: object, given: torch.Tensor) -> None:
        over = tuple(range(2, given.dim())) if given.dim() == 4 else (1,)  # maps, or a row of tokens
        given = given.float()
        seen.extend([given.mean(over), given.std(over)])

    hooks = [module.register_forward_hook(look) for module in modules]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
