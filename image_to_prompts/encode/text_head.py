"""A head from text alone: a bank's vectors of prompts are mapped to their embeddings, and so are vectors of images.

Images lie elsewhere than texts in a CLIP's space; the difference of both means is added first (the seventh team's way).
"""

from __future__ import annotations

from collections.abc import Sized
from dataclasses import dataclass

import numpy as np

from ..models import metrics
from ..search.near_pairs import NEAR, near
from .banks import Bank

ROWS = 100_000  # of the bank from which it is made


@dataclass(frozen=True)
class Head:
    """Maps a bank's vectors of images to prompt embeddings: (vector + shift) @ weight + bias, all float32."""

    shift: np.ndarray
    weight: np.ndarray
    bias: np.ndarray

    def __call__(self, queries: np.ndarray) -> np.ndarray:
        """Unit vectors, float32 (n, 384), of float32 (n, d)."""
        return metrics.unit(metrics.mapped(metrics.unit(queries + self.shift), self.weight, self.bias))

    def linear(self, features: np.ndarray, projection: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Weight (width, 384) and bias (384,) for a tower's own vectors, as if all were as long as those given.

        Args:
            features: float32 (n, width).
            projection: The bank's.
        """
        weight = self.weight if projection is None else projection @ self.weight
        return weight / np.linalg.norm(features, axis=1).mean(), self.bias + self.shift @ self.weight


def spaced(rows: Sized, most: int) -> np.ndarray:
    """Numbers of at most so many rows, evenly spaced."""
    return np.arange(0, len(rows), -(-len(rows) // most))


def fit(bank: Bank, queries: np.ndarray, truth: np.ndarray, others: np.ndarray | None = None) -> Head:
    """A ridge regression on a bank; shift and penalty are chosen on images with known prompts.

    Args:
        bank: The bank.
        queries: float32 (n, d), the images' vectors, see `Bank.queries`.
        truth: float32 (n, 384), the embeddings of their prompts. What is near to them in the bank is left out.
        others: float32 (m, 384), more prompts that it must not know.
    """
    part = spaced(bank.vectors, ROWS)
    vectors, targets = bank.vectors[part].astype(np.float32), bank.targets[part].astype(np.float32)
    known = truth if others is None else np.concatenate([truth, others])
    far = ~near(metrics.unit(targets), known, NEAR)
    vectors, targets = vectors[far], targets[far]
    shift = (vectors.mean(0) - queries.mean(0)).astype(np.float32)
    weight, bias = metrics.ridge(vectors, targets, (metrics.unit(queries + shift), truth))
    return Head(shift, weight.astype(np.float32), bias.astype(np.float32))
