"""Stage 7, infer: predicts the prompt embedding of every image in a folder.

    image-to-prompts infer --images DIR --out submission.csv [--checkpoint DIR ...] [--key prompts.csv] [--bank CSV]

Several checkpoints are blended. An image that cannot be read, or is not reached in time, gets the mean prediction, so
that the submission stays complete. With --fallback something always predicts: where no checkpoint works, kNN over
embeddings or the mean prompt embedding. With a key the predictions are scored; with a bank of prompts the nearest one
of each image is written beside the submission.
"""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from ..data import images, metadata, rows
from ..models import doubt, metrics, text_encoder
from ..predict import predictors
from ..predict.ladder import Rung, climb, ladder
from ..profiles import Models, StageConfig
from ..run.bounds import Amount, NotNegative
from ..run.devices import rank_and_processes
from ..run.engine import EngineConfig
from ..run.errors import UserError
from ..run.files import make_folder, write_json
from ..run.folders import Run, is_bank
from ..run.resume import Stamp, alone
from . import submission

log = logging.getLogger(__name__)


@dataclass
class Main:
    """What it predicts, and with what."""

    images: Path = Path("images")
    """Folder of images, sub-folders too."""
    checkpoint: tuple[Path, ...] = ()
    """Checkpoint folders, and folders of embed for kNN, blended; left out: the newest of finetune and of ensemble, in
    this run or attached."""
    out: Path = Path("submission/submission.csv")
    """Submission CSV to write."""
    key: Path | None = None
    """CSV with the images' true prompts (image_name or image, prompt), to score against."""
    bank: tuple[Path, ...] = ()
    """CSVs of prompts, of which the nearest to each image goes to <out>.prompts.csv; banks of embed --texts predict."""
    blend: tuple[float, ...] = ()
    """Weights of the checkpoints in the blend; left out: fitted on the images that all kept for validation."""
    second_size: NotNegative = 0
    """Also predict with finetune's checkpoints at this input size in px; 0: off."""
    own_colours: bool = False
    """Also predict with them after normalising colours by the mean and deviation of these images."""
    pairs: tuple[Path, ...] = ()
    """Folders of embed, of images with known prompts, to fit a bank's settings on; left out: the run's, or attached."""
    second_tower: str = ""
    """open_clip:<model> that judges the prompts which a bank's own tower found."""
    fallback: bool = False
    """If no checkpoint is given, found or works: kNN over embeddings, else CLIP Interrogator if it
    is here, else the mean prompt embedding."""
    max_hours: Amount = 0.0
    """Give the images that are left the mean prediction before the process is this old; 0: never."""


@dataclass
class Config(Main, predictors.Viewing, Models, EngineConfig, StageConfig):
    """Predicts 384 numbers an image and writes the submission; with --key it also scores them."""


@dataclass
class Prediction:
    """What `run` found out.

    Attributes:
        files: Image files, sorted by path.
        vectors: float32 (n, 384), unit length, same order.
        broken: Files that could not be read and got the mean prediction.
        unreached: Number of files that were not reached within --max-hours and got it too.
        strange: Number of images that are unlike those that the checkpoint knows.
        how: What predicted.
        alone: Score of each checkpoint of a blend by itself, with a key.
        score: Mean cosine against the key; None without one.
        constant: Score of the constant mean prediction on the same images; None without a key.
        prompts: `image,prompt,cosine` of the nearest prompts; None without a bank.
        colours: Mean and deviation of the images' channels, where these were asked for.
    """

    files: list[Path]
    vectors: np.ndarray
    broken: list[Path]
    unreached: int = 0
    strange: int = 0
    how: str = ""
    alone: dict[str, float] = field(default_factory=dict)
    score: float | None = None
    constant: float | None = None
    prompts: pd.DataFrame | None = None
    colours: rows.Colours | None = None


def read_key(path: Path, files: list[Path], folder: Path) -> list[str]:
    """The true prompt of each image file below a folder; see `images.join`.

    Raises:
        UserError: If the key is bad or an image has no row in it.
    """
    frame = metadata.read_prompts(path)
    column = next((name for name in ("image_name", "image", "imgId") if name in frame), None)
    if column is None:
        raise UserError(f"{path}: no column 'image_name', found {', '.join(frame.columns)}; rename or add it")
    known = dict(zip(images.join(frame[column], files, folder), frame["prompt"], strict=True))
    missing = [file for file in files if file not in known]
    if missing:
        raise UserError(f"{path}: no row for image {missing[0].name} ({len(missing)} such images); add it to the key")
    return [known[file] for file in files]


