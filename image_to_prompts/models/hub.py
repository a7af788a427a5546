"""Files of the Hugging Face hub, and what identifies weights: their SHA-256."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from ..run.errors import UserError, explained
from ..run.files import make_folder, sha256
from . import layouts
from .layouts import Layout

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoFile

log = logging.getLogger(__name__)
HUB = "huggingface.co"
REACHED = 5.0  # seconds in which the hub must answer at all


class Unavailable(Exception):
    """Where nothing was got, and why, in a few words."""


def cache() -> Path:
    """The folder in which the hub's library keeps what it downloads."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def cached(repository: str, layout: Layout, single_files: Iterable[str] = ()) -> Path | None:
    """What the cache has of a repository, if it is complete; raises UserError if a file is damaged."""
    found = layouts.inside(cache() / f"models--{repository.replace('/', '--')}", layout, single_files)
    for file in layouts.files(found) if found else ():
        _check_download(file)
    return found


def listing(repository: str) -> list[RepoFile]:
    """The files of a repository.

    Raises:
        Unavailable: If the hub cannot be reached, has no such repository, or asks for an agreement first.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
    from huggingface_hub.hf_api import RepoFile

    if constants.HF_HUB_OFFLINE:
        raise Unavailable(f"{HUB} (not asked)")
    if problem := _unreachable():
        raise Unavailable(f"{HUB} ({problem})")
    page = f"{HUB}/{repository}"
    try:
        return [one for one in HfApi().list_repo_tree(repository, recursive=True) if isinstance(one, RepoFile)]
    except GatedRepoError as error:
        raise Unavailable(f"{page} (accept its licence there, then log in with `hf auth login`)") from error
    except RepositoryNotFoundError as error:
        raise Unavailable(f"{page} (not there, or not for everybody)") from error
    except (HfHubHTTPError, OSError, RuntimeError) as error:
        raise Unavailable(f"{page} ({in_words(error)})") from error


@functools.cache
def _unreachable() -> str:
    """Why the hub cannot be reached, asked once; its library would try for 20 seconds."""
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=REACHED)
    except Exception as error:  # of whichever library it talks HTTP with
        return f"cannot be reached: {in_words(error)}"
    return ""


def in_words(error: Exception) -> str:
    """An error as one line of at most 200 letters."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def chosen(repository: str, layout: Layout, half: bool = False) -> list[RepoFile]:
    """The files of a repository that are downloaded; raises Unavailable if there are none, or see `listing`."""
    found = {one.path: one for one in listing(repository)}
    names = layouts.needed(found, layout, half)
    if not layouts.tensors(names, layout.stems, half):
        raise Unavailable(f"{HUB}/{repository} (no {layouts.wants(layout)})")
    return [found[name] for name in names]


def first(repositories: Iterable[str], layout: Layout, half: bool = False) -> tuple[str, list[RepoFile]]:
    """The first repository that has a model, and what is downloaded of it; raises Unavailable, with why none has."""
    said = []
    for repository in repositories:
        try:
            return repository, chosen(repository, layout, half)
        except Unavailable as error:
            said.append(str(error))
    raise Unavailable("; ".join(dict.fromkeys(said)) or "no place on the hub")


def download(repository: str, files: list[RepoFile], folder: Path) -> None:
    """Downloads files of a repository; of what an earlier call has left, only the rest.

    Args:
        repository: Its name.
        files: From `chosen`.
        folder: Where they go, under their paths in the repository.

    Raises:
        Unavailable: If the connection ends for good.
        UserError: If a file is another than the hub says; it is removed.
    """
    from filelock import FileLock

    with FileLock(make_folder(folder.parent) / f".{folder.name}.lock"):
        for one in files:
            _fetch(repository, one, folder / one.path)


def left(files: list[RepoFile], folder: Path) -> int:
    """Bytes of some files that are not in a folder yet."""
    missing = 0
    for one in files:
        here = [path for path in (folder / one.path, _part(one, folder / one.path)) if path.is_file()]
        missing += max(0, one.size - sum(path.stat().st_size for path in here))
    return missing


def _part(one: RepoFile, target: Path) -> Path:
    """Where a file lies until it is whole."""
    return target.with_name(f".{target.name}.{one.blob_id[:12]}.part")


def _fetch(repository: str, one: RepoFile, target: Path) -> None:
    """Downloads one file; its library gives up what was there when a process ends, so its parts are kept here."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    expected = one.lfs.sha256 if one.lfs else ""
    if target.exists():
        if target.stat().st_size == one.size and expected in ("", layouts.file_digest(target)):
            return
        raise UserError(f"{target}: another file is there than the hub has; move it away")
    part = _part(one, target)
    make_folder(part.parent)
    url, headers = hf_hub_url(repository, one.path), build_hf_headers()
    try:
        with part.open("ab") as file:
            http_get(url, file, resume_size=file.tell(), headers=headers, expected_size=one.size)
    except Exception as error:  # of whichever library it talks HTTP with
        if explained(error):
            raise
        raise Unavailable(f"{HUB}/{repository} ({in_words(error)})") from error
    found = sha256(part) if expected else ""
    if found != expected or part.stat().st_size != one.size:
        part.unlink()
        raise UserError(f"{target}: SHA-256 is {found}, the hub says {expected}; it was removed; start again")
    part.replace(target)


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


def named_digest(file: Path) -> str:
    """SHA-256 of a large file as the hub's cache has it: the name of what it links to; "" of others."""
    name = file.resolve().name
    return name if re.fullmatch("[0-9a-f]{64}", name) else ""


def _check_download(file: Path) -> None:
    """Compares a large file of the hub's cache with its SHA-256."""
    expected = named_digest(file)
    if expected and (found := layouts.file_digest(file)) != expected:
        raise UserError(f"{file}: SHA-256 is {found}, the hub said {expected}; delete {file.resolve()} and start again")
