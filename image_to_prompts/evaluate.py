"""Scores and the baselines that stand beside them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

    from .frozen import CachedRows
    from .images import ImageRows

NEIGHBOURS = (1, 3, 5, 10, 20, 50, 100)
CEILING_DRAWS = 16


def unit(vectors: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1 (float32); zero rows stay zero."""
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return (vectors / np.maximum(norms, 1e-12)).astype(np.float32)


def mean_cosine(predicted: np.ndarray, targets: np.ndarray) -> float:
    """The competition's score: mean cosine of rows, both (n, 384)."""
    return float((unit(predicted) * unit(targets)).sum(1).mean())


def constant_score(mean: np.ndarray, targets: np.ndarray) -> float:
    """Score of predicting the mean training target (384,) for every row of `targets` (n, 384)."""
    return mean_cosine(np.broadcast_to(mean, targets.shape), targets)


def nearest_mean(features: np.ndarray, train_features: np.ndarray, train_targets: np.ndarray, k: int) -> np.ndarray:
    """kNN regression by cosine of features.

    Args:
        features: float32 (n, d).
        train_features: float32 (m, d).
        train_targets: float32 (m, 384).
        k: Neighbours to average.

    Returns:
        float32 (n, 384), the mean target of each row's k nearest training rows.
    """
    import faiss

    index = faiss.IndexFlatIP(train_features.shape[1])
    index.add(unit(train_features))
    _, rows = index.search(unit(features), min(k, len(train_features)))
    return train_targets[rows].mean(1)


def best_k(features: np.ndarray, targets: np.ndarray, train_features: np.ndarray, train_targets: np.ndarray) -> int:
    """The k of `NEIGHBOURS` that scores best on validation rows."""
    scores = {k: mean_cosine(nearest_mean(features, train_features, train_targets, k), targets) for k in NEIGHBOURS}
    return max(scores, key=scores.get)


def ceiling_score(prompts: Sequence[str], targets: np.ndarray) -> float:
    """Score of an oracle that knows all that an embedded scene shows and nothing else.

    It reads the scene from the prompt as the renderer does, says it again in `CEILING_DRAWS` ways of the grammar with
    random undrawn phrases, and predicts the mean embedding.

    Args:
        prompts: Prompts of the embedded grammar.
        targets: float32 (n, 384), their embeddings.
    """
    from . import text_encoder
    from .generate import grammar

    said = [
        grammar.write(grammar.parse(prompt), random.Random(f"ceiling {prompt} {draw}"))
        for prompt in prompts
        for draw in range(CEILING_DRAWS)
    ]
    vectors = text_encoder.encode(said).reshape(len(prompts), CEILING_DRAWS, -1)
    return mean_cosine(vectors.mean(1), targets)


def skill(score: float, constant: float, ceiling: float) -> float:
    """(score - constant) / (ceiling - constant): 0 knows nothing, 1 all that the picture shows."""
    return (score - constant) / (ceiling - constant)


def extract(
    forward: Callable[[torch.Tensor], torch.Tensor],
    images: ImageRows | CachedRows,
    batch_size: int,
    device: torch.device,
    workers: int = 0,
    only: np.ndarray | None = None,
) -> np.ndarray:
    """Applies a model to every image of a dataset, without gradients.

    Args:
        forward: Maps uint8 images (n, 3, s, s) to (n, d), for example a model in eval mode or its `features`.
        images: The images.
        batch_size: Images at once.
        device: Where to compute.
        workers: Loader processes.
        only: Row numbers to compute; all if left out.

    Returns:
        float32 (len(images), d); NaN in the rows of broken images and of those not asked for. d is 1 if no image
        could be read.
    """
    import torch
    from torch.utils.data import DataLoader

    from .devices import autocast
    from .progress import progress

    wanted = range(len(images)) if only is None else only.tolist()
    loader = DataLoader(images, batch_size, sampler=wanted, collate_fn=images.collate, num_workers=workers)
    values, where = [], []
    with torch.inference_mode(), autocast(device):
        for batch, positions in progress(loader, "images", len(loader)):
            if len(positions):
                values.append(forward(batch.to(device)).float().cpu().numpy())
                where.append(positions.numpy())
    result = np.full((len(images), values[0].shape[1] if values else 1), np.nan, np.float32)
    if values:
        result[np.concatenate(where)] = np.concatenate(values)
    return result
