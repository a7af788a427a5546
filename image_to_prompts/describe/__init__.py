"""Stage 8, describe: says the prompt of any image in words that can be edited.

    image-to-prompts describe PATH... [--out prompts.csv | --out prompts.jsonl] [--txt] [--ignore-file]

The prompt that stands in the image file comes first. For the rest (see `ways`) the checkpoints predict an embedding,
the known prompts nearest to it are looked up, and `compose` makes one prompt that is nearer. Images that are unlike
those that the checkpoint has seen go to CLIP Interrogator; without it they get a guess, and it is called one. Without
`--out` prompts go to standard output, one image a line. In Python:

    from image_to_prompts import describe
    describe("cat.png").prompt
"""

import contextlib
import logging
import sys
import tempfile
import types
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import tyro
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from .. import profiles
from ..models import layouts, text_encoder, weights
from ..predict import predictors
from ..predict.predictors import Viewing
from ..profiles import Models, StageConfig
from ..run.bounds import Positive
from ..run.devices import gather, rank_and_processes
from ..run.errors import UserError, explained
from ..run.files import shown
from ..run.folders import BANK, Run, default_run, profile_of
from ..run.progress import progress_to
from ..run.resume import alone, fingerprint
from . import files as outputs
from .files import Description
from .ways import BLOCK, Describer, from_files

__all__ = ["Config", "Describer", "Description", "describe", "run"]
log = logging.getLogger(__name__)
FIRST = 4  # images of the first block, so that something is seen soon
METHOD = 5  # to be raised when the same inputs give other texts
TABLES = (".csv", ".jsonl")
WAYS = {
    "file": "prompts from their files",
    "checkpoint": "from the checkpoint",
    "bank": "from a bank of prompts",
    "interrogator": "from CLIP Interrogator",
    "caption": "captioned",
    "guess": "guessed",
}


@dataclass
class Main:
    """What it describes, and where the prompts go."""

    paths: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """Image files, and folders with all that is below them."""
    recursive: bool = True
    """Look into sub-folders too."""
    ignore_file: bool = False
    """Predict prompts of images whose file carries one, too."""
    out: Path | None = None
    """Table to write, .csv or .jsonl; images already in it are not described again."""
    txt: bool = False
    """Write a .txt beside each image that has none."""
    append: bool = False
    """With --txt, add the prompt to an existing .txt."""
    overwrite: bool = False
    """Replace tables and texts that others wrote or edited."""
    recompute: bool = False
    """Work everything out again."""
    top: Positive = 5
    """How many of the nearest known prompts to list."""


@dataclass
class Words:
    """What prompts are made of."""

    prefix: str = ""
    """Text before every prompt."""
    suffix: str = ""
    """Text behind every prompt."""
    ban: tuple[str, ...] = ()
    """Words, or files with one a line; parts of prompts that hold one are left out."""
    artists: bool = True
    """Let prompts name artists."""
    most_words: Positive = 30
    """Words of a prompt."""
    checkpoint: tuple[Path, ...] = ()
    """Checkpoint folders, blended; left out: the newest of finetune and of ensemble, in this run or attached."""
    bank: tuple[Path, ...] = ()
    """Banks of prompts that embed --texts made; they need no checkpoint."""
    prompts: tuple[Path, ...] = ()
    """CSVs of known prompts; left out: those of the bank, or those that the run was trained on."""
    vocabulary: Path | None = None
    """Folder of own phrases: subjects, places, mediums, movements, flavors or artists .txt, one a line."""


@dataclass
class Config(Main, Words, Viewing, Models, StageConfig):
    """Gives the prompts of images: the one in the file, or what a model predicts; a guess is labelled as one."""


@lru_cache(maxsize=1)
def _loaded(run: Path, profile: str, written: tuple[int, ...]) -> Describer:
    """Models in memory; anew when a checkpoint or a bank of the run was written since."""
    return Describer(profiles.default_config("describe", Run(run), profile))


