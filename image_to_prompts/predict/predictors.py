"""What predicts: checkpoints or, where there are none, kNN over embeddings or the mean prompt embedding.

A submission kernel so scores on its first push, before anything is trained.
"""

import csv
import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pandas as pd
from safetensors.numpy import load_file

from ..encode import embeddings, encoders
from ..encode.encoders import Encoder
from ..models import checkpoints, ensemble, metrics, text_encoder, weights
from ..run import resume
from ..run.bounds import AtLeast, NotNegative, Positive
from ..run.devices import process_state
from ..run.engine import EngineConfig, over_blocks
from ..run.errors import UserError
from ..run.files import make_folder
from ..run.folders import Run, is_ensemble, kaggle_inputs
from ..run.progress import Deadline

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


@dataclass
class Viewing:
    """How images are looked at."""

    views: Annotated[tuple[Literal["whole", "centre", "mirror"], ...], AtLeast(1)] = ("whole", "centre", "mirror")
    """What is shown of each image; the predictions of several are averaged, which takes as many times as long."""
    batch_size: Positive = 32
    """Images at once."""
    loader_workers: NotNegative = 0
    """Threads that decode images; 0: one a core."""


def checkpoint(folder: Path) -> Predictor:
    """A checkpoint of `finetune` or `ensemble`; see their `load` for what it raises."""
    from ..encode.backbone import BackboneEncoder

    if is_ensemble(folder):
        blend = ensemble.load(folder)
        seen = blend.config["ensemble"]["encoders"].values()
        return Predictor(blend.mean, list(map(encoders.rebuild, seen)), partial(metrics.in_fixed_rows, blend))
    found = checkpoints.load(folder)
    return Predictor(found.mean, [BackboneEncoder(found.model, found.spec)])


def trained_on(folders: list[Path], targets: np.ndarray) -> int:
    """How many of float32 (n, 384) embeddings of prompts are among those that checkpoints say they were trained on."""
    from ..search.near_pairs import near

    found = np.zeros(len(targets), bool)
    for folder in folders:
        if is_ensemble(folder):
            found |= near(targets, ensemble.load(folder).known[1], SAME)
        elif (folder / "baselines.safetensors").is_file():
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
        return Predictor(mean, [encoder], partial(_nearest_mean, features, targets, k))
    raise UserError(f"{folder}: no array's encoder can be built: {missing}")


def _nearest_mean(features: np.ndarray, targets: np.ndarray, k: int, seen: list[np.ndarray]) -> np.ndarray:
    return metrics.in_fixed_rows(lambda rows: metrics.nearest_mean(rows[0], features, targets, k), seen)


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
        rungs.append(Rung(f"kNN over {folder}", {str(folder): partial(neighbours, folder)}, [1.0], inputs))
    if all(found := [weights.attached(name) for name in (CAPTION, RANKER)]):
        files = [file for some in found for file in some if file.is_file()]
        rungs.append(Rung("CLIP Interrogator", {"interrogator": interrogator}, [1.0], files))
    csvs = [path for path in [*kaggle_inputs("*.csv"), run.metadata] if _has_prompts(path)]
    if csvs:
        what = f"the mean embedding of the prompts in {len(csvs)} CSV files"
        rungs.append(Rung(what, {"mean": partial(prompt_mean, csvs)}, [1.0], csvs))
    return rungs


def _has_prompts(path: Path) -> bool:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return "prompt" in next(csv.reader(file), [])
    except (OSError, UnicodeDecodeError, csv.Error):
        return False


def predict(predictor: Predictor, files: list[Path], viewing: Viewing) -> np.ndarray:
    """Predicts for image files, in the hardware's half precision.

    Returns:
        float32 (n, 384) of unit vectors, NaN in the rows of images that cannot be read.
    """
    return _start(predictor, viewing)(files)


def _start(load: Predictor | Callable[[], Predictor], viewing: Viewing) -> Callable[[list[Path]], np.ndarray]:
    """What predicts for some images; a GPU's memory that did not suffice is remembered between them."""
    predictor = load if isinstance(load, Predictor) else load()
    if not predictor.encoders:
        return lambda files: np.tile(predictor.mean, (len(files), 1))
    show = encoders.viewer(predictor.encoders, viewing.batch_size, viewing.loader_workers)
    return lambda files: _predict_block(predictor, show, files, viewing.views)


def _predict_block(
    predictor: Predictor, show: Callable[..., list[encoders.Encoded]], files: list[Path], views: tuple[str, ...]
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


def predict_resumed(
    start: Callable[[], Callable[[list[Path]], np.ndarray]],
    files: list[Path],
    engine: EngineConfig,
    work: Path,
    deadline: Deadline,
) -> tuple[np.ndarray, int]:
    """Predicts as `predict`, in blocks of 512 images that a later run finds in `work`, until the deadline.

    Returns:
        As `predict`, NaN also for images that were not reached; and how many were.
    """

    def make(blocks: Iterable[range]) -> Iterator[dict[str, np.ndarray]]:
        for vectors in over_blocks(engine, start, (files[rows.start : rows.stop] for rows in blocks)):
            yield {"vectors": vectors}

    found = [load_file(file)["vectors"] for file in resume.blocks(work, len(files), BLOCK, make, deadline.passed)]
    vectors = np.full((len(files), text_encoder.DIMENSION), np.nan, np.float32)
    reached = sum(map(len, found))
    vectors[:reached] = np.concatenate([vectors[:0], *found])
    process_state().wait_for_everyone()  # nobody removes the blocks before all processes have read them
    return vectors, reached


def climb(
    rungs: list[Rung], files: list[Path], viewing: Viewing, engine: EngineConfig, work: Path, hours: float, strict: bool
) -> tuple[Rung, list[np.ndarray], np.ndarray, list[int]]:
    """Predicts with the first rung that works.

    Args:
        rungs: Ways to predict, best first.
        files: Image files.
        viewing, engine: How to look at them, and who does the work.
        work: Folder for finished blocks.
        hours: After so many hours of this process the rest is not predicted; 0: never.
        strict: Whether a failure ends it, instead of leading to the next rung.

    Returns:
        The rung; float32 (n, 384) of each of its predictors, NaN in the rows of images that cannot be read or were not
        reached; the mean prediction (384,); how many images each predictor reached.
    """
    deadline = Deadline(hours)
    for place, rung in enumerate(rungs):
        found, means, reached = [], [], []
        try:
            for name, load in rung.load.items():
                predictor = load()
                start = partial(_start, load if engine.engine == "ray" else predictor, viewing)
                blocks = make_folder(work / hashlib.sha256(name.encode()).hexdigest()[:16])
                vectors, count = predict_resumed(start, files, engine, blocks, deadline)
                found.append(vectors)
                means.append(predictor.mean[None])
                reached.append(count)
                del predictor  # before the next one is loaded
        except Exception as error:
            if strict or rung is rungs[-1]:
                raise
            said = " ".join(str(error).split()) or type(error).__name__
            log.warning("%s: failed (%s); next: %s", rung.what, said, rungs[place + 1].what)
            continue
        return rung, found, metrics.blend(means, rung.weights)[0], reached
    raise UserError("nothing to predict from; run finetune first, or attach a checkpoint, embeddings or prompts")
