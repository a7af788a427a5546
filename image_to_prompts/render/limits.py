"""Time and room: what a render run has used, whether the next block still fits, and what the rest will take."""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from ..run.progress import Deadline, Estimate

T = TypeVar("T")
FIRST_GUESS = 500_000  # bytes an image before any is written; a 512-px PNG of a photo has about that


def folder_bytes(folder: Path) -> int:
    """Bytes of all files in a folder and below."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # another process's temporary file
                total += os.stat(os.path.join(parent, name)).st_size  # noqa: PTH116, PTH118 (many files)
    return total


class Limits:
    """Counts one run's images, seconds and bytes; `stopped` says which limit ended it, if one did."""

    def __init__(self, inside: Path, max_hours: float, max_gb: float, total: int, before: int) -> None:
        """Takes the limits.

        Args:
            inside: Folder whose room is limited.
            max_hours: Hours that this process may live; 0: any.
            max_gb: GB that `inside` may hold; 0: any.
            total: Images of this process.
            before: How many of them were there at the beginning.
        """
        self.inside, self.max_hours, self.max_gb = inside, max_hours, max_gb
        self.total, self.before = total, before
        self.images = self.bytes = self.blocks = 0
        self.drawing_since = self.last = 0.0
        self.stopped = ""

    def watch(self, blocks: Iterator[T], ahead: int) -> Iterator[T]:
        """Passes blocks on until the next one would break a limit.

        Args:
            blocks: What is being drawn; a block is begun when it is asked for.
            ahead: Blocks that may be under way unwritten.
        """
        self.drawing_since = self.last = time.monotonic()
        deadline = Deadline(self.max_hours)
        while not self._over(deadline, ahead):
            block = next(blocks, None)
            if block is None:
                return
            yield block

    def _over(self, deadline: Deadline, ahead: int) -> bool:
        if deadline.passed():
            self.stopped = f"--max-hours {self.max_hours:g}"
        if self.max_gb:
            an_image = self.bytes / self.images if self.images else FIRST_GUESS
            a_block = an_image * (self.images / self.blocks if self.blocks else 1)
            if folder_bytes(self.inside) + (ahead + 1) * a_block > self.max_gb * 1e9:
                self.stopped = f"--max-gb {self.max_gb:g}"
        return bool(self.stopped)

    def block(self, images: int, size: int) -> None:
        """Notes a written block."""
        now = time.monotonic()
        self.images, self.bytes, self.blocks, self.last = self.images + images, self.bytes + size, self.blocks + 1, now

    def estimate(self) -> Estimate:
        """What the images of this process that are not there yet will take, after the first block."""
        left = self.total - self.before - self.images
        seconds = (self.last - self.drawing_since) / self.images
        return Estimate("images", self.total, left, seconds, self.bytes / self.images)
