"""What `finetune` does after each epoch and in the end: it validates, keeps the best weights, and reports."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ..data import metadata, pictures
from ..data.images import tell_broken
from ..data.rows import ImageRows
from ..models import checkpoints, doubt, freezing, metrics, text_encoder
from ..predict import predictors
from ..predict.predictors import Viewing
from ..run.devices import gather, rank_and_processes
from ..run.folders import LAST
from ..training import by_source, clusters, dataset, frozen_features, loop

if TYPE_CHECKING:
    import torch
    from torch import nn

log = logging.getLogger(__name__)
SHOWN = ("whole", "blurred", "noisy", "quarter")  # how validating images are shown, to fit the doubt
CORRUPTED = 128  # validating images that are shown so


def validate(
    model: nn.Module,
    images: ImageRows | frozen_features.CachedRows,
    rows: dataset.Rows,
    device: torch.device,
    mixed: bool = True,
) -> np.ndarray:
    """Predicts the validation rows in eval mode; processes share the work.

    Returns:
        float32 (len(rows.valid), 384), NaN where an image cannot be read.
    """
    freezing.set_training(model, False)
    rank, processes = rank_and_processes()
    mine = rows.valid[rank::processes]
    predicted = metrics.extract(model, images, 32, device, only=mine, mixed=mixed)
    return np.stack(gather(list(np.broadcast_to(predicted, (len(mine), text_encoder.DIMENSION))), len(rows.valid)))


def save_doubt(folder: Path, rows: dataset.Rows, looked: np.ndarray, statistics: np.ndarray) -> None:
    """Writes into a checkpoint what tells familiar images from strange ones, see `doubt`.

    Args:
        folder: The checkpoint.
        rows: What it was trained on and validated with.
        looked: Row numbers of the images that were looked at.
        statistics: float32 (len(looked), d), of the frozen stages; NaN where an image is broken.
    """
    good = np.isfinite(statistics).all(1)
    train, valid = (statistics[good & np.isin(looked, side)] for side in (rows.train, rows.valid))
    if not (train.size and valid.size):
        return
    own = doubt.Doubt.fit(train, valid)
    own.save(folder)
    predictor = predictors.checkpoint(folder)
    chosen = dataset.thinned(rows.valid, CORRUPTED)
    files = [rows.paths[row] for row in chosen]
    ways = [predictors.predict(predictor, files, Viewing((view,))) for view in SHOWN]  # type: ignore[arg-type]
    vectors, strange = (np.concatenate(column) for column in zip(*ways, strict=True))
    good, targets = np.isfinite(strange), np.tile(rows.targets[chosen], (len(SHOWN), 1))
    pull = doubt.best_pull(vectors[good], predictor.mean, strange[good], targets[good])
    replace(own, pull=np.array(pull, np.float32)).save(folder)
    shares = [f"{view} {100 * (one.strangeness > 1).mean():.0f} %" for view, one in zip(SHOWN, ways, strict=True)]
    log.info("validating images that are strange to the checkpoint: %s; pull %g, %g", ", ".join(shares), *pull)


@dataclass
class Keeper:
    """Validates after each epoch and keeps the best weights; in the end writes what a person looks at.

    Attributes:
        out: The checkpoint folder.
        trainer: The trainer.
        source: What validates, by row number.
        features: float32 (n, width) of all rows, by the frozen backbone.
        looked: Row numbers of the images that the frozen backbone has looked at.
        statistics: float32 (len(looked), d), of its frozen stages, see `doubt`; d is 0 where these train.
        base: The baselines.
        description: config.json, without metrics.
        images: Datasets, which know of images that could not be read.
        told: Those of them that were told of.
    """

    out: Path
    trainer: loop.Trainer
    source: ImageRows | frozen_features.CachedRows
    features: np.ndarray
    looked: np.ndarray
    statistics: np.ndarray
    base: frozen_features.Baselines
    description: dict[str, Any]
    images: list[ImageRows]
    told: set[Path]

    @property
    def history(self) -> list[dict[str, float]]:
        return self.trainer.standing.history

    def save(self, folder: Path, entry: dict[str, float]) -> None:
        """Writes a checkpoint with an epoch's metrics."""
        scores = {"validation_cosine": float(entry["cosine"]), **self.base.scores, "knn_k": self.base.k}
        config = {**self.description, "metrics": {"epoch": int(entry["epoch"]), **scores}}
        checkpoints.save(folder, self.trainer.model, config, self.base.mean)

    def finish_epoch(self, epoch: int, loss: float) -> None:
        """Validates, saves the checkpoint if it is the best so far, and the state to go on from."""
        trainer = self.trainer
        with trainer.averaged():
            entry = self._validated(epoch, loss)
        trainer.finish_epoch(entry)

    def _validated(self, epoch: int, loss: float) -> dict[str, float]:
        """The entry of an epoch; of the best so far the checkpoint is saved."""
        trainer, rows, accelerator = self.trainer, self.trainer.rows, self.trainer.accelerator
        mixed = accelerator.mixed_precision != "no"
        predicted = validate(trainer.trained, self.source, rows, accelerator.device, mixed)
        readable = np.isfinite(predicted[:, 0])
        cosine = metrics.mean_cosine(predicted[readable], rows.targets[rows.valid][readable])
        entry = {"epoch": epoch, "loss": loss, "cosine": cosine}
        if accelerator.is_main_process:
            how = f"loss {loss:.4f}" if epoch else "before the first step"
            log.info("epoch %d: %s, validation cosine %.4f", epoch, how, cosine)
            if cosine >= max((one["cosine"] for one in self.history), default=-1):
                by_source.write(self.out, rows, predicted)
                self.save(self.out, entry)
        return entry

    def report(self, frame: pd.DataFrame, history: Path) -> None:
        """Writes the last epoch's weights, tables and pictures."""
        rows, base = self.trainer.rows, self.base
        with self.trainer.averaged():
            self.save(self.out / LAST, self.history[-1])
        frozen_features.save(self.out / "baselines.safetensors", base)
        save_doubt(self.out, rows, self.looked, self.statistics)
        metadata.write_table(history, frame)
        pictures.learning_curve(frame, base.scores, history.with_suffix(".png"))
        kinds = clusters.of(rows.targets, self.out.parent / clusters.FILE)
        sources = by_source.by_source(self.out, rows, self.features, base, kinds)
        metadata.write_table(self.out / "sources.csv", sources.round(4))
        log.info("validation by source:\n%s", sources.round(4).to_string(index=False))
        by_source.gallery(self.out, rows)
        tell_broken({path for images in self.images for path in images.broken} - self.told, "left out")
        if base.scores["constant"] >= (best := frame["cosine"].max()):
            log.warning(
                "validation cosine %.3f is no better than the constant's %.3f: nothing was learnt that holds for other "
                "prompts; look at whether images and prompts belong together, and give more of them",
                *(best, base.scores["constant"]),
            )
