"""Stage 8, describe: says the prompt of any image in words that can be edited.

    image-to-prompts describe PATH... [--out prompts.csv | --out prompts.jsonl | --txt] [--top 5] [--no-artists]

The checkpoints predict an embedding, the known prompts nearest to it are looked up, and `compose` makes one prompt that
is nearer. Without a checkpoint it is the text of the `embed` stage's interrogator. Prompts go to standard output, one
image a line. In Python:

    from image_to_prompts import describe
    describe("cat.png").prompt
"""

import logging
import sys
import tempfile
import types
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from PIL import Image

from .. import infer, profiles
from ..data import images
from ..encode import encoders
from ..models import hub, metrics, text_encoder, weights
from ..predict import predictors
from ..profiles import StageConfig
from ..run.bounds import Positive
from ..run.devices import gather, rank_and_processes
from ..run.errors import UserError
from ..run.files import make_folder, shown
from ..run.folders import Run, default_run, profile_of
from ..run.resume import alone, fingerprint
from .files import Description, Known, Written, check_places, image_files, table

log = logging.getLogger(__name__)
BLOCK = 64  # images described together
METHOD = 2  # to be raised when the same inputs give other texts
TABLES = (".csv", ".jsonl")


@dataclass
class Main:
    """What it describes, and where the prompts go."""

    paths: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """Image files, and folders with all that is below them."""
    out: Path | None = None
    """Table to write, .csv or .jsonl."""
    txt: bool = False
    """Write a .txt beside each image."""
    overwrite: bool = False
    """Replace files that are not from here, or were edited."""
    top: Positive = 5
    """How many of the nearest known prompts to tell."""


@dataclass
class Words:
    """What prompts are made of."""

    checkpoint: tuple[Path, ...] = ()
    """Checkpoint folders, blended; left out: the newest of finetune and of ensemble, in this run or attached."""
    prompts: tuple[Path, ...] = ()
    """CSVs of known prompts; left out: those that the run was trained on."""
    vocabulary: Path | None = None
    """Folder of own phrases: subjects, mediums, movements, flavors or artists .txt, one a line."""
    artists: bool = True
    """Let prompts name artists."""
    most_words: Positive = 30
    """Words of a prompt."""


@dataclass
class Config(Main, Words, predictors.Viewing, StageConfig):
    """Says the prompts of images; does only those that are not done yet."""


class Describer:
    """Models, known prompts and vocabulary, loaded once for any number of images."""

    def __init__(self, config: Config) -> None:
        """Loads everything; `config.paths` and the outputs play no role.

        Raises:
            UserError: If neither a checkpoint nor an interrogator is there, or a CSV or the vocabulary is bad.
        """
        from ..search.nearest import open_index
        from . import compose

        self.config = config
        run = Run(config.run)
        folders, csvs = sources(config)
        self.weights = infer.blend_weights(folders) if folders else []
        self.predictors = [predictors.checkpoint(folder) for folder in folders]
        self.interrogator = None if folders else _interrogator(config.profile, run)
        self.index = open_index(csvs) if csvs else None
        self.words = compose.vocabulary(config.vocabulary, config.artists) if folders else None

    def describe(self, files: Sequence[Path]) -> list[Description]:
        """Describes images, `BLOCK` at once; one that cannot be read gets an error instead of a prompt."""
        blocks = (list(files[start : start + BLOCK]) for start in range(0, len(files), BLOCK))
        return [one for block in blocks for one in self._describe(block)]

    def _describe(self, files: list[Path]) -> list[Description]:
        from . import compose

        vectors, texts = self._look(files)
        readable = np.flatnonzero(np.isfinite(vectors[:, 0]))
        count = max(compose.NEIGHBOURS, self.config.top)
        nearest = self.index.search(vectors[readable], count) if self.index else [[] for _ in readable]
        if self.words:
            known = [[prompt for prompt, _ in some] for some in nearest]
            said = compose.compose(vectors[readable], known, self.words, self.config.most_words)
            cosines = (text_encoder.encode_once(said) * vectors[readable]).sum(1).astype(float).round(4).tolist()
        else:
            said, cosines = [texts[row] for row in readable], [None] * len(readable)
        found = {}
        for row, prompt, cosine, some in zip(readable.tolist(), said, cosines, nearest, strict=True):
            near = tuple((text, round(value, 4)) for text, value in some[: self.config.top])
            found[row] = Description(files[row], prompt, cosine, near, vector=vectors[row])
        return [found.get(row) or Description(f, "", error=images.why_broken(f)) for row, f in enumerate(files)]

    def _look(self, files: list[Path]) -> tuple[np.ndarray, list[str]]:
        """Unit vectors, NaN for images that cannot be read; without a checkpoint also what the interrogator says."""
        config = self.config
        if self.interrogator:
            (seen,) = encoders.viewer([self.interrogator], config.batch_size, config.loader_workers)(files, "whole")
            if seen.vectors.shape[1] == 1:  # none can be read
                return np.full((len(files), text_encoder.DIMENSION), np.nan, np.float32), [""] * len(files)
            return seen.vectors, seen.texts or []
        found = [predictors.predict(predictor, files, config) for predictor in self.predictors]
        return metrics.blend(found, self.weights), []


