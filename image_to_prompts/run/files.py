"""Atomic writes, journals, seals, stamps and locks: what makes every stage safe to kill and start again.

Whatever a stage finds of an earlier run carries a checksum, so that what a disk or a copy has damaged is made again:
the lines of a journal, the sealed files of half-done work, the outputs that a stamp lists.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import logging
import os
import re
import shutil
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

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


def write_tensors(path: Path, tensors: dict[str, Any]) -> None:
    """Writes tensors, all of PyTorch or all of NumPy, as .safetensors atomically.

    The library writes to a temporary file of its own first; here it lies in a folder that `sweep` knows.
    """
    import numpy as np

    are_arrays = isinstance(next(iter(tensors.values())), np.ndarray)
    library = importlib.import_module(f"safetensors.{'numpy' if are_arrays else 'torch'}")
    folder = make_folder(path.with_name(f".{path.name}.{os.getpid()}.part"))
    try:
        library.save_file(tensors, folder / path.name)
        (folder / path.name).replace(path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


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
        for path in (folder / name for name in names if outputs.get(name)):
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
        return {**stamp, "fingerprint": str(stamp["fingerprint"]), "outputs": dict(stamp["outputs"])}
    except (OSError, ValueError, KeyError, TypeError):
        return {"fingerprint": "", "outputs": {}}


class Stamp:
    """Remembers from which settings and inputs a command's outputs were made, so that a second run does nothing.

    Its file also says which files the command may replace: `claim` writes their names before they are made, `write`
    their digests afterwards. A command killed between the two starts again from its work folder, whose name is the
    fingerprint of the same settings and inputs.
    """

    def __init__(self, path: Path, by: str, settings: dict[str, Any], inputs: Iterable[Path] = ()) -> None:
        """Computes the fingerprint.

        Args:
            path: Where the stamp lives, beside or above the outputs.
            by: Name of the command.
            settings: JSON-like values on which the outputs depend.
            inputs: Files on whose contents they depend; missing ones are passed over.
        """
        self.path, self.by = path, by
        self.inputs = [file for file in inputs if file.is_file()]
        text = json.dumps([settings, [sha256(file) for file in self.inputs]], sort_keys=True, default=str)
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
        if current:
            self._clear(stamp["outputs"])
        return current

    def claim(self, outputs: Iterable[Path], reads: Iterable[Path] = ()) -> None:
        """Notes which files are going to be written, to be called before the first of them is.

        Args:
            outputs: The files.
            reads: What is read beside the inputs.

        Raises:
            UserError: If one of them is read here, or is there already and not from an earlier run of this command.
        """
        if rank_and_processes()[0]:
            return
        stamp, there = _read_stamp(self.path), self.path.is_file()
        names, inputs = {os.path.relpath(out, self.path.parent): "" for out in outputs}, [*self.inputs, *reads]
        ours = stamp["outputs"] if stamp.get("by", self.by) == self.by else {}
        for name in names:
            out = self.path.parent / name
            if any(out.exists() and out.samefile(file) for file in inputs):
                raise UserError(f"{out}: is read here; choose another --out")
            if out.exists() and name not in ours and not (there and not stamp["outputs"]):
                raise UserError(f"{out}: not written by {self.by} before; move it away, or choose another --out")
        claimed = {"by": self.by, "fingerprint": "", "outputs": {**dict.fromkeys(ours, ""), **names}}
        if claimed != stamp:
            write_json(self.path, claimed)

    def write(self, outputs: Iterable[Path]) -> None:
        """Declares `outputs` finished; removes what earlier runs left: work folders, files that are made no more."""
        digests = {os.path.relpath(out, self.path.parent): sha256(out) for out in outputs}
        for name in _read_stamp(self.path)["outputs"].keys() - digests.keys():
            (self.path.parent / name).unlink(missing_ok=True)
        write_json(self.path, {"by": self.by, "fingerprint": self.fingerprint, "outputs": digests})
        self._clear(digests)

    def work_folder(self) -> Path:
        """A folder for half-done work that only the same settings and inputs may continue."""
        return make_folder(self._work)

    def _clear(self, outputs: Iterable[str]) -> None:
        """Removes what this and earlier runs left half-done; the lock on the output keeps others from working on it."""
        for folder in self.path.parent.glob(f"{self.path.stem}-*"):
            if re.fullmatch("[0-9a-f]{12}", folder.name.removeprefix(f"{self.path.stem}-")):
                shutil.rmtree(folder, ignore_errors=True)
        sweep(self.path.parent / name for name in (*outputs, self.path.name))


def sweep(paths: Iterable[Path]) -> None:
    """Removes what killed processes left half-written of files that nobody else is writing now."""
    wanted = set(paths)
    for folder in {path.parent for path in wanted}:
        for part in folder.glob(".*.part"):
            name = re.fullmatch(r"\.(.+)\.\d+\.part", part.name)
            if name and folder / name[1] in wanted:
                shutil.rmtree(part, ignore_errors=True) if part.is_dir() else part.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(path: Path, by: str, outputs: Sequence[Path], reads: Iterable[Path] = ()) -> Iterator[None]:
    """For commands that do their work anew each time: a stamp around the writing of `outputs`; see `Stamp`."""
    stamp = Stamp(path, by, {})
    with alone(path):
        stamp.claim(outputs, reads)
        yield
        stamp.write(outputs)
