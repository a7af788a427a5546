"""How near the texts that say what an image shows come to the prediction and, where it is known, to the truth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from ..encode import encoders
from ..models import metrics, text_encoder
from . import Describer

TEN = 10


def compare(describer: Describer, files: Sequence[Path], truth: Sequence[str], interrogator: str = "") -> pd.DataFrame:
    """Scores every way to say what images show, on the same images.

    Args:
        describer: With a checkpoint; its known prompts should not hold the truth.
        files: Images, all readable.
        truth: Their prompts.
        interrogator: Encoder that says something without any training, `interrogator` or `classes`; "" leaves it out.

    Returns:
        A row a way: mean cosine to the prediction and to the truth, the latter with its 95 % bootstrap interval; the
        share of images in which it is nearer to the truth than the nearest known prompt, and in which it is farther.
    """
    found = describer.describe(files)
    predicted = np.stack([one.vector for one in found])
    targets = text_encoder.encode(list(truth))
    ten = [[text for text, _ in some] for some in describer.index.search(predicted, TEN)]
    flat = text_encoder.encode([text for some in ten for text in some]).reshape(len(ten), -1, text_encoder.DIMENSION)
    luckiest = np.einsum("ikd,id->ik", flat, targets).argmax(1)
    ways = {
        "nearest known prompt": flat[:, 0],
        "composed": text_encoder.encode([one.prompt for one in found]),
        "of the ten nearest the one nearest to the truth": flat[np.arange(len(ten)), luckiest],
        "the prediction itself, no text": predicted,
    }
    if interrogator:
        ways["interrogator"] = encoders.encode([encoders.build(interrogator, 224)], list(files))[0].vectors
    base = (metrics.unit(flat[:, 0]) * targets).sum(1)
    rows = {}
    for name, vectors in ways.items():
        to_truth = (metrics.unit(vectors) * targets).sum(1)
        low, high = metrics.bootstrap(to_truth)
        rows[name] = {
            "to the prediction": metrics.mean_cosine(vectors, predicted),
            "to the truth": float(to_truth.mean()),
            "from": low,
            "to": high,
            "nearer than nearest": float((to_truth > base).mean()),
            "farther": float((to_truth < base).mean()),
        }
    return pd.DataFrame(rows).T
