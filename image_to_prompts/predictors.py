"""What predicts: checkpoints or, where there are none, kNN over embeddings or the mean prompt embedding.

A submission kernel so scores on its first push, before anybody has trained anything.
"""

from __future__ import annotations

import csv
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from . import backbones, embed, evaluate, images, text_encoder, workspace
from . import model as models
from .devices import mixed_precision, process_state, type_of
from .errors import UserError
from .files import make_folder, write_array
from .progress import Deadline

if TYPE_CHECKING:
    from torch import nn

    from . import infer

log = logging.getLogger(__name__)
BLOCK = 512  # images a file of half-done work
MOST_PROMPTS = 20_000  # the mean of more is the same to three digits
MOST_ASKED = 2_000  # rows on which the number of neighbours is chosen


@dataclass
class Predictor:
    """Maps images to prompt embeddings.

    Attributes:
        mean: float32 (384,), the prediction for an image that cannot be read or is not reached in time.
        forward: Maps uint8 images (n, 3, s, s) to (n, d); None: the prediction is the mean.
        image_size: s.
        finish: Maps float32 (n, d) to (n, 384).
    """

    mean: np.ndarray
    forward: nn.Module | None = None
    image_size: int = 0
    finish: Callable[[np.ndarray], np.ndarray] = lambda vectors: vectors


@dataclass(frozen=True)
class Rung:
    """One way to predict.

    Attributes:
        what: What it is, for the log.
        load: Gives its predictors, one at a time.
        weights: Their weights in the blend.
        inputs: Files on whose contents the predictions depend.
    """

    what: str
    load: list[Callable[[], Predictor]]
    weights: list[float]
    inputs: list[Path]


def checkpoint(folder: Path) -> Predictor:
    """A checkpoint; see `model.load` for what it raises."""
    found = models.load(folder)
    return Predictor(found.mean, found.model, found.spec.image_size)


