"""What predicts: checkpoints or, where there are none, kNN over embeddings or the mean prompt embedding.

A submission kernel so scores on its first push, before anybody has trained anything.
"""

from __future__ import annotations

import csv
import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from .. import ensemble
from ..encode import embeddings, encoders
from ..encode.encoders import Encoder
from ..models import checkpoints, metrics, text_encoder, weights
from ..run.engine import over_blocks
from ..run.errors import UserError
from ..run.files import is_sealed, make_folder, seal, write_array
from ..run.folders import Run, is_ensemble, kaggle_inputs
from ..run.progress import Deadline

if TYPE_CHECKING:
    from .. import infer

log = logging.getLogger(__name__)
BLOCK = 512  # images a file of half-done work
MOST_PROMPTS = 20_000  # the mean of more is the same to three digits
SAME = 0.99999  # cosine of two embeddings of one prompt
MOST_ASKED = 2_000  # rows on which the number of neighbours is chosen


@dataclass
class Predictor:
    """Maps images to prompt embeddings.

    Attributes:
        mean: float32 (384,), the prediction for an image that cannot be read or is not reached in time.
        encoders: What looks at the images; none: the prediction is the mean.
        finish: Maps what each encoder gave, float32 (n, d), to float32 (n, 384).
    """

    mean: np.ndarray
    encoders: list[Encoder] = field(default_factory=list)
    finish: Callable[[list[np.ndarray]], np.ndarray] = lambda arrays: arrays[0]


@dataclass(frozen=True)
class Rung:
    """One way to predict.

    Attributes:
        what: What it is, for the log.
        load: By name, what gives its predictors; of those with one name finished blocks are shared between rungs.
        weights: Their weights in the blend.
        inputs: Files on whose contents the predictions depend.
    """

    what: str
    load: dict[str, Callable[[], Predictor]]
    weights: list[float]
    inputs: list[Path]


def checkpoint(folder: Path) -> Predictor:
    """A checkpoint of `finetune` or `ensemble`; see their `load` for what it raises."""
    from ..encode.backbone import BackboneEncoder

    if is_ensemble(folder):
        found = ensemble.load(folder)
        seen = found.config["ensemble"]["encoders"]
        alone = found.config["ensemble"]["attention"] != "seed"  # that network looks at a whole batch
        finish = partial(metrics.in_fixed_rows, found) if alone else found
        return Predictor(found.mean, [encoders.rebuild(about) for about in seen.values()], finish)
    found = checkpoints.load(folder)
    return Predictor(found.mean, [BackboneEncoder(found.model, found.spec)])


def trained_on(folders: list[Path], targets: np.ndarray) -> int:
    """How many of float32 (n, 384) embeddings of prompts are among those that checkpoints say they were trained on."""
    from ..search.near_pairs import near

    found = np.zeros(len(targets), bool)
    for folder in folders:
        if is_ensemble(folder):
            known = ensemble.load(folder).known
            found |= near(targets, known[1], SAME) if known else False
        elif (folder / "baselines.safetensors").is_file():
            from safetensors.numpy import load_file

            found |= near(targets, load_file(folder / "baselines.safetensors")["targets"], SAME)
    return int(found.sum())


