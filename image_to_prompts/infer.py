"""Stage 7, infer: predicts the prompt embedding of every image in a folder.

    image-to-prompts infer --images DIR --out submission.csv [--checkpoint DIR ...] [--key prompts.csv] [--bank CSV]

Several checkpoints are blended. An image that cannot be read, or is not reached in time, gets the mean prediction, so
that the submission stays complete. With --fallback something always predicts: where no checkpoint works, kNN over
embeddings or the mean prompt embedding. With a key the predictions are scored; with a bank of prompts the nearest one
of each image is written beside the submission.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from . import evaluate, images, metadata, predictors, submission, tars, text_encoder, validation
from .errors import UserError
from .files import Stamp, make_folder, write_json
from .predictors import Rung
from .profiles import StageConfig
from .workspace import Run

log = logging.getLogger(__name__)
LEAST_TO_FIT = 20  # images on which weights are fitted


@dataclass
class Config(StageConfig):
    """Predicts 384 numbers an image and writes the submission; with --key it also scores them."""

    images: Path = Path("images")
    """Folder of images, sub-folders too."""
    checkpoint: tuple[Path, ...] = ()
    """Checkpoint folders, blended; left out: the newest of this run or of the attached Kaggle inputs."""
    blend: tuple[float, ...] = ()
    """Weights of the checkpoints in the blend; left out: all the same."""
    fit_blend: bool = False
    """Fit the weights on the images that every checkpoint kept for validation."""
    views: tuple[Literal["whole", "centre", "mirror"], ...] = ("whole", "centre", "mirror")
    """What is shown of each image; the predictions of several are averaged, which takes as many times as long."""
    out: Path = Path("submission/submission.csv")
    """Submission CSV to write."""
    key: Path | None = None
    """CSV with the images' true prompts (image_name or image, prompt), to score against."""
    bank: Path | None = None
    """CSV of prompts; the nearest one to each image goes to <out>.prompts.csv."""
    fallback: bool = False
    """Where none is given, found or works: kNN over attached embeddings, else the mean prompt embedding."""
    max_hours: float = 0.0
    """Give the images that are left the mean prediction before the process is this old; 0: never."""
    batch_size: int = 32
    """Images at once."""
    loader_workers: int = 0
    """Threads that decode images; 0: one a core."""


@dataclass
class Prediction:
    """What `run` found out.

    Attributes:
        files: Image files, sorted by path.
        vectors: float32 (n, 384), unit length, same order.
        broken: Files that could not be read and got the mean prediction.
        unreached: Number of files that were not reached within --max-hours and got it too.
        how: What predicted.
        score: Mean cosine against the key; None without one.
        constant: Score of the constant mean prediction on the same images; None without a key.
        prompts: `image,prompt,cosine` of the nearest prompts; None without a bank.
    """

    files: list[Path]
    vectors: np.ndarray
    broken: list[Path]
    unreached: int = 0
    how: str = ""
    score: float | None = None
    constant: float | None = None
    prompts: pd.DataFrame | None = None


def blend_weights(folders: list[Path], config: Config) -> list[float]:
    """The weights of checkpoints: given, fitted, or all the same.

    Raises:
        UserError: If their number is not that of the checkpoints, one is negative, all are 0, or there are no
            validation images to fit on that all checkpoints have in common.
    """
    if config.fit_blend and len(folders) > 1:
        kept = [validation.read(folder) for folder in folders]
        names = sorted(set.intersection(*(set(frame["image_name"]) for frame, _, _ in kept)))
        if len(names) < LEAST_TO_FIT:
            raise UserError(
                f"--fit-blend: {len(names)} images validated in all checkpoints, {LEAST_TO_FIT} are needed; "
                f"train them with the same --fold, or give --blend"
            )
        order = [pd.Index(frame["image_name"]).get_indexer(names) for frame, _, _ in kept]
        predictions = [predicted[rows] for (_, predicted, _), rows in zip(kept, order, strict=True)]
        fitted = evaluate.fit_weights(predictions, kept[0][2][order[0]])
        log.info("weights fitted on %d images: %s", len(names), ", ".join(f"{weight:.3f}" for weight in fitted))
        return fitted.tolist()
    weights = list(config.blend or [1 / len(folders)] * len(folders))
    if len(weights) != len(folders):
        raise UserError(f"--blend has {len(weights)} numbers for {len(folders)} checkpoints; give one each")
    if min(weights) < 0 or not sum(weights) > 0:
        raise UserError(f"--blend {' '.join(map(str, weights))}: must not be negative, nor all 0")
    return weights


def read_key(path: Path, files: list[Path]) -> list[str]:
    """The true prompt of each image file, joined by name.

    Raises:
        UserError: If the key is bad or an image has no row in it.
    """
    frame = metadata.read_prompts(path)
    column = next((name for name in ("image_name", "image", "imgId") if name in frame), None)
    if column is None:
        raise UserError(f"{path}: no column 'image_name', found {', '.join(frame.columns)}; rename or add it")
    known = {Path(name).stem: prompt for name, prompt in zip(frame[column], frame["prompt"], strict=True)}
    missing = [file for file in files if file.stem not in known]
    if missing:
        raise UserError(f"{path}: no row for image {missing[0].name} ({len(missing)} such images); add it to the key")
    return [known[file.stem] for file in files]


