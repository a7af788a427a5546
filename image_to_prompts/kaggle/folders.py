"""Folders that become Kaggle datasets: wheels for kernels without internet, weights, metadata, embeddings."""

import contextlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata as installed
from pathlib import Path
from types import MappingProxyType
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from ..models import layouts
from ..models import weights as located
from ..models.layouts import LAYOUTS
from ..run.errors import UserError
from ..run.files import atomic_path, sha256, write_json, write_text
from ..run.folders import is_checkpoint
from ..run.resume import writing

NAME = "image-to-prompts[full]"
# What Kaggle's image has of ours (August 2026); what these need is there too.
IMAGE = (
    *("accelerate", "diffusers", "numpy", "pandas", "polars", "pyarrow", "scikit-learn"),
    *("scipy", "timm", "torch", "torchvision", "transformers"),
)
PYTHONS = ("3.12", "3.13")
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
LICENSE = "apache-2.0"
COLUMNS, DESCRIPTION = "columns.csv", "dataset-metadata.json"


def needed(roots: Iterable[str], without: Iterable[str] = ()) -> set[str]:
    """The installed distributions that some need, themselves included, by walking their metadata.

    Args:
        roots: Installed distributions as requirements, extras too.
        without: Names not to follow.

    Returns:
        Canonical names.

    Raises:
        UserError: If one of them is not installed.
    """
    stop, seen, left = set(without), set(), [Requirement(root) for root in roots]
    while left:
        wanted = left.pop()
        name = canonicalize_name(wanted.name)
        if name in stop or (name, *wanted.extras) in seen:
            continue
        seen.add((name, *wanted.extras))
        try:
            lines = installed.requires(name) or []
        except installed.PackageNotFoundError as error:
            raise UserError(f"{name} is not installed here; run make install first") from error
        for line in lines:
            requirement = Requirement(line)
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *wanted.extras)):
                left.append(requirement)
    return {name for name, *_ in seen}


def wheels(out: Path, source: Path, owner: dict[str, str], pythons: tuple[str, ...] = PYTHONS) -> Path:
    """Collects our own wheel and those that it needs beyond Kaggle's image, in the versions installed here.

    Args:
        out: Folder to fill.
        source: A clone of this project, to build our own wheel from.
        owner: From `read_owner`.
        pythons: Versions of Python that the image may run.

    Returns:
        The folder.

    Raises:
        UserError: If a wheel cannot be built or downloaded.
    """
    with _filling(out, "wheels"), tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        image = needed(IMAGE)
        missing = sorted(needed([NAME], image) - {"image-to-prompts"})
        _pip("wheel", "--no-deps", "--wheel-dir", folder, source.resolve())
        if not list(folder.glob("image_to_prompts-*.whl")):
            raise UserError(f"{source}: not a clone of this project; give it with --source")
        platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
        pins = [f"{name}=={installed.version(name)}" for name in missing]
        for python in pythons:
            where = ("--only-binary", ":all:", "--python-version", python, *platforms)
            _pip("download", "--no-deps", *where, "--dest", folder, *pins)
        found = {path.name: path for path in sorted(folder.glob("*.whl"))}
        with _filling(out, "wheels-files", found, ()):
            files = {name: f"Wheel of {name.split('-')[0]}" for name in found}
        subtitle = "Wheels for image-to-prompts kernels without internet"
        return describe(out, owner, "wheels", "Image to prompts wheels", subtitle, files)


@contextlib.contextmanager
def _filling(
    out: Path,
    which: str,
    sources: Mapping[str, Path] = MappingProxyType({}),
    more: tuple[str, ...] = ("dataset-metadata.json",),
) -> Iterator[None]:
    """Copies files into a dataset's folder, under the names given, before the block describes them.

    What an earlier call of the same kind has put there, and this one does not, goes; nothing of others is touched. The
    stamp lies beside the folder, since all that is in it is published.
    """
    outputs = [out / name for name in (*sources, *more)]
    with writing(out.with_name(f".{out.name}.{which}.done"), f"kaggle {which}", outputs, sources.values()):
        for name, source in sources.items():
            with atomic_path(out / name) as part:
                shutil.copyfile(source, part)
        yield


def _pip(*words: Any) -> None:
    argv = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, words)]
    result = subprocess.run(argv, capture_output=True, text=True, check=False)
    if result.returncode:
        lines = [line for line in result.stderr.splitlines() if line.startswith("ERROR")] or result.stderr.splitlines()
        raise UserError(f"pip {words[0]}: {lines[0] if lines else 'failed'}; is there an internet connection?")


def weights(out: Path, what: Iterable[str], owner: dict[str, str]) -> Path:
    """Copies weights into a folder each, with SHA256SUMS (`sha256sum -c SHA256SUMS`), and describes them as a dataset.

    What an earlier call has put there stays: a new version of a dataset holds what its folder holds.

    Args:
        out: Folder to fill.
        what: Checkpoint folders, model folders, files, or names of models.
        owner: From `read_owner`.

    Returns:
        The folder.

    Raises:
        UserError: If something is nowhere.
    """
    targets = {name: out / located.own_folder(Path(name).name if Path(name).exists() else name) for name in what}
    if len(set(targets.values())) < len(targets):
        raise UserError(f"weights: two of {', '.join(targets)} have one name; rename a folder")
    for name, target in targets.items():
        path = Path(name) if Path(name).exists() else located.locate(name)
        base = path if path.is_dir() else path.parent
        files = _one_format(path)
        more = [*(base / "terms").glob("*.npy"), *base.glob("open_clip_config.json")]  # the interrogator's terms
        inside = {file.relative_to(base): file for file in sorted({*files, *more}) if file.is_file()}
        names = {f"{target.name}/{at}": f for at, f in inside.items() if not any(p.startswith(".") for p in at.parts)}
        with _filling(out, f"weights-{target.name}", names, ()):
            pass
    with _filling(out, "weights", more=("SHA256SUMS", DESCRIPTION)):
        copied = sorted(file for file in out.rglob("*") if file.is_file() and file.parent != out)
        sums = "\n".join(f"{sha256(file)}  {file.relative_to(out).as_posix()}" for file in copied)
        write_text(out / "SHA256SUMS", f"{sums}\n")
        said = {"SHA256SUMS": "SHA-256 of every file, for sha256sum -c SHA256SUMS"}
        subtitle = "Checkpoints and encoder weights of image-to-prompts"
        return describe(out, owner, "weights", "Image to prompts weights", subtitle, said)


