"""Stage 6, ensemble: a transformer encoder that fuses several embeddings of each image into its prompt's embedding.

    image-to-prompts ensemble --embeddings DIR --out checkpoints/ensemble [--preset 10k]

Beside it stand what needs no gradient: ridge regression on all embeddings together, and kNN among them. The checkpoint
holds all three and the weights of their blend, fitted on the validating fold, where a blend with fitted weights is at
least as good as the best of them. `models.networks` has the networks, `loop` the training.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import pandas as pd

from .. import finetune
from ..data import metadata
from ..encode import embeddings
from ..models import checkpoints, metrics
from ..profiles import StageConfig
from ..run.devices import process_state
from ..run.errors import UserError
from ..run.files import Stamp, alone, check_whole, write_json, write_tensors, write_text, writing
from ..training import by_source, dataset, frozen_features

if TYPE_CHECKING:
    from torch import nn

log = logging.getLogger(__name__)


class Preset(NamedTuple):
    """One of the first seed's configurations; it trained each for 500 epochs at one learning rate."""

    batch_size: int
    learning_rate: float
    seed: int


PRESETS = {"10k": Preset(64, 5e-4, 0), "43k": Preset(256, 1e-3, 0), "93k": Preset(256, 1e-3, 100)}
MEMBERS = ("attention", "ridge", "knn")
PAIRS = ("scale", "ridge", "known")  # of arrays, in a checkpoint
PUBLISHED = ("open_clip:ViT-B-32-quickgelu", "transformers:facebook/convnext-tiny-224", "interrogator")
OUTPUTS = (
    *(*checkpoints.FILES, "history.csv", "history.png", "members.csv"),
    *("validation.csv", "validation.safetensors"),
)


@dataclass
class Config(StageConfig):
    """Trains a transformer over the embeddings of images."""

    embeddings: Path = Path("embeddings")
    """Folder that embed wrote."""
    arrays: tuple[str, ...] = ()
    """Arrays to fuse, in this order; left out: all in the folder."""
    out: Path = Path("checkpoints/ensemble")
    """Checkpoint folder to write."""
    preset: Literal["10k", "43k", "93k"] = "10k"
    """Batch size, learning rate and seed that the first seed took for so many rows."""
    attention: Literal["modalities", "seed"] = "modalities"
    """Across the embeddings of an image, or, as published, across the images of a batch."""
    epochs: int = 8
    """Passes over the training rows; the learning rate falls along a cosine to 0."""
    patience: int = 0
    """Stop after so many epochs without a better one; 0: never."""
    fold: int = 0
    """Fold that validates."""
    test_fold: int = 1
    """Fold that neither trains nor validates, and is scored in the end."""
    seed: int = -1
    """Seed of the weights and the shuffling; -1: the preset's."""
    save_minutes: float = 10.0
    """Save the state at least so often, after an epoch."""


