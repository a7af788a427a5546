"""Reading images of any kind that people have, as RGB; from folders, tar shards and DiffusionDB's zip files alike."""

from __future__ import annotations

import hashlib
import io
import logging
import random
import struct
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from ..run import archives
from ..run.devices import cores
from ..run.errors import UserError
from ..run.files import shown
from .metadata import IMAGE_SUFFIXES, stem

if TYPE_CHECKING:
    import torch


log = logging.getLogger(__name__)
MOST_PIXELS, MOST_BYTES = 150_000_000, 256_000_000  # beyond any camera's; as RGB .45 GB
OTHER_SUFFIXES = (".avif", ".bmp", ".gif", ".heic", ".heif", ".jxl", ".tif", ".tiff")  # images that are passed over
AHEAD = 2  # batches read before they are asked for


class BrokenImageError(ValueError):
    """An image that cannot be read; reported and skipped, never fatal."""


def find(folder: Path) -> list[Path]:
    """All images below a folder and in the archives there, hidden files left out, sorted by path relative to it.

    Returns:
        Paths that `read` accepts; an image in an archive is called `<shard>.tar/<name>`.

    Raises:
        UserError: If the folder is missing or holds no image, or if an archive cannot be read.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give a folder of images")
    found: list[Path] = []
    passed: Counter[str] = Counter()
    for path in folder.rglob("*"):
        if path.name.startswith(".") or not path.is_file():
            passed["dangling link"] += path.is_symlink() and not path.exists()
            continue
        if path.suffix.lower() in IMAGE_SUFFIXES:
            found.append(path)
        elif path.suffix.lower() in OTHER_SUFFIXES:
            passed[path.suffix.lower()] += 1
        elif archives.is_archive(path):
            try:
                found += [path / name for name in archives.index(path) if Path(name).suffix.lower() in IMAGE_SUFFIXES]
            except OSError as error:
                raise UserError(f"{path}: {error}; render or download it again, or delete it") from error
    if passed := +passed:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(passed.items()))
        log.warning("%s: passed over: %s (%s are read)", folder, kinds, ", ".join(IMAGE_SUFFIXES))
    if not found:
        raise UserError(f"{folder}: no images ({', '.join(IMAGE_SUFFIXES)}) in it or below; check the path")
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def read(path: Path) -> Image.Image:
    """Reads an image as RGB.

    The EXIF orientation is applied, transparency is laid on white, CMYK and palettes are converted, 16-bit values
    are scaled to 8, and of an animation the first frame is taken.

    Raises:
        BrokenImageError: If the file is empty, truncated or no image, or larger than `MOST_PIXELS` or `MOST_BYTES`.
    """
    try:
        if archives.stat(path)[0] > MOST_BYTES:
            raise ValueError(f"more than {MOST_BYTES} bytes")
        with Image.open(io.BytesIO(archives.read(path)) if archives.is_member(path) else path) as file:
            if file.width * file.height > MOST_PIXELS:
                raise ValueError(f"{file.width} x {file.height} px, more than {MOST_PIXELS}")
            file.seek(0)
            image = _upright(file)
            if image.mode in ("I;16", "I;16B", "I;16L", "I", "F"):
                image = Image.fromarray(_eight_bit(np.asarray(image)))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError) as error:
        raise BrokenImageError(shown(f"{path}: cannot be read as an image: {error}")) from error


def why_broken(path: Path) -> str:
    """Why an image cannot be read."""
    try:
        read(path)
    except BrokenImageError as error:
        return str(error)
    return f"{shown(path)}: could not be read"


def tell_broken(paths: Iterable[Path], outcome: str) -> None:
    """Warns of images that cannot be read, a line each, and says what became of them."""
    for path in sorted(paths):
        log.warning("%s; %s", why_broken(path), outcome)


def contents(files: Sequence[Path]) -> str:
    """SHA-256 over the contents of image files, in order: what tells a replaced image, whatever its name and date."""
    with ThreadPoolExecutor(cores()) as pool:
        found = hashlib.sha256("\n".join(map(str, pool.map(archives.digest, files))).encode())
    return found.hexdigest()


def join(names: Iterable[str], files: Sequence[Path], folder: Path) -> list[Path | None]:
    """The image of each name: the one rule by which rows and images find each other.

    A name is an image's path below the folder, suffix included. Where no image has it, it may lack the suffix, have
    that of another format, or lack the folders, as long as it fits one image alone.

    Args:
        names: As in the column `image_name`.
        files: Images, as `find` gives them.
        folder: Where they lie.

    Returns:
        A file a name; None where no image or more than one fits.
    """
    inside = {path.relative_to(folder).as_posix(): path for path in files}
    whole, bare = Counter(map(stem, inside)), Counter(path.stem for path in files)
    by_stem: dict[str, Path | None] = {path.stem: path for path in files if bare[path.stem] == 1}
    by_stem |= {stem(name): path for name, path in inside.items() if whole[stem(name)] == 1}
    by_stem |= dict.fromkeys(name for name, count in whole.items() if count > 1)
    return [inside.get(name) or by_stem.get(stem(name)) for name in names]


def _upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF block says; one that is damaged says nothing."""
    image.load()
    try:
        return ImageOps.exif_transpose(image)
    except (OSError, SyntaxError, ValueError, struct.error):
        return image.copy()


