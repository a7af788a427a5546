"""Atomic writes, journals, seals, stamps and locks: what makes every stage safe to kill and start again.

Whatever a stage finds of an earlier run carries a checksum, so that what a disk or a copy has damaged is made again:
the lines of a journal, the sealed files of half-done work, the outputs that a stamp lists.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import archives
from .devices import rank_and_processes
from .errors import UserError

if TYPE_CHECKING:
    import numpy as np

log = logging.getLogger(__name__)


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
    except OSError as error:  # a full disk names no file, and nobody knows the temporary one
        if error.errno is not None and error.filename in (None, str(part)):
            error.filename = str(path)
        raise
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
    write_blocks(path, array.shape, array.dtype, [array])


def write_blocks(path: Path, shape: tuple[int, ...], dtype: np.dtype, blocks: Iterable[np.ndarray]) -> None:
    """Writes an array as .npy atomically, without holding more than a block of it.

    Args:
        path: Where to.
        shape: Of the whole.
        dtype: Of the whole.
        blocks: Its rows, in order.
    """
    import numpy as np

    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
    with atomic_path(path) as part, part.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for block in blocks:  # by Python: NumPy's own writing does not say that a disk is full, a mapped file kills
            file.write(np.ascontiguousarray(block, dtype).data)


def write_json(path: Path, value: Any) -> None:
    """Writes indented JSON atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def sha256(path: Path) -> str:
    """SHA-256 of a file, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def append_line(path: Path, *records: dict[str, Any]) -> None:
    """Appends a line a record to a journal, its checksum and its JSON, all in one write.

    The line break comes first, so that a line torn by a kill stays alone.
    """
    texts = [json.dumps(record, ensure_ascii=False).encode("utf-8") for record in records]
    with path.open("ab") as file:
        file.write(b"".join(b"\n%08x %s" % (zlib.crc32(text), text) for text in texts))


def read_journal(path: Path) -> list[dict[str, Any]]:
    """Reads a journal, without lines that a kill left half-written or that are damaged; a missing journal is empty."""
    records = []
    for line in path.read_bytes().split(b"\n") if path.exists() else ():
        checksum, _, text = line.partition(b" ")
        if checksum == b"%08x" % zlib.crc32(text):
            records.append(json.loads(text))
    return records


def _seal(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def seal(*paths: Path) -> None:
    """Declares files of half-done work finished, by a second file with the SHA-256 of each."""
    for path in paths:
        write_text(_seal(path), sha256(path))


def is_sealed(*paths: Path) -> bool:
    """Whether all files are there as they were when they were sealed."""
    try:
        return all(_seal(path).read_bytes() == sha256(path).encode() for path in paths)
    except FileNotFoundError:
        return False


def check_whole(folder: Path, *names: str) -> None:
    """Compares outputs with the stamp of the stage that made them, if that lies beside them.

    Args:
        folder: Where they lie.
        names: The files; of one that is not there its reader tells.

    Raises:
        UserError: If a file is another than the stage wrote.
    """
    for stamp in sorted(folder.glob(".*.done")):
        outputs = _read_stamp(stamp)["outputs"]
        for path in (folder / name for name in names if name in outputs):
            if path.is_file() and sha256(path) != outputs[path.name]:
                raise UserError(
                    f"{path}: damaged: not what the stage that made it wrote; run that stage again, or delete {stamp} "
                    "if you have changed the file yourself"
                )


@contextlib.contextmanager
def alone(place: Path) -> Iterator[None]:
    """Keeps other processes from working on the same output: they wait, and say so.

    Processes of one `accelerate launch` are one: the first of them keeps the others' place.

    Args:
        place: The output; the lock lies beside it.
    """
    from filelock import FileLock, Timeout

    if rank_and_processes()[0]:
        yield
        return
    lock = FileLock(make_folder(place.parent) / f".{place.name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.warning("%s: another process is working on it; waiting for its end", place)
        lock.acquire()
    except OSError as error:
        error.filename = str(place)
        raise
    try:
        yield
    finally:
        lock.release()


def _read_stamp(path: Path) -> dict[str, Any]:
    """A stamp; an empty one where there is none or where it is damaged."""
    try:
        stamp = json.loads(path.read_bytes())
        return {"fingerprint": str(stamp["fingerprint"]), **{key: dict(stamp[key]) for key in ("outputs", "broken")}}
    except (OSError, ValueError, KeyError, TypeError):
        return {"fingerprint": "", "outputs": {}, "broken": {}}


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
        """Whether the outputs of exactly these settings and inputs are there, unchanged.

        If so, it removes what a run left that was killed before it had cleared up.
        """
        stamp = _read_stamp(self.path)
        current = stamp["fingerprint"] == self.fingerprint and all(
            (self.path.parent / name).is_file() and sha256(self.path.parent / name) == digest
            for name, digest in stamp["outputs"].items()
        )
        current = current and all(archives.digest(Path(name)) == found for name, found in stamp["broken"].items())
        if current:
            self._clear()
        return current

    def revoke(self) -> None:
        """Removes the stamp, before outputs that it lists are replaced one by one."""
        self.path.unlink(missing_ok=True)

    def write(self, outputs: list[Path], broken: Iterable[Path] = ()) -> None:
        """Declares `outputs`, which lie beside or below the stamp, finished, and removes the work folder.

        Args:
            outputs: The files.
            broken: Images that could not be read; the stamp holds until one of them has changed.
        """
        digests = {os.path.relpath(out, self.path.parent): sha256(out) for out in outputs}
        unread = {str(path): archives.digest(path) for path in broken}
        write_json(self.path, {"fingerprint": self.fingerprint, "outputs": digests, "broken": unread})
        self._clear()

    def work_folder(self) -> Path:
        """A folder for half-done work that only the same settings and inputs may continue."""
        return make_folder(self._work)

    def _clear(self) -> None:
        shutil.rmtree(self._work, ignore_errors=True)
