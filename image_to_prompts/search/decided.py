"""The fate of rows, block by block on the disk: a killed search continues after the last decided block."""

import hashlib
from pathlib import Path

import numpy as np

from ..run.files import let_go, make_folder, read_tensors, write_tensors
from ..run.resume import is_sealed, seal

HASHED = 65_536  # rows of a mapped file that are read at once


class Decided:
    """Decided blocks of one search.

    Attributes:
        folder: Where they lie; no other vectors, threshold or number of fixed rows use it.
    """

    def __init__(self, folder: Path, vectors: np.ndarray, threshold: float, fixed: int) -> None:
        digest = hashlib.sha256()
        for start in range(0, len(vectors), HASHED):
            digest.update(np.ascontiguousarray(vectors[start : start + HASHED], np.float32).data)
            let_go(vectors)
        self.folder = make_folder(folder / f"{threshold}-{fixed}-{digest.hexdigest()[:16]}")

    def read(self, rows: slice, leader: np.ndarray, cosine: np.ndarray) -> bool:
        """Fills in what is known of a block; False where that is nothing."""
        if not is_sealed(self._file(rows)):
            return False
        decided = read_tensors(self._file(rows))
        leader[rows], cosine[rows] = decided["leader"], decided["cosine"]
        return True

    def keep(self, rows: slice, leader: np.ndarray, cosine: np.ndarray) -> None:
        """Writes a block."""
        write_tensors(self._file(rows), {"leader": leader[rows], "cosine": cosine[rows]})
        seal(self._file(rows))

    def _file(self, rows: slice) -> Path:
        return self.folder / f"decided-{rows.start:012d}-{rows.stop:012d}.safetensors"
