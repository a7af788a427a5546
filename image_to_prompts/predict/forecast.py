"""How long a prediction will take, measured on made-up pictures before the first image is read."""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..encode import encoders
from ..models import metrics, text_encoder
from ..run.progress import Deadline, short
from .predictors import BLOCK, Predictor, Viewing

log = logging.getLogger(__name__)
LEAST = 1000  # images; of fewer nobody waits long
FEW, MANY = 4, 36  # images on which the search is measured; both, since a bank is read once a block of any size


def seconds(predictor: Predictor, count: int, viewing: Viewing) -> dict[str, float]:
    """What each part of a prediction takes.

    Args:
        predictor: A predictor that looks at images.
        count: Number of images.
        viewing: How they are looked at.

    Returns:
        Seconds by the encoders' names, and `search and prediction` for what follows them.
    """
    import torch

    found: dict[str, float] = {}
    arrays, rng = [], np.random.default_rng(0)
    for encoder in predictor.encoders:
        batch = encoders.rows_at_once(encoder.fits, viewing.batch_size)
        shapes = [(batch, 3, fit.size, fit.size) for fit in encoder.fits]
        squares = [torch.from_numpy(rng.integers(0, 256, shape, np.uint8)) for shape in shapes]
        with torch.inference_mode():
            made = encoder.see(squares)  # the first time is not like the others
            found[_name(encoder.about)] = _took(encoder.see, squares) / batch * count
        width = text_encoder.DIMENSION if isinstance(made, list) else made.shape[1]
        arrays.append(metrics.unit(rng.standard_normal((MANY, width), np.float32)))
    few, many = (_took(predictor.finish, [one[:rows] for one in arrays]) for rows in (FEW, MANY))
    each = max(0.0, many - few) / (MANY - FEW)
    found["search and prediction"] = max(0.0, few - FEW * each) * -(-count // BLOCK) + each * count
    return {name: value * len(viewing.views) for name, value in found.items()}


def tell(name: str, predictor: Predictor, count: int, viewing: Viewing, deadline: Deadline) -> None:
    """Logs what the parts will take, and warns where the time that is left does not suffice; of many images alone."""
    if count < LEAST or not predictor.encoders:
        return
    parts = seconds(predictor, count, viewing)
    total, left = sum(parts.values()), deadline.left
    said = ", ".join(f"{part} {short(value)} s" for part, value in parts.items())
    log.info("%s, %d images: %s; %s h in all", name, count, said, short(total / 3600))
    if total > left:
        about = int(count * left / total)
        log.warning("%s h are left: about %d images will get the mean prediction", short(left / 3600), count - about)


def _took(work: Callable[[Any], Any], given: Any) -> float:
    begun = time.perf_counter()
    work(given)
    return time.perf_counter() - begun


def _name(about: dict[str, Any]) -> str:
    """What an encoder is called: that of a checkpoint by its backbone."""
    return str(about.get("encoder") or Path(about["backbone"]["name"]).name)
