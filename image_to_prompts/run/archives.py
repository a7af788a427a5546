"""Images inside archives, named as if an archive were a folder: `00003.tar/abc.png`, `part-000001.zip/abc.png`.

Tar shards are in webdataset's layout, zip files are DiffusionDB's parts. Reading is by offset, so that rows can be
shuffled; the webdataset library reads the same tar files as a stream.
"""

import hashlib
import struct
import tarfile
import zipfile
import zlib
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

BROKEN = (tarfile.TarError, zipfile.BadZipFile, NotImplementedError, ValueError, struct.error, zlib.error)


class Index(NamedTuple):
    """An open zip file, or None for a tar file; and the members by name."""

    zip: zipfile.ZipFile | None
    members: dict[str, zipfile.ZipInfo | tarfile.TarInfo]


def is_archive(path: Path) -> bool:
    """Whether a file's name is that of a tar shard or of a part of DiffusionDB; other zip files are left alone."""
    return path.suffix == ".tar" or path.match("part-*.zip")


def is_member(path: Path) -> bool:
    """Whether `path` names a member of an archive rather than a file."""
    return is_archive(path.parent) and path.parent.is_file()


@lru_cache(maxsize=32)  # so many zip files stay open
def _index(archive: Path, modified: int) -> Index:
    file: zipfile.ZipFile | None = None
    members: list[tuple[str, zipfile.ZipInfo | tarfile.TarInfo]]
    if archive.suffix == ".zip":
        file = zipfile.ZipFile(archive)
        members = [(one.filename, one) for one in file.infolist() if not one.is_dir()]
    else:
        with tarfile.open(archive, "r:") as tar:
            members = [(one.name, one) for one in tar if one.isfile()]
    by_name = {Path(name).name: one for name, one in members}
    return Index(file, {name: one for name, one in by_name.items() if name[0] != "." and not name.endswith(".json")})


def index(archive: Path) -> Index:
    """Every member but hidden ones and the JSON records, by its bare name; of equal names the last.

    Raises:
        OSError: If the file cannot be read, or is torn or no such archive.
    """
    try:
        return _index(archive, archive.stat().st_mtime_ns)
    except BROKEN as error:
        raise OSError(f"not a whole archive: {error}") from error


def _member(path: Path) -> zipfile.ZipInfo | tarfile.TarInfo:
    member = index(path.parent).members.get(path.name)
    if member is None:
        raise OSError(f"no readable member {path.name}")
    return member


def read(path: Path) -> bytes:
    """Contents of a member, never more than the archive says that it has.

    Raises:
        OSError: If there is no such member or the archive cannot be read.
    """
    member = _member(path)
    if isinstance(member, tarfile.TarInfo):  # tarfile's own reading is not for several threads
        with path.parent.open("rb") as file:
            file.seek(member.offset_data)
            return file.read(member.size)
    try:
        with (index(path.parent).zip or zipfile.ZipFile(path.parent)).open(member) as whole:
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
    size = member.size if isinstance(member, tarfile.TarInfo) else member.file_size
    return size, int(path.parent.stat().st_mtime)
