"""Stage 5, embed: what pretrained encoders make of each image, and the embeddings of the prompts.

    image-to-prompts embed --images DIR [--metadata CSV] --out embeddings [--encoders NAME ...]
    image-to-prompts embed --texts CSV... --encoders open_clip:<model> --out bank

With --texts it makes a bank of prompts instead, which `infer` searches: see `bank`.

The reference's three: CLIP ViT-B/32, ConvNeXt-Tiny, and CLIP Interrogator's text through all-MiniLM-L6-v2; see
`encoders` for others and `embeddings` for the files. The interrogator's texts stand in its names.csv.
"""

import json
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pandas as pd

from ..data import images
from ..encode import embeddings, encoders
from ..encode.encoders import Encoded
from ..models import backbones, layouts, text_encoder, weights
from ..profiles import Models, StageConfig
from ..run import resume
from ..run.bounds import Amount, AtLeast, NotNegative, Positive
from ..run.devices import process_state
from ..run.engine import EngineConfig, over_blocks
from ..run.errors import UserError
from ..run.files import read_tensors
from ..run.folders import Run, is_bank, is_embeddings
from ..run.progress import Deadline
from ..run.resume import Stamp, alone
from ..training import dataset

log = logging.getLogger(__name__)
BLOCK = 512  # images a file of half-done work


@dataclass
class Main:
    """What it embeds, and with what."""

    images: tuple[Path, ...] = ()
    """Folders of images or tar shards; with --metadata one a CSV, or one for all."""
    metadata: tuple[Path, ...] = ()
    """Metadata CSVs; left out: each folder's manifest.csv, else a .txt beside each image."""
    out: Path = Path("embeddings")
    """Folder to write; with --texts left out: banks/prompts of the run."""
    encoders: Annotated[tuple[str, ...], AtLeast(1)] = (
        *("timm:tf_efficientnet_lite0", "timm:tf_efficientnet_lite2", "classes"),
    )
    """open_clip:<model or folder>, timm:<model>, transformers:<model or folder>, interrogator, classes,
    caption:<model, folder or address of a server>."""
    image_size: Positive = 224
    """Side of the backbones' input in px."""
    batch_size: Positive = 32
    """Images at once."""
    loader_workers: NotNegative = 0
    """Threads that decode images; 0: one a core."""
    max_hours: Amount = 0.0
    """Stop before this process has run for so many hours, and write what is there of the first images; 0: never."""


@dataclass
class Bank:
    """A bank of prompts in place of images."""

    texts: tuple[Path, ...] = ()
    """CSVs of prompts to make a bank of, for infer and describe; --encoders names its one tower."""
    dimensions: NotNegative = 0
    """Numbers a prompt, by principal components; 0: all that the tower gives."""


@dataclass
class Texts:
    """What the interrogator and captioners say."""

    mode: Literal["fast", "classic", "best"] = "fast"
    """How the interrogator puts its text together."""
    terms: str = ""
    """Folder of own term lists (artists.txt, flavors.txt, mediums.txt, movements.txt, trendings.txt)."""
    artists: bool = True
    """Let the interrogator name artists."""
    samples: Positive = 1
    """Captions an image, of encoders caption:...: the first is the likeliest, the others are drawn."""


@dataclass
class Config(Main, Bank, Texts, Models, EngineConfig, StageConfig):
    """Embeds images with pretrained encoders, and their prompts with all-MiniLM-L6-v2."""


def slug(name: str) -> str:
    """Name of an encoder's array."""
    return name.replace(":", "-").strip("/").replace("/", "-")


def run(config: Config) -> dict[str, tuple[int, int]]:
    """Runs the stage.

    Returns:
        Rows and width of each array, by name; of a bank by its tower.

    Raises:
        UserError: On bad input, terms or weights, or if no image can be read.
    """
    if config.texts:
        from . import bank

        own = Run(config.run)
        if config.out == own.embeddings:  # nobody has named another place
            config = replace(config, out=own.bank)
        _not_beside(is_embeddings(config.out), config.out, "embeddings of images")
        with alone(config.out):
            return bank.run(config)
    _not_beside(is_bank(config.out), config.out, "a bank of prompts")
    tables = dataset.tables(config.metadata, config.images)
    with alone(config.out):
        return _run(config, tables)


def _not_beside(there: bool, out: Path, what: str) -> None:
    """Raises UserError if `out` holds what the other kind of run has written; it would be taken for our own."""
    if there:
        raise UserError(f"{out}: holds {what}; give another --out")


