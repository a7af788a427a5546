"""`image-to-prompts kaggle ...`: push, status, submit for kernels; wheels, weights, metadata, embeddings."""

import json
import logging
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Union

from tyro.conf import Positional, arg, subcommand

from ..pipeline import COMPETITION, STAGES
from ..run.errors import UserError
from ..run.files import write_json
from . import folders, kernels, remote

log = logging.getLogger(__name__)
ASK_EVERY = float(os.environ.get("IMAGE_TO_PROMPTS_ASK_EVERY", 30))  # seconds between two looks at a running kernel
MOST_FAILURES = 20  # of them in a row
PUSHED = ".pushed.json"  # versions of the last push, by kernel, in the folder of kernels


@dataclass
class Command:
    """What every command about kernels has."""

    kernels: Path = Path("kernels")
    """Folder of kernel folders, from `make kernels`."""
    timeout: float = remote.TIMEOUT
    """Seconds to wait for an answer."""

    def run(self) -> str:
        """Does it; returns what to print."""
        raise NotImplementedError


@dataclass
class Push(Command):
    """Sends kernels to Kaggle, which runs them."""

    stage: Positional[str] = ""
    """Stage whose kernel to push, or benchmark."""
    all: bool = False
    """Push all stages, in order."""
    dry_run: bool = False
    """Only show what would be sent, and send nothing."""
    verbose: Annotated[bool, arg(aliases=["-v"])] = False
    """With --dry-run: every field."""
    wait: bool = False
    """Wait until each kernel has run before the next, which reads its output, is pushed."""

    def run(self) -> str:
        """Pushes.

        Returns:
            A line a kernel, or the table.

        Raises:
            UserError: If a kernel or one of its sources is refused, or if one that was waited for fails.
        """
        chosen = _chosen(self.kernels, self.stage, self.all)
        if self.dry_run:
            return kernels.table(chosen, self.verbose)
        api = remote.connect(self.timeout)
        lines = []
        for number, kernel in enumerate(chosen):
            version = self._push(api, kernel)
            write_json(self.kernels / PUSHED, {**_pushed(self.kernels), kernel.id: version})
            lines.append(f"{kernel.id}: version {version} pushed, it runs now; https://www.kaggle.com/code/{kernel.id}")
            log.info("%s", lines[-1])
            if self.wait and number + 1 < len(chosen):
                self._wait(api, kernel)
        return "\n".join(lines)

    def _push(self, api: Any, kernel: kernels.Kernel) -> int:
        """Pushes one, without those sources that are not there and that it can do without; returns its version."""
        missing = remote.missing(api, kernel, self.timeout)
        for source in missing:
            if source not in kernel.optional:
                is_kernel = source in kernel.metadata["kernel_sources"]
                what_to_do = "push that kernel first" if is_kernel else "publish it with kaggle wheels --publish"
                raise UserError(f"{kernel.id}: its source {source} is not on Kaggle; {what_to_do}")
            log.warning("%s: goes without %s, which is not on Kaggle", kernel.id, source)
        with tempfile.TemporaryDirectory() as folder:
            return remote.push(api, kernels.without(kernel, missing, Path(folder) / "kernel"), self.timeout)

    def _wait(self, api: Any, kernel: kernels.Kernel) -> None:
        state, failures = "queued", 0
        while state != "complete":
            time.sleep(ASK_EVERY)
            try:
                state, message = remote.status(api, kernel.id, self.timeout)
                failures = 0
            except UserError as error:  # Kaggle has bad minutes, a kernel runs for hours
                failures += 1
                if failures == MOST_FAILURES:
                    raise
                log.warning("%s; asking again", error)
                continue
            if state not in ("queued", "running", "complete"):
                raise UserError(f"{kernel.id}: {state}{message and f', {message}'}; those after it were not pushed")


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
            if not self.stage and not remote.is_there(api, kernel.id, "kernel", self.timeout):
                lines.append(f"{kernel.id}: not on Kaggle")
                continue
            state, message = remote.status(api, kernel.id, self.timeout)
            lines.append(f"{kernel.id}: {state}{message and f', {message}'}")
        return "\n".join(lines)


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


