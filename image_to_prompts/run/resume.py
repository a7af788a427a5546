"""How a stage continues after it was killed: a stamp for what is finished, sealed blocks and journals for what is not.

Whatever a stage finds of an earlier run carries a checksum, so that what a disk or a copy has damaged is made again:
the lines of a journal, the sealed files of half-done work, the outputs that a stamp lists.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from .devices import gather, rank_and_processes, wait_for_files
from .errors import UserError
from .files import make_folder, sha256, write_json, write_tensors, write_text

log = logging.getLogger(__name__)


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


def blocks(
    folder: Path,
    count: int,
    size: int,
    make: Callable[[Iterable[range]], Iterable[dict[str, Any]]],
    over: Callable[[], bool] = lambda: False,
) -> list[Path]:
    """Half-done work on `count` rows, in sealed files of `size` rows; those that are not there yet are made.

    Processes share what is to be made. Each sees all files in the end, or all raise an error.

    Args:
        folder: Where the files lie.
        count: Rows.
        size: Rows a file.
        make: Yields, for each of some ranges of rows, its tensors: all of PyTorch or all of NumPy.
        over: Asked before a block is made; once it is true, no more are.

    Returns:
        The files, `block-<first row>.safetensors`, in order; up to the first that was not made.

    Raises:
        UserError: If one process does not see what another made.
    """
    files = [folder / f"block-{start:09d}.safetensors" for start in range(0, count, size)]
    rank, processes = rank_and_processes()
    todo = [number for number in range(rank, len(files), processes) if not is_sealed(files[number])]
    made = iter(make(range(number * size, min((number + 1) * size, count)) for number in todo))
    stopped = False
    for number in todo:
        if stopped := over():
            break
        write_tensors(files[number], next(made))
        seal(files[number])
    if any(gather([stopped], processes)):
        return list(takewhile(is_sealed, files))
    wait_for_files(files)
    return files


def check_whole(folder: Path, *names: str) -> None:
    """Compares outputs with the stamp of the stage that made them, if that lies beside them.

    Args:
        folder: Where they lie.
        names: The files; a missing one is passed over, since its reader says so.

    Raises:
        UserError: If a file is another than the stage wrote.
    """
    for stamp in sorted(folder.glob(".*.done")):
        outputs = _read_stamp(stamp)["outputs"]
        for path in (folder / name for name in names if outputs.get(name)):
            if path.is_file() and sha256(path) != outputs[path.name]:
                remedy = f"run that stage again, or delete {stamp} if you have changed the file yourself"
                raise UserError(f"{path}: damaged: not what the stage that made it wrote; {remedy}")


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
        if not Path(lock.lock_file).exists():  # nobody holds it: no file can be made there
            raise UserError(f"{place}: cannot be written here; choose another path") from None
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


def is_finished(path: Path) -> bool:
    """Whether a stage has written its stamp, with whatever settings."""
    return bool(_read_stamp(path)["fingerprint"])


def fingerprint(settings: dict[str, Any], inputs: Iterable[Path]) -> str:
    """Tells work from that with other settings (JSON-like values) or other contents of input files: 64 hex digits."""
    text = json.dumps([settings, [sha256(file) for file in inputs if file.is_file()]], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


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
            inputs: Files on whose contents they depend; missing ones are skipped.
        """
        self.path, self.by = path, by
        self.inputs = [file for file in inputs if file.is_file()]
        self.fingerprint = fingerprint(settings, self.inputs)
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

    def check(self, outputs: Iterable[Path], reads: Iterable[Path] = (), overwrite: bool | None = None) -> None:
        """Looks whether files may be written.

        Args:
            outputs: The files.
            reads: What is read beside the inputs.
            overwrite: Whether files of others and edited ones may go; None: not the former, but the latter.

        Raises:
            UserError: If one of them is read here, or is there already and may not go.
        """
        stamp, there = _read_stamp(self.path), self.path.is_file()
        inputs = [*self.inputs, *reads]
        ours = stamp["outputs"] if stamp.get("by", self.by) == self.by else {}
        for out in outputs:
            name = os.path.relpath(out, self.path.parent)
            if any(out.exists() and out.samefile(file) for file in inputs):
                raise UserError(f"{out}: is read here; choose another --out")
            if out.exists() and not overwrite and name not in ours and not (there and not stamp["outputs"]):
                raise UserError(f"{out}: not written by {self.by} before; move it away, or choose another --out")
            if out.is_file() and overwrite is False and ours.get(name) not in (None, "", sha256(out)):
                raise UserError(f"{out}: was edited; choose another --out, or --overwrite to replace it")

    def claim(self, outputs: Iterable[Path], reads: Iterable[Path] = (), overwrite: bool | None = None) -> None:
        """Notes which files are going to be written, to be called before the first of them is; see `check`."""
        if rank_and_processes()[0]:
            return
        outputs = list(outputs)
        self.check(outputs, reads, overwrite)
        stamp = _read_stamp(self.path)
        ours = stamp["outputs"] if stamp.get("by", self.by) == self.by else {}
        names = {os.path.relpath(out, self.path.parent): "" for out in outputs}
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
