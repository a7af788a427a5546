"""Images inside archives, named as if an archive were a folder: `00003.tar/abc.png`, `part-000001.zip/abc.png`.

Tar shards are in webdataset's layout, zip files are DiffusionDB's parts. Members are read in any order, so that rows
can be shuffled; the webdataset library reads the same tar files as a stream.
"""

import hashlib
import struct
import tarfile
import zipfile
import zlib
from functools import cache, lru_cache
from pathlib import Path

BROKEN = (tarfile.TarError, zipfile.BadZipFile, NotImplementedError, ValueError, struct.error, zlib.error)
Member = zipfile.ZipInfo | tarfile.TarInfo


def is_archive(path: Path) -> bool:
    """Whether a file's name is that of a tar shard or of a part of DiffusionDB; other zip files are left alone."""
    return path.suffix == ".tar" or path.match("part-*.zip")


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
    else:
        with tarfile.open(archive, "r:") as tar:
            members = {Path(one.name).name: one for one in tar if one.isfile()}
    return {name: member for name, member in members.items() if not name.startswith(".") and not name.endswith(".json")}


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
    size = member.size if isinstance(member, tarfile.TarInfo) else member.file_size
    return size, int(path.parent.stat().st_mtime)
