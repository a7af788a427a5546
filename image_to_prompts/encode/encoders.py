"""What tells something of an image without any training: backbones give vectors, interrogators give texts.

open_clip:<model or folder>, timm:<model>, transformers:<model or folder>   features of a backbone
interrogator   a BLIP caption and the terms that CLIP ranks highest: CLIP Interrogator, batched and offline; of another
               captioner than BLIP its caption alone
caption:<model or address>   captions by a model of transformers, or by a server: see `captions`
classes        its stand-in in the embedded profile: ImageNet classes, and the grammar's words that are nearest to them
dual:<folder>  stand-in of a CLIP in the embedded profile: one space for images and texts

A text counts by its all-MiniLM-L6-v2 embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from .. import pipeline
from ..data.rows import Fit, ImageRows, load
from ..models import metrics, text_encoder
from ..run.devices import local_device, within_memory
from ..run.errors import UserError

if TYPE_CHECKING:
    import torch


ON_CPU = 8 * 224**2  # pixels at once on a CPU; twice as many are 4 % faster (docs/log.md)


class Encoder(Protocol):
    """Maps images to vectors or texts.

    Attributes:
        fits: The squares of each image that it looks at.
        about: What `rebuild` needs, as JSON values.
    """

    fits: tuple[Fit, ...]
    about: dict[str, Any]

    def see(self, squares: list[torch.Tensor]) -> np.ndarray | list[str]:
        """Maps one uint8 tensor (n, 3, size, size) a fit to float32 (n, d) or to n texts."""


@dataclass
class Encoded:
    """What an encoder made of some files.

    Attributes:
        vectors: float32 (n, d), NaN in the rows of files that cannot be read; d is 1 if none can.
        texts: What an interrogator said, "" where it saw nothing; None for a backbone.
    """

    vectors: np.ndarray
    texts: list[str] | None = None


def build(name: str, image_size: int, **settings: Any) -> Encoder:
    """Builds an encoder with its pretrained weights.

    Args:
        name: See this module's text.
        image_size: Side of a backbone's input in px.
        **settings: Of the interrogator; see `interrogator.load`.

    Raises:
        UserError: If the name is unknown, or the weights are nowhere or damaged.
    """
    from ..models import backbones, weights
    from .backbone import BackboneEncoder

    samples = settings.pop("samples", 1)
    if name.startswith("caption:"):
        from . import captions

        return captions.build(name.partition(":")[2], samples)
    if name == "interrogator":  # its models look at images of their own sizes
        if weights.captions_alone(caption := settings.get("caption", weights.CAPTION)):
            return build(f"caption:{caption}", 0, samples=samples)
        from . import interrogator

        return interrogator.load(**settings)
    if name == "classes":
        return pipeline.embedded("classes")(image_size)
    if name.startswith("dual:"):
        return pipeline.embedded("dual")(Path(name.partition(":")[2]))
    return BackboneEncoder.pretrained(backbones.describe(name, image_size))


def rebuild(about: dict[str, Any]) -> Encoder:
    """Builds an encoder again from its `about`; raises as `build`, or if the array was imported without one."""
    from ..models import backbones
    from .backbone import BackboneEncoder

    if "backbone" in about:
        return BackboneEncoder.pretrained(backbones.Spec(**about["backbone"]))
    if "encoder" not in about:
        raise UserError("an imported array says nothing about its encoder; embed the images anew")
    return build(about["encoder"], about["image_size"], **about.get("settings", {}))


def viewer(
    encoders: Sequence[Encoder], batch_size: int = 32, workers: int = 0
) -> Callable[[list[Path], str], list[Encoded]]:
    """What shows images to encoders, block after block; each image is read once for all of them.

    Args:
        encoders: From `build`.
        batch_size: Images at once; halved, and left so, whenever memory runs out.
        workers: Threads that decode images; 0: one a core.

    Returns:
        Maps image files, as `images.read` takes them, and one of `rows.VIEWS` to what each encoder made of them.
    """
    fits, limit = list(dict.fromkeys(fit for encoder in encoders for fit in encoder.fits)), batch_size

    def show(files: list[Path], view: str) -> list[Encoded]:
        nonlocal limit
        rows = ImageRows(files, view=view, fits=fits)
        (seen, where), limit = within_memory(lambda count: see(count, encoders, rows, workers), limit, limit)
        return [_encoded(parts, where, len(files)) for parts in seen]

    return show


def encode(encoders: Sequence[Encoder], files: list[Path], batch_size: int = 32, view: str = "whole") -> list[Encoded]:
    """What each encoder makes of some files; see `viewer`."""
    return viewer(encoders, batch_size)(files, view)


def rows_at_once(fits: Sequence[Fit], batch_size: int) -> int:
    """How many images an encoder always sees at once, made-up ones among them: so none depends on its company.

    On a CPU no more than are needed to keep it busy, since one image takes as long as all of them.
    """
    if local_device().type != "cpu":
        return batch_size
    largest = max(fit.size for fit in fits)
    return max(1, min(batch_size, ON_CPU // largest**2))


def see(
    batch_size: int, encoders: Sequence[Encoder], rows: ImageRows, workers: int
) -> tuple[list[list[np.ndarray | list[str]]], np.ndarray]:
    """What each encoder sees, batch by batch, and the row numbers of all readable images."""
    import torch

    from ..run.progress import progress

    count = rows_at_once(rows.fits, batch_size)
    batches = [range(start, min(start + count, len(rows))) for start in range(0, len(rows), count)]
    seen: list[list[np.ndarray | list[str]]] = [[] for _ in encoders]
    where = []
    with torch.inference_mode():
        for squares, positions in progress(load(rows, batches, workers), "images", len(batches)):
            if len(positions):
                where.append(positions.numpy())
                squares = [torch.cat([one, one.new_zeros(count - len(one), *one.shape[1:])]) for one in squares]
                for encoder, parts in zip(encoders, seen, strict=True):
                    found = encoder.see([squares[rows.fits.index(fit)] for fit in encoder.fits])
                    parts.append(found[: len(positions)])
    return seen, np.concatenate([np.empty(0, np.int64), *where])


def _encoded(parts: list[np.ndarray | list[str]], where: np.ndarray, count: int) -> Encoded:
    if not parts:
        return Encoded(np.full((count, 1), np.nan, np.float32))
    texts = None
    if isinstance(parts[0], list):
        said = [text for part in parts for text in part]
        texts = [""] * count
        for row, text in zip(where, said, strict=True):
            texts[row] = text
        found = _mean_of_lines(said)
    else:
        found = np.concatenate(parts)
    vectors = np.full((count, found.shape[1]), np.nan, np.float32)
    vectors[where] = found
    return Encoded(vectors, texts)


def _mean_of_lines(said: list[str]) -> np.ndarray:
    """The embedding of each text, float32 (n, 384); of one of several lines the unit vector of their mean."""
    lines = [text.split("\n") for text in said]
    vectors = text_encoder.encode([line for some in lines for line in some])
    if len(vectors) == len(said):
        return vectors
    ends = np.cumsum(list(map(len, lines)))
    return metrics.unit(np.stack([part.mean(0) for part in np.split(vectors, ends[:-1])]))
