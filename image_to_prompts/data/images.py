"""Reading images of any kind that people have, as RGB; from folders, tar shards and DiffusionDB's zip files alike."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from ..run import archives
from ..run.devices import cores
from ..run.errors import UserError
from ..run.files import shown
from .metadata import IMAGE_SUFFIXES, stem

log = logging.getLogger(__name__)
MOST_PIXELS, MOST_BYTES = 150_000_000, 256_000_000  # beyond any camera's; as RGB .45 GB
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, RuntimeError, struct.error, Image.DecompressionBombError)
"""What Pillow and its plugins raise for damaged files."""
OTHER_SUFFIXES = (".jp2", ".jxl", ".psd", ".svg")  # images that are skipped


class BrokenImageError(ValueError):
    """An image that cannot be read; reported and skipped, never fatal."""


def find(folder: Path, recursive: bool = True) -> list[Path]:
    """All images in a folder, below it, and in the archives there, sorted by path; without what is hidden.

    Args:
        folder: The folder.
        recursive: Whether to look into its sub-folders.

    Returns:
        Paths that `read` accepts; an image in an archive is called `<shard>.tar/<name>`.

    Raises:
        UserError: If the folder is missing or holds no image, or if an archive cannot be read.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give a folder of images")
    found: list[Path] = []
    passed: Counter[str] = Counter()
    for path in visible(folder, recursive):
        if not path.is_file():
            passed["dangling link"] += path.is_symlink()
        elif path.suffix.lower() in IMAGE_SUFFIXES:
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
        log.warning("%s: skipped: %s (%s are read)", folder, kinds, ", ".join(IMAGE_SUFFIXES))
    if not found:
        raise UserError(f"{folder}: no images ({', '.join(IMAGE_SUFFIXES)}) in it or below; check the path")
    return sorted(found, key=Path.as_posix)


def visible(folder: Path, recursive: bool = True) -> Iterator[Path]:
    """The files of a folder that are not hidden, also those of its sub-folders."""
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if recursive and not name.startswith(".")]
        yield from (Path(place, name) for name in names if not name.startswith("."))


@cache
def _know_heic() -> None:
    """Teaches Pillow to read HEIC, which telephones write."""
    from pillow_heif import register_heif_opener

    register_heif_opener()


def opened(path: Path) -> Image.Image:
    """An image as Pillow opens it, its pixels not read yet; it may lie in an archive."""
    _know_heic()
    return Image.open(io.BytesIO(archives.read(path)) if archives.is_member(path) else path)


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
        with opened(path) as file:
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
    except UNREADABLE as error:
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
