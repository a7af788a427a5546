"""Several predictors as one: checkpoints and kNN over embeddings, with weights fitted on what all validated."""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from ..models import metrics
from ..run.folders import is_bank, is_embeddings
from ..training import by_source
from . import knn

log = logging.getLogger(__name__)
LEAST_TO_FIT = 20  # images on which weights are fitted
PARTS = 5  # of them, for the gain: each is measured with weights that the others gave


def fitted(folders: list[Path], pairs: Sequence[Path] = (), second: str = "") -> list[float]:
    """Weights fitted on the images that all checkpoints kept for validation; see `predictors.blend_weights`.

    A bank beside checkpoints that has no vectors of these images gets no weight: nobody knows how good it is.

    Args:
        folders: Checkpoints, folders of embeddings, and banks.
        pairs, second: See `predictors.Searching`.
    """
    trained = [folder for folder in folders if not (is_embeddings(folder) or is_bank(folder))]
    if not trained or not all(by_source.is_there(folder) for folder in trained):
        log.warning("a checkpoint without validation predictions: all count the same; infer --blend sets weights")
        return [1 / len(folders)] * len(folders)
    read = {folder: by_source.read(folder) for folder in trained}
    frame, _, targets = read[trained[-1]]
    known = pd.DataFrame(targets, frame["image_name"])
    found = {}
    for folder, (frame, predicted, targets) in read.items():
        mine = knn.asked_of(frame["image_name"], targets, known)
        found[folder] = pd.DataFrame(predicted[mine], frame["image_name"][mine])
    names = _common(found)
    for folder in (one for one in folders if one not in found):
        if is_embeddings(folder):
            found[folder] = knn.validation(folder, known.loc[names])
            continue
        from . import retrieval

        said = retrieval.validation(folder, known.loc[names], pairs, second)
        if len(said) >= LEAST_TO_FIT:
            found[folder] = said
        else:
            said = "%s: left out of the blend: no vectors of images that were validated; infer --blend sets a weight"
            log.warning(said, folder)
    same = [(folder in found) / len(found) for folder in folders]
    if len(found) == 1:
        return same
    names = _common(found)
    if len(names) < LEAST_TO_FIT:
        said = "%d images validated in all checkpoints: all count the same; infer --blend sets weights"
        log.warning(said, len(names))
        return same
    predictions, truth = [one.loc[names].to_numpy() for one in found.values()], known.loc[names].to_numpy()
    weights = metrics.fit_weights(predictions, truth)
    alone = [metrics.mean_cosine(predicted, truth) for predicted in predictions]
    for folder, score, weight in zip(found, alone, weights, strict=True):
        log.info("%s: %.4f alone on %d images, %.3f of the blend", folder, score, len(names), weight)
    gain, both = gains(predictions, truth, int(np.argmax(alone))), metrics.blend(predictions, weights)
    said = "blend: %.4f; beyond the best alone %+.4f (95 %% interval %+.4f to %+.4f) with weights of other images"
    log.info(said, metrics.mean_cosine(both, truth), gain.mean(), *metrics.bootstrap(gain))
    by_folder = dict(zip(found, weights.tolist(), strict=True))
    return [by_folder.get(folder, 0.0) for folder in folders]


def _common(found: dict[Path, pd.DataFrame]) -> list[str]:
    """The images that all have predicted."""
    return sorted(set.intersection(*(set(one.index) for one in found.values())))


def gains(predictions: list[np.ndarray], truth: np.ndarray, best: int) -> np.ndarray:
    """How much more a blend has of each image's cosine than its best predictor, float64 (n,); by cross-fitting.

    Args:
        predictions: float32 (n, 384) of each predictor.
        truth: float32 (n, 384).
        best: Number of the predictor to compare with.
    """
    found, part = np.empty(len(truth)), np.arange(len(truth)) % PARTS
    for mine in (part == number for number in range(PARTS)):
        fitted = metrics.fit_weights([one[~mine] for one in predictions], truth[~mine])
        vectors = metrics.blend([one[mine] for one in predictions], fitted)
        found[mine] = ((metrics.unit(vectors) - metrics.unit(predictions[best][mine])) * truth[mine]).sum(1)
    return found
