"""Stage 4, finetune: an image backbone, its last layers unfrozen, learns prompt embeddings.

    image-to-prompts finetune --metadata data_meta/x.csv --images images/x --out checkpoints/x

One fold of groups validates, in eval mode; the best epoch is kept, and the last one beside it in last/. A state is
saved after every epoch and every few minutes; a killed run continues from there.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from ..data.images import contents, tell_broken
from ..data.rows import ImageRows
from ..models import backbones, checkpoints, doubt, freezing, text_encoder
from ..profiles import StageConfig
from ..run.bounds import NotNegative, Positive
from ..run.devices import rank_and_processes
from ..run.errors import UserError
from ..run.files import sha256
from ..run.folders import BANK, LAST, MANIFEST
from ..run.progress import STOPPED
from ..run.resume import Stamp, alone
from ..training import dataset, epochs, frozen_features, loop
from ..training import model as models
from ..training import state as state_file
from . import recipes
from .validation import Keeper, save_doubt

if TYPE_CHECKING:
    from . import dry_run

log = logging.getLogger(__name__)
LOOSE = (
    "out",
    "recipe",
    "metadata",
    "images",
    "image_column",
    "prompt_column",
    "loader_workers",
    "dry_run",
    "micro_batch",
    "compile",
    "max_hours",
    "save_minutes",
)
BEFORE_RECIPES = {  # how all was trained before these could be chosen
    "warm_up": 0,
    "layer_decay": 1.0,
    "lowest_rate": 0.0,
    "ema": 0.0,
    "one_seed": False,
    "train_from": -1,
}
MOST_PAIRS = 1000  # images on which a head from text is chosen
SOURCES = 5  # the largest, named in a checkpoint
COLUMNS = ["epoch", "loss", "cosine"]
SETTINGS = (  # on the card
    *("epochs", "cycles", "batch_size", "learning_rate", "train_from", "fold", "leave_out", "seed", "precision"),
)
OUTPUTS = (
    *("model.safetensors", "config.json", "README.md", "baselines.safetensors", "history.csv", "history.png"),
    *("validation.csv", "validation.safetensors", "sources.csv", "best_and_worst.png"),
    *(f"{LAST}/{name}" for name in checkpoints.FILES),
    doubt.FILE,
)


@dataclass
class Main:
    """What it trains, and on what."""

    images: tuple[Path, ...] = ()
    """Folders of images or tar shards; with --metadata one a CSV, or one for all."""
    metadata: tuple[Path, ...] = ()
    """Metadata CSVs; left out: each folder's manifest.csv, else a .txt beside each image. Rows of fold --fold
    validate."""
    image_column: str = "image_name"
    """What the CSVs call the column of the images' names."""
    prompt_column: str = "prompt"
    """What the CSVs call the column of the prompts."""
    out: Path = Path("checkpoints/convnext")
    """Checkpoint folder to write."""
    recipe: str = ""
    """How it is tuned: a row of `--recipe list`, which sets the flags below; left out: the profile's own."""
    backbone: str = "timm:tf_efficientnet_lite2"
    """open_clip:<model>, open_clip:<folder> or timm:<model>."""
    image_size: Positive = 224
    """Side of the input in px."""
    weights: Path | None = None
    """File or folder of backbone weights; left out: see `image-to-prompts weights`."""
    init: Path | None = None
    """Checkpoint folder to start from, for a second stage on better data; left out: pretrained weights."""
    bank: Path | None = None
    """Bank of embed --texts by the same tower, from whose texts the head starts; helps where images are few."""
    dry_run: bool = False
    """Only say what would train, the memory it needs, the steps and the hours, from a measured step."""


@dataclass
class Rows:
    """Which rows count, and how."""

    augment: bool = False
    """Weak augmentation: crops of 85 to 100 % of a side, brightness and contrast within 10 %, one time in
    four a grey rectangle."""
    fold: int = 0
    """Fold that validates."""
    leave_out: str = ""
    """Source that does not train and alone validates: how well the model does on prompts of another kind."""
    source_weights: tuple[str, ...] = ()
    """How much the rows of a source count, as SOURCE=WEIGHT; others count 1."""
    patience: NotNegative = 0
    """Stop after so many epochs without a better one; 0: never."""


@dataclass
class Config(Main, loop.Schedule, Rows, StageConfig):
    """Fine-tunes the last layers of an image backbone, with a linear head to the 384-number prompt embedding."""


def _check(config: Config) -> None:
    if not (0 <= config.ema < 1 and 0 < config.layer_decay <= 1):
        raise UserError(
            f"--ema {config.ema} must be from 0 to below 1, --layer-decay {config.layer_decay} above 0, at most 1"
        )
    if not config.learning_rate > 0:
        raise UserError(f"--learning-rate {config.learning_rate}: must be above 0")
    if config.augment and config.cache_features:
        raise UserError("--augment changes the images, cached features cannot; add --no-cache-features")
    if config.bank:
        from ..encode import text_tower

        if (tower := text_tower.open_bank(config.bank).tower) != config.backbone:
            raise UserError(f"{config.bank}: made by {tower}, not by --backbone {config.backbone}; give one of that")
    _, processes = rank_and_processes()
    if config.batch_size < 2 * processes:  # the batches of an epoch are of one size, down to half of --batch-size
        raise UserError(f"--batch-size {config.batch_size}: {processes} processes need at least two images each")