def nearest_prompts(vectors: np.ndarray, prompts: list[str], prompt_vectors: np.ndarray) -> pd.DataFrame:
    """The nearest of known prompts for each predicted vector.

    Args:
        vectors: float32 (n, 384) predictions.
        prompts: m prompts.
        prompt_vectors: float32 (m, 384), their embeddings.

    Returns:
        `prompt,cosine`, one row per prediction.
    """
    from ..search.nearest import nearest

    rows, cosines = (column[:, 0] for column in nearest(vectors, prompt_vectors, 1))
    return pd.DataFrame({"prompt": [prompts[row] for row in rows], "cosine": np.round(cosines.astype(float), 4)})


def run(config: Config) -> Prediction:
    """Runs the stage.

    Raises:
        UserError: If there are no images, no usable checkpoint, a bad key or bank, or two images with one stem.
    """
    files = images.find(config.images)
    stems = submission.check_stems(files)
    with alone(config.out):
        return _run(config, files, stems)


def _run(config: Config, files: list[Path], stems: list[str]) -> Prediction:
    truth = read_key(config.key, files, config.images) if config.key else None
    csvs = [path for path in config.bank if not is_bank(path)]
    bank = [prompt for path in csvs for prompt in metadata.read_prompts(path)["prompt"]]
    banks = [path for path in config.bank if is_bank(path)] or ([] if config.checkpoint else Run(config.run).banks())
    stored = Run(config.run).stored_embeddings() if banks and not config.pairs else config.pairs
    searching = predictors.Searching(tuple(stored), config.second_tower)
    folders = list(dict.fromkeys(config.checkpoint)) or newest(Run(config.run), config.fallback or bool(banks))
    folders += banks
    weights = _weights(config, folders, searching)
    colours = rows.colours(files) if config.own_colours else None
    rungs = _rungs(config, folders, weights, predictors.Looks(config.second_size, colours), searching)
    make_folder(config.out.parent)
    names = [file.relative_to(config.images).as_posix() for file in files]
    settings = {"images": [names, images.contents(files)], "key": bool(truth), "bank": bool(bank)}
    settings |= {"weights": weights, "views": config.views, "rungs": [rung.what for rung in rungs]}
    settings |= {"looks": [config.second_size, colours]} if config.second_size or colours else {}
    settings |= {"second_tower": config.second_tower} if config.second_tower else {}
    inputs = [*(path for rung in rungs for path in rung.inputs), *filter(None, (config.key, *csvs))]
    stamp = Stamp(config.out.with_name(f".{config.out.stem}.done"), "infer", settings, inputs)
    scores_path, nearest_path = config.out.with_suffix(".json"), config.out.with_name(f"{config.out.stem}.prompts.csv")
    if stamp.is_current():
        log.info("%s is up to date", config.out)
        return read(config)
    outputs = [config.out, scores_path, *([nearest_path] if bank else [])]
    stamp.claim(outputs)
    rung, seen, used, reached = climb(
        *(rungs, files, config, config, stamp.work_folder(), config.max_hours),
        strict=not config.fallback,
    )
    mean = metrics.blend([one.mean[None] for one in used], rung.weights)[0]
    found, strange = [one.vectors for one in seen], predictors.strangeness(seen)
    vectors = metrics.blend([np.nan_to_num(one) for one in found], rung.weights)
    unreadable = np.asarray(~vectors.any(1))  # no predictor had them
    vectors[unreadable] = mean
    vectors = doubt.pulled(vectors, mean, strange, next((one.pull for one in used if one.judge), (1.0, 0.0)))
    broken = [file for file, bad in zip(files[: max(reached)], unreadable, strict=False) if bad]
    result = Prediction(files, vectors, broken, len(files) - max(reached), int((strange > 1).sum()), rung.what)
    result.colours = colours
    if rank_and_processes()[0]:  # the main process writes
        return result
    submission.write(config.out, stems, vectors)
    if bank:
        nearest = nearest_prompts(vectors, bank, text_encoder.encode(bank))
        familiar = ["" if np.isnan(one) else str(one <= 1).lower() for one in strange]
        result.prompts = pd.concat([pd.DataFrame({"image": names}), nearest], axis=1).assign(familiar=familiar)
        metadata.write_table(nearest_path, result.prompts)
    if truth:
        used_folders = [folder for folder in folders if str(folder) in rung.load]
        _score(result, found, mean, text_encoder.encode(truth), used_folders)
    kept = {
        name: getattr(result, name) for name in ("score", "constant", "alone", "how", "strange", "unreached", "colours")
    }
    write_json(scores_path, {**kept, "broken": list(map(str, broken))})
    if rung is rungs[0] and min(reached) == len(files):
        stamp.write(outputs)
    _tell(result, reached)
    if result.strange:
        known = predictors.knows(folders)
        log.warning("%d of %d images are unlike those that the checkpoint knows: %s", result.strange, len(files), known)
    log.info("%s: %d images, predicted by %s", config.out, len(files), result.how)
    return result


