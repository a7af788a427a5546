"""Files of the Hugging Face hub, and what identifies weights: their SHA-256."""

import contextlib
import functools
import hashlib
import logging
import re
from collections.abc import Iterator
from pathlib import Path

from ..run.errors import UserError
from ..run.files import sha256

log = logging.getLogger(__name__)
_stay_here = False  # see `without_network`


def digest(path: Path) -> str:
    """SHA-256 that identifies a model: of the file, or of the names and digests of a folder's weights and settings."""
    if path.is_file():
        return _file_digest(path)
    files = sorted(file for file in path.rglob("*") if file.suffix in (".safetensors", ".bin", ".json", ".txt"))
    listing = [f"{file.relative_to(path).as_posix()} {_file_digest(file)}" for file in files]
    return hashlib.sha256("\n".join(listing).encode()).hexdigest()


def _file_digest(file: Path) -> str:
    info = file.stat()
    return _cached_digest(file, info.st_size, info.st_mtime_ns)


@functools.cache
def _cached_digest(file: Path, size: int, modified: int) -> str:
    """SHA-256 of a file; gigabytes are read once a process, however many folders a notebook renders."""
    return sha256(file)


@contextlib.contextmanager
def without_network(stay_here: bool = True) -> Iterator[None]:
    """Within it, `snapshot` finds what was downloaded before, and asks nobody for more."""
    global _stay_here
    before, _stay_here = _stay_here, stay_here
    try:
        yield
    finally:
        _stay_here = before


def snapshot(repository: str, patterns: list[str]) -> Path | None:
    """Folder of a repository's files that fit `patterns`; None if the hub has none, or cannot be reached.

    Raises:
        UserError: If a file is another than the hub says.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(repository, allow_patterns=patterns, local_files_only=_stay_here))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        log.log(logging.DEBUG if _stay_here else logging.INFO, "hub %s: %s", repository, str(error).splitlines()[0])
        return None
    for file in folder.rglob("*"):
        _check_download(file)
    return folder


def dataset_files(given: str) -> list[Path]:
    """Files of a data set.

    Args:
        given: A file or folder, or `hf://datasets/<owner>/<name>/<path>` on the Hugging Face hub, where the path may
            hold `*`; such files come into the hub's cache once.

    Raises:
        UserError: If there is no such file, or the hub cannot be reached.
    """
    if not given.startswith("hf://"):
        if not Path(given).exists():
            raise UserError(f"{given}: no such file or folder; correct --input")
        return [Path(given)]
    from huggingface_hub import HfFileSystem, hf_hub_download

    owner, name, path = [*given.removeprefix("hf://").removeprefix("datasets/").split("/", 2), "", ""][:3]
    if not path:
        raise UserError(f"{given}: must be hf://datasets/<owner>/<name>/<path>; correct --input")
    try:
        files = [path]
        if "*" in path:
            prefix = f"datasets/{owner}/{name}/"
            files = [found.removeprefix(prefix) for found in HfFileSystem().glob(prefix + path)]
        found = [Path(hf_hub_download(f"{owner}/{name}", file, repo_type="dataset")) for file in sorted(files)]
    except Exception as error:  # of the hub's library and of whichever one it talks HTTP with
        said = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"{given}: {said}; download it where the hub can be reached, and give --input FILE") from error
    if not found:
        raise UserError(f"{given}: no such file on the hub; correct --input")
    for file in found:
        _check_download(file)
    return found


def _check_download(file: Path) -> None:
    """Compares a large file of the hub's cache with its SHA-256, after which the cache names it."""
    blob = file.resolve()
    if file.is_file() and re.fullmatch("[0-9a-f]{64}", blob.name) and (found := _file_digest(file)) != blob.name:
        raise UserError(f"{file}: SHA-256 is {found}, the hub said {blob.name}; delete {blob} and start again")