def plan(config: Config, processes: int = 0) -> dry_run.Plan:
    """What training would need and take; images need not be there, the metadata must.

    Args:
        config: The settings.
        processes: How many would train; 0: as many as there are now.

    Raises:
        UserError: On an unknown backbone or bad metadata.
    """
    from . import dry_run

    tables = dataset.tables(config.metadata, config.images)
    frames = [dataset.read(table, _called(config)) for table in tables]
    # A table without folds gets eight from `dataset.split`.
    rows = sum(int((f["fold"] != config.fold).sum()) if "fold" in f else len(f) * 7 // 8 for f in frames)
    return dry_run.make(backbones.describe(config.backbone, config.image_size), rows, config, processes)


def _called(config: Config) -> dict[str, str]:
    return {"image_name": config.image_column, "prompt": config.prompt_column}


def answer(config: Config) -> str | dry_run.Plan | None:
    """The table that `--recipe list` asks for, the plan of `--dry-run`, or None where a training is asked for.

    Raises:
        UserError: On bad settings; see `plan`.
    """
    if config.recipe == recipes.LIST:
        return recipes.table()
    _check(config)
    return plan(config) if config.dry_run else None


def run(config: Config) -> pd.DataFrame:
    """Runs the stage; also under `accelerate launch`.

    Returns:
        The history: epoch, loss, cosine (validation), one row an epoch and one for the fitted head before (epoch 0);
        empty after a dry run.

    Raises:
        UserError: On bad input, settings or weights, or if the loss becomes infinite.
    """
    found = answer(config)
    if found is not None:
        log.log(logging.INFO if getattr(found, "fits", True) else logging.WARNING, "%s", found)
        return pd.DataFrame(columns=COLUMNS)
    with alone(config.out):
        return _train(config)


def _train(config: Config) -> pd.DataFrame:
    """Trains, and writes everything."""
    tables = dataset.tables(config.metadata, config.images)
    loaded = dataset.load_metadata(tables, config.images, _called(config))
    stamp = _stamp(config, tables, loaded)
    history, state = config.out / "history.csv", config.out / f"unfinished-{stamp.fingerprint[:12]}.pt"
    if stamp.is_current():
        state_file.forget(state)
        if not (config.out / doubt.FILE).is_file():
            _add_doubt(config, loaded, stamp)
        log.info("%s is up to date", config.out)
        return pd.read_csv(history)
    stamp.claim(config.out / name for name in OUTPUTS)
    targets = text_encoder.encode(loaded["prompt"].tolist())
    rows = dataset.split(loaded, targets, config.fold, config.leave_out, dataset.parse_weights(config.source_weights))
    log.info("%d rows train, %d validate, %d left out", len(rows.train), len(rows.valid), rows.left_out)
    keeper = _prepared(config, rows, stamp.work_folder(), state)
    keeper.description["data"] = {str(csv): sha256(csv) for csv in tables if csv.is_file()}
    finished = _epochs(config, keeper)
    frame = pd.DataFrame(keeper.history)
    if keeper.trainer.accelerator.is_main_process:
        keeper.report(frame, history)  # of a training that was stopped, too: a notebook shows it
        if finished:
            stamp.write(_written(config.out))
            state_file.forget(state)
        else:
            log.warning(STOPPED, config.max_hours)
    keeper.trainer.accelerator.wait_for_everyone()  # the stamp has removed the work folder, in which doubt is looked up
    if finished and not keeper.statistics.size and freezing.stages(keeper.trainer.model.backbone, config.train_from):
        _add_doubt(config, loaded, stamp)  # with the trained stages, once they are what they will be
    return frame


def _written(out: Path) -> list[Path]:
    """The outputs; a network without frozen stages has no doubt."""
    return [out / name for name in OUTPUTS if name != doubt.FILE or (out / name).is_file()]


def _add_doubt(config: Config, loaded: pd.DataFrame, stamp: Stamp) -> None:
    """Gives a checkpoint its doubt by one look at its images, without any training; earlier versions gave none."""
    rows = dataset.split(loaded, text_encoder.encode(loaded["prompt"].tolist()), config.fold, config.leave_out)
    spec, mixed = backbones.describe(config.backbone, config.image_size), config.precision == "auto"
    accelerator = models.accelerator_for(mixed)
    model, _ = models.build(spec, accelerator, config.seed, init=config.out)  # the frozen part that will be asked
    wanted = np.concatenate([dataset.thinned(rows.train, frozen_features.KNN_ROWS), rows.valid])
    _, statistics, _ = frozen_features.features(
        *(model, ImageRows(rows.paths, config.image_size), wanted, freezing.stages(model.backbone, config.train_from)),
        *(accelerator.device, stamp.work_folder()),
        cache=False,
        mixed=mixed,
        workers=config.loader_workers,
    )
    if accelerator.is_main_process:
        save_doubt(config.out, rows, wanted, statistics)
        stamp.write(_written(config.out))
    accelerator.wait_for_everyone()


def _stamp(config: Config, tables: tuple[Path, ...], loaded: pd.DataFrame) -> Stamp:
    """The stamp: settings, names and contents of the images, tables and what the training starts from."""
    unused = [name for name, value in BEFORE_RECIPES.items() if getattr(config, name) == value]
    unused += ["bank"]  # one of the inputs
    settings = config.settings(*LOOSE, *unused)  # what was trained before there were recipes is not trained again
    settings |= {"images": loaded["image_name"].tolist(), "contents": contents(loaded["path"].tolist())}
    if any(table.is_dir() for table in tables):
        settings["prompts"] = loaded["prompt"].tolist()
    manifests = [folder / MANIFEST for folder in config.images]
    first = [config.init / name for name in checkpoints.FILES] if config.init else []
    first += [config.bank / BANK] if config.bank else []
    inputs = dict.fromkeys([*tables, *manifests, *first, *filter(None, [config.weights])])
    return Stamp(config.out / ".finetune.done", "finetune", settings, inputs)


def _prepared(config: Config, rows: dataset.Rows, work: Path, state: Path) -> Keeper:
    """The model with its head fitted, its baselines, and the trainer, which continues from `state`."""
    from ..models.fast_layers import compiled, faster

    spec, mixed = backbones.describe(config.backbone, config.image_size), config.precision == "auto"
    accelerator = models.accelerator_for(mixed)
    model, trained_names = models.build(
        *(spec, accelerator, config.seed, config.init, config.weights),
        grad_checkpointing=config.grad_checkpointing,
        train_from=config.train_from,
    )
    if config.compile:
        compiled(model.backbone)
    images = ImageRows(rows.paths, config.image_size)
    sample = rows.train if config.cache_features else dataset.thinned(rows.train, frozen_features.KNN_ROWS)
    wanted = np.concatenate([sample, rows.valid])
    stages = freezing.stages(model.backbone, config.train_from)
    if any(p.requires_grad for stage in stages for p in stage.parameters()):
        stages = []  # what they say of images will change
    features, statistics, cached = frozen_features.features(
        *(model, images, wanted, stages, accelerator.device, work, config.cache_features, mixed),
        workers=config.loader_workers,
    )
    told = {rows.paths[row] for row in wanted[np.isnan(features[wanted, 0])]}
    if accelerator.is_main_process:
        tell_broken(told, "left out")
    base = frozen_features.baselines(features, rows)
    if config.init is None:
        checkpoints.fit_head(model, base.features, base.targets, _text_head(config, base, rows.targets[rows.valid]))
    if cached:
        rows.train, rows.valid = (side[cached.position[side] >= 0] for side in (rows.train, rows.valid))
    varied = ImageRows(rows.paths, config.image_size, augment_seed=config.seed) if config.augment else images
    if accelerator.is_main_process:
        state_file.adopt(state)
    accelerator.wait_for_everyone()
    trained = frozen_features.over_cache(model) if cached else faster(model)
    trainer = loop.Trainer(accelerator, model, trained, cached or varied, rows, config, state)
    description = {
        "backbone": spec.to_dict(),
        "trained_tensors": len(trained_names) + 2,
        "sources": rows.sources.value_counts().index[:SOURCES].tolist(),
        "rows": {"train": len(rows.train), "validate": len(rows.valid), "left_out": rows.left_out},
        "settings": {name: getattr(config, name) for name in SETTINGS},
        "profile": config.profile,
        "revision": checkpoints.revision(),
    }
    both = [images, varied]
    return Keeper(config.out, trainer, cached or images, features, wanted, statistics, base, description, both, told)


def _text_head(
    config: Config, base: frozen_features.Baselines, truth: np.ndarray
) -> tuple[np.ndarray, np.ndarray] | None:
    """Weight and bias of a head from the bank's texts, but those near to validating prompts; None without a bank."""
    if config.bank is None:
        return None
    from ..encode import banks, text_head

    bank = banks.open_bank(config.bank)
    part = text_head.spaced(base.features, MOST_PAIRS)
    head = text_head.fit(bank, bank.queries(base.features[part]), base.targets[part], truth)
    return head.linear(base.features, bank.projection)


def _epochs(config: Config, keeper: Keeper) -> bool:
    """Trains epoch by epoch; False if --max-hours ended it."""
    trainer = keeper.trainer
    if not trainer.standing.history:
        keeper.finish_epoch(0, math.nan)  # the fitted head on frozen features: with few rows nothing may beat it
    while trainer.standing.epoch <= config.epochs and not epochs.has_stalled(keeper.history, config.patience):
        loss = trainer.epoch()
        if loss is None:
            return False
        keeper.finish_epoch(trainer.standing.epoch, loss)
    return True