def describe(
    image: str | Path | bytes | Image.Image | Sequence[Any], run: str | Path | None = None, profile: str | None = None
) -> Any:
    """Describes images; models are loaded with the first one that needs them. For folders: `run` of this module.

    Args:
        image: A file, its bytes, an image in memory, or a list of these.
        run: Folder of the run whose checkpoints to use; left out: the default one.
        profile: `embedded` or `full`; left out: the run's own.

    Returns:
        A `Description`; for a list, a list of them, in which an image that cannot be read has an `error`.

    Raises:
        ModuleNotFoundError: If an image has no prompt in its file, and the package is installed without `[full]`.
        UserError: If the image, or one of the list, is not there; if a single one cannot be read; or see `Describer`.
    """
    folder = (Path(run) if run else default_run()).resolve()
    if isinstance(image, list | tuple):
        with tempfile.TemporaryDirectory() as name:
            files = [_file(one, Path(name) / f"{number}.png") for number, one in enumerate(image)]
            made = [*folder.glob("checkpoints/*/config.json"), *folder.glob(f"banks/*/{BANK}")]
            written = tuple(path.stat().st_mtime_ns for path in sorted(made))
            return _loaded(folder, profile_of(folder, profile), written).describe(files)
    (found,) = describe([image], run, profile)
    if found.error:
        raise UserError(found.error)
    return found


def _file(image: Any, place: Path) -> Path:
    """A file of an image, written to `place` if it is in memory alone."""
    if isinstance(image, Image.Image):
        about = PngInfo()
        for name, text in image.info.items():
            if isinstance(text, str):
                about.add_itxt(str(name), text)
        plain = image if image.mode in ("RGB", "RGBA", "L", "LA", "P", "I;16") else image.convert("RGB")
        plain.save(place, exif=image.getexif(), pnginfo=about)
        return place
    if isinstance(image, bytes):
        place.write_bytes(image)
        return place
    if not isinstance(image, str | Path):
        raise UserError(f"describe({image!r}): give a path, bytes, a PIL image, or a list of them")
    if Path(image).is_dir():
        raise UserError(f"{image}: is a folder; describe takes images, `image-to-prompts describe` whole folders")
    return outputs.image_files([Path(image)])[0]


Show = Callable[[list[Description]], object] | None


def run(config: Config, show: Show = None) -> list[Description]:
    """Runs the stage.

    Args:
        config: The settings.
        show: Gets the descriptions of each block, as soon as they are there.

    Returns:
        The descriptions, in the order of the paths; with `txt` alone, of those images that had no text yet.

    Raises:
        UserError: If a path or a setting is bad, an output is not from here (unless `overwrite`), or see `Describer`.
    """
    if not config.paths:
        raise UserError("give image files or folders to describe")
    if config.out and config.out.suffix.lower() not in TABLES:
        raise UserError(f"--out {config.out}: must end in {' or '.join(TABLES)}")
    files = outputs.image_files(config.paths, config.recursive)
    if config.txt:
        outputs.check_places(files)
    if not config.out:
        return _run(config, files, show)
    with alone(config.out):
        return _run(config, files, show)


def printed(found: list[Description]) -> str:
    """What the command line prints: an image and its prompt a line, whatever line breaks the prompt has."""
    return "".join(f"{shown(one.path)}\t{' '.join(one.prompt.split())}\n" for one in found)


def _run(config: Config, files: list[Path], show: Show) -> list[Description]:
    if config.txt and not (config.out or config.overwrite or config.append or config.recompute):
        done = {file for file in files if outputs.beside(file).exists()}
        files = [file for file in files if file not in done]
        if done:
            log.info("%d images have a .txt already; --append adds to it, --overwrite replaces it", len(done))
    banned, describer = outputs.banned(config.ban), Describer(config)
    table = _table(config, describer.csvs)
    ask = _asking(config, describer)
    found: list[Description] = []
    stay: list[Path] = []
    rank, processes = rank_and_processes()
    with progress_to(len(files), "describe") as advance, table or contextlib.nullcontext():
        while len(found) < len(files):
            block = files[len(found) : len(found) + processes * (BLOCK if found else FIRST)]
            mine = {file: outputs.key(file) for file in block[rank::processes]}  # as they are before they are read
            said = {} if config.ignore_file else from_files(mine)
            if rest := {file: key for file, key in mine.items() if file not in said}:
                said |= ask(rest)
            share = [outputs.worded(said[file], config.prefix, config.suffix, banned, config.top) for file in mine]
            both = gather(share, len(block))
            if table:
                table.add(both)
            if config.txt and rank == 0:
                stay += [one.path for one in both if not outputs.write_beside(one, config.overwrite, config.append)]
            if show and rank == 0:
                show(both)
            found += both
            advance(len(both))
    for path in stay:
        log.warning("%s: holds another text and stays; --append or --overwrite", shown(outputs.beside(path)))
    _tell(describer.folders, found)
    return found