def _one_format(path: Path) -> list[Path]:
    """What is copied of a model: the files that it is loaded from; of a checkpoint of ours, or what is unknown, all."""
    found = [path] if path.is_file() else [layouts.inside(path, form) for form in LAYOUTS.values()]
    whole = path.is_dir() and (is_checkpoint(path) or not any(found))
    return list(path.rglob("*")) if whole else layouts.files(next(filter(None, found)))


def tables(out: Path, data: Path, owner: dict[str, str]) -> Path:
    """Copies metadata CSVs and describes every column.

    Args:
        out: Folder to fill.
        data: Folder of CSVs; its columns.csv (column, type, description), else data_meta's, describes their columns.
        owner: From `read_owner`.

    Returns:
        The folder.

    Raises:
        UserError: If there is no CSV of prompts, or a column is not described.
    """
    from ..data.metadata import header_alone, read_table

    described = next((path for path in (data / COLUMNS, Path("data_meta") / COLUMNS) if path.is_file()), data / COLUMNS)
    known = read_table(described, ("column", "type", "description")).set_index("column")
    csvs = sorted(path for path in data.glob("*.csv") if path.name != COLUMNS and not header_alone(path))
    if not csvs:
        raise UserError(f"{data}: no CSVs of prompts; give a run's folder, for example --data runs/default/data_meta")
    files: dict[str, Any] = {}
    for csv in csvs:
        columns = {}
        for name in read_table(csv, ()).columns:
            if name not in known.index:
                raise UserError(f"{csv}: column {name!r} is not in {described}; describe it there")
            columns[name] = (known["type"][name], known["description"][name])
        files[csv.name] = (f"{csv.stem}: one row per {'prompt' if 'prompt' in columns else 'file'}", columns)
    subtitle = "Prompts with the names of their images, deduplicated"
    with _filling(out, "metadata", {csv.name: csv for csv in csvs}):
        return describe(out, owner, "metadata", "Image to prompts metadata", subtitle, files)


NAMES = {
    "image_name": ("string", "file name of the row's image"),
    "prompt": ("string", "its prompt"),
    "source": ("string", "where the prompt comes from"),
    "group": ("string", "image_name of the first prompt that this one resembles"),
    "fold": ("integer", "fold of the group"),
    "text": ("string", "what the interrogator says of the image"),
}
"""Columns of the names beside an array of embeddings."""


def embeddings(out: Path, data: Path, owner: dict[str, str]) -> Path:
    """Copies arrays of `embed` with their names; see `embeddings.read` for what it raises."""
    from ..encode import embeddings as stored

    names = [*stored.arrays(data), stored.PROMPTS]
    files: dict[str, Any] = {}
    for name in names:
        vectors, table, about = stored.read(data, name)
        made = about.get("encoder") or about.get("backbone", {}).get("name") or f"whoever made {about.get('imported')}"
        files[f"{name}.npy"] = f"float32 {vectors.shape}, by {made}; rows named in {name}.names.csv"
        said = {column: NAMES[column] for column in table}
        files[f"{name}.names.csv"] = (f"names of the rows of {name}.npy", said)
        files[f"{name}.json"] = f"how {name}.npy was made"
    subtitle = "Embeddings of images and of their prompts, for kNN"
    with _filling(out, "embeddings", {name: data / name for name in files}):
        return describe(out, owner, "embeddings", "Image to prompts embeddings", subtitle, files)


def describe(folder: Path, names: dict[str, str], which: str, title: str, subtitle: str, files: dict[str, Any]) -> Path:
    """Writes the folder's description.

    Args:
        folder: The folder.
        names: From `read_owner`.
        which: Which of its slugs, 6 to 50 characters.
        title: 6 to 50 characters.
        subtitle: 20 to 80 characters.
        files: For each file name its description, or (description, {column: (type, description)}), in order.

    Returns:
        The folder.

    Raises:
        UserError: If the slug is not what Kaggle accepts.
    """
    owner, slug = names["owner"], names.get(which, "")
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]{5,49}", slug):
        raise UserError(f"{folder}: slug {slug!r}: must have 6 to 50 characters, of a-z, 0-9 and dashes alone")
    resources = []
    for path, said in files.items():
        said, columns = (said, {}) if isinstance(said, str) else said
        fields = [{"name": name, "type": kind, "description": text} for name, (kind, text) in columns.items()]
        schema = {"schema": {"fields": fields}} if fields else {}
        resources.append({"path": path, "description": said, **schema})
    description = {"id": f"{owner}/{slug}", "title": title, "subtitle": subtitle, "licenses": [{"name": LICENSE}]}
    write_json(folder / DESCRIPTION, {**description, "resources": resources})
    return folder


def read_owner(path: Path) -> dict[str, str]:
    """Owner and slugs, from kernels/owner.json.

    Raises:
        UserError: If it cannot be read or lacks the owner.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        found["owner"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: must be JSON with your Kaggle name as owner ({error!r})") from error
    return found
