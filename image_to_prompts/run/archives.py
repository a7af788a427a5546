"""Images inside archives, named as if an archive were a folder: `00003.tar/abc.png`, `train.parquet/0000007.png`.

Tar shards are in webdataset's layout, zip files are DiffusionDB's parts, Parquet files the Hugging Face hub's. Members
are read in any order, so that rows can be shuffled; the webdataset library reads the same tar files as a stream.
"""

import hashlib
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

BROKEN = (tarfile.TarError, zipfile.BadZipFile, NotImplementedError, ValueError, struct.error, zlib.error)


class Cell(NamedTuple):
    """Where an image stands in a Parquet file: its column, its row group, and its row in that."""

    column: str
    group: int
    row: int


Member = zipfile.ZipInfo | tarfile.TarInfo | Cell


def is_archive(path: Path) -> bool:
    """Whether a file's name is that of a tar shard, a part of DiffusionDB or a Parquet file, which may hold images.

    A shard that `render` has not finished yet is called `.tar.part`. Other zip files are left alone.
    """
    return path.name.endswith((".tar", ".tar.part", ".parquet")) or path.match("part-*.zip")


def is_member(path: Path) -> bool:
    """Whether `path` names a member of an archive rather than a file."""
    return is_archive(path.parent) and path.parent.is_file()


@lru_cache(maxsize=32)  # so many stay open
def _zip(archive: Path, modified: int) -> zipfile.ZipFile:
    return zipfile.ZipFile(archive)


@cache
def _index(archive: Path, modified: int) -> dict[str, Member]:
    members: dict[str, Member]
    if archive.suffix == ".zip":
        members = {Path(one.filename).name: one for one in _zip(archive, modified).infolist() if not one.is_dir()}
    elif archive.suffix == ".parquet":
        members = dict(_cells(archive))
    else:
        with tarfile.open(archive, "r:") as tar:
            members = {Path(one.name).name: one for one in _whole(tar, archive) if one.isfile()}
    return {name: member for name, member in members.items() if not name.startswith(".") and not name.endswith(".json")}


def _whole(tar: tarfile.TarFile, archive: Path) -> Iterator[tarfile.TarInfo]:
    """The members of a tar file; of an unfinished one, whose last may be torn, those that are whole."""
    unfinished, size = archive.suffix == ".part", archive.stat().st_size
    try:
        yield from (one for one in tar if not unfinished or one.offset_data + one.size <= size)
    except tarfile.TarError:
        if not unfinished:
            raise


def _cells(archive: Path) -> Iterator[tuple[str, Member]]:
    """The images in a Parquet file, in a column of bytes and path, as the Hugging Face hub has them; by their rows."""
    from pyarrow import parquet

    with parquet.ParquetFile(archive) as file:
        kinds = {one.name: one.type for one in file.schema_arrow if str(one.type).startswith("struct<")}
        column = next((name for name, kind in kinds.items() if {"bytes", "path"} <= {one.name for one in kind}), None)
        start = 0
        for group in range(file.num_row_groups if column else 0):
            paths = file.read_row_group(group, [f"{column}.path"]).column(0).combine_chunks().field("path").to_pylist()
            for row, path in enumerate(paths):
                suffix = Path(path or "").suffix.lower() or ".png"
                yield f"{start + row:07d}{suffix}", Cell(str(column), group, row)
            start += len(paths)


@lru_cache(maxsize=4)  # groups of about a hundred images, as whoever goes through a file in order needs them
def _group(archive: Path, modified: int, column: str, group: int) -> Any:
    from pyarrow import parquet

    with parquet.ParquetFile(archive) as file:
        return file.read_row_group(group, [f"{column}.bytes"]).column(0).combine_chunks().field("bytes")


def index(archive: Path) -> dict[str, Member]:
    """Every member but hidden ones and the JSON records, by its bare name; of equal names the last.

    Raises:
        OSError: If the file cannot be read, or is torn or no such archive.
    """
    try:
        return _index(archive, archive.stat().st_mtime_ns)
    except BROKEN as error:
        raise OSError(f"not a whole archive: {error}") from error


def _member(path: Path) -> Member:
    member = index(path.parent).get(path.name)
    if member is None:
        raise OSError(f"no readable member {path.name}")
    return member


def read(path: Path) -> bytes:
    """Contents of a member, never more than the archive says that it has.

    Raises:
        OSError: If there is no such member or the archive cannot be read.
    """
    member = _member(path)
    if isinstance(member, Cell):
        modified = path.parent.stat().st_mtime_ns
        data = _group(path.parent, modified, member.column, member.group)[member.row].as_py()
        if data is None:
            raise OSError(f"{path.name} is empty")
        return data
    if isinstance(member, tarfile.TarInfo):  # tarfile's own reading is not for several threads
        with path.parent.open("rb") as file:
            file.seek(member.offset_data)
            return file.read(member.size)
    try:
        with _zip(path.parent, path.parent.stat().st_mtime_ns).open(member) as whole:
            return whole.read(member.file_size)
    except (*BROKEN, RuntimeError, EOFError) as error:
        raise OSError(f"{path.name} is damaged: {error}") from error


def digest(path: Path) -> str | None:
    """SHA-256 of a file or a member, as 64 hexadecimal digits; None if it cannot be read."""
    try:
        return hashlib.sha256(read(path) if is_member(path) else path.read_bytes()).hexdigest()
    except OSError:
        return None


def stat(path: Path) -> tuple[int, int]:
    """Size in bytes and time of the last change in seconds of a file or a member; raises OSError if it is not there."""
    if not is_member(path):
        return path.stat().st_size, int(path.stat().st_mtime)
    member = _member(path)
    if isinstance(member, Cell):
        size = len(read(path))
    else:
        size = member.size if isinstance(member, tarfile.TarInfo) else member.file_size
    return size, int(path.parent.stat().st_mtime)
