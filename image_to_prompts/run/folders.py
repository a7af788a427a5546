"""The only module that knows where things lie: a run's folder, and Kaggle's input and working folders."""

import importlib.util
import json
import logging
import os
from pathlib import Path
from typing import Any

from .errors import UserError
from .files import make_folder, write_json

log = logging.getLogger(__name__)
KAGGLE_INPUT = Path(os.environ.get("IMAGE_TO_PROMPTS_KAGGLE_INPUT", "/kaggle/input"))
KAGGLE_WORKING = Path(os.environ.get("IMAGE_TO_PROMPTS_KAGGLE_WORKING", "/kaggle/working"))
MANIFEST = "manifest.csv"  # what a folder of rendered images contains
EMBEDDED = "prompt"  # array of the prompts' own embeddings in a folder of `embed`
BANK = "bank.json"  # what a bank of prompts says of itself
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


def package_folder(name: str) -> Path:
    """Folder of an installed package, found without importing it.

    Raises:
        ModuleNotFoundError: If it is not installed.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return Path(next(iter(spec.submodule_search_locations)))


class Run:
    """One run's folder and everything in it."""

    def __init__(self, folder: Path) -> None:
        """Takes the folder."""
        self.folder = folder
        self.prompts = folder / "prompts" / "generated.csv"
        self.metadata = folder / "data_meta" / "prompts.csv"
        self.train_metadata = self.metadata.with_name("train.csv")
        self.test_metadata = self.metadata.with_name("test.csv")
        self.images = folder / "images" / "prompts"
        self.train_images = self.images.with_name("train")
        self.test_images = self.images.with_name("test")
        self.embeddings = folder / "embeddings"
        self.checkpoints = folder / "checkpoints"
        self.checkpoint = self.checkpoints / "convnext"
        self.ensemble = self.checkpoints / "ensemble"
        self.bank = folder / "banks" / "prompts"
        self.submission = folder / "submission" / "submission.csv"
        self.report = folder / "report"

    def have(self, path: Path) -> Path:
        """`path`, or where nothing is there what an attached Kaggle kernel left in the same place of its run."""
        attached = [] if path.exists() else kaggle_inputs(path.relative_to(self.folder).as_posix())
        return max(attached, key=lambda found: found.stat().st_mtime, default=path)

    def rendered(self, images: Path) -> tuple[Path, ...]:
        """`images` and the attached folders of the same name: parts of one set that several kernel runs rendered."""
        return tuple(f for f in (*attached_images(images.name), images) if (f / MANIFEST).is_file()) or (images,)

    def filled(self, *folders: Path) -> Path:
        """The first of some folders that was rendered, here or in an attached kernel; the first if none was."""
        return next((f for f in folders if (self.rendered(f)[0] / MANIFEST).is_file()), folders[0])

    def target_images(self) -> Path | None:
        """The images that matter in the end: those held out, else the competition's if it is attached."""
        held_out = [folder for folder in self.rendered(self.test_images) if folder.is_dir()]
        return next(iter([*held_out, *_competitions()]), None)

    def stored_embeddings(self) -> list[Path]:
        """Folders of embeddings that `embed` wrote, attached or in this run."""
        found = kaggle_inputs(f"{EMBEDDED}.npy")
        for below in ("*", "banks/*"):
            found += sorted(self.folder.glob(f"{below}/{EMBEDDED}.npy"))
        return [path.parent for path in found]

    def banks(self) -> list[Path]:
        """Banks of prompts, attached or in this run."""
        return [path.parent for path in (*kaggle_inputs(BANK), *sorted(self.folder.glob(f"banks/*/{BANK}")))]

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
    return bool(read_json(folder / "config.json").keys() & {"backbone", "ensemble"})


def is_embeddings(folder: Path) -> bool:
    """Whether a folder holds embeddings that `embed` wrote."""
    return (folder / f"{EMBEDDED}.npy").is_file()


def is_bank(folder: Path) -> bool:
    """Whether a folder holds a bank of prompts that `embed --texts` wrote."""
    return (folder / BANK).is_file()


def is_ensemble(folder: Path) -> bool:
    """Whether a folder holds a checkpoint of `ensemble`."""
    return "ensemble" in read_json(folder / "config.json")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one where there is none or it is damaged."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def profile_of(folder: Path, explicit: str | None = None) -> str:
    """The profile that governs a run: explicit, else stored in its run.json, else by machine.

    Raises:
        UserError: If the profile is unknown or run.json is damaged.
    """
    file = folder / "run.json"
    stored = read_json(file).get("profile")
    if file.is_file() and stored not in (*PROFILES, *OLD_NAMES):
        raise UserError(f"{file}: not a run file; delete it or choose another --run folder")
    return profile_called(explicit or stored or ("full" if on_kaggle() else "embedded"))


def profile_called(name: str) -> str:
    """A profile by its name or an old one; raises UserError if there is none."""
    if name not in (*PROFILES, *OLD_NAMES):
        raise UserError(f"unknown profile {name!r}; choose one of {', '.join(PROFILES)}")
    return OLD_NAMES.get(name, name)


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


def competition_key(images: Path) -> Path | None:
    """The competition's prompts.csv, if it has the prompt of each of its images; in the hidden run it has few."""
    key = images.parent / "prompts.csv"
    known = {line.partition(",")[0] for line in key.read_text("utf-8").splitlines()} if key.is_file() else set()
    return key if all(file.stem in known for file in images.iterdir()) else None


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
