"""The rows that `near_pairs.leaders` keeps, where a cluster compares: the same law, by tasks that hold nothing.

The rows lie in a file that all nodes see. They are taken in blocks. What is kept of earlier blocks lies in shards,
files of row numbers. A task compares a piece of a block with a shard and returns, of each row that reaches the
threshold with a row of the shard, the first such. The process that was started puts the answers together, decides
within the block by `near_pairs.leaders`, and writes what is kept as new shards. A row kept in an earlier block comes
before all rows of its own, so nothing that is decided changes again: the result does not depend on the size of blocks,
pieces and shards, nor on the number of actors. A task that is lost begins anew; decided blocks are kept on the disk,
and a killed run reads them.
"""

import logging
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..run.engine import EngineConfig, over_blocks
from ..run.files import write_array
from ..run.progress import progress_to
from ..run.resume import is_sealed, seal
from . import near_pairs
from .decided import Decided

log = logging.getLogger(__name__)
BLOCK = 65_536  # rows that are decided at once; the started process compares them with each other, about 2 s
PIECE, SHARD = 32_768, 131_072  # rows of a block, and kept rows, that a task compares: 2 to 4 s of a core
VECTORS = "vectors.npy"


class Task(NamedTuple):
    """Rows to compare with a shard."""

    start: int
    stop: int
    shard: Path


def leaders(
    vectors: np.ndarray, threshold: float, fixed: int, engine: EngineConfig, folder: Path
) -> tuple[np.ndarray, np.ndarray]:
    """`near_pairs.leaders` over an engine.

    Args:
        vectors: float32 unit vectors (n, d), in order of preference.
        threshold: Least cosine.
        fixed: So many first rows are kept whatever they resemble.
        engine: Who compares.
        folder: For half-done work, seen by all nodes.

    Returns:
        As `near_pairs.leaders`.

    Raises:
        ValueError: As `near_pairs.leaders`.
        UserError: See `over_blocks`.
    """
    vectors = np.ascontiguousarray(vectors, np.float32)
    decided = Decided(folder, vectors, threshold, fixed)
    folder = decided.folder
    if not is_sealed(folder / VECTORS):
        write_array(folder / VECTORS, vectors)
        seal(folder / VECTORS)
    leader, cosine = np.arange(len(vectors)), np.ones(len(vectors), np.float32)
    shards, own = _Shards(folder, np.arange(fixed)), 0.0
    start = partial(_start, folder / VECTORS, threshold)
    begun = time.monotonic()

    def kept(rows: slice) -> np.ndarray:
        return rows.start + np.flatnonzero(leader[rows] == np.arange(rows.start, rows.stop))

    with progress_to(len(vectors) - fixed, "compare") as advance:
        for first in range(fixed, len(vectors), BLOCK):
            rows = slice(first, min(first + BLOCK, len(vectors)))
            if not decided.read(rows, leader, cosine):
                found = _compare(leader, cosine, rows, shards.files, start, engine)
                log.info("rows from %d: %d shards, %d candidates", first, len(shards.files), found)
                before = time.monotonic()
                left = kept(rows)
                within, how = near_pairs.leaders(vectors[left], threshold)
                leader[left], cosine[left] = left[within], how
                decided.keep(rows, leader, cosine)
                own += time.monotonic() - before
            shards.add(kept(rows))
            advance(rows.stop - rows.start)
    log.info(
        "%d shards; %.0f s, of which this process decided %.0f s", len(shards.files), time.monotonic() - begun, own
    )
    return leader, cosine


class _Shards:
    """Files of the numbers of kept rows, `SHARD` in each but the last."""

    def __init__(self, folder: Path, rows: np.ndarray) -> None:
        self.folder = folder
        self.files: list[Path] = []
        self.last = np.empty(0, np.int64)  # rows of a shard that is not full
        self.add(rows)

    def add(self, rows: np.ndarray) -> None:
        """Fills the last shard and begins new ones."""
        full = len(self.files) - bool(len(self.last))
        rows = np.concatenate([self.last, rows])
        for number, start in enumerate(range(0, len(rows), SHARD), full):
            self.last = rows[start : start + SHARD]
            file = self.folder / f"kept-{number:06d}-{len(self.last)}.npy"  # a task never sees a shard that grows
            write_array(file, self.last)
            self.files[number:] = [file]
        if len(self.last) == SHARD:
            self.last = self.last[:0]


def _compare(
    leader: np.ndarray,
    cosine: np.ndarray,
    rows: slice,
    shards: list[Path],
    start: Callable[[], Callable[[Task], near_pairs.Pairs]],
    engine: EngineConfig,
) -> int:
    """Finds, for rows of a block, the first kept row of earlier blocks that each resembles; counts what tasks name."""
    candidates = 0
    tasks = [
        Task(first, min(first + PIECE, rows.stop), shard)
        for shard in shards
        for first in range(rows.start, rows.stop, PIECE)
    ]
    for found in over_blocks(engine, start, tasks, holds=False):
        free = leader[found.later] == found.later  # shards come in order: the first that has one counts
        later = found.later[free]
        leader[later], cosine[later] = found.earlier[free], found.cosine[free]
        candidates += len(found.later)
    return candidates


def _start(file: Path, threshold: float) -> Callable[[Task], near_pairs.Pairs]:
    """What does a task."""
    vectors = np.load(file, mmap_mode="r")

    def work(task: Task) -> near_pairs.Pairs:
        kept = np.load(task.shard)
        found = near_pairs.between(vectors[task.start : task.stop], vectors[kept], threshold)
        later, first = np.unique(found.later, return_index=True)
        return near_pairs.Pairs(later + task.start, kept[found.earlier[first]], found.cosine[first])

    return work