def _eight_bit(values: np.ndarray) -> np.ndarray:
    values = values.astype(np.float64)
    scale = 255 / 65535 if values.max(initial=0) > 255 else 1
    return np.clip(values * scale, 0, 255).astype(np.uint8)


def vary(image: Image.Image, rng: random.Random) -> Image.Image:
    """Weak augmentation: a crop of 85 to 100 % of each side, brightness and contrast within 10 %.

    No flip: it cost the competition's 3rd team points, as left and right are part of many prompts.
    """
    wide, high = (side * rng.uniform(0.85, 1) for side in image.size)
    left, top = rng.uniform(0, image.width - wide), rng.uniform(0, image.height - high)
    image = image.crop((round(left), round(top), round(left + wide), round(top + high)))
    image = ImageEnhance.Brightness(image).enhance(rng.uniform(0.9, 1.1))
    return ImageEnhance.Contrast(image).enhance(rng.uniform(0.9, 1.1))


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


def _centre(image: Image.Image) -> Image.Image:
    wide, high = (round(0.05 * side) for side in image.size)
    return image.crop((wide, high, image.width - wide, image.height - high))


VIEWS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "whole": lambda image: image,
    "centre": _centre,
    "mirror": ImageOps.mirror,
}
"""What test-time augmentation shows a model of an image; `centre` is the middle 90 % of each side."""


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


class Readable(Protocol):
    """What `load` reads: items by row number, and how to batch them."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> Any: ...

    def collate(self, items: list[Any]) -> tuple[Any, torch.Tensor]: ...


def load(rows: Readable, batches: Iterable[Sequence[int]], workers: int = 0) -> Iterator[tuple[Any, torch.Tensor]]:
    """Reads batches in threads, while the caller computes on those before; Pillow decodes without Python's lock.

    Args:
        rows: What to read.
        batches: Row numbers, batch by batch.
        workers: Threads; 0: one a core.

    Yields:
        What `rows.collate` makes of each batch.
    """
    waiting: deque[list[Future]] = deque()
    pool = ThreadPoolExecutor(workers or cores(), "loader")
    try:
        for batch in batches:
            waiting.append([pool.submit(rows.__getitem__, row) for row in batch])
            if len(waiting) > AHEAD:
                yield rows.collate([future.result() for future in waiting.popleft()])
        while waiting:
            yield rows.collate([future.result() for future in waiting.popleft()])
    finally:
        pool.shutdown(cancel_futures=True)