def neighbours(folder: Path) -> Predictor:
    """kNN over the best array of `embed` whose encoder can be built, the number of neighbours chosen on a part of it.

    Args:
        folder: What `embed` wrote.

    Raises:
        UserError: If an array is damaged, or the weights of no encoder are there.
    """
    table = embeddings.load(folder)
    found = []
    for name, vectors in table.arrays.items():
        known = np.isfinite(vectors[:, 0])
        features, targets = vectors[known], table.targets[known]
        asked = np.arange(len(features)) % max(10, len(features) // MOST_ASKED) == 0
        k = metrics.best_k(features[asked], targets[asked], features[~asked], targets[~asked])
        guess = metrics.nearest_mean(features[asked], features[~asked], targets[~asked], k)
        found.append((metrics.mean_cosine(guess, targets[asked]), name, k, features, targets))
    missing = ""
    for score, name, k, features, targets in sorted(found, key=lambda one: -one[0]):
        try:
            encoder = encoders.rebuild(table.about[name])
        except UserError as error:
            missing = missing or str(error)
            log.warning("%s: passed over: %s", folder / name, error)
            continue
        log.info("kNN over %d embeddings by %s, k = %d: %.4f on a part of them", len(features), name, k, score)
        mean = metrics.unit(targets.mean(0))
        guess = partial(lambda f, t, k, seen: metrics.nearest_mean(seen[0], f, t, k), features, targets, k)
        return Predictor(mean, [encoder], partial(metrics.in_fixed_rows, guess))
    raise UserError(f"{folder}: no array's encoder can be built: {missing}")


def interrogator() -> Predictor:
    """CLIP Interrogator's text, as it is; raises as `encoders.build`."""
    encoder = encoders.build("interrogator", 0)
    return Predictor(metrics.unit(text_encoder.encode(["a picture"])[0]), [encoder])


def prompt_mean(csvs: list[Path]) -> Predictor:
    """The mean embedding of the prompts of CSVs.

    Raises:
        UserError: If there is none.
    """
    found = [pd.Series(dtype=str)]
    for path in csvs:
        try:
            found.append(pd.read_csv(path, usecols=["prompt"], dtype=str, keep_default_na=False)["prompt"])
        except (OSError, ValueError) as error:  # other people's files; the rest serve as well
            log.warning("%s: passed over: %s", path, error)
    prompts = pd.concat(found)
    prompts = prompts[prompts.str.strip().fillna("") != ""].drop_duplicates()
    prompts = prompts.iloc[:: -(-len(prompts) // MOST_PROMPTS) or 1].tolist()
    if not prompts:
        raise UserError(f"no prompts in {', '.join(map(str, csvs))}; attach metadata, embeddings or a checkpoint")
    log.info("mean embedding of %d prompts of %s", len(prompts), ", ".join(map(str, csvs)))
    return Predictor(metrics.unit(text_encoder.encode(prompts).mean(0)))


def ladder(run: Run) -> list[Rung]:
    """What can predict without a checkpoint, best first: kNN, CLIP Interrogator, the mean of what prompts there are.

    Looked for among the attached Kaggle inputs and in the run.
    """
    from ..encode.interrogator import CAPTION, RANKER

    rungs = []
    stored = [path.parent for path in kaggle_inputs(f"{embeddings.PROMPTS}.npy")]
    stored += [path.parent for path in run.folder.glob(f"*/{embeddings.PROMPTS}.npy")]
    for folder in stored:
        names = [*embeddings.arrays(folder), embeddings.PROMPTS]
        inputs = [folder / f"{name}{end}" for name in names for end in embeddings.ENDS]
        rungs.append(Rung(f"kNN over {folder}", {str(folder): lambda folder=folder: neighbours(folder)}, [1.0], inputs))
    models_ = [weights.attached(name) for name in (CAPTION, RANKER)]
    if all(models_):
        files = [file for found in models_ for file in found if file.is_file()]
        rungs.append(Rung("CLIP Interrogator", {"interrogator": interrogator}, [1.0], files))
    csvs = [path for path in [*kaggle_inputs("*.csv"), run.metadata] if _has_prompts(path)]
    if csvs:
        what = f"the mean embedding of the prompts in {len(csvs)} CSV files"
        rungs.append(Rung(what, {"mean": lambda: prompt_mean(csvs)}, [1.0], csvs))
    return rungs


def _has_prompts(path: Path) -> bool:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return "prompt" in next(csv.reader(file), [])
    except (OSError, UnicodeDecodeError, csv.Error):
        return False


def predict(
    predictor: Predictor,
    files: list[Path],
    config: infer.Config,
    work: Path | None = None,
    deadline: Deadline | None = None,
    load: Callable[[], Predictor] | None = None,
) -> tuple[np.ndarray, int]:
    """Predicts for image files with one predictor, in the hardware's half precision.

    Args:
        predictor: What predicts.
        files: Image files.
        config: Batch size, loader threads, views.
        work: Folder in which finished blocks of 512 images are kept for a resumed run.
        deadline: When to stop.
        load: What loads the predictor again, in each of Ray's actors.

    Returns:
        float32 (n, 384) of unit vectors, NaN in the rows of images that cannot be read or were not reached; and how
        many were reached.
    """
    vectors = np.full((len(files), text_encoder.DIMENSION), np.nan, np.float32)
    if not predictor.encoders:
        vectors[:] = predictor.mean
        return vectors, len(files)
    places = {start: work / f"vectors-{start:09d}.npy" if work else None for start in range(0, len(files), BLOCK)}
    done = {start for start, place in places.items() if place and is_sealed(place)}
    todo = (files[start : start + BLOCK] for start in places if start not in done)
    made = over_blocks(config, partial(_start, load if config.engine == "ray" else lambda: predictor, config), todo)
    for start, place in places.items():
        if start in done:
            part = np.load(place)
        elif deadline and deadline.passed():
            return vectors, start
        else:
            part = next(made)
            if place:
                write_array(place, part)
                seal(place)
        vectors[start : start + BLOCK] = part
    return vectors, len(files)


def _start(load: Callable[[], Predictor], config: infer.Config) -> Callable[[list[Path]], np.ndarray]:
    """What predicts for a block of images."""
    predictor = load()
    show = encoders.viewer(predictor.encoders, config.batch_size, config.loader_workers)
    return lambda files: _predict_block(predictor, show, files, config.views)


def _predict_block(
    predictor: Predictor,
    show: Callable[[list[Path], str], list[encoders.Encoded]],
    files: list[Path],
    views: tuple[str, ...],
) -> np.ndarray:
    """The mean over the views of unit vectors, float32 (n, 384), NaN for images that cannot be read."""
    seen = []
    for view in views:
        found = show(files, view)
        readable = np.isfinite(found[0].vectors[:, 0])
        vectors = np.full((len(files), text_encoder.DIMENSION), np.nan, np.float32)
        if readable.any():
            vectors[readable] = predictor.finish([one.vectors[readable] for one in found])
        seen.append(vectors)
    return metrics.blend(seen, [1 / len(seen)] * len(seen))


def climb(
    rungs: list[Rung], files: list[Path], config: infer.Config, work: Path
) -> tuple[Rung, list[np.ndarray], np.ndarray, list[int]]:
    """Predicts with the first rung that works.

    Args:
        rungs: Ways to predict, best first.
        files: Image files.
        config: As `predict`; with `fallback` a failure leads to the next rung.
        work: Folder for finished blocks.

    Returns:
        The rung; float32 (n, 384) of each of its predictors, NaN in the rows of images that cannot be read or were not
        reached; the mean prediction (384,); how many images each predictor reached.
    """
    deadline = Deadline(config.max_hours)
    for place, rung in enumerate(rungs):
        found, means, reached = [], [], []
        try:
            for name, load in rung.load.items():
                predictor = load()
                block_folder = make_folder(work / hashlib.sha256(name.encode()).hexdigest()[:16])
                vectors, count = predict(predictor, files, config, block_folder, deadline, load)
                found.append(vectors)
                means.append(predictor.mean[None])
                reached.append(count)
                del predictor  # before the next one is loaded
        except Exception as error:
            if not config.fallback or rung is rungs[-1]:
                raise
            said = " ".join(str(error).split()) or type(error).__name__
            log.warning("%s: failed (%s); next: %s", rung.what, said, rungs[place + 1].what)
            continue
        return rung, found, metrics.blend(means, rung.weights)[0], reached
    raise UserError("nothing to predict from; run finetune first, or attach a checkpoint, embeddings or prompts")
