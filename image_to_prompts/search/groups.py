"""Which rows stand for others that are near to them: by the exact engine or by FAISS, and as groups and folds."""

from pathlib import Path

import numpy as np
import pandas as pd

from ..data import metadata

FLOOR = 0.7  # least cosine of groups, as the 5th-placed team made its folds; dedupe keeps pairs from there on
MOST_EXACT = 4_000_000  # rows; beyond, an inverted index is faster


def exactly(engine: str, count: int) -> bool:
    """Whether the exact engine takes so many texts."""
    return engine == "exact" or (engine == "auto" and count <= MOST_EXACT)


def leaders(
    vectors: np.ndarray, threshold: float, fixed: int = 0, engine: str = "auto", folder: Path | None = None
) -> tuple[np.ndarray, np.ndarray, str]:
    """`near_pairs.leaders` or `with_faiss.leaders`, and which of them and why."""
    if exactly(engine, len(vectors)):
        from . import near_pairs

        return *near_pairs.leaders(vectors, threshold, fixed, folder), f"exact, {len(vectors)} texts"
    from . import with_faiss

    leader, cosine, missed = with_faiss.leaders(vectors, threshold, fixed)
    why = "asked for" if engine == "faiss" else f"more than {MOST_EXACT} texts"
    return leader, cosine, f"faiss ({why}), {missed:.2%} of the near rows missed"


def with_groups(frame: pd.DataFrame, leader: np.ndarray, folds: int) -> pd.DataFrame:
    """Adds `group`, the image_name of each row's leader, and `fold`, a hash of the group from 0 to folds - 1."""
    group = frame["image_name"].to_numpy()[leader]
    return frame.assign(group=group, fold=[metadata.fold_of(name, folds) for name in group])
