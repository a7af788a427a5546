"""Images inside tar shards in webdataset's layout, named as if a shard were a folder: `00003.tar/abc.png`.

Reading is by offset, so that rows can be shuffled; the webdataset library reads the same files as a stream.
"""

from __future__ import annotations

import tarfile
from functools import cache
from pathlib import Path


def is_member(path: Path) -> bool:
    """Whether `path` names a member of a tar shard rather than a file."""
    return path.parent.suffix == ".tar" and path.parent.is_file()


@cache
def _index(tar: Path, modified: int) -> dict[str, tuple[int, int]]:
    with tarfile.open(tar, "r:") as archive:
        images = (member for member in archive if member.isfile() and not member.name.endswith(".json"))
        return {member.name: (member.offset_data, member.size) for member in images}


def index(tar: Path) -> dict[str, tuple[int, int]]:
    """Offset and size in bytes of every member but the JSON records.

    Raises:
        OSError: If the file cannot be read.
        tarfile.TarError: If it is no tar file or torn.
    """
    return _index(tar, tar.stat().st_mtime_ns)


def read(path: Path) -> bytes:
    """Contents of a member.

    Raises:
        OSError: If there is no such member or the shard cannot be read.
    """
    try:
        offset, size = index(path.parent)[path.name]
    except (KeyError, tarfile.TarError) as error:
        raise OSError(f"no readable member {path.name}") from error
    with path.parent.open("rb") as file:
        file.seek(offset)
        return file.read(size)


def stat(path: Path) -> tuple[int, int]:
    """Size in bytes and time of the last change in seconds of a file or a member."""
    if is_member(path):
        return index(path.parent)[path.name][1], int(path.parent.stat().st_mtime)
    return path.stat().st_size, int(path.stat().st_mtime)
