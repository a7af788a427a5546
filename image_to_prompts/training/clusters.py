"""Clusters of prompts by k-means: whole ones held out tell how a model does on prompts unlike all that it learned from.

The groups that folds keep together are small: of two prompts about cats one may train and the other validate.
"""

import logging
import os
from pathlib import Path

import numpy as np

from ..run.files import read_tensors, write_tensors
from ..run.folders import kaggle_inputs
from .dataset import thinned

log = logging.getLogger(__name__)
FILE = "clusters.safetensors"
MOST, ROWS_EACH = 100, 20  # clusters, as the competition's 12th team had; rows that one has on average at least
SAMPLE = 20_000  # rows that centroids are fitted on


def of(vectors: np.ndarray, file: Path) -> np.ndarray:
    """The cluster of each prompt, by the centroids in `file`.

    Where there is no such file it is written: with the centroids of an attached Kaggle kernel, else with new ones.
    Kept centroids put a prompt into the same cluster whatever rows are added later.

    Args:
        vectors: float32 (n, 384), unit vectors of prompts.
        file: Where the centroids lie, float32 (clusters, 384).

    Returns:
        int (n,), from 0 on.

    Raises:
        UserError: If the file is damaged.
    """
    if not file.is_file():
        kept = kaggle_inputs(file.name)
        write_tensors(file, {"centroids": _read(max(kept, key=os.path.getmtime)) if kept else _fitted(vectors)})
        log.info("centroids of clusters of prompts: %s", file)
    centroids = _read(file)
    return (vectors @ centroids.T - (centroids**2).sum(1) / 2).argmax(1)  # the nearest


def _read(file: Path) -> np.ndarray:
    return read_tensors(file, "delete it or detach its input, and clusters are made anew", ["centroids"])["centroids"]


def _fitted(vectors: np.ndarray) -> np.ndarray:
    from sklearn.cluster import KMeans

    count = min(MOST, max(1, len(vectors) // ROWS_EACH))
    found = KMeans(count, n_init=1, random_state=0).fit(vectors[thinned(np.arange(len(vectors)), SAMPLE)])
    return found.cluster_centers_.astype(np.float32)
