"""FAISS for deduplication: an index for more rows than the exact engine is made for."""

import logging
import math
from typing import Any

import numpy as np

from . import near_pairs

log = logging.getLogger(__name__)
BLOCK = 65_536  # rows looked up at once
NEIGHBOURS = 32  # kept rows lie apart from each other, so that few reach the threshold with one row
PROBED = 1 / 16  # share of the lists that a query visits
MOST_PROBED = 2048  # what FAISS allows on GPUs
TRAINING = 40  # rows a list from which its centre is computed; FAISS asks for 39
SAMPLE = 1000  # rows on which missed pairs are counted


def leaders(vectors: np.ndarray, threshold: float, fixed: int = 0) -> tuple[np.ndarray, np.ndarray, float]:
    """As `near_pairs.leaders`, but kept rows of earlier blocks are looked up in an inverted index, which misses some.

    Args:
        vectors: float32 unit vectors (n, d), in order of preference.
        threshold: Least cosine.
        fixed: So many first rows are kept whatever they resemble.

    Returns:
        leader and cosine as `near_pairs.leaders` returns them, and the share of sampled rows with a near kept row
        that the index finds none for.
    """
    import faiss

    count, width = vectors.shape
    leader, cosine = np.arange(count), np.ones(count, np.float32)
    lists = max(1, min(int(4 * math.sqrt(count)), count // TRAINING))
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, lists, faiss.METRIC_INNER_PRODUCT)
    rng = np.random.default_rng(0)
    index.train(vectors[np.sort(rng.choice(count, min(count, TRAINING * lists), replace=False))])
    index.nprobe = max(1, min(int(lists * PROBED), MOST_PROBED))
    if getattr(faiss, "get_num_gpus", lambda: 0)():
        index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index)
    index.add_with_ids(vectors[:fixed], np.arange(fixed))
    for start in range(fixed, count, BLOCK):
        rows = np.arange(start, min(start + BLOCK, count))
        how, near = index.search(vectors[rows], NEIGHBOURS)
        first = np.where((how >= np.float32(threshold)) & (near >= 0), near, count).min(1)
        hit = first < count
        leader[rows[hit]] = first[hit]
        cosine[rows[hit]] = np.einsum("ij,ij->i", vectors[rows[hit]], vectors[first[hit]])
        rest = rows[~hit]
        inner, inner_cosine = near_pairs.leaders(vectors[rest], threshold)
        leader[rest], cosine[rest] = rest[inner], inner_cosine
        stay = rest[leader[rest] == rest]
        index.add_with_ids(vectors[stay], stay)
    return leader, cosine, _missed(index, vectors, leader, threshold)


def _missed(index: Any, vectors: np.ndarray, leader: np.ndarray, threshold: float) -> float:
    """Share of sampled rows that have another kept row within the threshold and for which the index names none."""
    kept = np.flatnonzero(leader == np.arange(len(leader)))
    rows = np.sort(np.random.default_rng(1).choice(len(vectors), min(SAMPLE, len(vectors)), replace=False))
    how, near = index.search(vectors[rows], NEIGHBOURS)
    found = ((how >= np.float32(threshold)) & (near >= 0) & (near != rows[:, None])).any(1)
    there = np.zeros(len(rows), bool)
    for start in range(0, len(kept), BLOCK):
        some = kept[start : start + BLOCK]
        there |= ((vectors[rows] @ vectors[some].T >= np.float32(threshold)) & (some != rows[:, None])).any(1)
    return float((there & ~found).sum() / max(there.sum(), 1))