def nearest_prompts(vectors: np.ndarray, prompts: list[str], prompt_vectors: np.ndarray) -> pd.DataFrame:
    """The nearest of known prompts for each predicted vector.

    Args:
        vectors: float32 (n, 384) predictions.
        prompts: m prompts.
        prompt_vectors: float32 (m, 384), their embeddings.

    Returns:
        `prompt,cosine`, one row a prediction.
    """
    import faiss

    index = faiss.IndexFlatIP(prompt_vectors.shape[1])
    index.add(prompt_vectors)
    cosines, rows = index.search(evaluate.unit(vectors), 1)
    return pd.DataFrame(
        {"prompt": [prompts[row] for row in rows[:, 0]], "cosine": np.round(cosines[:, 0].astype(float), 4)}
    )


def run(config: Config) -> Prediction:
    """Runs the stage.

    Raises:
        UserError: If there are no images, no usable checkpoint, a bad key or bank, or two images with one stem.
    """
    if config.batch_size < 1:
        raise UserError(f"--batch-size {config.batch_size}: must be at least 1")
    if not config.views:
        raise UserError("--views: give at least one")
    files = images.find(config.images)
    stems = submission.check_stems(files)
    truth = read_key(config.key, files) if config.key else None
    bank = metadata.read_prompts(config.bank)["prompt"].tolist() if config.bank else None
    run_ = Run(config.run)
    folders = list(config.checkpoint) or newest(run_, config.fallback)
    weights = blend_weights(folders, config) if folders else []
    rungs = predictors.ladder(run_) if config.fallback and not config.checkpoint else []
    if folders:
        loads = [lambda folder=folder: predictors.checkpoint(folder) for folder in folders]
        files_ = [folder / "model.safetensors" for folder in folders]
        rungs.insert(0, Rung(f"checkpoint {', '.join(map(str, folders))}", loads, weights, files_))
    make_folder(config.out.parent)
    listing = [(str(file.relative_to(config.images)), *tars.stat(file)) for file in files]
    inputs = [*(path for rung in rungs for path in rung.inputs), *filter(None, (config.key, config.bank))]
    stamp = Stamp(
        config.out.with_name(f".{config.out.stem}.done"),
        {
            **{"images": listing, "key": bool(truth), "bank": bool(bank), "weights": weights, "views": config.views},
            "rungs": [rung.what for rung in rungs],
        },
        inputs,
    )
    scores_path, nearest_path = config.out.with_suffix(".json"), config.out.with_name(f"{config.out.stem}.prompts.csv")
    if stamp.is_current():
        log.info("%s is up to date", config.out)
        scores = json.loads(scores_path.read_text(encoding="utf-8"))
        broken = [Path(name) for name in scores["broken"]]
        nearest = pd.read_csv(nearest_path) if bank else None
        vectors = submission.read(config.out, stems)
        return Prediction(files, vectors, broken, 0, scores["how"], scores["score"], scores["constant"], nearest)
    work = stamp.work_folder()
    rung, vectors, mean, reached = predictors.climb(rungs, files, config, work)
    unreadable = ~np.isfinite(vectors[:, 0])
    vectors[unreadable] = mean
    broken = [file for file, bad in zip(files[:reached], unreadable, strict=False) if bad]
    submission.write(config.out, stems, vectors)
    result = Prediction(files, vectors, broken, len(files) - reached, rung.what)
    if bank:
        nearest = nearest_prompts(vectors, bank, text_encoder.encode(bank))
        names = [file.relative_to(config.images).as_posix() for file in files]
        result.prompts = pd.concat([pd.DataFrame({"image": names}), nearest], axis=1)
        metadata.write_table(nearest_path, result.prompts)
    if truth:
        targets = text_encoder.encode(truth)
        result.score = evaluate.mean_cosine(vectors, targets)
        result.constant = evaluate.constant_score(mean, targets)
        log.info("score %.4f constant %.4f on %d images", result.score, result.constant, len(files))
    names = [str(file) for file in broken]
    scores = {"score": result.score, "constant": result.constant, "how": result.how, "broken": names}
    write_json(scores_path, scores)
    if rung is rungs[0] and not result.unreached:
        stamp.write([config.out, scores_path, *([nearest_path] if bank else [])])
    for file in broken:
        log.warning("%s could not be read and got the mean prediction", file)
    if result.unreached:
        log.warning("%d of %d images not reached in time: they got the mean prediction", result.unreached, len(files))
    log.info("%s: %d images, predicted by %s", config.out, len(files), result.how)
    return result


def newest(run: Run, may_miss: bool) -> list[Path]:
    """The newest checkpoint of the run or of the attached Kaggle inputs, as a list; empty where there may be none.

    Raises:
        UserError: If there is none and there must be one.
    """
    try:
        return [run.newest_checkpoint()]
    except UserError as error:
        if not may_miss:
            raise
        log.warning("%s", error)
        return []
