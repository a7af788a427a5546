"""`image-to-prompts kaggle ...`: push, status, submit for kernels; wheels, weights, metadata, embeddings."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Union

from tyro.conf import Positional, subcommand

from ..pipeline import COMPETITION
from ..run.errors import UserError
from . import folders, remote
from .push import OTHER, Command, Push, chosen, pushed


@dataclass
class Status(Command):
    """Says how the kernels' last runs stand."""

    stage: Positional[str] = ""
    """Stage; left out: all."""

    def run(self) -> str:
        """Asks; returns a line a kernel."""
        api = remote.connect(self.timeout)
        lines = []
        asked = [kernel.id for kernel in chosen(self.kernels, self.stage, not self.stage)]
        asked += [one for one in pushed(self.kernels) if one.removesuffix(OTHER) in asked and one not in asked]
        for name in asked:
            if not self.stage and not remote.is_there(api, name, "kernel", self.timeout):
                lines.append(f"{name}: not on Kaggle")
                continue
            state, message = remote.status(api, name, self.timeout)
            lines.append(f"{name}: {state}{message and f', {message}'}")
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
        kernel = chosen(self.kernels, "infer", False)[0]
        version = self.version or pushed(self.kernels).get(kernel.id, 0)
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
