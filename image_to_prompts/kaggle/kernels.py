"""Kernel folders as `make kernels` builds them, and the chain that they are."""

from __future__ import annotations

import ast
import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..pipeline import STAGES, Stage
from ..run.errors import UserError
from ..run.files import write_json

WORDS = {"true": "True", "false": "False", "none": "None"}  # as many write them, and Python does not

PLACEHOLDER = "your-kaggle-name"
FILE = "kernel-metadata.json"
REFERENCE = re.compile(r"[A-Za-z0-9][\w-]*/[a-z0-9][a-z0-9-]*")
LISTS = ("dataset_sources", "kernel_sources", "competition_sources", "model_sources")


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
        return bool(self.metadata["competition_sources"]) and not self.metadata["enable_internet"]

    @property
    def stage(self) -> Stage | None:
        """The stage that it runs; None of the bank and the benchmark."""
        return next((one for one in STAGES if one.slug == self.folder.name), None)

    @property
    def optional(self) -> list[str]:
        """Sources that it does without where they are not there: all but the wheels and what its stage comes after."""
        first = len(self.stage.kernel.after) if self.stage else 0
        return [*self.metadata["dataset_sources"][1:], *self.metadata["kernel_sources"][first:]]

    def changed(self, folder: Path, values: Sequence[str] = (), **fields: Any) -> Kernel:
        """A copy of it, written to `folder`, with other metadata and with a cell that sets parameters (NAME=VALUE)."""
        shutil.copytree(self.folder, folder)
        metadata = {**self.metadata, **fields}
        write_json(folder / FILE, metadata)
        if values:
            notebook, place = self._parameters()
            cell = {**notebook["cells"][place], "id": "set", "metadata": {}}
            cell["source"] = "".join(f"{name} = {value!r}\n" for name, value in self.settings(values).items())
            notebook["cells"].insert(place + 1, cell)
            write_json(folder / self.metadata["code_file"], notebook)
        return Kernel(folder, metadata)

    def _parameters(self) -> tuple[dict[str, Any], int]:
        """Its notebook, and the number of the cell with the parameters."""
        notebook = json.loads((self.folder / self.metadata["code_file"]).read_text(encoding="utf-8"))
        tags = [cell["metadata"].get("tags", []) for cell in notebook["cells"]]
        if ["parameters"] not in tags:
            raise UserError(f"{self.id}: its notebook has no parameters; leave --set out")
        return notebook, tags.index(["parameters"])

    def settings(self, given: Sequence[str]) -> dict[str, Any]:
        """Names and values of parameters of the notebook.

        Args:
            given: NAME=VALUE each; a value that Python does not read as one (`vit-l-336`) is taken as text.

        Raises:
            UserError: If the notebook has no parameter of a name.
        """
        notebook, place = self._parameters()
        known = re.findall(r"^(\w+) = ", "".join(notebook["cells"][place]["source"]), re.MULTILINE)
        found: dict[str, Any] = {}
        for one in given:
            name, _, value = one.partition("=")
            if name not in known or not value:
                raise UserError(f"--set {one}: give NAME=VALUE with a parameter of the notebook: {', '.join(known)}")
            try:
                found[name] = ast.literal_eval(WORDS.get(value.lower(), value))
            except (ValueError, SyntaxError):
                found[name] = value
        return found


def read(folder: Path) -> Kernel:
    """Reads a kernel folder.

    Raises:
        UserError: If it is not what `make kernels` writes, or says nobody's name.
    """
    path = folder / FILE
    try:
        metadata = json.loads(path.read_text(encoding="utf-8"))
        owned, code = REFERENCE.fullmatch(metadata["id"]), folder / metadata["code_file"]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); run make kernels") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not what make kernels writes ({error!r}); run it again") from error
    if PLACEHOLDER in json.dumps(metadata):
        raise UserError(f"{path}: {PLACEHOLDER!r} is a placeholder; put your Kaggle name into owner.json, make kernels")
    if not owned:
        raise UserError(f"{path}: id {metadata['id']!r}: must be owner/slug; correct owner.json and run make kernels")
    if metadata.get("enable_gpu") and not metadata.get("machine_shape"):
        why = "without machine_shape Kaggle gives a P100, on which nothing runs"
        raise UserError(f"{path}: {why}; run make kernels")
    if not code.is_file():
        raise UserError(f"{code}: no such file; run make kernels")
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


def table(kernels: list[Kernel], every_field: bool = False) -> str:
    """The chain as text: one row per kernel, or all that would be sent."""
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
