"""The file from which a killed training continues."""

from __future__ import annotations

import logging
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..run.files import atomic_path
from ..run.folders import kaggle_inputs

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)


def save(path: Path, state: dict[str, Any]) -> None:
    """Writes what `read` reads."""
    import torch

    with atomic_path(path) as part, part.open("wb") as file:  # PyTorch's own file hides that a disk is full
        torch.save(state, file)


def read(path: Path, device: torch.device | str) -> dict[str, Any] | None:
    """What was saved to go on from; None if nothing was, or, with a warning, if the file is damaged.

    PyTorch's files are zip archives, whose checksums PyTorch itself does not look at.
    """
    import torch

    if not path.is_file():
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is None:
            return torch.load(path, map_location=device, weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
        damaged = str(error).partition("\n")[0]
    log.warning("%s: damaged (%s); the training begins anew", path, damaged)
    return None


def forget(state: Path) -> None:
    """Removes the state of a training that has ended, and what trainings of other settings left for the same output."""
    for path in state.parent.glob("unfinished-*.pt"):
        if path != state:
            log.warning("%s: removed, an unfinished training of other settings", path)
        path.unlink(missing_ok=True)
    for part in state.parent.glob(".unfinished-*.pt.*.part"):  # of one that was killed while it saved
        part.unlink(missing_ok=True)


def adopt(state: Path) -> None:
    """Copies what an attached Kaggle kernel left of the same training, its best checkpoint too, beside `state`."""
    if state.is_file():
        return
    found = kaggle_inputs(state.name)
    if not found and (others := kaggle_inputs("unfinished-*.pt")):
        log.warning("%s: left by a training with other settings or images; this one begins anew", others[0])
    for earlier in found[:1]:
        files = [file for file in earlier.parent.iterdir() if file.is_file() and not file.name.startswith(".")]
        for file in sorted(files, key=lambda file: file == earlier):  # the state last: it says that the rest is there
            with atomic_path(state.with_name(file.name)) as part:
                shutil.copyfile(file, part)
