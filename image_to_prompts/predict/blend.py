"""How much each checkpoint counts in a blend."""

import logging
from pathlib import Path

import pandas as pd

from ..models import metrics
from ..run.errors import UserError

log = logging.getLogger(__name__)
LEAST_TO_FIT = 20  # images on which weights are fitted


def blend_weights(folders: list[Path], given: tuple[float, ...] = ()) -> list[float]:
    """The weights of checkpoints in a blend.

    Args:
        folders: The checkpoints.
        given: Weights; none: fitted on the images that all checkpoints kept for validation, where the blend is at least
            as good as the best of them. Where there are fewer than 20 such images, all weights are the same.

    Raises:
        UserError: If the number of weights is not that of the checkpoints, one is negative, or all are 0.
    """
    same = [1 / len(folders)] * len(folders)
    if not given and len(folders) > 1:
        from ..training import by_source

        if not all(by_source.is_there(folder) for folder in folders):
            log.warning("a checkpoint without validation predictions: all count the same; or give --blend")
            return same
        kept = [by_source.read(folder) for folder in folders]
        names = sorted(set.intersection(*(set(frame["image_name"]) for frame, _, _ in kept)))
        if len(names) < LEAST_TO_FIT:
            log.warning("%d images validated in all checkpoints: all count the same; or give --blend", len(names))
            return same
        order = [pd.Index(frame["image_name"]).get_indexer(names) for frame, _, _ in kept]
        predictions = [predicted[rows] for (_, predicted, _), rows in zip(kept, order, strict=True)]
        truth = kept[0][2][order[0]]
        fitted = metrics.fit_weights(predictions, truth)
        for folder, predicted, weight in zip(folders, predictions, fitted, strict=True):
            alone = metrics.mean_cosine(predicted, truth)
            log.info("%s: %.4f alone on %d images, %.3f of the blend", folder, alone, len(names), weight)
        log.info("blend: %.4f", metrics.mean_cosine(metrics.blend(predictions, fitted), truth))
        return fitted.tolist()
    weights = list(given or same)
    if len(weights) != len(folders):
        raise UserError(f"--blend has {len(weights)} numbers for {len(folders)} checkpoints; give one each")
    if min(weights) < 0 or not sum(weights) > 0:
        raise UserError(f"--blend {' '.join(map(str, weights))}: must not be negative, nor all 0")
    return weights
