"""`image-to-prompts kaggle push|status|output|submit`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from ..errors import UserError
from ..files import write_json
from ..stages import COMPETITION, STAGES
from . import kernels, remote

PUSHED = ".pushed.json"  # versions of the last push, by kernel, in the folder of kernels


@dataclass
class Command:
    """What every command about kernels has."""

    kernels: Path = Path("kernels")
    """Folder of kernel folders, from `make kernels`."""
    timeout: float = remote.TIMEOUT
    """Seconds to wait for an answer."""


@dataclass
class Push(Command):
    """Sends kernels to Kaggle, which runs them."""

    stage: Positional[str] = ""
    """Stage whose kernel to push."""
    all: bool = False
    """Push all of them, in order."""
    dry_run: bool = False
    """Only show what would be sent, and send nothing."""
    verbose: Annotated[bool, arg(aliases=["-v"])] = False
    """With --dry-run: every field."""

    def run(self) -> str:
        """Pushes.

        Returns:
            A line a kernel, or the table.
        """
        chosen = _chosen(self.kernels, self.stage, self.all)
        if self.dry_run:
            return kernels.table(chosen, self.verbose)
        api = remote.connect(self.timeout)
        lines = []
        for kernel in chosen:
            version = remote.push(api, kernel, self.timeout)
            write_json(self.kernels / PUSHED, {**_pushed(self.kernels), kernel.id: version})
            lines.append(f"{kernel.id}: version {version} pushed, it runs now; https://www.kaggle.com/code/{kernel.id}")
        return "\n".join(lines)


@dataclass
class Status(Command):
    """Says how the kernels' last runs stand."""

    stage: Positional[str] = ""
    """Stage; left out: all."""

    def run(self) -> str:
        """Asks; returns a line a kernel."""
        api = remote.connect(self.timeout)
        lines = []
        for kernel in _chosen(self.kernels, self.stage, not self.stage):
            state, message = remote.status(api, kernel.id, self.timeout)
            lines.append(f"{kernel.id}: {state}{message and f', {message}'}")
        return "\n".join(lines)


@dataclass
class Output(Command):
    """Downloads what a kernel's last run wrote."""

    stage: Positional[str] = "infer"
    """Stage."""
    out: Path = Path("kaggle_output")
    """Folder to write to."""

    def run(self) -> str:
        """Downloads; returns the files."""
        kernel = _chosen(self.kernels, self.stage, False)[0]
        files = remote.output(remote.connect(self.timeout), kernel.id, self.out, self.timeout)
        return "\n".join(map(str, files)) or f"{kernel.id}: no output"


@dataclass
class Submit(Command):
    """Submits the inference kernel's submission.csv to the competition."""

    version: int = 0
    """Version of the kernel; left out: the one pushed last from here."""
    message: str = "image-to-prompts"
    """Description of the submission."""

    def run(self) -> str:
        """Submits; returns Kaggle's message."""
        kernel = _chosen(self.kernels, "infer", False)[0]
        version = self.version or _pushed(self.kernels).get(kernel.id, 0)
        if not version:
            raise UserError(f"{kernel.id} was not pushed from here; give --version, shown on its page on Kaggle")
        api = remote.connect(self.timeout)
        state, message = remote.status(api, kernel.id, self.timeout)
        if state != "complete":
            raise UserError(f"{kernel.id} is {state}{message and f', {message}'}; submit it when it is complete")
        return remote.submit(api, kernel.id, version, COMPETITION, self.message, self.timeout)


ACTIONS: dict[str, type[Command]] = {"push": Push, "status": Status, "output": Output, "submit": Submit}


def _chosen(folder: Path, stage: str, every: bool) -> list[kernels.Kernel]:
    """The kernels of a stage or all, the whole chain checked."""
    found = kernels.find(folder)
    if bool(stage) == every:
        raise UserError("name a stage or give --all")
    if every:
        return found
    notebooks = {each.name: each.notebook for each in STAGES}
    if stage not in notebooks:
        raise UserError(f"unknown stage {stage!r}; choose one of {', '.join(notebooks)}")
    chosen = [kernel for kernel in found if kernel.folder.name == notebooks[stage].replace("_", "-")]
    if not chosen:
        raise UserError(f"{folder}: no kernel of {stage}; run make kernels")
    return chosen


def _pushed(folder: Path) -> dict[str, int]:
    path = folder / PUSHED
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
