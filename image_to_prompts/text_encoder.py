"""The target space: all-MiniLM-L6-v2 sentence embeddings, as the competition computed them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from . import weights
from .files import write_array
from .progress import progress

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

DIMENSION = 384
BLOCK = 2048


@lru_cache(maxsize=1)
def load() -> SentenceTransformer:
    """Loads the encoder once per process, on the GPU where there is one."""
    folder = weights.locate("all-MiniLM-L6-v2")
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder))


def encode(prompts: Sequence[str], work: Path | None = None) -> np.ndarray:
    """Embeds prompts.

    Args:
        prompts: Texts; longer ones are cut at the model's 256 tokens.
        work: Folder in which finished blocks are kept, so that a killed run goes on where it was.

    Returns:
        float32 array (len(prompts), 384) of unit vectors. Blocks of 2,048 rows are encoded alike whatever was done
        before, so that a resumed run returns the same bytes.
    """
    vectors = np.zeros((len(prompts), DIMENSION), np.float32)
    starts = range(0, len(prompts), BLOCK)
    for start in progress(starts, "encode prompts"):
        block = work / f"embeddings-{start:09d}.npy" if work else None
        if block and block.is_file():
            vectors[start : start + BLOCK] = np.load(block)
            continue
        part = load().encode(
            list(prompts[start : start + BLOCK]),
            batch_size=32,
            normalize_embeddings=True,
            convert_to_numpy=True,
            show_progress_bar=False,
        )
        vectors[start : start + BLOCK] = part
        if block:
            write_array(block, part)
    return vectors