class Ensemble:
    """What an ensemble checkpoint predicts with.

    Attributes:
        network: From `networks.build`, in eval mode.
        config: All of config.json; `config["ensemble"]["blend"]` has the weight of each member.
        mean: float32 (384,), the mean target of the training rows, as a unit vector.
        scale: Mean and deviation of each number of the embeddings, float32 (d,) both.
        ridge: Weight (d, 384) and bias (384,) over all embeddings, standardised; None in an imported checkpoint.
        known: float32 (m, d) embeddings and (m, 384) targets that kNN looks among; None in an imported checkpoint.
    """

    def __init__(
        self,
        network: nn.Module,
        config: dict[str, Any],
        mean: np.ndarray,
        scale: tuple[np.ndarray, np.ndarray],
        ridge: tuple[np.ndarray, np.ndarray] | None = None,
        known: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> None:
        """Takes its parts."""
        self.network, self.config, self.mean = network, config, mean
        self.scale, self.ridge, self.known = scale, ridge, known

    def members(self, arrays: list[np.ndarray]) -> dict[str, np.ndarray]:
        """What each member predicts: float32 (n, 384) by name.

        Args:
            arrays: float32 (n, d), one an embedding, NaN in the rows where one is missing.
        """
        import torch

        from . import loop

        about, joined = self.config["ensemble"], stacked(arrays, self.scale)
        at_once = self.config["settings"]["batch_size"] if about["attention"] == "seed" else loop.AT_ONCE
        found = {"attention": loop.predict(self.network, arrays, at_once)}
        if self.ridge:
            # By PyTorch: in OpenBLAS's product for AVX2 a row's last digit depends on its place among the others.
            weight, bias = map(torch.from_numpy, self.ridge)
            found["ridge"] = torch.addmm(bias, torch.from_numpy(joined), weight).numpy()
        if self.known:
            found["knn"] = metrics.nearest_mean(joined, *self.known, about["knn_k"])
        return found

    def __call__(self, arrays: list[np.ndarray]) -> np.ndarray:
        """The blend of the members' predictions, float32 (n, 384)."""
        found, weights = self.members(arrays), self.config["ensemble"]["blend"]
        return metrics.blend(list(found.values()), [weights[name] for name in found])


def stacked(arrays: list[np.ndarray], scale: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Embeddings side by side, standardised, float32 (n, d); 0, the mean, where one is missing."""
    mean, std = scale
    return np.nan_to_num((np.concatenate(arrays, 1) - mean) / std).astype(np.float32)


def scale_of(arrays: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation of each number of the embeddings: two float32 (d,)."""
    means, deviations = [], []
    for array in arrays:
        for start in range(0, array.shape[1], 64):  # in double precision, but never all of it
            part = array[:, start : start + 64].astype(np.float64)
            means.append(np.nanmean(part, 0))
            deviations.append(np.maximum(np.nanstd(part, 0), 1e-6))
    return np.concatenate(means).astype(np.float32), np.concatenate(deviations).astype(np.float32)


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
    config.at_least(1, "epochs")
    config.at_least(0, "patience")
    with process_state().main_process_first(), alone(config.out):
        return _run(config)


def _run(config: Config) -> pd.DataFrame:
    from ..models import networks
    from . import loop

    table = embeddings.load(config.embeddings, config.arrays)
    names = list(table.arrays)
    inputs = [config.embeddings / f"{name}{end}" for name in [*names, embeddings.PROMPTS] for end in embeddings.ENDS]
    stamp = Stamp(
        config.out / ".ensemble.done", "ensemble", config.settings("out", "embeddings", "save_minutes"), inputs
    )
    if stamp.is_current():
        log.info("%s is up to date", config.out)
        return pd.read_csv(config.out / "members.csv")
    stamp.claim(config.out / name for name in OUTPUTS)
    work = stamp.work_folder()
    rows, test = load_rows(table, config.fold, config.test_fold)
    log.info("%d rows train, %d validate, %d test", len(rows.train), len(rows.valid), len(test))
    arrays, widths = list(table.arrays.values()), [array.shape[1] for array in table.arrays.values()]
    if config.attention == "seed" and any(np.isnan(array).any() for array in arrays):
        raise UserError("--attention seed: an array lacks images that another one has; embed them, or leave it out")
    preset = PRESETS[config.preset]
    seed = preset.seed if config.seed < 0 else config.seed

    train_arrays = [array[rows.train] for array in arrays]
    scale = scale_of(train_arrays)
    joined, targets, truth = stacked(arrays, scale), rows.targets[rows.train], rows.targets[rows.valid]
    ridge = tuple(part.astype(np.float32) for part in metrics.ridge(joined[rows.train], targets))
    near = rows.train[:: -(-len(rows.train) // frozen_features.KNN_ROWS)]
    k = metrics.best_k(joined[rows.valid], truth, joined[near], rows.targets[near])
    settings = loop.Settings(
        preset.batch_size, preset.learning_rate, config.epochs, config.patience, seed, config.save_minutes
    )
    network, history = loop.fit(
        lambda: networks.build(config.attention, widths, scale, ridge), arrays, rows, settings, work / "state.pt"
    )
    about = {"arrays": names, "encoders": table.about, "widths": widths, "attention": config.attention, "knn_k": k}
    description = {
        "ensemble": about,
        "rows": {"train": len(rows.train), "validate": len(rows.valid), "test": len(test)},
        "settings": {"preset": config.preset, **preset._asdict(), "seed": seed, "fold": config.fold},
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
    finetune.plot_history(history, scores[["constant", "ridge", "knn"]].to_dict(), config.out / "history.png")
    save(config.out, ensemble)
    stamp.write([config.out / name for name in OUTPUTS])
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


def save(folder: Path, ensemble: Ensemble) -> None:
    """Writes a checkpoint; config.json comes last, so that a folder with one is complete."""
    state = {f"network.{name}": value.cpu().numpy() for name, value in ensemble.network.state_dict().items()}
    state["mean_target"] = ensemble.mean
    for name in PAIRS:
        if pair := getattr(ensemble, name):
            state |= {f"{name}.{number}": part for number, part in enumerate(pair)}
    if ensemble.known:
        state["known.0"] = ensemble.known[0].astype(np.float16)
    write_tensors(folder / "model.safetensors", {name: np.ascontiguousarray(value) for name, value in state.items()})
    write_text(folder / "README.md", checkpoints.card(ensemble.config))
    write_json(folder / "config.json", ensemble.config)


def load(folder: Path) -> Ensemble:
    """Loads a checkpoint folder that `run` wrote.

    Raises:
        UserError: If a file is missing or damaged, or the weights have another shape than config.json says.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    from ..models import networks

    check_whole(folder, "model.safetensors", "config.json")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        state = load_file(folder / "model.safetensors")
        about = config["ensemble"]
        network = networks.build(about["attention"], about["widths"]).eval()
        own = {name.removeprefix("network."): value for name, value in state.items() if name.startswith("network.")}
        network.load_state_dict({name: torch.from_numpy(value) for name, value in own.items()})
        pairs = {
            name: tuple(state[f"{name}.{number}"].astype(np.float32) for number in range(2))
            for name in PAIRS
            if f"{name}.0" in state
        }
        return Ensemble(network, config, state["mean_target"], **pairs)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        said = str(error).splitlines()[0]
        raise UserError(f"{folder}: not an ensemble checkpoint: {said}; run ensemble again") from error


def import_published(file: Path, out: Path) -> Ensemble:
    """Converts a checkpoint that the first seed published.

    Args:
        file: The `.ckpt`; nothing in it is unpickled but tensors.
        out: Checkpoint folder to write.

    Returns:
        The checkpoint, as `load` gives it; its only member is the network, its answers depend on the batch.

    Raises:
        UserError: If the file is no such checkpoint.
    """
    import torch

    from .. import embed
    from ..models import backbones, networks

    widths = [512, 768, 384]
    network = networks.SeedFusion(widths).eval()
    try:
        network.load_published(backbones.read_state(file))
    except RuntimeError as error:
        detail = str(error).splitlines()[1].strip()
        raise UserError(f"{file}: no checkpoint of the first seed's network: {detail}") from error
    with torch.no_grad():
        mean = metrics.unit(network([torch.zeros(1, width) for width in widths]).numpy())[0]
    encoders = {embed.slug(name): {"encoder": name, "image_size": 224} for name in PUBLISHED}
    about = {"arrays": list(encoders), "encoders": encoders, "widths": widths, "attention": "seed"}
    config = {
        "ensemble": {**about, "blend": {"attention": 1.0}},
        "settings": PRESETS["10k"]._asdict(),
        "imported": file.name,
        "profile": "kaggle",
    }
    scale = (np.zeros(sum(widths), np.float32), np.ones(sum(widths), np.float32))
    with writing(out / ".import.done", "import-checkpoint", [out / name for name in checkpoints.FILES], [file]):
        save(out, Ensemble(network, config, mean, scale))
    return load(out)