@dataclass
class Dataset(Command):
    """What every command that makes a dataset has."""

    out: Path | None = None
    """Folder to write; left out: kaggle_datasets/<which>."""
    publish: bool = False
    """Upload it as a private dataset, or as a new version of it."""
    notes: str = "image-to-prompts"
    """Notes on the version."""

    def make(self, out: Path, owner: dict[str, str]) -> Path:
        """Fills `out` and describes it; returns it."""
        raise NotImplementedError

    def run(self) -> str:
        """Makes the dataset; returns a line about it."""
        out = self.out or Path("kaggle_datasets") / type(self).__name__.lower()
        folder = self.make(out, folders.read_owner(self.kernels / "owner.json"))
        files = [file for file in folder.rglob("*") if file.is_file()]
        said = f"{folder}: {len(files)} files, {sum(file.stat().st_size for file in files) / 1e6:.1f} MB"
        if not self.publish:
            return f"{said}; look at it, then run the same command with --publish"
        address = remote.publish(remote.connect(self.timeout), folder, self.notes, self.timeout)
        return f"{said}; published as {address}"


@dataclass
class Wheels(Dataset):
    """Collects our own wheel and what else Kaggle's image lacks, for kernels without internet."""

    source: Path = Path()
    """Clone to build our own wheel from."""
    python: tuple[str, ...] = folders.PYTHONS
    """Versions of Python to collect for."""

    def make(self, out: Path, owner: dict[str, str]) -> Path:
        """See `folders.wheels`."""
        return folders.wheels(out, self.source, owner, self.python)


@dataclass
class Weights(Dataset):
    """Copies checkpoints and encoder weights into one dataset, with their hashes."""

    what: Positional[tuple[str, ...]] = ("runs/default/checkpoints/convnext", "all-MiniLM-L6-v2")
    """Folders, files, or names of weights such as all-MiniLM-L6-v2 and open_clip:convnext_xxlarge."""

    def make(self, out: Path, owner: dict[str, str]) -> Path:
        """See `folders.weights`."""
        return folders.weights(out, self.what, owner)


@dataclass
class Metadata(Dataset):
    """Makes a dataset of metadata CSVs with every column described."""

    data: Path = Path("data_meta")
    """Folder of CSVs; its columns.csv (column, type, description) describes their columns."""

    def make(self, out: Path, owner: dict[str, str]) -> Path:
        """See `folders.tables`."""
        return folders.tables(out, self.data, owner)


@dataclass
class Embeddings(Dataset):
    """Makes a dataset of the arrays and names that `embed` wrote."""

    data: Path = Path("runs/default/embeddings")
    """What embed wrote."""

    def make(self, out: Path, owner: dict[str, str]) -> Path:
        """See `folders.embeddings`."""
        return folders.embeddings(out, self.data, owner)


ACTIONS: dict[str, type[Command]] = {
    **{"push": Push, "status": Status, "submit": Submit},
    **{"wheels": Wheels, "weights": Weights, "metadata": Metadata, "embeddings": Embeddings},
}
Action: Any = Union[tuple(Annotated[action, subcommand(name)] for name, action in ACTIONS.items())]  # noqa: UP007


def run(action: Command) -> str:
    """Does what a command says; returns what to print."""
    return action.run()


def _chosen(folder: Path, stage: str, every: bool) -> list[kernels.Kernel]:
    """The kernels of a stage or all, the whole chain checked."""
    found = kernels.find(folder)
    if bool(stage) == every:
        raise UserError("name a stage or give --all")
    names = {each.name: each.notebook.replace("_", "-") for each in STAGES}
    if every:
        return [kernel for kernel in found if kernel.folder.name in names.values()]
    names["benchmark"] = "benchmark"
    if stage not in names:
        raise UserError(f"unknown stage {stage!r}; choose one of {', '.join(names)}")
    chosen = [kernel for kernel in found if kernel.folder.name == names[stage]]
    if not chosen:
        raise UserError(f"{folder}: no kernel of {stage}; run make kernels")
    return chosen


def _pushed(folder: Path) -> dict[str, int]:
    path = folder / PUSHED
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