def read(config: Config) -> Prediction:
    """What an earlier `run`, with these settings and in whatever process, has written."""
    files = images.find(config.images)
    found = json.loads(config.out.with_suffix(".json").read_text(encoding="utf-8"))
    found["broken"] = [Path(name) for name in found["broken"]]
    found["colours"] = tuple(map(tuple, found.get("colours") or ())) or None
    nearest = config.out.with_name(f"{config.out.stem}.prompts.csv")
    prompts = None
    if not all(map(is_bank, config.bank)):
        prompts = metadata.read_table(nearest, ()).astype({"cosine": float})
    return Prediction(files, submission.read(config.out, submission.check_stems(files)), **found, prompts=prompts)


def _weights(config: Config, folders: list[Path], searching: predictors.Searching) -> list[float]:
    """Weights of the blend; with --fallback also where one of the folders cannot be used."""
    try:
        return predictors.blend_weights(folders, config.blend, searching) if folders else []
    except UserError as error:
        if config.blend or not config.fallback:
            raise
        log.warning("%s; all count the same", error)
        return [1 / len(folders)] * len(folders)


def _rungs(
    config: Config, folders: list[Path], weights: list[float], looks: predictors.Looks, searching: predictors.Searching
) -> list[Rung]:
    """Ways to predict, best first: checkpoints and banks and, with --fallback, each alone and what needs none."""
    used = [place for place, weight in enumerate(weights) if weight or not is_bank(folders[place])]
    counted, weights = [folders[place] for place in used], [weights[place] for place in used]
    rungs = [_folder_rung(counted, weights, looks, searching)] if counted else []
    if config.fallback and len(folders) > 1:  # one may lack the weights of its encoders
        rungs += [_folder_rung([folder], [1.0], looks, searching) for folder in folders]
    if config.fallback and not config.checkpoint:
        rungs += ladder(Run(config.run), config.caption, config.ranker)
    return rungs


def _score(
    result: Prediction, found: list[np.ndarray], mean: np.ndarray, targets: np.ndarray, folders: list[Path]
) -> None:
    """Scores predictions, the constant's beside them, and where there are several checkpoints each alone."""
    result.score, result.constant = metrics.mean_cosine(result.vectors, targets), metrics.constant_score(mean, targets)
    if len(found) > 1:
        for folder, one in zip(folders, found, strict=True):
            one[~np.isfinite(one[:, 0])] = mean
            result.alone[str(folder)] = metrics.mean_cosine(one, targets)
            log.info("%s alone: %.4f", folder, result.alone[str(folder)])
    log.info("score %.4f constant %.4f on %d images", result.score, result.constant, len(targets))
    if trained := predictors.trained_on(folders, targets):
        log.warning(
            "%d of %d images have prompts that the checkpoint was trained on: on others the score will be lower",
            *(trained, len(targets)),
        )


def _tell(result: Prediction, reached: list[int]) -> None:
    """Warns of images that were not predicted, or not by all."""
    if min(reached) < max(reached):
        log.warning("%d images were not reached by all checkpoints of the blend", max(reached) - min(reached))
    images.tell_broken(result.broken, "predicted by the mean")
    if result.unreached:
        every = len(result.files)
        log.warning("%d of %d images not reached in time: they got the mean prediction", result.unreached, every)


def _folder_rung(
    folders: list[Path], weights: list[float], looks: predictors.Looks, searching: predictors.Searching
) -> Rung:
    loads: dict[str, Callable[[], predictors.Predictor]] = {
        str(folder): partial(predictors.load, folder, looks, searching) for folder in folders
    }
    inputs = [path for folder in folders for path in predictors.inputs(folder, searching)]
    kinds = {
        "checkpoint": [f for f in folders if not is_bank(f)],
        "bank of prompts": [f for f in folders if is_bank(f)],
    }
    what = ", ".join(f"{kind} {', '.join(map(str, some))}" for kind, some in kinds.items() if some)
    return Rung(what, loads, weights, inputs)


def newest(run: Run, may_miss: bool) -> list[Path]:
    """The newest checkpoints of the run or of the attached Kaggle inputs; none where there may be none.

    Raises:
        UserError: If there is none and there must be one.
    """
    try:
        return run.newest_checkpoints()
    except UserError as error:
        if not may_miss:
            raise
        log.warning("%s", error)
        return []
