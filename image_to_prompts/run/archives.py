"""Images inside archives, named as if an archive were a folder: `00003.tar/abc.png`, `part-000001.zip/abc.png`.

Tar shards are in webdataset's layout, zip files are DiffusionDB's parts. Reading is by offset, so that rows can be
shuffled; the webdataset library reads the same tar files as a stream.
"""

from __future__ import annotations

import hashlib
import struct
import tarfile
import zipfile
import zlib
from functools import cache
from pathlib import Path
from typing import NamedTuple


class Member(NamedTuple):
    """Where a member's bytes lie: offset (in a zip file, of its header), bytes there, its size, whether deflated."""

    offset: int
    stored: int
    size: int
    deflated: bool = False


def is_archive(path: Path) -> bool:
    """Whether a file's name is that of a tar shard or of a part of DiffusionDB; other zip files are left alone."""
    return path.suffix == ".tar" or path.match("part-*.zip")


def is_member(path: Path) -> bool:
    """Whether `path` names a member of an archive rather than a file."""
    return is_archive(path.parent) and path.parent.is_file()


@cache
def _index(archive: Path, modified: int) -> dict[str, Member]:
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive) as file:
            members = {
                Path(one.filename).name: Member(
                    one.header_offset, one.compress_size, one.file_size, one.compress_type == zipfile.ZIP_DEFLATED
                )
                for one in file.infolist()
                if not one.is_dir() and one.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
            }
    else:
        with tarfile.open(archive, "r:") as file:
            members = {Path(one.name).name: Member(one.offset_data, one.size, one.size) for one in file if one.isfile()}
    return {name: member for name, member in members.items() if not name.startswith(".") and not name.endswith(".json")}


def index(archive: Path) -> dict[str, Member]:
    """Every member but hidden ones and the JSON records, by its bare name; of equal names the last.

    Raises:
        OSError: If the file cannot be read, or is torn or no such archive.
    """
    try:
        return _index(archive, archive.stat().st_mtime_ns)
    except (tarfile.TarError, zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as error:
        raise OSError(f"not a whole archive: {error}") from error


def _member(path: Path) -> Member:
    member = index(path.parent).get(path.name)
    if member is None:
        raise OSError(f"no readable member {path.name}")
    return member


def read(path: Path) -> bytes:
    """Contents of a member.

    Raises:
        OSError: If there is no such member or the archive cannot be read.
    """
    member = _member(path)
    with path.parent.open("rb") as file:
        file.seek(member.offset)
        if path.parent.suffix == ".zip":  # the header's length is known only from itself: APPNOTE.TXT, 4.3.7
            header = file.read(30)
            if len(header) < 30:
                raise OSError(f"{path.name} is cut short")
            file.seek(sum(struct.unpack("<HH", header[26:])), 1)
        data = file.read(member.stored)
    if not member.deflated:
        return data
    try:
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, max(member.size, 1))
    except zlib.error as error:
        raise OSError(f"{path.name} is damaged: {error}") from error


def digest(path: Path) -> str | None:
    """SHA-256 of a file or a member, as 64 hexadecimal digits; None if it cannot be read."""
    try:
        return hashlib.sha256(read(path) if is_member(path) else path.read_bytes()).hexdigest()
    except OSError:
        return None


def stat(path: Path) -> tuple[int, int]:
    """Size in bytes and time of the last change in seconds of a file or a member; raises OSError if it is not there."""
    if is_member(path):
        return _member(path).size, int(path.parent.stat().st_mtime)
    return path.stat().st_size, int(path.stat().st_mtime)
