"""Embeddings of texts on disk, by the hash of what they were made from: no stage encodes a text that another has.

One SQLite file in ~/.cache/image-to-prompts, or in the folder that IMAGE_TO_PROMPTS_CACHE names; each vector stands
there with a checksum. Delete it at will.
"""

import contextlib
import hashlib
import logging
import os
import sqlite3
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from ..run.errors import UserError

log = logging.getLogger(__name__)
FOLDER = "IMAGE_TO_PROMPTS_CACHE"
WAIT = 60.0  # seconds for another process that writes
TABLE = "CREATE TABLE IF NOT EXISTS vectors (key BLOB PRIMARY KEY, vector BLOB) WITHOUT ROWID"
SUM = 4  # bytes of a vector's checksum
ASKED = 500  # keys in one query; SQLite allows 999
_failed: set[Path] = set()  # files that this process has given up


def path() -> Path:
    """The cache's file."""
    folder = os.environ.get(FOLDER)
    return (Path(folder) if folder else Path.home() / ".cache" / "image-to-prompts") / "text.sqlite"


def key(encoder: str, text: str) -> bytes:
    """16 bytes that stand for a text and its encoder."""
    return hashlib.blake2b(f"{encoder}\0{text}".encode(), digest_size=16).digest()


def _checksum(content: bytes) -> bytes:
    return zlib.crc32(content).to_bytes(SUM, "little")


class TextCache:
    """Vectors by key; once the file cannot be used, the process keeps nothing any more, but a full disk ends it."""

    def __init__(self, width: int) -> None:
        """Opens the file; vectors are float32 of `width` numbers."""
        self.width = width
        self.database: sqlite3.Connection | None = None
        if path() in _failed:
            return
        with self._guarded():
            file = path()
            file.parent.mkdir(parents=True, exist_ok=True)
            self.database = sqlite3.connect(file, timeout=WAIT)
            self.database.execute(TABLE)

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        """Works without the file after its first failure; raises UserError if the disk is full."""
        try:
            yield
        except (OSError, RuntimeError, sqlite3.Error) as error:
            if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
                raise UserError(f"{path()}: no space left; free some, or name another folder: {FOLDER}") from error
            _failed.add(path())
            log.warning("%s: not used: %s (delete it, or name another folder: %s)", path(), error, FOLDER)
            self.close()

    def close(self) -> None:
        """Closes the file."""
        if self.database is not None:
            self.database.close()
            self.database = None

    def read(self, keys: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """Looks up keys.

        Returns:
            float32 (n, width), zeros where there is none; bool (n,), whether there is one.
        """
        vectors = np.zeros((len(keys), self.width), np.float32)
        there = np.zeros(len(keys), bool)
        rows = {key: row for row, key in enumerate(keys)}
        for start in range(0, len(keys), ASKED):
            asked = keys[start : start + ASKED]
            if self.database is None:
                break
            with self._guarded():
                query = f"SELECT * FROM vectors WHERE key IN ({','.join('?' * len(asked))})"
                for found, vector in self.database.execute(query, asked):
                    if len(vector) == 4 * self.width + SUM and vector[-SUM:] == _checksum(found + vector[:-SUM]):
                        vectors[rows[found]] = np.frombuffer(vector[:-SUM], np.float32)
                        there[rows[found]] = True
        return vectors, there

    def write(self, keys: Sequence[bytes], vectors: np.ndarray) -> None:
        """Keeps float32 (n, width) vectors, all of them or, after a kill, none."""
        if self.database is None:
            return
        rows = [(key, vector.tobytes()) for key, vector in zip(keys, vectors, strict=True)]
        rows = [(key, vector + _checksum(key + vector)) for key, vector in rows]
        with self._guarded(), self.database:
            self.database.executemany("INSERT OR REPLACE INTO vectors VALUES (?, ?)", rows)
