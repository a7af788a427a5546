"""Images as rows of a batch: squares of pixels, varied or shown in several views, read ahead by threads."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from ..run.devices import cores
from ..run.errors import UserError
from .images import BrokenImageError, read

if TYPE_CHECKING:
    import torch

ERASED = 0.25  # of the images that are varied
SAMPLED, SIDE = 1_000, 64  # images whose colours are looked at, and their side in px
Colours = tuple[tuple[float, ...], tuple[float, ...]]
AHEAD = 2  # batches read before they are asked for


def vary(image: Image.Image, rng: random.Random) -> Image.Image:
    """Weak augmentation: a crop of 85 to 100 % of each side, brightness and contrast within 10 %, one time in four a
    grey rectangle of up to a fifth of each side.

    No flip: it cost the competition's 3rd team points, as left and right are part of many prompts. The random numbers
    are the row's own, which torchvision's transforms do not take, so threads and order change nothing.
    """
    wide, high = (side * rng.uniform(0.85, 1) for side in image.size)
    left, top = rng.uniform(0, image.width - wide), rng.uniform(0, image.height - high)
    image = image.crop((round(left), round(top), round(left + wide), round(top + high)))
    image = ImageEnhance.Brightness(image).enhance(rng.uniform(0.9, 1.1))
    image = ImageEnhance.Contrast(image).enhance(rng.uniform(0.9, 1.1))
    if rng.random() < ERASED:
        wide, high = (round(side * rng.uniform(0.05, 0.2)) for side in image.size)
        left, top = rng.randint(0, image.width - wide), rng.randint(0, image.height - high)
        image.paste((128, 128, 128), (left, top, left + wide, top + high))
    return image


class Fit(NamedTuple):
    """How an image becomes a square: its side in px, the share of the shorter side that is seen, or all squashed."""

    size: int
    crop: float = 1.0
    squash: bool = False


def fit(image: Image.Image, size: int, crop: float = 1.0, squash: bool = False) -> np.ndarray:
    """Resizes (bicubic) so that the centre `crop` of the shorter side has `size` px, and cuts that square out.

    Returns:
        uint8 array (3, size, size).
    """
    whole = int(size / crop)  # cut off, as in transformers
    if squash:
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    elif image.size != (whole, whole):
        image = ImageOps.fit(image, (whole, whole), Image.Resampling.BICUBIC)
    edge = (image.width - size) // 2
    return np.asarray(image.crop((edge, edge, edge + size, edge + size)) if edge else image).transpose(2, 0, 1)


def _middle(image: Image.Image, margin: float) -> Image.Image:
    wide, high = (round(margin * side) for side in image.size)
    return image.crop((wide, high, image.width - wide, image.height - high))


def _noisy(image: Image.Image) -> Image.Image:
    pixels = np.asarray(image)
    noise = np.random.default_rng(0).normal(0, 40, pixels.shape)
    return Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8))


VIEWS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "whole": lambda image: image,
    "centre": lambda image: _middle(image, 0.05),
    "mirror": ImageOps.mirror,
    "blurred": lambda image: image.filter(ImageFilter.GaussianBlur(image.width / 16)),
    "noisy": _noisy,
    "quarter": lambda image: _middle(image, 0.25),
}
"""What is shown of an image: the first three by test-time augmentation (`centre` is the middle 90 % of each side), the
others by `finetune`, to see how a checkpoint fares on images that are unlike those that it knows."""


class ImageRows:
    """A torch map-style dataset: item i is (uint8 array (3, size, size), i), or (None, i) for a broken image.

    With `fits` an item has a list of arrays in the place of one: the squares to make of an image.
    """

    def __init__(
        self,
        paths: list[Path],
        size: int = 0,
        view: str = "whole",
        augment_seed: int | None = None,
        fits: Sequence[Fit] = (),
    ) -> None:
        """Takes image files, the side or the squares to fit them to, one of `VIEWS`, a seed if epochs are to vary."""
        self.paths, self.size, self.view, self.fits = paths, size, VIEWS[view], fits
        self.augment_seed, self.epoch = augment_seed, 0
        self.broken: dict[Path, str] = {}

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> tuple[Any, int]:
        try:
            image = self.view(read(self.paths[row]))
        except BrokenImageError as error:
            self.broken[self.paths[row]] = str(error)
            return None, row
        if self.augment_seed is not None:
            image = vary(image, random.Random(f"augment {self.augment_seed} {self.epoch} {row}"))
        squares = [np.ascontiguousarray(fit(image, *one)) for one in self.fits or (Fit(self.size),)]
        return squares if self.fits else squares[0], row

    @staticmethod
    def collate(items: list[tuple[Any, int]]) -> tuple[Any, torch.Tensor]:
        """Batches the readable images of `items`.

        Returns:
            (uint8 tensor (m, 3, size, size), or a list of them, one a fit; int64 tensor (m,) of row numbers); m may be
            below the batch size, even 0.
        """
        import torch

        good = [(pixels, row) for pixels, row in items if pixels is not None]
        rows = torch.tensor([row for _, row in good], dtype=torch.int64)
        if not good:
            return torch.empty(0), rows
        if isinstance(good[0][0], list):
            by_fit = zip(*(squares for squares, _ in good), strict=True)
            return [torch.from_numpy(np.stack(squares)) for squares in by_fit], rows
        return torch.from_numpy(np.stack([pixels for pixels, _ in good])), rows


def colours(files: list[Path]) -> Colours:
    """Mean and deviation of the channels, from 0 to 1, over a thousand of some images at most.

    Raises:
        UserError: If none can be read.
    """
    chosen = files[:: -(-len(files) // SAMPLED)]
    rows = ImageRows(chosen, SIDE)
    parts = [pixels.numpy() for pixels, _ in load(rows, [[row] for row in range(len(chosen))]) if len(pixels)]
    if not parts:
        raise UserError(f"{files[0].parent}: no image can be read; correct --images")
    values = np.concatenate(parts).transpose(1, 0, 2, 3).reshape(3, -1) / 255
    mean, deviation = values.mean(1), values.std(1)
    return tuple(mean.round(4).tolist()), tuple(deviation.round(4).tolist())


class Readable(Protocol):
    """What `load` reads: items by row number, and how to batch them."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> Any: ...

    def collate(self, items: list[Any]) -> tuple[Any, torch.Tensor]: ...


def pinned(value: Any) -> Any:
    """Tensors, alone or in tuples and lists, in memory from which a GPU, if there is one, copies by itself."""
    import torch

    if isinstance(value, (tuple, list)):
        return type(value)(map(pinned, value))
    return value.pin_memory() if torch.cuda.is_available() else value


def load(rows: Readable, batches: Iterable[Sequence[int]], workers: int = 0) -> Iterator[tuple[Any, torch.Tensor]]:
    """Reads batches in threads, while the caller computes on those before; Pillow decodes without Python's lock.

    Args:
        rows: What to read.
        batches: Row numbers, batch by batch.
        workers: Threads; 0: one a core.

    Yields:
        What `rows.collate` makes of each batch.
    """

    def collated(items: list[Future]) -> tuple[Any, torch.Tensor]:
        return pinned(rows.collate([item.result() for item in items]))

    waiting: deque[Future] = deque()
    pool = ThreadPoolExecutor(workers or cores(), "loader")
    try:
        for batch in batches:
            # Threads take work in order, so that the items are under way when the last task waits for them.
            waiting.append(pool.submit(collated, [pool.submit(rows.__getitem__, row) for row in batch]))
            if len(waiting) > AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
