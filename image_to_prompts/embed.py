"""Embeddings of images by pretrained backbones, and of their prompts: what kNN predicts from without any training.

    image-to-prompts embed --images DIR [--metadata CSV] --out embeddings [--backbone NAME ...]

On disk: `<name>.npy` float32 (n, d), its rows named in `<name>.names.csv`, and how it was made in `<name>.json`. Two
arrays are joined by name, never by order.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from . import backbones, dataset, finetune, frozen, metadata, tars, text_encoder
from . import model as models
from .devices import process_state
from .errors import UserError
from .files import Stamp, make_folder, write_array, write_json
from .images import ImageRows
from .profiles import StageConfig

log = logging.getLogger(__name__)
PROMPTS = "prompt"  # name of the prompts' own embeddings
ENDS = (".npy", ".names.csv", ".json")


@dataclass
class Config(StageConfig):
    """Embeds images with pretrained backbones, and their prompts with all-MiniLM-L6-v2."""

    images: tuple[Path, ...] = ()
    """Folders of images or tar shards; with --metadata one a CSV, or one for all."""
    metadata: tuple[Path, ...] = ()
    """Metadata CSVs; left out: each folder's manifest.csv."""
    backbone: tuple[str, ...] = ("timm:tf_efficientnet_lite2",)
    """open_clip:<model>, open_clip:<folder> or timm:<model>, one or several."""
    image_size: int = 224
    """Side of the input in px."""
    out: Path = Path("embeddings")
    """Folder to write."""
    loader_workers: int = 0
    """Threads that decode images; 0: one a core."""


def write(folder: Path, name: str, vectors: np.ndarray, names: pd.DataFrame, about: dict[str, Any]) -> None:
    """Writes an array with its names.

    Args:
        folder: Where to.
        name: Stem of the files.
        vectors: float32 (n, d), finite.
        names: n rows, `image_name` first and unique.
        about: How they were made, as JSON values.

    Raises:
        ValueError: If the lengths differ, a name stands twice or a vector is not finite.
    """
    if len(vectors) != len(names) or names["image_name"].duplicated().any() or not np.isfinite(vectors).all():
        raise ValueError(f"{name}: {vectors.shape} vectors for {len(names)} names, or a name twice, or not finite")
    write_array(folder / f"{name}.npy", vectors.astype(np.float32))
    metadata.write_table(folder / f"{name}.names.csv", names)
    write_json(folder / f"{name}.json", about)


def read(folder: Path, name: str) -> tuple[np.ndarray, pd.DataFrame, dict[str, Any]]:
    """Reads what `write` wrote: float32 (n, d), the names and how they were made.

    Raises:
        UserError: If a file is missing or damaged, or the rows are not as many as the names, or not finite.
    """
    path = folder / f"{name}.npy"
    names = metadata.read_table(folder / f"{name}.names.csv", ("image_name",))
    try:
        vectors = np.load(path, allow_pickle=False)
        about = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path}: not an array of this project: {error}; run embed again") from error
    if vectors.ndim != 2 or len(vectors) != len(names):
        raise UserError(f"{path}: shape {vectors.shape} for {len(names)} names; run embed again")
    bad = np.flatnonzero(~np.isfinite(vectors).all(1))
    if len(bad):
        raise UserError(f"{path}: row {bad[0] + 1} ({names['image_name'][bad[0]]}) is not finite; run embed again")
    metadata.check_names(names, folder / f"{name}.names.csv")
    return vectors, names, about


def joined(folder: Path, name: str) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """An image array and the prompts' embeddings, row by row for the same images.

    Returns:
        float32 (n, d), float32 (n, 384), and how the image array was made.

    Raises:
        UserError: As `read`, or if an image has no prompt.
    """
    vectors, names, about = read(folder, name)
    targets, prompt_names, _ = read(folder, PROMPTS)
    rows = pd.Index(prompt_names["image_name"]).get_indexer(names["image_name"])
    if (rows < 0).any():
        missing = names["image_name"][int(np.argmin(rows))]
        raise UserError(f"{folder / name}.names.csv: {missing} has no row in {PROMPTS}.names.csv; run embed again")
    return vectors, targets[rows], about


def arrays(folder: Path) -> list[str]:
    """Names of the image arrays in a folder."""
    return sorted(path.stem for path in folder.glob("*.npy") if path.stem != PROMPTS)


def run(config: Config) -> dict[str, tuple[int, int]]:
    """Runs the stage.

    Returns:
        Rows and width of each array, by name.

    Raises:
        UserError: On bad input or weights, or if no image can be read.
    """
    if config.image_size < 1 or not config.backbone:
        raise UserError("--image-size must be at least 1, --backbone must name one; correct them")
    specs = {name: backbones.describe(name, config.image_size) for name in config.backbone}
    tables = dataset.tables(config.metadata, config.images)
    rows = dataset.with_images(tables, config.images)
    listing = [(str(path), *tars.stat(path)) for path in rows["path"]]
    settings = config.settings("out", "images", "metadata", "loader_workers") | {"files": listing}
    stamp = Stamp(config.out / ".embed.done", settings, tables)
    slugs = {name: name.replace(":", "-").replace("/", "-") for name in specs}
    if stamp.is_current():
        log.info("%s is up to date", config.out)
        return {name: np.load(config.out / f"{name}.npy", mmap_mode="r").shape for name in [*slugs.values(), PROMPTS]}
    work = stamp.work_folder()
    device = process_state().device
    alone = finetune.Config(image_size=config.image_size, cache_features=False, loader_workers=config.loader_workers)
    found = {}
    for name, spec in specs.items():
        model = models.build(spec)
        backbones.load_pretrained(model.backbone, spec)
        images = ImageRows(rows["path"].tolist(), config.image_size)
        folder = make_folder(work / slugs[name])
        features, _ = frozen.features(model.to(device), images, np.arange(len(rows)), device, alone, folder)
        readable = np.isfinite(features[:, 0])
        for file in images.broken:
            log.warning("%s could not be read and was left out", file)
        about = {"backbone": spec.to_dict()}
        write(config.out, slugs[name], features[readable], rows.loc[readable, ["image_name"]], about)
        found[slugs[name]] = features[readable].shape
    targets = text_encoder.encode(rows["prompt"].tolist())
    write(config.out, PROMPTS, targets, rows[["image_name", "prompt"]], {"encoder": "all-MiniLM-L6-v2"})
    found[PROMPTS] = targets.shape
    stamp.write([config.out / f"{name}{end}" for name in found for end in ENDS])
    log.info("%s: %s", config.out, ", ".join(f"{name} {shape}" for name, shape in found.items()))
    return found
