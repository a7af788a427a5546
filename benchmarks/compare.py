"""What each embedding, their mean, their ridge regression, and both kinds of attention score on the same rows.

    python benchmarks/compare.py --embeddings DIR [--seeds 0 1 2]

Seed i validates fold i and tests on fold i + 1, so that all ways vary with the rows, and the networks with their random
numbers as well.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import tyro

from image_to_prompts import ensemble
from image_to_prompts.encode import embeddings
from image_to_prompts.models import metrics
from image_to_prompts.run import progress
from image_to_prompts.run.errors import UserError
from image_to_prompts.training import dataset

sys.path.append(str(Path(__file__).resolve().parents[1] / "tools"))
from earlier_ensemble import PRESETS, SeedFusion

log = logging.getLogger(__name__)
Predict = Callable[[list[np.ndarray]], np.ndarray]
Pair = tuple[np.ndarray, np.ndarray]


@dataclass
class Config:
    """Compares ways to predict from embeddings."""

    embeddings: Path = Path("embeddings")
    """Folder that embed wrote."""
    arrays: tuple[str, ...] = ()
    """Arrays to compare and to fuse; left out: all in the folder."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """One run each."""
    preset: Literal["10k", "43k", "93k"] = "10k"
    """The earlier ensemble's batch size and learning rate, for both attentions."""
    epochs: int = 8
    """Passes over the training rows, of both attentions."""


def run(config: Config) -> pd.DataFrame:
    """Scores every way with every seed.

    Returns:
        way, seed, validation and test (mean cosine).

    Raises:
        UserError: On bad input or settings, or if a fold is empty.
    """
    table = embeddings.load(config.embeddings, config.arrays)
    arrays = list(table.arrays.values())
    if any(np.isnan(array).any() for array in arrays):
        raise UserError(f"{config.embeddings}: an array lacks images that another one has; compare whole ones")
    found = []
    for seed in config.seeds:
        rows, test = ensemble.load_rows(table, seed, seed + 1)
        if not len(test):
            raise UserError(f"fold {seed + 1} is empty; give other --seeds or embed more images")
        for way, predict in _ways(list(table.arrays), arrays, rows, config, seed):
            entry: dict[str, str | int | float] = {"way": way, "seed": seed}
            for side, which in {"validation": rows.valid, "test": test}.items():
                entry[side] = metrics.mean_cosine(predict([array[which] for array in arrays]), table.targets[which])
            log.info("%s, seed %d: validation %.4f, test %.4f", *entry.values())
            found.append(entry)
    return pd.DataFrame(found)


def _ways(
    names: list[str], arrays: list[np.ndarray], rows: dataset.Rows, config: Config, seed: int
) -> Iterator[tuple[str, Predict]]:
    """Each way with what maps embeddings, float32 (n, d) each, to float32 (n, 384)."""
    from image_to_prompts.ensemble import loop
    from image_to_prompts.models import networks

    train, targets = [array[rows.train] for array in arrays], rows.targets[rows.train]
    mean = metrics.unit(targets.mean(0))
    yield "constant", lambda some: np.broadcast_to(mean, (len(some[0]), len(mean)))
    alone = [_linear(*_fitted([one], targets)) for one in train]

    def each(some: list[np.ndarray]) -> list[np.ndarray]:
        return [predict([one]) for predict, one in zip(alone, some, strict=True)]

    for number, name in enumerate(names):
        yield f"{name}, ridge", lambda some, number=number: each(some)[number]
    yield "mean of these", lambda some: metrics.blend(each(some), [1.0] * len(some))
    scale, ridge = _fitted(train, targets)
    yield "ridge on all", _linear(scale, ridge)
    preset = PRESETS[config.preset]
    settings = {**preset._asdict(), "epochs": config.epochs, "seed": seed}
    widths = [array.shape[1] for array in arrays]
    network, *_ = loop.fit(lambda: SeedFusion(widths), arrays, rows, **settings)
    yield "attention across images", lambda some: loop.predict(network, some, preset.batch_size)
    ours, *_ = loop.fit(lambda: networks.Fusion(widths).start(scale, ridge), arrays, rows, **settings)
    yield "attention across embeddings", lambda some: loop.predict(ours, some)


def _fitted(arrays: list[np.ndarray], targets: np.ndarray) -> tuple[Pair, Pair]:
    """The scale of embeddings, and the ridge regression on them, standardised."""
    scale = ensemble.scale_of(arrays)
    return scale, metrics.ridge(ensemble.stacked(arrays, scale), targets)


def _linear(scale: Pair, ridge: Pair) -> Predict:
    return lambda some: ensemble.stacked(some, scale) @ ridge[0] + ridge[1]


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """Mean and deviation over the seeds of what `run` returns, in the order of its ways."""
    grouped = frame.groupby("way", sort=False)[["validation", "test"]]
    return grouped.agg(["mean", "std"]).round(4)


if __name__ == "__main__":
    progress.show_log()
    print(summary(run(tyro.cli(Config))).to_string())
