"""What deduplication finds: rows kept, rows removed with their witnesses, and all near pairs, for any threshold."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from ..run.files import let_go, write_blocks
from ..search.groups import FLOOR, exactly, leaders

if TYPE_CHECKING:
    from ..search.near_pairs import Pairs

Search = Callable[[np.ndarray, float, int], tuple[np.ndarray, np.ndarray, str]]
"""Given vectors, a threshold and how many first ones are kept whatever they resemble: leaders, cosines, and how."""
log = logging.getLogger(__name__)
MOST_PAIRS = 20_000_000  # more are not kept: 20 bytes each, several times that while they are found
SAMPLE, BLOCK = 1000, 65_536  # rows whose neighbours are looked up to count pairs, and how many at once


@dataclass
class Result:
    """Deduplicated rows.

    Rows of the same text, but for case and spaces, share a vector; arrays of texts have one item for each such text, in
    the order of their first rows.

    Attributes:
        frame: All rows, in order of preference; besides `prompt` and what else they had `_file` and `_row`, where they
            come from, and `_position`, their place in the order of the files.
        fixed: So many first rows are only compared with.
        text: int64 (rows,), number of the text of each row.
        first: int64 (texts,), the first row of each text.
        vectors: float32 (texts, 384).
        threshold: Least cosine that made a text a copy.
        leader: int64 (texts,), the kept text that stands for each; itself where it is kept.
        cosine: float32 (texts,), cosine with the leader.
        pairs: All pairs of texts with a cosine of at least `floor`; None where there are too many.
        floor: See `pairs`.
        nearest: float32, the cosine of some texts, taken at random, with the nearest other one.
        search: Finds leaders among vectors; see `Search`.
        how: The engine that was used, and why.
    """

    frame: pd.DataFrame
    fixed: int
    text: np.ndarray
    first: np.ndarray
    vectors: np.ndarray
    threshold: float
    leader: np.ndarray
    cosine: np.ndarray
    pairs: Pairs | None
    floor: float
    nearest: np.ndarray
    search: Search
    how: str

    @property
    def fixed_texts(self) -> int:
        """How many first texts are only compared with."""
        return int((self.first < self.fixed).sum())

    @property
    def witness(self) -> np.ndarray:
        """int64 (rows,), the row that stands for each; itself where it is kept."""
        return self.first[self.leader[self.text]]

    @cached_property
    def kept_rows(self) -> np.ndarray:
        """int64 (kept,), numbers of the rows that are kept, in the order of the files."""
        rows = np.flatnonzero(self.witness == np.arange(len(self.frame)))
        rows = rows[rows >= self.fixed]
        return rows[np.argsort(self.frame["_position"].to_numpy()[rows])]

    @property
    def kept(self) -> pd.DataFrame:
        """The rows that are kept, in the order of the files."""
        kept = self.frame.iloc[self.kept_rows]
        return kept.drop(columns=["_file", "_row", "_position"]).reset_index(drop=True)

    @cached_property
    def removed(self) -> pd.DataFrame:
        """`prompt,kept_prompt,similarity,reason,file,row,kept_file,kept_row`, in order of preference.

        The reason is `exact` (the same text), `normalised` (the same but for case and spaces) or `similar`. Files' rows
        count from 1, below the header.
        """
        rows = np.flatnonzero(self.witness != np.arange(len(self.frame)))
        rows = rows[rows >= self.fixed]
        kept = self.frame.iloc[self.witness[rows]]
        gone = self.frame.iloc[rows]
        same = gone["prompt"].to_numpy() == kept["prompt"].to_numpy()
        same_text = self.leader[self.text[rows]] == self.text[rows]
        columns = {
            "prompt": gone["prompt"],
            "kept_prompt": kept["prompt"],
            "similarity": np.round(self.cosine[self.text[rows]].astype(float), 6),
            "reason": np.select([same, same_text], ["exact", "normalised"], "similar"),
            "file": gone["_file"],
            "row": gone["_row"],
            "kept_file": kept["_file"],
            "kept_row": kept["_row"],
        }
        return pd.DataFrame({name: np.asarray(values) for name, values in columns.items()})

    @property
    def counts(self) -> dict[str, int]:
        """Rows read, kept, and removed by reason."""
        reasons = self.removed["reason"].value_counts()
        removed = {reason: int(reasons.get(reason, 0)) for reason in ("exact", "normalised", "similar")}
        return {"rows": len(self.frame) - self.fixed, "kept": len(self.kept_rows), **removed}

    def at(self, threshold: float) -> Result:
        """The same rows at another threshold: from `pairs` where they reach that far, without comparing any vectors."""
        if threshold == self.threshold:
            return self
        if self.pairs is not None and threshold >= self.floor:
            leader, cosine = resolved(self.pairs, len(self.first), threshold, self.fixed_texts)
            return replace(self, threshold=threshold, leader=leader, cosine=cosine)
        leader, cosine, how = self.search(self.vectors, threshold, self.fixed_texts)
        return replace(self, threshold=threshold, leader=leader, cosine=cosine, how=how)

    def groups(self) -> np.ndarray:
        """int64 (kept,), for each kept row the number, among the kept ones, of its leader at cosine 0.7."""
        return self.search(_rows(self.vectors, self.text[self.kept_rows]), FLOOR, 0)[0]


def _rows(vectors: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Some rows of an array; if that is a mapped file, in a file beside it."""
    if not isinstance(vectors, np.memmap) or vectors.filename is None:
        return vectors[rows]

    def blocks() -> Iterator[np.ndarray]:
        for start in range(0, len(rows), BLOCK):
            yield vectors[rows[start : start + BLOCK]]
            let_go(vectors)

    file = Path(vectors.filename).with_name("kept.npy")
    write_blocks(file, (len(rows), vectors.shape[1]), vectors.dtype, blocks())
    return np.load(file, mmap_mode="c")


