"""Stage 6, ensemble: a transformer encoder that fuses several embeddings of each image into its prompt's embedding.

    image-to-prompts ensemble --embeddings DIR --out checkpoints/ensemble

Beside it stand what needs no gradient: ridge regression on all embeddings together, and kNN among them. The checkpoint
holds all three and the weights of their blend, fitted on the validating fold, where a blend with fitted weights is at
least as good as the best of them. `models.networks` has the networks, `loop` the training.
"""

import logging
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pandas as pd

from ..data import metadata, pictures
from ..encode import embeddings
from ..models import checkpoints, metrics
from ..models.ensemble import Ensemble, save, scale_of, stacked
from ..models.ensemble import load as load
from ..profiles import StageConfig
from ..run.bounds import Amount, NotNegative, Positive
from ..run.devices import process_state
from ..run.errors import UserError
from ..run.progress import STOPPED
from ..run.resume import Stamp, alone
from ..training import by_source, dataset, frozen_features

log = logging.getLogger(__name__)


MEMBERS = ("attention", "ridge", "knn")
OUTPUTS = (
    *(*checkpoints.FILES, "history.csv", "history.png", "members.csv"),
    *("validation.csv", "validation.safetensors"),
)


@dataclass
class Main:
    """What it fuses."""

    embeddings: Path = Path("embeddings")
    """Folder that embed wrote."""
    arrays: tuple[str, ...] = ()
    """Arrays to fuse, in this order; left out: all in the folder."""
    out: Path = Path("checkpoints/ensemble")
    """Checkpoint folder to write."""


@dataclass
class Steps:
    """How it trains."""

    epochs: Positive = 8
    """Passes over the training rows; the learning rate falls along a cosine to 0."""
    batch_size: Positive = 64
    """Rows a step; 256 suits 40,000 rows and more."""
    learning_rate: float = 5e-4
    """Peak learning rate; 1e-3 with batches of 256."""
    patience: NotNegative = 0
    """Stop after so many epochs without a better one; 0: never."""
    seed: int = 0
    """Seed of the weights and the shuffling."""
    max_hours: Amount = 0.0
    """Stop after an epoch before the process is this old, and write what is there; 0: never."""
    save_minutes: Amount = 10.0
    """Save the state at least so often, after an epoch."""


@dataclass
class Rows:
    """Which rows validate."""

    fold: int = 0
    """Fold that validates."""
    test_fold: int = 1
    """Fold that neither trains nor validates, and is scored in the end."""


@dataclass
class Config(Main, Steps, Rows, StageConfig):
    """Trains a transformer over the embeddings of images."""


def load_rows(table: embeddings.Table, fold: int, test_fold: int) -> tuple[dataset.Rows, np.ndarray]:
    """Splits a table by fold.

    Returns:
        The rows, and the row numbers of the test fold, too near ones left out; empty where there is none.

    Raises:
        UserError: If a side of the split is empty.
    """
    rows = dataset.split(table.frame, table.targets, fold)
    folds = rows.frame["fold"].to_numpy()
    rows.train = rows.train[folds[rows.train] != test_fold]
    if not len(rows.train) or not len(rows.valid):
        raise UserError(
            f"{len(rows.train)} of {len(folds)} rows would train, {len(rows.valid)} validate ({rows.left_out} of fold "
            f"{fold} are too near to others); choose another --fold or embed more images"
        )
    test = np.flatnonzero((folds == test_fold) & (folds != fold))
    if len(test):
        test = test[~dataset.near_training(table.targets[test], table.targets[rows.train])]
    return rows, test


def run(config: Config) -> pd.DataFrame:
    """Runs the stage. Of several processes the main one trains; the others wait for what it wrote.

    Returns:
        member, weight (in the blend), validation and test (mean cosine; NaN without a test fold): what the mean
        embedding (`constant`), each member and their blend score.

    Raises:
        UserError: On bad input or settings.
    """
    with process_state().main_process_first(), alone(config.out):
        return _run(config)


