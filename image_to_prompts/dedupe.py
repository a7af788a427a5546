"""Stage 2, dedupe: drops every prompt whose embedding is within a cosine of one that is kept.

    image-to-prompts dedupe --prompts A.csv B.csv --out data_meta/x.csv --threshold 0.8

The first of each cluster stays. The kept rows get a `group` (their leader at cosine 0.7) and a `fold` (a hash of the
group), so that near-identical prompts never stand on both sides of a split.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from . import metadata, text_encoder
from .errors import UserError
from .files import Stamp
from .profiles import StageConfig

log = logging.getLogger(__name__)
GROUP_THRESHOLD = 0.7  # the 5th-placed team's grouping of folds
SEARCH_BLOCK = 1024


@dataclass
class Config(StageConfig):
    """Drops prompts that are nearly the same as an earlier one (FAISS, cosine)."""

    prompts: tuple[Path, ...] = ()
    """CSVs with a `prompt` column (and optional `image_name`, `seed`, ...); earlier files win."""
    out: Path = Path("data_meta/prompts.csv")
    """Metadata CSV to write; what was dropped goes to <name>.removed.csv beside it."""
    threshold: float = 0.8
    """Cosine from which a prompt counts as a copy of an earlier one."""
    folds: int = 5
    """Number of folds."""


def leaders(vectors: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Greedy leader clustering: each row joins the first kept row within `threshold`, or is kept itself.

    Args:
        vectors: float32 unit vectors (n, d).
        threshold: Least cosine to join.

    Returns:
        leader: int64 (n,), the index of each row's leader; kept rows are their own.
        similarity: float32 (n,), the cosine to the leader.
    """
    import faiss

    count = len(vectors)
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    # FAISS keeps inner products greater than the radius, the contract says at least the threshold.
    radius = float(np.nextafter(np.float32(threshold), np.float32(-1)))
    leader = np.arange(count)
    similarity = np.ones(count, np.float32)
    for start in range(0, count, SEARCH_BLOCK):
        rows = np.arange(start, min(start + SEARCH_BLOCK, count))
        rows = rows[leader[rows] == rows]
        limits, cosines, neighbours = index.range_search(vectors[rows], radius)
        for position, row in enumerate(rows):
            if leader[row] != row:  # joined another row of this block meanwhile
                continue
            found = slice(limits[position], limits[position + 1])
            for other, cosine in zip(neighbours[found], cosines[found], strict=True):
                if other > row and leader[other] == other:
                    leader[other], similarity[other] = row, cosine
    return leader, similarity


def dedupe(frame: pd.DataFrame, vectors: np.ndarray, threshold: float = 0.8) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Splits rows into those kept and those removed.

    Args:
        frame: Rows with `prompt`, in order of preference.
        vectors: float32 unit vectors (n, 384) of the prompts, same order.
        threshold: Least cosine that makes a row a copy.

    Returns:
        kept: The rows that stay, in order.
        removed: `prompt,kept_prompt,similarity,reason` (`exact` or `similar`), in order.
    """
    leader, similarity = leaders(vectors, threshold)
    gone = leader != np.arange(len(frame))
    prompts = frame["prompt"].to_numpy()
    removed = pd.DataFrame(
        {
            "prompt": prompts[gone],
            "kept_prompt": prompts[leader[gone]],
            "similarity": np.round(similarity[gone], 6),
            "reason": np.where(prompts[gone] == prompts[leader[gone]], "exact", "similar"),
        }
    )
    return frame[~gone].reset_index(drop=True), removed


def add_groups(frame: pd.DataFrame, vectors: np.ndarray, folds: int) -> pd.DataFrame:
    """Adds `group` (image_name of the row's leader at cosine 0.7) and `fold` (hash of the group, 0 to folds - 1)."""
    leader, _ = leaders(vectors, GROUP_THRESHOLD)
    group = frame["image_name"].to_numpy()[leader]
    return frame.assign(group=group, fold=[metadata.fold_of(name, folds) for name in group])


def hold_out(frame: pd.DataFrame, folds: Sequence[int], train: Path, test: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Writes the rows of some folds to one metadata CSV and all others to another.

    Args:
        frame: Rows with `fold`, as `run` returns them.
        folds: Folds to hold out; with none, no test file is written.
        train: CSV for the rest.
        test: CSV for the rows held out.

    Returns:
        The rest and the rows held out.

    Raises:
        UserError: If a side that is wanted would be empty.
    """
    held_out = frame["fold"].isin(list(folds))
    if held_out.all() or (len(folds) and not held_out.any()):
        raise UserError(f"{train}: folds {list(folds)} hold {held_out.sum()} of {len(frame)} rows; use more prompts")
    metadata.write_table(train, frame[~held_out])
    if len(folds):
        metadata.write_table(test, frame[held_out])
    return frame[~held_out], frame[held_out]


def removed_path(out: Path) -> Path:
    """`<name>.removed.csv` beside `<name>.csv`."""
    return out.with_name(f"{out.stem}.removed.csv")


def run(config: Config) -> pd.DataFrame:
    """Runs the stage.

    Returns:
        The kept rows, as written to `config.out`.

    Raises:
        UserError: On bad input files or settings.
    """
    if not config.prompts:
        raise UserError("dedupe: no input; give --prompts A.csv [B.csv ...]")
    if not 0 < config.threshold <= 1:
        raise UserError(f"--threshold {config.threshold}: must lie above 0 and at most 1")
    if config.folds < 2:
        raise UserError(f"--folds {config.folds}: must be at least 2")
    parts = []
    for path in config.prompts:
        part = metadata.with_keys(metadata.read_prompts(path), path)
        parts.append(part if "source" in part else part.assign(source=path.stem))
    stamp = Stamp(config.out.with_name(f".{config.out.stem}.done"), config.settings("out"), config.prompts)
    if stamp.is_current():
        log.info("%s is up to date", config.out)
        return metadata.read(config.out)

    frame = pd.concat(parts, ignore_index=True).fillna("")
    work = stamp.work_folder()
    vectors = text_encoder.encode(frame["prompt"].tolist(), work)
    kept, removed = dedupe(frame.assign(row=range(len(frame))), vectors, config.threshold)
    kept = add_groups(kept.drop(columns=["row"]), vectors[kept["row"].to_numpy()], config.folds)
    metadata.check_names(kept, config.out)
    metadata.write_table(removed_path(config.out), removed)
    metadata.write_table(config.out, kept)
    stamp.write([config.out, removed_path(config.out)])
    largest = kept["group"].value_counts(normalize=True).max()
    log.info("kept %d of %d prompts; largest group %.1f %%", len(kept), len(frame), 100 * largest)
    return kept
