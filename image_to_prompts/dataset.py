"""Rows to train on: metadata, images and targets, split by fold."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from . import metadata, text_encoder
from .dedupe import add_groups
from .errors import UserError

NEAR = 0.8  # a validation prompt this close to a training prompt is left out


@dataclass
class Rows:
    """Rows to train on and to validate with.

    Attributes:
        frame: image_name, prompt, fold and the rest of the metadata.
        paths: Image file of each row.
        targets: float32 (n, 384) prompt embeddings.
        train: Row numbers that train.
        valid: Row numbers that validate.
        left_out: Number of validation rows dropped because a training prompt is within cosine 0.8.
    """

    frame: pd.DataFrame
    paths: list[Path]
    targets: np.ndarray
    train: np.ndarray
    valid: np.ndarray
    left_out: int


def load_rows(csvs: tuple[Path, ...], folders: tuple[Path, ...], fold: int = 0, work: Path | None = None) -> Rows:
    """Loads metadata, finds every row's image, embeds the prompts and splits by fold.

    Args:
        csvs: Metadata CSVs; where one has no `fold`, all rows are grouped and folded anew.
        folders: Image folders, one a CSV or one for all.
        fold: Fold that validates.
        work: Folder for half-done embeddings.

    Raises:
        UserError: If a row has no image file, or a side of the split is empty.
    """
    if not csvs or len(folders) not in (1, len(csvs)):
        raise UserError(f"--metadata has {len(csvs)} files, --images {len(folders)} folders; give one folder a file")
    frames, paths = [], []
    for csv, folder in zip(csvs, folders * len(csvs) if len(folders) == 1 else folders, strict=True):
        frame = metadata.read(csv)
        files = [folder / metadata.image_file(name) for name in frame["image_name"]]
        missing = [row for row, file in enumerate(files) if not file.is_file()]
        if missing:
            raise UserError(
                f"{csv}: row {missing[0] + 1}: no image {files[missing[0]]} ({len(missing)} of {len(files)} rows have "
                "none); run render first or correct --images"
            )
        frames.append(frame)
        paths += files
    frame = pd.concat(frames, ignore_index=True)
    targets = text_encoder.encode(frame["prompt"].tolist(), work)
    if "fold" not in frame or frame["fold"].isna().any():
        frame = add_groups(frame, targets, folds=8)
    valid = np.flatnonzero(frame["fold"] == fold)
    train = np.flatnonzero(frame["fold"] != fold)
    if not len(valid) or not len(train):
        raise UserError(f"fold {fold} holds {len(valid)} of {len(frame)} rows; choose another --fold or add prompts")
    too_near = near_training(targets[valid], targets[train])
    return Rows(frame, paths, targets, train, valid[~too_near], int(too_near.sum()))


def near_training(targets: np.ndarray, train_targets: np.ndarray) -> np.ndarray:
    """Which rows of `targets` (n, 384) reach cosine 0.8 with a row of `train_targets` (m, 384): bool (n,)."""
    import faiss

    index = faiss.IndexFlatIP(targets.shape[1])
    index.add(train_targets)
    return index.search(targets, 1)[0][:, 0] >= NEAR


class EpochOrder:
    """A sampler whose order depends on (seed, epoch) alone, so that a resumed run sees the same batches."""

    def __init__(self, rows: np.ndarray, seed: int) -> None:
        self.rows, self.seed, self.epoch = rows, seed, 0

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[int]:
        return iter(np.random.default_rng((self.seed, self.epoch)).permutation(self.rows).tolist())