def neighbours(folder: Path, name: str) -> Predictor:
    """kNN over an array of `embed`, the number of neighbours chosen on a part of it.

    Args:
        folder: What `embed` wrote.
        name: The image array.

    Raises:
        UserError: If the array is damaged or its backbone's weights are nowhere.
    """
    from torch.nn import Identity

    features, targets, about = embed.joined(folder, name)
    spec = backbones.Spec(**about["backbone"])
    model = models.build(spec)
    backbones.load_pretrained(model.backbone, spec)
    model.head = Identity()
    asked = np.arange(len(features)) % max(10, len(features) // MOST_ASKED) == 0
    k = evaluate.best_k(features[asked], targets[asked], features[~asked], targets[~asked])
    log.info("kNN over %d embeddings by %s, k = %d", len(features), spec.name, k)
    mean = evaluate.unit(targets.mean(0))
    return Predictor(mean, model, spec.image_size, lambda found: evaluate.nearest_mean(found, features, targets, k))


def prompt_mean(csvs: list[Path]) -> Predictor:
    """The mean embedding of the prompts of CSVs.

    Raises:
        UserError: If there is none.
    """
    found = [pd.Series(dtype=str)]
    for path in csvs:
        try:
            found.append(pd.read_csv(path, usecols=["prompt"], dtype=str)["prompt"])
        except (OSError, ValueError) as error:  # other people's files; the rest serve as well
            log.warning("%s: passed over: %s", path, error)
    prompts = pd.concat(found)
    prompts = prompts[prompts.str.strip().fillna("") != ""].drop_duplicates()
    prompts = prompts.iloc[:: -(-len(prompts) // MOST_PROMPTS) or 1].tolist()
    if not prompts:
        raise UserError(f"no prompts in {', '.join(map(str, csvs))}; attach metadata, embeddings or a checkpoint")
    log.info("mean embedding of %d prompts of %s", len(prompts), ", ".join(map(str, csvs)))
    return Predictor(evaluate.unit(text_encoder.encode(prompts).mean(0)))


def ladder(run: workspace.Run) -> list[Rung]:
    """What can predict without a checkpoint, best first: kNN where embeddings lie, the mean of what prompts there are.

    Looked for among the attached Kaggle inputs and in the run.
    """
    rungs = []
    stored = [path.parent for path in workspace.kaggle_inputs(f"{embed.PROMPTS}.npy")]
    stored += [path.parent for path in run.folder.glob(f"*/{embed.PROMPTS}.npy")]
    for folder in stored:
        for name in embed.arrays(folder):
            inputs = [folder / f"{stem}{end}" for stem in (name, embed.PROMPTS) for end in embed.ENDS]
            load = [lambda f=folder, n=name: neighbours(f, n)]
            rungs.append(Rung(f"kNN over {folder / name}.npy", load, [1.0], inputs))
    csvs = [path for path in [*workspace.kaggle_inputs("*.csv"), run.metadata] if _has_prompts(path)]
    if csvs:
        what = f"the mean embedding of the prompts in {len(csvs)} CSV files"
        rungs.append(Rung(what, [lambda: prompt_mean(csvs)], [1.0], csvs))
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
) -> tuple[np.ndarray, int]:
    """Predicts for image files with one predictor, in the hardware's half precision.

    Args:
        predictor: From `predictors`; its model's matrices are kept in half precision from here on.
        files: Image files.
        config: Batch size, loader threads, views.
        work: Folder in which finished blocks of 512 images are kept for a resumed run.
        deadline: When to stop.

    Returns:
        float32 (n, 384) of unit vectors, NaN in the rows of images that cannot be read or were not reached; and how
        many were reached.
    """
    from accelerate.utils import find_executable_batch_size

    from .fast_layers import faster

    vectors = np.full((len(files), text_encoder.DIMENSION), np.nan, np.float32)
    if predictor.forward is None:
        vectors[:] = predictor.mean
        return vectors, len(files)
    device = process_state().device
    model = predictor.forward.requires_grad_(False).to(device).eval()
    backbones.half_frozen(model, type_of(mixed_precision(device)))
    model = faster(model)

    @find_executable_batch_size(starting_batch_size=config.batch_size)  # smaller whenever memory runs out
    def extract(batch_size: int, rows: images.ImageRows) -> np.ndarray:
        return evaluate.extract(model, rows, batch_size, device, config.loader_workers)

    for start in range(0, len(files), BLOCK):
        block = work / f"vectors-{start:09d}.npy" if work else None
        if block and block.is_file():
            part = np.load(block)
        elif deadline and deadline.passed():
            return vectors, start
        else:
            part = _predict_block(predictor, extract, files[start : start + BLOCK], config.views)
            if block:
                write_array(block, part)
        vectors[start : start + BLOCK] = part
    return vectors, len(files)


def _predict_block(
    predictor: Predictor, extract: Callable[[images.ImageRows], np.ndarray], files: list[Path], views: tuple[str, ...]
) -> np.ndarray:
    """The mean over the views of unit vectors, float32 (n, 384), NaN for images that cannot be read."""
    seen = []
    for view in views:
        found = extract(images.ImageRows(files, predictor.image_size, view))
        readable = np.isfinite(found[:, 0])
        vectors = np.full((len(files), text_encoder.DIMENSION), np.nan, np.float32)
        if readable.any():
            vectors[readable] = predictor.finish(found[readable])
        seen.append(vectors)
    return evaluate.blend(seen, [1 / len(seen)] * len(seen))


def climb(
    rungs: list[Rung], files: list[Path], config: infer.Config, work: Path
) -> tuple[Rung, np.ndarray, np.ndarray, int]:
    """Predicts with the first rung that works.

    Args:
        rungs: Ways to predict, best first.
        files: Image files.
        config: As `predict`; with `fallback` a failure leads to the next rung.
        work: Folder for finished blocks.

    Returns:
        The rung; float32 (n, 384), NaN in the rows of images that cannot be read or were not reached; the mean
        prediction (384,); how many images were reached by a predictor at least.
    """
    deadline = Deadline(config.max_hours)
    for place, rung in enumerate(rungs):
        found, means, reached = [], [], 0
        try:
            for number, load in enumerate(rung.load):
                predictor = load()
                block_folder = make_folder(work / f"{place}-{number}")
                vectors, count = predict(predictor, files, config, block_folder, deadline)
                found.append(vectors)
                means.append(predictor.mean[None])
                reached = max(reached, count)
                del predictor  # before the next one is loaded
        except Exception as error:
            if not config.fallback or rung is rungs[-1]:
                raise
            said = " ".join(str(error).split()) or type(error).__name__
            log.warning("%s: failed (%s); next: %s", rung.what, said, rungs[place + 1].what)
            continue
        blended = evaluate.blend([np.nan_to_num(vectors) for vectors in found], rung.weights)
        blended[~blended.any(1)] = np.nan  # no predictor had them
        return rung, blended, evaluate.blend(means, rung.weights)[0], reached
    raise UserError("nothing to predict from; run finetune first, or attach a checkpoint, embeddings or prompts")
