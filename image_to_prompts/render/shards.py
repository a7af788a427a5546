"""Tar shards in webdataset's layout, which grow image by image and go on after a kill."""

import hashlib
import io
import json
import logging
import os
import shutil
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..run.errors import UserError
from ..run.files import atomic_path
from ..run.progress import progress
from .store import KEYS, FolderStore, Record, Row, foreign

log = logging.getLogger(__name__)


def _is_begun_by(path: Path, row: Row) -> bool:
    """Whether a file that may be cut short begins as a shard whose first row this is."""
    with path.open("rb") as file:
        head = file.read(tarfile.LENGTH_NAME)
    names = (row.file, f"{Path(row.file).stem}.json", "././@LongLink")
    return any(name.encode().ljust(tarfile.LENGTH_NAME, b"\0").startswith(head) for name in names)


class TarStore(FolderStore):
    """Tar shards of `unit` rows in webdataset's layout: `<stem>.png`, then `<stem>.json` with the row's record.

    A shard grows under the name `<number>.tar.part` and is its own journal: a kill tears its last row at most, which
    is cut off before it grows on. The webdataset library's writer cannot go on with a shard, so tarfile writes it.
    """

    def __init__(self, out: Path, settings: Record, journal: str, unit: int, total: int) -> None:
        super().__init__(out, settings, journal)
        self.unit, self.total = unit, total
        self._ends: dict[int, int] = {}
        self._tar: Any = None  # the open shard, a tarfile.TarFile
        self._number = -1
        self._finished: set[int] = set()

    def path(self, number: int) -> Path:
        """File of a finished shard."""
        return self.out / f"{number:05d}.tar"

    def part(self, number: int) -> Path:
        """File of a growing shard."""
        return self.out / f"{number:05d}.tar.part"

    def size(self, number: int) -> int:
        """Rows of a shard; the last one may hold fewer."""
        return min(self.unit, self.total - number * self.unit)

    def shards(self, rows: list[Row]) -> list[tuple[int, list[Row]]]:
        """Number and rows of each shard of `rows`, which are whole shards."""
        units = [rows[start : start + self.unit] for start in range(0, len(rows), self.unit)]
        return [(unit[0].number // self.unit, unit) for unit in units]

    def adopt(self, folders: Sequence[Path], rows: list[Row]) -> set[str]:
        """See `FolderStore.adopt`; an unfinished shard is copied, before `scan`, and continued here."""
        done: set[str] = set()
        for number, unit in self.shards(rows):
            here = (self.path(number), self.part(number))
            found: dict[Path, set[str]] = {}
            for file in (folder / path.name for folder in folders for path in here):
                if file.is_file():
                    other = TarStore(file.parent, self.settings, "none", self.unit, self.total)
                    other._take(file, unit, read_shard(file, check=False)[0])
                    found[file] = set(other.records)
            longest = max(found, key=lambda file: (len(found[file]), file.suffix == ".tar"), default=None)
            if longest and longest.suffix == ".tar" and len(found[longest]) >= len(unit):
                done |= found[longest]
            elif longest and not any(path.is_file() for path in here):
                with atomic_path(self.part(number)) as part:
                    shutil.copyfile(longest, part)
        return done

    def scan(self, rows: list[Row]) -> None:
        """See `FolderStore.scan`; a shard that is whole but for its name is finished."""
        for number, unit in progress(self.shards(rows), "check shards"):
            for path in (self.path(number), self.part(number)):
                if path.is_file():
                    records, ends = read_shard(path)
                    if not records and not _is_begun_by(path, unit[0]):
                        raise foreign(path)
                    self._take(path, unit, records)
                    self._ends[number] = max(ends[: len(unit)], default=0)  # rows that are no more are cut off
                    if len(records) >= len(unit):
                        self._finished.add(number)
                        blocks = -(-(self._ends[number] + 2 * tarfile.BLOCKSIZE) // tarfile.RECORDSIZE)
                        if path == self.part(number) or path.stat().st_size != blocks * tarfile.RECORDSIZE:
                            self._open(number)
                            self.close()
                    break

    def _take(self, path: Path, rows: list[Row], records: list[Record]) -> None:
        for row, record in zip(rows, records, strict=False):
            inside = row._replace(file=f"{path.name.removesuffix('.part')}/{row.file}")
            if record["image_name"] != row.name or not self.fits(record, inside):
                there = f"{record['image_name']!r} with seed {record['seed']}"
                wanted = f"{row.name!r} with seed {row.seed} or another prompt (image {row.number + 1})"
                said = "add rows at the end only, choose another --out, or delete this shard"
                raise UserError(f"{path}: holds {there} where the metadata has {wanted}; {said}")
            self.records[row.name] = record

    def add(self, row: Row, data: bytes | None, flag: str) -> None:
        """See `FolderStore.add`; rows of a shard must come in order."""
        number = row.number // self.unit
        if number != self._number:
            self.close()
            self._open(number)
        stem = Path(row.file).stem
        record = self.record(row._replace(file=f"{self.path(number).name}/{row.file}"), data, flag)
        if data is not None:
            self._member(row.file, data)
        self._member(f"{stem}.json", json.dumps(record, ensure_ascii=False).encode())
        self._tar.fileobj.flush()
        self.records[row.name] = record
        if row.number + 1 == number * self.unit + self.size(number):
            self._finished.add(number)
            self.close()

    def _open(self, number: int) -> None:
        part, end = self.part(number), self._ends.get(number, 0)
        if self.path(number).is_file():  # damaged, or shorter than it should be now
            self.path(number).replace(part)
        if end == 0:
            part.unlink(missing_ok=True)
        else:  # cut off what is torn and put the two empty blocks behind it, after which tarfile appends
            os.truncate(part, end)
            os.truncate(part, end + 2 * tarfile.BLOCKSIZE)
        self._tar = tarfile.open(part, "a" if end else "w", format=tarfile.GNU_FORMAT)  # noqa: SIM115
        self._number = number

    def _member(self, name: str, data: bytes) -> None:
        member = tarfile.TarInfo(name)  # owner 0, time 0: the same bytes whoever writes them and when
        member.size = len(data)
        self._tar.addfile(member, io.BytesIO(data))

    def close(self) -> None:
        """Closes the open shard and, if all its rows are there, gives it its name."""
        if self._tar is None:
            return
        number = self._number
        if number in self._finished:
            self._tar.close()
            self.part(number).replace(self.path(number))
        else:
            self._tar.fileobj.close()  # without the end mark, which would stand in the way of the next row
        self._tar, self._number = None, -1

    def listed(self) -> dict[str, Record]:
        """Records for the manifest, with the file that a row lies in now: its shard may not be finished."""
        found = {}
        for name, record in self.records.items():
            shard, _, file = record["file"].partition("/")
            unfinished = file and int(shard.removesuffix(".tar")) not in self._finished
            found[name] = {**record, "file": f"{shard}.part/{file}"} if unfinished else record
        return found


def read_shard(path: Path, check: bool = True) -> tuple[list[Record], list[int]]:
    """Reads a shard up to its end or its first damaged row.

    Args:
        path: The shard or part of one.
        check: Whether to compare every image with its SHA-256.

    Returns:
        Records of the good rows at its beginning, and the offset at which each ends.
    """
    records, ends = [], []
    try:
        with tarfile.open(path, "r:") as archive:
            image = None
            for member in archive:
                file = archive.extractfile(member) if check or member.name.endswith(".json") else None
                data = file.read() if file else b""
                if not member.name.endswith(".json"):
                    image = data
                    continue
                record = json.loads(data)
                if record.keys() != KEYS:
                    break
                if check and record["sha256"] != (hashlib.sha256(image).hexdigest() if image is not None else ""):
                    break
                records.append(record)
                image = None
                ends.append(member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE)
    except (tarfile.TarError, ValueError, OSError) as error:
        log.info("%s: %s; the %d rows before that are kept", path, error, len(records))
    return records, ends