def _asking(config: Config, describer: Describer) -> Callable[[dict[Path, str]], dict[Path, Description]]:
    """What answers by the models, given images with their keys; what is known is not computed again."""

    @lru_cache(maxsize=1)
    def known() -> outputs.Known:
        return outputs.Known(config.out, _fingerprint(describer) if config.out else "", config.recompute)

    def ask(keys: dict[Path, str]) -> dict[Path, Description]:
        try:
            said = known().of(keys)
            new = [file for file in keys if file not in said]
            predicted = dict(zip(new, describer.predict(new), strict=True))
            known().keep({keys[file]: one for file, one in predicted.items()})
            return said | predicted
        except ModuleNotFoundError as error:  # installed without [full]: prompts from files are there
            why = f"no prompt in the file, and {explained(error) or error}"
            return {file: Description(file, "", error=why) for file in keys}

    return ask


def _table(config: Config, reads: list[Path]) -> outputs.Table | None:
    """The table, in the main process; what is wrong with it ends all of them."""
    rank, processes = rank_and_processes()
    table, problem = None, ""
    if config.out and rank == 0:
        try:
            table = outputs.Table(config.out, config.top, config.overwrite, reads)
        except UserError as error:
            problem = str(error)
    if problem := max(gather([problem], processes)):
        raise UserError(problem)
    return table


def _tell(folders: list[Path], found: list[Description]) -> None:
    """Says how many prompts came by which way, and how to get better ones."""
    broken = [one for one in found if one.error]
    for error in dict.fromkeys(one.error for one in broken):
        log.warning("%s", error)
    counts = Counter(one.source for one in found if one.source)
    ways = ", ".join(f"{counts[source]} {said}" for source, said in WAYS.items() if counts[source])
    failed = f"{len(broken)} without an answer" if broken else ""
    log.info("%d images: %s", len(found), ", ".join(filter(None, [ways, failed])))
    if strange := sum(one.familiar is False for one in found):
        known = predictors.knows(folders)
        log.warning("%d of %d images are unlike all that the checkpoint knows: %s", strange, len(found), known)
    elif counts["checkpoint"] and not all(one.familiar for one in found if one.source == "checkpoint"):
        log.warning(
            "the checkpoint cannot tell which images are unlike all that it knows; finetune, run again, adds that"
        )
    if counts["guess"]:
        log.warning(
            "%d prompts are guesses, classes of ImageNet; CLIP Interrogator says more: "
            "image-to-prompts weights get describe (5.8 GB)",
            counts["guess"],
        )


def _fingerprint(describer: Describer) -> str:
    """Tells descriptions from those of other settings, checkpoints, known prompts, vocabularies and code."""
    from . import phrases

    config, folders, csvs = describer.config, describer.folders, describer.csvs
    settings = {name: getattr(config, name) for name in ("views", "artists", "most_words", "profile")}
    settings |= {"method": METHOD, "phrases": phrases.lists(config.vocabulary)}
    at_hand = weights.interrogator_at_hand(config.caption, config.ranker)
    settings["interrogator"] = [layouts.digest(path) if path else "" for path in at_hand]
    settings |= {"caption": config.caption} if weights.is_address(config.caption) else {}
    settings["encoder"] = layouts.digest(weights.locate(text_encoder.NAME))
    inputs = [path for folder in folders for path in predictors.inputs(folder, describer.searching)]
    inputs += [folder / "validation.safetensors" for folder in folders]  # on which a blend's weights are fitted
    return fingerprint(settings, [*inputs, *csvs])[:16]


# `from image_to_prompts import describe` gives this module; called, it describes images.
sys.modules[__name__].__class__ = type("CallableModule", (types.ModuleType,), {"__call__": staticmethod(describe)})
