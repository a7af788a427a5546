"""The only module that knows where things lie: a run's folder, and Kaggle's input and working folders."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path

from .errors import UserError
from .files import make_folder, write_json

log = logging.getLogger(__name__)
KAGGLE_INPUT = Path(os.environ.get("IMAGE_TO_PROMPTS_KAGGLE_INPUT", "/kaggle/input"))
KAGGLE_WORKING = Path(os.environ.get("IMAGE_TO_PROMPTS_KAGGLE_WORKING", "/kaggle/working"))
MANIFEST = "manifest.csv"  # what a folder of rendered images contains
LAST = "last"  # folder of the last epoch's weights, in that of the best epoch's
PROFILES = ("embedded", "full")
OLD_NAMES = {"kaggle": "full"}  # until version 0.3


def on_kaggle() -> bool:
    """Whether this is a Kaggle kernel."""
    return "KAGGLE_KERNEL_RUN_TYPE" in os.environ or "IMAGE_TO_PROMPTS_KAGGLE_INPUT" in os.environ


def default_run() -> Path:
    """`/kaggle/working` on Kaggle, `runs/default` elsewhere."""
    return KAGGLE_WORKING if on_kaggle() else Path("runs/default")


def kaggle_inputs(marker: str) -> list[Path]:
    """Every file called `marker` (a name or a glob pattern) below an attached Kaggle input, whatever its layout.

    Kaggle changed its mount layout in 2026 (`/kaggle/input/<slug>`, `.../datasets/<owner>/<slug>`,
    `.../models/...`), so the marker is searched for.
    """
    return sorted(KAGGLE_INPUT.rglob(marker)) if KAGGLE_INPUT.is_dir() else []


def package_folder(name: str) -> Path | None:
    """Folder of an installed package, found without importing it; None if it is not installed."""
    spec = importlib.util.find_spec(name)
    return Path(next(iter(spec.submodule_search_locations))) if spec and spec.submodule_search_locations else None


@dataclass(frozen=True)
class Run:
    """One run's folder and everything in it."""

    folder: Path

    def have(self, path: Path) -> Path:
        """`path`, or where nothing is there what an attached Kaggle kernel left in the same place of its run."""
        attached = [] if path.exists() else kaggle_inputs(path.relative_to(self.folder).as_posix())
        return max(attached, key=lambda found: found.stat().st_mtime, default=path)

    @property
    def prompts(self) -> Path:
        return self.folder / "prompts" / "generated.csv"

    @property
    def metadata(self) -> Path:
        return self.folder / "data_meta" / "prompts.csv"

    @property
    def train_metadata(self) -> Path:
        return self.metadata.with_name("train.csv")

    @property
    def test_metadata(self) -> Path:
        return self.metadata.with_name("test.csv")

    @property
    def images(self) -> Path:
        return self.folder / "images" / "prompts"

    def rendered(self, images: Path) -> tuple[Path, ...]:
        """`images` and the attached folders of the same name: parts of one set that several kernel runs rendered."""
        return tuple(f for f in (*attached_images(images.name), images) if (f / MANIFEST).is_file()) or (images,)

    def filled(self, *folders: Path) -> Path:
        """The first of some folders that was rendered, here or in an attached kernel; the first if none was."""
        return next((f for f in folders if (self.rendered(f)[0] / MANIFEST).is_file()), folders[0])

    @property
    def train_images(self) -> Path:
        return self.images.with_name("train")

    @property
    def test_images(self) -> Path:
        return self.images.with_name("test")

    @property
    def embeddings(self) -> Path:
        return self.folder / "embeddings"

    def target_images(self) -> Path | None:
        """The images that matter in the end: those held out, else the competition's if it is attached."""
        held_out = [folder for folder in self.rendered(self.test_images) if folder.is_dir()]
        return next(iter([*held_out, *_competitions()]), None)

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def checkpoint(self) -> Path:
        return self.checkpoints / "convnext"

    @property
    def ensemble(self) -> Path:
        return self.checkpoints / "ensemble"

    @property
    def submission(self) -> Path:
        return self.folder / "submission" / "submission.csv"

    @property
    def report(self) -> Path:
        return self.folder / "report"

    def newest_checkpoints(self) -> list[Path]:
        """The checkpoint folders that finetune and ensemble wrote last, in this run or in an attached Kaggle input.

        Raises:
            UserError: If there is none.
        """
        found = [path.parent for path in self.checkpoints.glob("*/config.json")]
        found += [path.parent for path in kaggle_inputs("config.json")]
        found = [folder for folder in found if (folder / "model.safetensors").is_file() and is_checkpoint(folder)]
        found = [folder for folder in found if folder.name != LAST]  # the epoch beside it was better
        if not found:
            raise UserError(f"no checkpoint under {self.checkpoints}; run finetune first or give --checkpoint DIR")
        newest = {is_ensemble(f): f for f in sorted(found, key=lambda f: (f / "model.safetensors").stat().st_mtime)}
        return [newest[kind] for kind in sorted(newest)]


def is_checkpoint(folder: Path) -> bool:
    """Whether `folder/config.json` is one of ours and not some other model's."""
    return bool({"backbone", "ensemble"} & _keys(folder / "config.json"))


def is_ensemble(folder: Path) -> bool:
    """Whether a folder holds a checkpoint of `ensemble`."""
    return "ensemble" in _keys(folder / "config.json")


def _keys(path: Path) -> set[str]:
    try:
        return set(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return set()


def profile_of(folder: Path, explicit: str | None = None) -> str:
    """The profile that governs a run: explicit, else stored in its run.json, else by machine.

    Raises:
        UserError: If the profile is unknown or run.json is damaged.
    """
    file = folder / "run.json"
    stored = _stored_profile(file)
    if file.is_file() and stored is None:
        raise UserError(f"{file}: not a run file; delete it or choose another --run folder")
    return profile_called(explicit or stored or ("full" if on_kaggle() else "embedded"))


def profile_called(name: str) -> str:
    """A profile by its name or an old one; raises UserError if there is none."""
    if name not in (*PROFILES, *OLD_NAMES):
        raise UserError(f"unknown profile {name!r}; choose one of {', '.join(PROFILES)}")
    return OLD_NAMES.get(name, name)


def _stored_profile(path: Path) -> str | None:
    """What a run.json says; None if it is missing or damaged."""
    try:
        profile = json.loads(path.read_text(encoding="utf-8"))["profile"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return profile if profile in (*PROFILES, *OLD_NAMES) else None


def _competitions() -> list[Path]:
    folders = [marker.parent / "images" for marker in kaggle_inputs("sample_submission.csv")]
    return [folder for folder in folders if folder.is_dir()]


def competition_images() -> Path:
    """Folder of the competition's test images below the attached Kaggle inputs.

    Raises:
        UserError: If the competition is not attached.
    """
    for folder in _competitions():
        return folder
    raise UserError(f"no competition images under {KAGGLE_INPUT}; attach stable-diffusion-image-to-prompts")


def attached_images(name: str) -> list[Path]:
    """Folders called `name` below the attached Kaggle inputs that hold what an earlier render run left."""
    found = kaggle_inputs(MANIFEST) + kaggle_inputs("*.tar.part")
    return sorted({path.parent for path in found if path.parent.name == name})


def open_run(folder: Path, profile: str) -> Run:
    """Makes the run's folder and stores its profile on first use."""
    make_folder(folder)
    if not (folder / "run.json").is_file():
        write_json(folder / "run.json", {"profile": profile})
    return Run(folder)
