"""Arrays of embeddings on disk: `<name>.npy` float32 (n, d), its rows named in `<name>.names.csv`.

How an array was made stands in `<name>.json`. Arrays are joined by name, never by order.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..data import metadata
from ..run.errors import UserError
from ..run.files import write_array, write_json
from ..run.folders import EMBEDDED, read_json
from ..run.resume import check_whole

PROMPTS = EMBEDDED  # name of the prompts' own embeddings
ENDS = (".npy", ".names.csv", ".json")
KEPT = ("image_name", "prompt", "source", "group", "fold")  # columns of the prompts' names, where there are any


@dataclass
class Table:
    """Several arrays, row by row for the same images.

    Attributes:
        frame: n rows: image_name, prompt and what else is known of `KEPT`.
        arrays: By name, float32 (n, d); NaN in the rows of images that an array does not have.
        targets: float32 (n, 384), the prompts' embeddings.
        about: By name, how an array was made.
    """

    frame: pd.DataFrame
    arrays: dict[str, np.ndarray]
    targets: np.ndarray
    about: dict[str, dict[str, Any]]


def write(folder: Path, name: str, vectors: np.ndarray, names: pd.DataFrame, about: dict[str, Any]) -> None:
    """Writes an array with its names.

    Args:
        folder: Where to.
        name: Stem of the files.
        vectors: float32 (n, d), finite.
        names: n rows, `image_name` first and unique.
        about: How they were made, as JSON values.

    Raises:
        ValueError: If the lengths differ, a name stands twice or a vector is not finite.
    """
    if len(vectors) != len(names) or names["image_name"].duplicated().any() or not np.isfinite(vectors).all():
        raise ValueError(f"{name}: {vectors.shape} vectors for {len(names)} names, or a name twice, or not finite")
    write_array(folder / f"{name}.npy", vectors.astype(np.float32))
    metadata.write_table(folder / f"{name}.names.csv", names)
    write_json(folder / f"{name}.json", about)


def read(folder: Path, name: str) -> tuple[np.ndarray, pd.DataFrame, dict[str, Any]]:
    """Reads what `write` wrote: float32 (n, d), the names and how they were made.

    Raises:
        UserError: If a file is missing or damaged, or the rows are not as many as the names, or not finite.
    """
    path = folder / f"{name}.npy"
    check_whole(folder, *(f"{name}{end}" for end in ENDS))
    names = metadata.read_table(folder / f"{name}.names.csv", ("image_name",))
    try:
        vectors = np.load(path, allow_pickle=False)
        about = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path}: not an array of this project: {error}; run embed again") from error
    if vectors.ndim != 2 or len(vectors) != len(names):
        raise UserError(f"{path}: shape {vectors.shape} for {len(names)} names; run embed again")
    bad = np.flatnonzero(~np.isfinite(vectors).all(1))
    if len(bad):
        raise UserError(f"{path}: row {bad[0] + 1} ({names['image_name'][bad[0]]}) is not finite; run embed again")
    metadata.check_names(names, folder / f"{name}.names.csv")
    return vectors, names, about


def about(folder: Path, name: str) -> dict[str, Any]:
    """How an array was made; nothing where that is not known."""
    return read_json(folder / f"{name}.json")


def files(folder: Path) -> list[Path]:
    """All files of a folder's arrays."""
    return [folder / f"{name}{end}" for name in [*arrays(folder), PROMPTS] for end in ENDS]


def arrays(folder: Path) -> list[str]:
    """Names of the image arrays in a folder."""
    return sorted(path.stem for path in folder.glob("*.npy") if path.stem != PROMPTS)


def load(folder: Path, names: Sequence[str] = ()) -> Table:
    """Reads several arrays and the prompts' embeddings.

    Args:
        folder: What `embed` wrote.
        names: Image arrays, in the order wanted; none: all.

    Returns:
        The prompts whose image is in one array at least.

    Raises:
        UserError: As `read`, if there is no array, or if an image has no prompt.
    """
    names = list(names) or arrays(folder)
    if not names:
        raise UserError(f"{folder}: no arrays of embeddings; run embed first")
    targets, frame, _ = read(folder, PROMPTS)
    index = pd.Index(frame["image_name"])
    found, about, some = {}, {}, np.zeros(len(frame), bool)
    for name in names:
        vectors, own, about[name] = read(folder, name)
        rows = index.get_indexer(own["image_name"])
        if (rows < 0).any():
            missing = own["image_name"][int(np.argmin(rows))]
            raise UserError(f"{folder / name}.names.csv: {missing} has no row in {PROMPTS}.names.csv; run embed again")
        found[name] = np.full((len(frame), vectors.shape[1]), np.nan, np.float32)
        found[name][rows] = vectors
        some[rows] = True
    kept = frame[[column for column in KEPT if column in frame]]
    if "fold" in kept:
        kept = kept.assign(fold=pd.to_numeric(kept["fold"], errors="coerce"))
    kept = kept[some].reset_index(drop=True)
    return Table(kept, {name: vectors[some] for name, vectors in found.items()}, targets[some], about)
