"""The mean of the prompts whose images are nearest in an encoder's embeddings, as `embed` writes them."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from ..encode import embeddings, encoders
from ..encode.encoders import Encoder
from ..models import metrics
from ..run.errors import UserError
from ..search.near_pairs import NEAR, near

log = logging.getLogger(__name__)
SAME_PROMPT = 0.999  # cosine of two embeddings of one prompt, half precision among them
MOST_ASKED = 2_000  # rows on which the number of neighbours is chosen


@dataclass
class _Known:
    """The rows of an array: their names, features and targets, the number of neighbours, and how that did."""

    name: str
    images: pd.Series
    features: np.ndarray
    targets: np.ndarray
    k: int
    score: float


def neighbours(folder: Path) -> tuple[np.ndarray, Encoder, Callable[[list[np.ndarray]], np.ndarray]]:
    """kNN over the best array of `embed` whose encoder can be built, the number of neighbours chosen on a part of it.

    Args:
        folder: What `embed` wrote.

    Returns:
        `mean`, encoder and `finish` of a `predictors.Predictor`.

    Raises:
        UserError: If an array is damaged, or the weights of no encoder are there.
    """
    known, encoder = next(_usable(folder))
    said = "kNN over %d embeddings by %s, k = %d: %.4f on a part of them"
    log.info(said, len(known.features), known.name, known.k, known.score)
    finish = partial(_nearest_mean, known.features, known.targets, known.k)
    return metrics.unit(known.targets.mean(0)), encoder, finish


def validation(folder: Path, asked: pd.DataFrame) -> pd.DataFrame:
    """What `neighbours` says of images that it may have among its own, from those whose prompts are not near to theirs.

    Args:
        folder: What `embed` wrote.
        asked: float32 (n, 384), the prompts' embeddings by the images' names.

    Returns:
        float32 (m, 384) by name, of the images that have an embedding.
    """
    known, _ = next(_usable(folder))
    mine, others = asked_of(known.images, known.targets, asked), ~near(known.targets, asked.to_numpy(), NEAR)
    if not (mine.any() and others.any()):
        return pd.DataFrame(index=[])
    found = metrics.nearest_mean(known.features[mine], known.features[others], known.targets[others], known.k)
    return pd.DataFrame(found, known.images[mine])


def asked_of(names: pd.Series, targets: np.ndarray, asked: pd.DataFrame) -> np.ndarray:
    """Which images are among those asked for, bool (n,).

    The prompt must be the same, too: several public sets of pairs call their images 00000000.jpg and so on.

    Args:
        names: Names of n images, each once.
        targets: float32 (n, 384), embeddings of their prompts.
        asked: float32 (m, 384), the same by name.
    """
    mine = names.isin(asked.index).to_numpy(copy=True)
    mine[mine] = (targets[mine] * asked.loc[names[mine]].to_numpy()).sum(1) > SAME_PROMPT
    return mine


def _usable(folder: Path) -> Iterator[tuple[_Known, Encoder]]:
    """The arrays, best first, whose encoders can be built; raises UserError where there is none."""
    table = embeddings.load(folder)
    found, missing = [], ""
    for name, vectors in table.arrays.items():
        known = np.isfinite(vectors[:, 0])
        features, targets = vectors[known], table.targets[known]
        asked = np.arange(len(features)) % max(10, len(features) // MOST_ASKED) == 0
        k = metrics.best_k(features[asked], targets[asked], features[~asked], targets[~asked])
        guess = metrics.nearest_mean(features[asked], features[~asked], targets[~asked], k)
        score = metrics.mean_cosine(guess, targets[asked])
        found.append(_Known(name, table.frame["image_name"][known], features, targets, k, score))
    for one in sorted(found, key=lambda one: -one.score):
        try:
            yield one, encoders.rebuild(table.about[one.name])
        except UserError as error:
            missing = missing or str(error)
            log.warning("%s: skipped: %s", folder / one.name, error)
    raise UserError(f"{folder}: no array's encoder can be built: {missing}")


def _nearest_mean(features: np.ndarray, targets: np.ndarray, k: int, seen: list[np.ndarray]) -> np.ndarray:
    return metrics.in_fixed_rows(lambda rows: metrics.nearest_mean(rows[0], features, targets, k), seen)
