"""An epoch of a training: its rows, in their order, its learning rate, and whether it is the last."""

import logging
import math

import numpy as np

log = logging.getLogger(__name__)


def learning_rate_factor(done: float, cycles: int) -> float:
    """Cosine from 1 to 0 in each of `cycles` equal parts (SGDR, Loshchilov & Hutter 2017); `done` in 0..1."""
    return 0.5 * (1 + math.cos(math.pi * ((done * cycles) % 1.0)))


def average_decay(most: float, step: int) -> float:
    """Share of the past in a moving average of weights; in a short training, too, its start is soon forgotten.

    As TensorFlow's `ExponentialMovingAverage` with `num_updates`.

    Args:
        most: The share after many steps.
        step: Steps before this one.
    """
    return min(most, (1 + step) / (10 + step))


def batches(rows: np.ndarray, seed: int, epoch: int, batch_size: int) -> list[np.ndarray]:
    """The rows of an epoch, ordered by (seed, epoch) alone, in batches whose sizes differ by one at most."""
    order = np.random.default_rng((seed, epoch)).permutation(rows)
    return np.array_split(order, -(-len(order) // batch_size) or 1)


def one_of_each(rows: np.ndarray, prompts: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """Of the rows of each prompt one, drawn by (seed, epoch) alone; in the order of the prompts' first rows."""
    order = np.random.default_rng((seed, epoch, 1)).permutation(len(rows))
    _, first, of = np.unique(prompts, return_index=True, return_inverse=True)
    drawn = np.empty(len(first), int)
    drawn[of[order]] = order  # of several the last that is written
    return rows[drawn[np.argsort(first)]]


def has_stalled(history: list[dict[str, float]], patience: int) -> bool:
    """Whether the last `patience` epochs brought nothing; never with patience 0."""
    cosines = [entry["cosine"] for entry in history]
    stalled = bool(patience) and len(cosines) > patience and max(cosines[-patience:]) <= max(cosines[:-patience])
    if stalled:
        log.info("no epoch of the last %d was better: stopped early", patience)
    return stalled
