"""Banks: prompts by the million, with what a tower that knows images and texts makes of each, and their embeddings.

A bank is a folder. Each of its shards has `vectors-0000.npy`, float16 (n, d), the tower's unit vectors;
`targets-0000.npy`, float16 (n, 384), all-MiniLM-L6-v2's; and `texts-0000.arrow`, the prompts. `bank.json` says which
tower it was, with which weights, and what the files are. With fewer numbers than the tower gives, `projection.npy`,
float32 (width, d), maps its vectors to them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..models import metrics
from ..run.errors import UserError
from ..run.files import write_array, write_json, write_text
from ..run.folders import BANK, read_json
from ..search.nearest import Parts, Stored, nearest, read_texts, write_texts

if TYPE_CHECKING:
    import pyarrow as pa

PROJECTION = "projection.npy"
KEPT = 60  # nearest prompts of which a projection should keep as many as it can


@dataclass(frozen=True)
class Bank:
    """A bank that was opened; its rows are read from the disk when they are asked for.

    Attributes:
        folder: Where it lies.
        tower: Encoder of images whose vectors its own are compared with.
        weights: Tells the tower's weights from others.
        texts: n prompts.
        vectors: float16 (n, d).
        targets: float16 (n, 384).
        projection: float32 (width, d) that maps the tower's vectors to the bank's; None: they are the same.
    """

    folder: Path
    tower: str
    weights: str
    texts: pa.ChunkedArray
    vectors: Parts
    targets: Parts
    projection: np.ndarray | None

    def queries(self, features: np.ndarray) -> np.ndarray:
        """The tower's vectors of images, float32 (n, width), as the bank's own: float32 (n, d)."""
        return projected(features, self.projection)


def projected(features: np.ndarray, projection: np.ndarray | None) -> np.ndarray:
    """Unit vectors of a tower's vectors, with a projection unit vectors of what it keeps."""
    found = metrics.unit(features)
    return found if projection is None else metrics.unit(metrics.mapped(found, projection))


def principal(vectors: np.ndarray, dimensions: int) -> np.ndarray:
    """The projection that keeps most of inner products: eigenvectors of the second moments.

    Nothing is subtracted before, since cosines are to stay.

    Args:
        vectors: float32 (n, width), a sample.
        dimensions: Numbers to keep.

    Returns:
        float32 (width, dimensions).
    """
    moments = vectors.T.astype(np.float64) @ vectors
    _, directions = np.linalg.eigh(moments)
    return np.ascontiguousarray(directions[:, : -dimensions - 1 : -1], np.float32)


def kept_share(vectors: np.ndarray, projection: np.ndarray, queries: np.ndarray, count: int = KEPT) -> float:
    """The share of the nearest rows that are still among as many nearest after a projection.

    Args:
        vectors: float32 (n, width) unit vectors.
        projection: float32 (width, d).
        queries: float32 (m, width).
        count: How many of the nearest.
    """
    before, _ = nearest(queries, vectors, count)
    after, _ = nearest(projected(queries, projection), projected(vectors, projection), count)
    return float(np.mean([len(np.intersect1d(*rows)) / len(rows[0]) for rows in zip(before, after, strict=True)]))


def files(number: int) -> list[str]:
    """Names of a shard's files: vectors, targets, texts."""
    return [f"vectors-{number:04d}.npy", f"targets-{number:04d}.npy", f"texts-{number:04d}.arrow"]


def write_shard(folder: Path, number: int, vectors: np.ndarray, targets: np.ndarray, texts: Sequence[str]) -> None:
    """Writes the files of a shard, each atomically."""
    names = files(number)
    write_array(folder / names[0], vectors.astype(np.float16))
    write_array(folder / names[1], targets.astype(np.float16))
    write_texts(folder / names[2], texts)


def write_about(folder: Path, about: dict[str, Any], readme: str) -> None:
    """Writes README.md and, last, bank.json: a folder with one is a bank."""
    write_text(folder / "README.md", readme)
    write_json(folder / BANK, about)


def open_bank(folder: Path) -> Bank:
    """Opens a bank.

    Raises:
        UserError: If the folder holds none, or a file of it is missing or damaged.
    """
    import pyarrow as pa

    about = read_json(folder / BANK)
    try:
        shards, rows = range(len(about["shards"])), about["shards"]
        names = [[folder / name for name in files(number)] for number in shards]
        vectors, targets = Parts([Stored(one[0]) for one in names]), Parts([Stored(one[1]) for one in names])
        chunks = [chunk for one in names for chunk in read_texts(one[2]).chunks]
        texts = pa.chunked_array(chunks, pa.large_string())
        projection = np.load(folder / PROJECTION, allow_pickle=False) if about["projected"] else None
        found = Bank(folder, about["tower"], about["weights"], texts, vectors, targets, projection)
    except KeyError as error:
        raise UserError(f"{folder}: not a bank: no {BANK} that says what it is; embed --texts makes one") from error
    except (OSError, ValueError, pa.ArrowInvalid) as error:
        raise UserError(f"{folder}: damaged: {error}; fetch or make the bank again") from error
    if not len(texts) == len(vectors) == len(targets) == sum(rows):
        counts = f"{len(texts)} texts, {len(vectors)} vectors, {len(targets)} targets"
        raise UserError(f"{folder}: damaged: {counts}; fetch or make the bank again")
    return found
