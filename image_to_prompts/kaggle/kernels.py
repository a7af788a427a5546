"""Kernel folders: what they declare, checked before anything is sent, because Kaggle says little afterwards.

The rules are those of Kaggle's `kernel-metadata.json` and of its server, which accepts a wrong title or a missing
`enable_internet` without a word.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..run.errors import UserError
from ..run.files import write_json

PLACEHOLDER = "your-kaggle-name"
FILE = "kernel-metadata.json"
LARGEST_SOURCE = 1_000_000  # bytes
SLUG = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
REFERENCE = re.compile(r"[A-Za-z0-9][\w-]*/[a-z0-9][a-z0-9-]*")
MODEL = re.compile(r"[^/\s]+/[^/\s]+/[^/\s]+/[^/\s]+/\d+")
BOOLEANS = ("is_private", "enable_gpu", "enable_tpu", "enable_internet")
LISTS = ("dataset_sources", "kernel_sources", "competition_sources", "model_sources")
KNOWN = {
    *("id", "title", "code_file", "language", "kernel_type", "machine_shape", "docker_image_pinning_type", "keywords"),
    *BOOLEANS,
    *LISTS,
}


@dataclass(frozen=True)
class Kernel:
    """A kernel folder.

    Attributes:
        folder: The folder.
        metadata: Its kernel-metadata.json.
    """

    folder: Path
    metadata: dict[str, Any]

    @property
    def id(self) -> str:
        """`owner/slug`."""
        return self.metadata["id"]

    @property
    def submits(self) -> bool:
        """Whether its output is a submission to the competition."""
        return bool(self.metadata["competition_sources"])

    @property
    def optional(self) -> list[str]:
        """Sources that it does without where they are not there: a kernel that submits needs only its first dataset."""
        return [*self.metadata["dataset_sources"][1:], *self.metadata["kernel_sources"]] if self.submits else []


def slug_of(title: str) -> str:
    """The slug that Kaggle makes of a title."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def read(folder: Path) -> Kernel:
    """Reads a kernel folder and checks what it declares.

    Raises:
        UserError: On the first thing in it that Kaggle would refuse, or take for something else without saying so.
    """
    path = folder / FILE
    try:
        metadata = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); run make kernels") from error
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); run make kernels") from error
    for problem in _problems(folder, metadata):
        raise UserError(f"{path}: {problem}")
    return Kernel(folder, metadata)


def find(folder: Path) -> list[Kernel]:
    """All kernels below a folder, in order of their numbers.

    Raises:
        UserError: If there is none, if one is bad, or if one reads the output of a kernel of the same owner that is
            not there.
    """
    found = [read(path.parent) for path in sorted(folder.glob(f"*/{FILE}"))]
    if not found:
        raise UserError(f"{folder}: no kernels; run make kernels")
    ids = {kernel.id for kernel in found}
    for kernel in found:
        owner = kernel.id.partition("/")[0]
        for source in kernel.metadata["kernel_sources"]:
            if source.partition("/")[0] == owner and source not in ids:
                raise UserError(f"{kernel.folder / FILE}: kernel_sources {source}: no such kernel in {folder}")
    return found


def _problems(folder: Path, metadata: Any) -> list[str]:
    """What is wrong, most important first; each line says what to do."""
    if not isinstance(metadata, dict):
        return ["not a JSON object; run make kernels"]
    missing = [name for name in ("id", "title", "code_file", "language", "kernel_type") if not metadata.get(name)]
    if missing:
        return [f"without {', '.join(missing)}; run make kernels"]
    problems = [f"unknown key {name!r}, which Kaggle ignores; correct or remove it" for name in metadata.keys() - KNOWN]
    owner, _, slug = str(metadata["id"]).partition("/")
    if PLACEHOLDER in json.dumps(metadata):
        problems.append(f"{PLACEHOLDER!r} is a placeholder; put your Kaggle name into owner.json and run make kernels")
    if not owner or not SLUG.fullmatch(slug) or len(slug) < 5:
        problems.append(f"id {metadata['id']!r}: must be owner/slug, the slug 5 or more of a-z, 0-9 and dashes")
    title = str(metadata["title"])
    if not 5 <= len(title) <= 50:
        problems.append(f"title {title!r} has {len(title)} characters; 5 to 50 are allowed")
    if slug_of(title) != slug:
        problems.append(f"title {title!r} makes the slug {slug_of(title)!r}, but the id says {slug!r}; make them equal")
    if metadata["language"] != "python" or metadata["kernel_type"] not in ("notebook", "script"):
        problems.append("language must be python, kernel_type notebook or script")
    for name in BOOLEANS:
        if not isinstance(metadata.get(name), bool):
            problems.append(f"{name} is {metadata.get(name)!r}; write true or false (left out, internet is on)")
    for name in LISTS:
        if not isinstance(metadata.get(name), list):
            problems.append(f"{name} must be a list, [] if there are none")
    return problems or [*_source_problems(metadata), *_code_problems(folder / metadata["code_file"])]


def _source_problems(metadata: dict[str, Any]) -> list[str]:
    forms = {
        "dataset_sources": (REFERENCE, "owner/slug"),
        "kernel_sources": (REFERENCE, "owner/slug"),
        "competition_sources": (SLUG, "a bare slug"),
        "model_sources": (MODEL, "owner/model/framework/variation/version, the version a number"),
    }
    problems = [
        f"{name} {source!r}: must be {form}"
        for name, (pattern, form) in forms.items()
        for source in metadata[name]
        if not pattern.fullmatch(str(source))
    ]
    if metadata["competition_sources"] and metadata["enable_internet"]:
        problems.append("enable_internet is true, but a kernel that submits must run without; set it to false")
    return problems


def _code_problems(path: Path) -> list[str]:
    if not path.is_file():
        return [f"code_file {path.name}: no such file; run make kernels"]
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        try:
            notebook = json.loads(text)
            for cell in notebook["cells"]:
                cell.pop("outputs", None)
        except (ValueError, KeyError, AttributeError) as error:
            return [f"code_file {path.name}: not a notebook ({error!r}); run make kernels"]
        text = json.dumps(notebook)
    if len(text.encode()) >= LARGEST_SOURCE:
        return [f"code_file {path.name}: {len(text.encode()):,} bytes without outputs; Kaggle takes less than 1 MB"]
    return []


def without(kernel: Kernel, sources: list[str], folder: Path) -> Kernel:
    """A copy of a kernel, written to `folder`, that does not ask for some of its sources."""
    kept = {name: [source for source in kernel.metadata[name] if source not in sources] for name in LISTS}
    shutil.copytree(kernel.folder, folder)
    write_json(folder / FILE, {**kernel.metadata, **kept})
    return Kernel(folder, {**kernel.metadata, **kept})


def table(kernels: list[Kernel], every_field: bool = False) -> str:
    """The chain as text: one row a kernel, or all that would be sent."""
    if every_field:
        return "\n\n".join(
            f"{kernel.folder}\n"
            + "\n".join(f"  {name}: {json.dumps(value)}" for name, value in kernel.metadata.items())
            for kernel in kernels
        )
    rows = [("kernel", "machine", "internet", "reads")]
    for kernel in kernels:
        said = kernel.metadata
        machine = said.get("machine_shape", "GPU") if said["enable_gpu"] else "CPU"
        sources = [source for name in LISTS for source in said[name]]
        reads = ", ".join(f"{source} (if there)" if source in kernel.optional else source for source in sources)
        rows.append((kernel.id, machine, "on" if said["enable_internet"] else "off", reads or "nothing"))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]) for row in rows
    )
