"""From a finished picture to bytes and a flag; files are written while the next pictures are made."""

import io
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from PIL import Image, ImageStat

from ..data.metadata import BLANK, NEAR_UNIFORM
from .store import Row

T = TypeVar("T")
Finished = tuple[list[Row], list[tuple[bytes | None, str]]]  # a block's rows and, for each, file contents and flag
SIZE = 512
NEAR_UNIFORM_DEVIATION = 4.0  # of 255; six real images have 32 and more, 200 embedded scenes 8 and more
# Level 1 writes a PNG three times as fast as Pillow's default of 6, 9 % larger; lossless WebP at its least effort is
# written twice as fast as that and read faster (docs/log.md).
FORMATS = {
    "png": ("PNG", {"compress_level": 1}),
    "jpg": ("JPEG", {"quality": 95, "subsampling": 0}),
    "webp": ("WEBP", {"lossless": True, "method": 0, "quality": 0}),
}


def flag_of(image: Image.Image) -> str:
    """`blank` for an image of one colour, `near_uniform` for one that shows next to nothing, else ""."""
    if ImageStat.Stat(image.convert("L")).stddev[0] >= NEAR_UNIFORM_DEVIATION:
        return ""
    return BLANK if not any(ImageStat.Stat(image).var) else NEAR_UNIFORM


def finish(image: Image.Image | None, flag: str, suffix: str) -> tuple[bytes | None, str]:
    """Downsizes to 512 px (Lanczos, as Pillow names it), flags and encodes.

    Args:
        image: RGB image, square; None where drawing it failed.
        flag: What the backend says of it; it wins over what is seen.
        suffix: A key of `FORMATS`.

    Returns:
        The file's bytes, None without an image, and the flag.
    """
    if image is None:
        return None, flag
    if image.size != (SIZE, SIZE):
        image = image.resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    kind, options = FORMATS[suffix]
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue(), flag or flag_of(image)


def run_ahead(produce: Iterable[Callable[[], T]], consume: Callable[[T], None], ahead: int) -> None:
    """Consumes results in order on a thread of its own, while the next ones are produced on this one.

    Args:
        produce: Yields functions that wait for a result, at most `ahead` of them before the first is consumed.
        consume: Takes one result.
        ahead: Results that may be under way.

    Raises:
        Exception: The first one of `consume` or of a result; nothing is consumed after it.
    """
    broken: list[BaseException] = []

    def take(result: Callable[[], T]) -> None:
        if broken:
            return
        try:
            consume(result())
        except BaseException as error:
            broken.append(error)
            raise

    pending: deque = deque()
    with ThreadPoolExecutor(1, "writer") as writer:
        for result in produce:
            pending.append(writer.submit(take, result))
            while len(pending) >= ahead:
                pending.popleft().result()
        for future in pending:
            future.result()