def sources(config: Config) -> tuple[list[Path], list[Path]]:
    """The checkpoints, none if there is none, and the CSVs of known prompts.

    Raises:
        UserError: If one that was given is not there, or there is a checkpoint but no known prompts.
    """
    run = Run(config.run)
    folders = list(config.checkpoint) or infer.newest(run, may_miss=True)
    known = [run.have(path) for path in (run.train_metadata, run.metadata)]
    csvs = list(config.prompts) or [path for path in known if path.is_file()][:1]
    for path in csvs:
        if not path.is_file():
            raise UserError(f"{path}: no such file; correct --prompts")
    for folder in folders:
        if not (folder / "model.safetensors").is_file():
            raise UserError(f"{folder}: no checkpoint; correct --checkpoint")
    if folders and not csvs:
        raise UserError(f"no known prompts: {known[0]} is not there; run dedupe first or give --prompts CSV")
    return folders, csvs


def _interrogator(profile: str, run: Run) -> encoders.Encoder:
    """What says something without a checkpoint: caption and ranking, or their stand-in of the embedded profile."""
    if profile == "embedded":
        log.warning("no checkpoint in %s: ImageNet classes must do; `image-to-prompts run` trains one", run.folder)
        return encoders.build("classes", 224)
    try:
        return encoders.build("interrogator", 0)
    except UserError as error:
        hint = f"no checkpoint in {run.folder} (finetune makes one), and no interrogator in its place"
        raise UserError(f"{hint}: {error}") from error


@lru_cache(maxsize=1)
def _loaded(run: Path, profile: str) -> Describer:
    return Describer(profiles.default_config("describe", Run(run), profile))


def describe(image: str | Path | Image.Image, run: str | Path | None = None, profile: str | None = None) -> Description:
    """Describes one image; the models are loaded with the first one. For many: `Describer`, or `run` of this module.

    Args:
        image: A file, or an image in memory.
        run: Folder of the run whose checkpoints to use; left out: the default one.
        profile: `embedded` or `full`; left out: the run's own.

    Raises:
        UserError: If the image is not there or cannot be read, or see `Describer`.
    """
    if isinstance(image, Image.Image):
        with tempfile.TemporaryDirectory() as name:
            plain = image if image.mode in ("RGB", "RGBA", "L", "LA", "P", "I;16") else image.convert("RGB")
            plain.save(Path(name) / "image.png", exif=image.getexif())
            return replace(describe(Path(name) / "image.png", run, profile), path=Path("image.png"))
    try:
        path = Path(image)
    except TypeError:
        raise UserError(f"describe({image!r}): give a path or a PIL image") from None
    if path.is_dir():
        raise UserError(f"{path}: is a folder; describe takes one image, `image-to-prompts describe` whole folders")
    (file,) = image_files([path])
    folder = (Path(run) if run else default_run()).resolve()
    (found,) = _loaded(folder, profile_of(folder, profile)).describe([file])
    if found.error:
        raise UserError(found.error)
    return found