def _run(config: Config, tables: tuple[Path, ...]) -> dict[str, tuple[int, int]]:
    rows = dataset.load_metadata(tables, config.images)
    files = rows["path"].tolist()
    of_banks = [one.name for one in fields(Bank)]
    settings = config.settings("out", "images", "metadata", "loader_workers", "batch_size", "max_hours", *of_banks)
    settings["files"] = [rows["image_name"].tolist(), images.contents(files)]
    if any(table.is_dir() for table in tables):  # a text beside each image
        settings["prompts"] = rows["prompt"].tolist()
    models = {name.replace("caption:", "transformers:", 1): name.partition(":")[2] for name in config.encoders}
    places = [backbones.locate(name) for name, model in models.items() if model and Path(model).is_dir()]
    given = weights.interrogator(config.caption, config.ranker)
    places += [weights.locate(name, folder) for name, folder in given if folder]
    settings["weights"] = [layouts.digest(place) for place in places]
    terms = sorted(Path(config.terms).glob("*.txt")) if config.terms else []
    stamp = Stamp(config.out / ".embed.done", "embed", settings, [*tables, *terms])
    slugs = [slug(name) for name in config.encoders]
    if stamp.is_current():
        log.info("%s is up to date", config.out)
        return _shapes(config.out, slugs)
    outputs = [config.out / f"{name}{end}" for name in [*slugs, embeddings.PROMPTS] for end in embeddings.ENDS]
    stamp.claim(outputs)
    work = stamp.work_folder()
    built = _build(config)
    blocks = _blocks(built, files, config, work)
    done = min(len(blocks) * BLOCK, len(files))
    if not done:
        raise UserError(f"--max-hours {config.max_hours:g}: no block of {BLOCK} images fits into it; allow more")
    if process_state().is_main_process:
        encoded = _joined(blocks, done, len(built))
        if np.isnan(encoded[0].vectors).all():
            raise UserError("no image can be read; check --images")
        _write(rows.iloc[:done], slugs, built, encoded, config.out)
        if done == len(files):
            stamp.write(outputs)
        else:
            said = "stopped by --max-hours %g with %d of %d images; run the same command again to continue"
            log.warning(said, config.max_hours, done, len(files))
    process_state().wait_for_everyone()
    return _shapes(config.out, slugs)


def _shapes(folder: Path, slugs: list[str]) -> dict[str, tuple[int, int]]:
    every = [*slugs, embeddings.PROMPTS]
    return {name: np.load(folder / f"{name}.npy", mmap_mode="r").shape for name in every}


def _write(
    rows: pd.DataFrame, slugs: list[str], built: list[encoders.Encoder], encoded: list[Encoded], out: Path
) -> None:
    """Writes the arrays of all encoders and of the prompts."""
    for name, encoder, made in zip(slugs, built, encoded, strict=True):
        readable = np.isfinite(made.vectors[:, 0])
        names = rows.loc[readable, ["image_name"]]
        if made.texts is not None:
            names = names.assign(text=[text for text, good in zip(made.texts, readable, strict=True) if good])
        embeddings.write(out, name, made.vectors[readable], names, encoder.about)
    targets = text_encoder.encode(rows["prompt"].tolist())
    names = rows[[column for column in embeddings.KEPT if column in rows]]
    embeddings.write(out, embeddings.PROMPTS, targets, names, {"encoder": text_encoder.NAME})
    images.tell_broken(rows["path"][~readable], "left out")
    log.info("%s: %s", out, ", ".join(f"{name} {shape}" for name, shape in _shapes(out, slugs).items()))


def _build(config: Config) -> list[encoders.Encoder]:
    chosen = {one.name: getattr(config, one.name) for kind in (Texts, Models) for one in fields(kind)}
    return weights.all_of(*(partial(encoders.build, name, config.image_size, **chosen) for name in config.encoders))


def _start(config: Config, built: list[encoders.Encoder] | None = None) -> Callable[[list[Path]], list[Encoded]]:
    """What shows a block of images to the encoders."""
    show = encoders.viewer(built or _build(config), config.batch_size, config.loader_workers)
    return lambda files: show(files, "whole")


def _blocks(built: list[encoders.Encoder], files: list[Path], config: Config, work: Path) -> list[Path]:
    """Files of what each encoder makes of 512 images each, which a later run finds in `work`; processes share them."""
    start = partial(_start, config, built if config.engine == "local" else None)

    def make(blocks: Iterable[range]) -> Iterator[dict[str, np.ndarray]]:
        for found in over_blocks(config, start, (files[rows.start : rows.stop] for rows in blocks)):
            texts = json.dumps([one.texts for one in found]).encode()
            yield {"texts": np.frombuffer(texts, np.uint8), **{str(i): one.vectors for i, one in enumerate(found)}}

    return resume.blocks(work, len(files), BLOCK, make, Deadline(config.max_hours).passed)


def _joined(blocks: list[Path], count: int, encoders: int) -> list[Encoded]:
    """What `_blocks` wrote of `count` images, for each encoder."""
    found = [Encoded(np.full((count, 1), np.nan, np.float32)) for _ in range(encoders)]
    said: list[list[str]] = [[] for _ in found]
    for start, file in zip(range(0, count, BLOCK), blocks, strict=True):
        block = read_tensors(file)
        for number, texts in enumerate(json.loads(block["texts"].tobytes())):
            one, vectors = found[number], block[str(number)]
            if vectors.shape[1] > one.vectors.shape[1]:  # 1 where no image of a block can be read
                one.vectors = np.full((count, vectors.shape[1]), np.nan, np.float32)
            one.vectors[start : start + len(vectors)] = vectors
            said[number] += texts or [""] * len(vectors)
    return [replace(one, texts=texts if any(texts) else None) for one, texts in zip(found, said, strict=True)]