def normalised(prompt: str) -> str:
    """A prompt without what all-MiniLM-L6-v2's tokenizer does not see either: case, and how words are spaced."""
    return " ".join(prompt.lower().split())


def dedupe(
    frame: pd.DataFrame,
    encode: Callable[[list[str]], np.ndarray],
    threshold: float = 0.8,
    *,
    fixed: int = 0,
    engine: str = "auto",
    search: Search | None = None,
) -> Result:
    """Goes through rows in order and keeps each that reaches the threshold with no earlier kept one.

    Args:
        frame: Rows with `prompt`, in order of preference; see `Result` for what else it may have.
        encode: Embeds texts as float32 unit vectors (n, 384).
        threshold: Least cosine at which a row counts as a copy.
        fixed: So many first rows are compared with, but neither kept nor removed.
        engine: `exact`, `faiss`, or `auto`: whichever fits the number of rows.
        search: What compares in place of these engines.
    """
    search, pairwise = search or partial(leaders, engine=engine), not search
    frame = frame.reset_index(drop=True)
    for column, values in {"_file": "", "_row": frame.index + 1, "_position": frame.index}.items():
        if column not in frame:
            frame[column] = values
    text, texts = pd.factorize(frame["prompt"].map(normalised))
    first = np.full(len(texts), len(frame))
    np.minimum.at(first, text, np.arange(len(frame)))
    vectors = encode(frame["prompt"].iloc[first].tolist())
    floor, fixed_texts = min(FLOOR, threshold), int((first < fixed).sum())
    nearest, estimated = sampled(vectors, floor)
    pairs = None
    if pairwise and estimated <= MOST_PAIRS and exactly(engine, len(vectors)):
        from ..search import near_pairs

        pairs = near_pairs.pairs(vectors, floor)
        leader, cosine = resolved(pairs, len(vectors), threshold, fixed_texts)
        how = f"exact, all {len(pairs.later)} pairs from cosine {floor:g}"
    else:
        leader, cosine, how = search(vectors, threshold, fixed_texts)
    log.info("%d rows, %d texts; engine: %s", len(frame) - fixed, len(texts), how)
    return Result(frame, fixed, text, first, vectors, threshold, leader, cosine, pairs, floor, nearest, search, how)


def resolved(pairs: Pairs, count: int, threshold: float, fixed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The greedy pass over known pairs; returns what `near_pairs.leaders` does."""
    from ..search import near_pairs

    enough = (pairs.cosine >= np.float32(threshold)) & (pairs.later >= fixed)
    near = near_pairs.Pairs(*(column[enough] for column in pairs))
    leader, cosine = np.arange(count), np.ones(count, np.float32)
    gone, which = near_pairs.first_kept(near)
    leader[gone], cosine[gone] = near.earlier[which], near.cosine[which]
    return leader, cosine


def sampled(vectors: np.ndarray, floor: float) -> tuple[np.ndarray, int]:
    """Nearest neighbours of some rows.

    Returns:
        float32 (s,), the cosine of each with its nearest other row; and from these rows the estimated number of pairs
        of all rows that reach `floor`.
    """
    count = len(vectors)
    rows = np.sort(np.random.default_rng(0).choice(count, min(SAMPLE, count), replace=False))
    nearest, reached = np.full(len(rows), -1, np.float32), 0
    for start in range(0, count, BLOCK):
        cosines = vectors[rows] @ vectors[start : start + BLOCK].T
        own = (rows >= start) & (rows < start + BLOCK)
        cosines[own, rows[own] - start] = -1
        nearest = np.maximum(nearest, cosines.max(1))
        reached += int((cosines >= floor).sum())
        let_go(vectors)
    return nearest, reached * count // (2 * max(len(rows), 1))