def run(config: Config) -> list[Description]:
    """Runs the stage.

    Returns:
        The descriptions, in the order of the paths.

    Raises:
        UserError: If a path or a setting is bad, an output is not from here (unless `overwrite`), or see `Describer`.
    """
    if not config.paths:
        raise UserError("give image files or folders to describe")
    if config.out and config.out.suffix.lower() not in TABLES:
        raise UserError(f"--out {config.out}: must end in {' or '.join(TABLES)}")
    files = image_files(config.paths)
    if config.txt:
        check_places(files)
    with alone(config.run / "described"):
        return _run(config, files)


def printed(found: list[Description]) -> str:
    """What the command line prints: an image and its prompt a line."""
    return "\n".join(f"{shown(one.path)}\t{one.prompt}" for one in found)


def _run(config: Config, files: list[Path]) -> list[Description]:
    outputs = Written(make_folder(config.run / "described"), config.overwrite)
    if config.out:
        if any(path.exists() and config.out.exists() and path.samefile(config.out) for path in sources(config)[1]):
            raise UserError(f"{config.out}: is read here; choose another --out")
        outputs.check(config.out)
    rank, processes = rank_and_processes()
    mine = files[rank::processes]
    known = Known(outputs.folder, _fingerprint(config), mine)
    _work(config, known, outputs)
    found = gather([one for file in mine if (one := known.of(file, config.top))], len(files))
    if config.out and rank == 0:
        outputs.check(config.out)  # hours may have passed
        outputs.write(config.out, table(found, config.out, config.top))
    broken = [one for one in found if one.error]
    for one in broken:
        log.warning("%s", one.error)
    log.info("%d images described, %d cannot be read", len(found) - len(broken), len(broken))
    return found


def _work(config: Config, known: Known, outputs: Written) -> None:
    """Describes what is not done, block by block; writes the text files of all."""
    from ..run.progress import progress_to
    from . import compose

    done = {file: known.of(file, config.top) for file in known.keys}
    todo = [file for file, one in done.items() if not one]
    if todo:
        describer = Describer(replace(config, top=max(config.top, compose.NEIGHBOURS)))
    stay = [outputs.beside(one) for one in done.values() if one and config.txt]
    with progress_to(len(done), "describe", len(done) - len(todo)) as advance:
        for start in range(0, len(todo), BLOCK):
            found = describer.describe(todo[start : start + BLOCK])
            known.keep(found)
            stay += [outputs.beside(one) for one in found if config.txt]
            advance(len(found))
    for path in filter(None, stay):
        log.warning("%s: not from here, or edited: it stays; --overwrite replaces it", shown(path))


def _fingerprint(config: Config) -> str:
    """Tells descriptions from those of other settings, checkpoints, known prompts, vocabularies and code."""
    from . import compose

    folders, csvs = sources(config)
    names = ("model.safetensors", "config.json", "validation.safetensors")  # the last one decides the blend's weights
    settings = {name: getattr(config, name) for name in ("views", "artists", "most_words", "profile")}
    settings |= {"method": METHOD, "top": max(config.top, compose.NEIGHBOURS)}
    settings["phrases"] = compose.phrases_in(config.vocabulary)
    settings["encoder"] = hub.digest(weights.locate(text_encoder.NAME))
    return fingerprint(settings, [*(folder / name for folder in folders for name in names), *csvs])[:16]


# `from image_to_prompts import describe` gives this module; called, it describes one image.
sys.modules[__name__].__class__ = type("CallableModule", (types.ModuleType,), {"__call__": staticmethod(describe)})
