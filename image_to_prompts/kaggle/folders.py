"""Folders that become Kaggle datasets: wheels for kernels without internet, weights, metadata, embeddings."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata as installed
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from ..errors import UserError
from ..files import make_folder, write_json
from .kernels import PLACEHOLDER

NAME = "image-to-prompts"
# What Kaggle's image has of ours (August 2026); what these need is there too.
IMAGE = (
    *("accelerate", "diffusers", "numpy", "pandas", "sentence-transformers"),
    *("timm", "torch", "torchvision", "transformers"),
)
PYTHONS = ("3.12", "3.13")
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
LICENSE = "apache-2.0"


def needed(roots: Iterable[str], without: Iterable[str] = ()) -> set[str]:
    """The installed distributions that some need, themselves included, by walking their metadata.

    Args:
        roots: Names of installed distributions.
        without: Names not to follow.

    Returns:
        Canonical names.

    Raises:
        UserError: If one of them is not installed.
    """
    found, left = set(without), [canonicalize_name(name) for name in roots]
    while left:
        name = left.pop()
        if name in found:
            continue
        found.add(name)
        try:
            lines = installed.requires(name) or []
        except installed.PackageNotFoundError as error:
            raise UserError(f"{name} is not installed here; run make install first") from error
        for line in lines:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                left.append(canonicalize_name(requirement.name))
    return found - set(without)


def wheels(out: Path, source: Path, pythons: tuple[str, ...] = PYTHONS) -> list[Path]:
    """Collects our own wheel and those that it needs beyond Kaggle's image, in the versions installed here.

    Args:
        out: Folder to fill.
        source: A clone of this project, to build our own wheel from.
        pythons: Versions of Python that the image may run.

    Returns:
        The wheels.

    Raises:
        UserError: If a wheel cannot be built or downloaded.
    """
    make_folder(out)
    image = needed(IMAGE)
    missing = sorted(needed([NAME], image) - {NAME})
    _pip("wheel", "--no-deps", "--wheel-dir", out, source)
    platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
    pins = [f"{name}=={installed.version(name)}" for name in missing]
    for python in pythons:
        where = ("--only-binary", ":all:", "--python-version", python, *platforms)
        _pip("download", "--no-deps", *where, "--dest", out, *pins)
    return sorted(out.glob("*.whl"))


def _pip(*words: Any) -> None:
    argv = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, words)]
    result = subprocess.run(argv, capture_output=True, text=True, check=False)
    if result.returncode:
        lines = [line for line in result.stderr.splitlines() if line.startswith("ERROR")] or result.stderr.splitlines()
        raise UserError(f"pip {words[0]}: {lines[0] if lines else 'failed'}; is there an internet connection?")


def describe(folder: Path, owner: str, slug: str, title: str, subtitle: str, files: dict[str, Any]) -> None:
    """Writes the folder's dataset-metadata.json.

    Args:
        folder: The folder.
        owner: Kaggle name.
        slug: 6 to 50 characters.
        title: 6 to 50 characters.
        subtitle: 20 to 80 characters.
        files: For each file name its description, or (description, {column: (type, description)}), in order.

    Raises:
        UserError: If one of them is not what Kaggle accepts.
    """
    if owner == PLACEHOLDER:
        raise UserError(f"{PLACEHOLDER!r} is a placeholder; put your Kaggle name into kernels/owner.json")
    for name, text, least, most in (("slug", slug, 6, 50), ("title", title, 6, 50), ("subtitle", subtitle, 20, 80)):
        if not least <= len(text) <= most:
            raise UserError(f"{folder}: {name} {text!r} has {len(text)} characters; {least} to {most} are allowed")
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]*", slug):
        raise UserError(f"{folder}: slug {slug!r}: only a-z, 0-9 and dashes are allowed")
    resources = []
    for path, said in files.items():
        if not (folder / path).is_file():
            raise UserError(f"{folder / path}: no such file")
        said, columns = (said, {}) if isinstance(said, str) else said
        fields = [{"name": name, "type": kind, "description": text} for name, (kind, text) in columns.items()]
        schema = {"schema": {"fields": fields}} if fields else {}
        resources.append({"path": path, "description": said, **schema})
    description = {"id": f"{owner}/{slug}", "title": title, "subtitle": subtitle, "licenses": [{"name": LICENSE}]}
    write_json(folder / "dataset-metadata.json", {**description, "resources": resources})


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
