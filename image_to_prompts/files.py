"""Atomic writes, append-only journals and stamps: what makes every stage safe to kill and start again."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UserError

if TYPE_CHECKING:
    import numpy as np


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path` that replaces it only when the block ends without an error.

    Raises:
        UserError: If the folder cannot be made, for example because a part of the path is a regular file.
    """
    make_folder(path.parent)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def make_folder(folder: Path) -> Path:
    """Makes `folder` and its parents; raises UserError where a regular file stands in the way."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"{folder}: a part of this path is a regular file; choose another output path") from error
    except PermissionError as error:
        raise UserError(f"{folder}: no permission to write here; choose another output path") from error
    return folder


def shown(path: Path | str) -> str:
    """A path, or what is said of one, as text that can be written anywhere; bytes that are not UTF-8 are replaced."""
    return os.fsencode(path).decode("utf-8", "replace")


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text atomically."""
    with atomic_path(path) as part:
        part.write_text(text, encoding="utf-8", newline="")


def write_array(path: Path, array: np.ndarray) -> None:
    """Writes an array as .npy atomically."""
    import numpy as np

    with atomic_path(path) as part, part.open("wb") as file:
        np.save(file, array)


def write_json(path: Path, value: Any) -> None:
    """Writes indented JSON atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def sha256(path: Path) -> str:
    """SHA-256 of a file, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def append_line(path: Path, *records: dict[str, Any]) -> None:
    """Appends a JSON line a record to a journal, all in one write.

    The line break comes first, so that a line torn by a kill stays alone.
    """
    with path.open("a", encoding="utf-8") as file:
        file.write("".join("\n" + json.dumps(record, ensure_ascii=False) for record in records))


def read_journal(path: Path) -> list[dict[str, Any]]:
    """Reads a journal of JSON lines, without those that a kill left half-written; a missing journal is empty."""
    records = []
    for line in path.read_bytes().split(b"\n") if path.exists() else ():
        with contextlib.suppress(ValueError):  # a part of an object is never JSON
            records.append(json.loads(line))
    return records


class Stamp:
    """Remembers from which settings and inputs a stage's outputs were made, so that a second run does nothing.

    The stamp is written after the outputs. A stage killed half-way leaves none and starts again from its journal,
    whose own key is the same fingerprint.
    """

    def __init__(self, path: Path, settings: dict[str, Any], inputs: Iterable[Path] = ()) -> None:
        """Computes the fingerprint.

        Args:
            path: Where the stamp lives.
            settings: JSON-like values on which the outputs depend.
            inputs: Files on whose contents they depend; missing ones are passed over.
        """
        self.path = path
        digests = [sha256(file) for file in inputs if file.is_file()]
        text = json.dumps([settings, digests], sort_keys=True, default=str)
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()
        self._work = path.with_name(f"{path.stem}-{self.fingerprint[:12]}")

    def is_current(self) -> bool:
        """Whether the outputs of exactly these settings and inputs are there, unchanged in size.

        If so, it removes what a run left that was killed before it had cleared up.
        """
        if not self.path.is_file():
            return False
        stamp = json.loads(self.path.read_text())
        current = stamp["fingerprint"] == self.fingerprint and all(
            (self.path.parent / name).is_file() and (self.path.parent / name).stat().st_size == size
            for name, size in stamp["outputs"].items()
        )
        if current:
            self._clear()
        return current

    def write(self, outputs: list[Path]) -> None:
        """Declares `outputs`, which lie beside or below the stamp, finished, and removes the work folder."""
        sizes = {os.path.relpath(out, self.path.parent): out.stat().st_size for out in outputs}
        write_json(self.path, {"fingerprint": self.fingerprint, "outputs": sizes})
        self._clear()

    def work_folder(self) -> Path:
        """A folder for half-done work that only the same settings and inputs may continue."""
        return make_folder(self._work)

    def _clear(self) -> None:
        shutil.rmtree(self._work, ignore_errors=True)
