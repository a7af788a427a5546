"""Reading images of any kind that people have, as RGB; from folders and from tar shards alike."""

from __future__ import annotations

import io
import logging
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps

from . import tars
from .errors import UserError
from .metadata import IMAGE_SUFFIXES

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)


class BrokenImageError(ValueError):
    """An image that cannot be read; reported and skipped, never fatal."""


def find(folder: Path) -> list[Path]:
    """All images below a folder and in tar shards there, hidden files left out, sorted by path relative to it.

    Returns:
        Paths that `read` accepts; an image in a shard is called `<shard>.tar/<name>`.

    Raises:
        UserError: If the folder is missing or holds no image, or if a tar file cannot be read.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give a folder of images")
    found = []
    for path in folder.rglob("*"):
        if path.name.startswith(".") or not path.is_file():
            continue
        if path.suffix.lower() in IMAGE_SUFFIXES:
            found.append(path)
        elif path.suffix == ".tar":
            try:
                found += [path / name for name in tars.index(path) if Path(name).suffix.lower() in IMAGE_SUFFIXES]
            except (OSError, tarfile.TarError) as error:
                raise UserError(f"{path}: not a whole tar file ({error}); render it again or delete it") from error
    if not found:
        raise UserError(f"{folder}: no images ({', '.join(IMAGE_SUFFIXES)}) in it or below; check the path")
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def read(path: Path) -> Image.Image:
    """Reads an image as RGB.

    The EXIF orientation is applied, transparency is laid on white, CMYK and palettes are converted, 16-bit values
    are scaled to 8, and of an animation the first frame is taken.

    Raises:
        BrokenImageError: If the file is empty, truncated or no image.
    """
    try:
        with Image.open(io.BytesIO(tars.read(path)) if tars.is_member(path) else path) as file:
            file.seek(0)
            image = ImageOps.exif_transpose(file)
            if image.mode in ("I;16", "I;16B", "I;16L", "I", "F"):
                image = Image.fromarray(_eight_bit(np.asarray(image)))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise BrokenImageError(f"{path}: cannot be read as an image: {error}") from error


def _eight_bit(values: np.ndarray) -> np.ndarray:
    values = values.astype(np.float64)
    scale = 255 / 65535 if values.max(initial=0) > 255 else 1
    return np.clip(values * scale, 0, 255).astype(np.uint8)


def fit(image: Image.Image, size: int) -> np.ndarray:
    """Resizes the shorter side to `size` (bicubic) and crops the centre.

    Returns:
        uint8 array (3, size, size).
    """
    if image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    return np.asarray(image).transpose(2, 0, 1)


class ImageRows:
    """A torch map-style dataset: item i is (uint8 array (3, size, size), i), or (None, i) for a broken image."""

    def __init__(self, paths: list[Path], size: int) -> None:
        self.paths, self.size = paths, size
        self.broken: dict[Path, str] = {}

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> tuple[np.ndarray | None, int]:
        try:
            pixels = np.ascontiguousarray(fit(read(self.paths[row]), self.size))
        except BrokenImageError as error:
            pixels = None
            if self.paths[row] not in self.broken:
                self.broken[self.paths[row]] = str(error)
                log.warning("%s", error)
        return pixels, row

    @staticmethod
    def collate(items: list[tuple[np.ndarray | None, int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Batches the readable images of `items`.

        Returns:
            (uint8 tensor (m, 3, size, size), int64 tensor (m,) of row numbers); m may be below the batch size, even 0.
        """
        import torch

        good = [(pixels, row) for pixels, row in items if pixels is not None]
        rows = torch.tensor([row for _, row in good], dtype=torch.int64)
        return torch.from_numpy(np.stack([pixels for pixels, _ in good])) if good else torch.empty(0), rows