def _run(config: Config) -> pd.DataFrame:
    from ..models import networks
    from . import loop

    table = embeddings.load(config.embeddings, config.arrays)
    names = list(table.arrays)
    inputs = [config.embeddings / f"{name}{end}" for name in [*names, embeddings.PROMPTS] for end in embeddings.ENDS]
    stamp = Stamp(
        config.out / ".ensemble.done",
        "ensemble",
        config.settings("out", "embeddings", "max_hours", "save_minutes"),
        inputs,
    )
    if stamp.is_current():
        log.info("%s is up to date", config.out)
        return pd.read_csv(config.out / "members.csv")
    stamp.claim(config.out / name for name in OUTPUTS)
    work = stamp.work_folder()
    rows, test = load_rows(table, config.fold, config.test_fold)
    log.info("%d rows train, %d validate, %d test", len(rows.train), len(rows.valid), len(test))
    arrays, widths = list(table.arrays.values()), [array.shape[1] for array in table.arrays.values()]

    train_arrays = [array[rows.train] for array in arrays]
    scale = scale_of(train_arrays)
    joined, targets, truth = stacked(arrays, scale), rows.targets[rows.train], rows.targets[rows.valid]
    weight, bias = metrics.ridge(joined[rows.train], targets)
    ridge = weight.astype(np.float32), bias.astype(np.float32)
    near = dataset.thinned(rows.train, frozen_features.KNN_ROWS)
    k = metrics.best_k(joined[rows.valid], truth, joined[near], rows.targets[near])
    how = {one.name: getattr(config, one.name) for one in fields(Steps)}
    network, history, finished = loop.fit(
        lambda: networks.Fusion(widths).start(scale, ridge), arrays, rows, **how, state=work / "state.pt"
    )
    about = {"arrays": names, "encoders": table.about, "widths": widths, "knn_k": k}
    description = {
        "ensemble": about,
        "rows": {"train": len(rows.train), "validate": len(rows.valid), "test": len(test)},
        "settings": {name: getattr(config, name) for name in ("batch_size", "learning_rate", "seed", "fold")},
        "profile": config.profile,
        "revision": checkpoints.revision(),
    }
    known = (joined[near].astype(np.float16).astype(np.float32), rows.targets[near])
    ensemble = Ensemble(network, description, metrics.unit(targets.mean(0)), scale, ridge, known)
    members = _scores(ensemble, arrays, rows, test)
    description["metrics"] = {f"validation_{m}": float(v) for m, v in members[["member", "validation"]].to_numpy()}
    by_source.write(config.out, rows, ensemble([array[rows.valid] for array in arrays]))
    metadata.write_table(config.out / "members.csv", members.round(4))
    metadata.write_table(config.out / "history.csv", history.round(6))
    scores = members.set_index("member")["validation"]
    pictures.learning_curve(history, scores[["constant", "ridge", "knn"]].to_dict(), config.out / "history.png")
    save(config.out, ensemble)
    if finished:
        stamp.write([config.out / name for name in OUTPUTS])
    else:
        log.warning(STOPPED, config.max_hours)
    log.info("ensemble:\n%s", members.round(4).to_string(index=False))
    return members


def _scores(ensemble: Ensemble, arrays: list[np.ndarray], rows: dataset.Rows, test: np.ndarray) -> pd.DataFrame:
    """Fits the blend on the validating fold and scores what `run` returns."""
    sides = {"validation": rows.valid, "test": test}
    found = {side: ensemble.members([array[which] for array in arrays]) for side, which in sides.items() if len(which)}
    truth = rows.targets[rows.valid]
    weights = metrics.fit_weights([found["validation"][name] for name in MEMBERS], truth)
    ensemble.config["ensemble"]["blend"] = dict(zip(MEMBERS, weights.tolist(), strict=True))
    table = pd.DataFrame({"member": ["constant", *MEMBERS, "blend"], "weight": [np.nan, *weights, np.nan]})
    for side, which in sides.items():
        if not len(which):
            table[side] = np.nan
            continue
        own = [found[side][name] for name in MEMBERS]
        guesses = [np.broadcast_to(ensemble.mean, (len(which), len(ensemble.mean))), *own, metrics.blend(own, weights)]
        table[side] = [metrics.mean_cosine(guess, rows.targets[which]) for guess in guesses]
    return table
