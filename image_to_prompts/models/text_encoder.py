"""The target space: all-MiniLM-L6-v2 sentence embeddings, as the competition computed them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..run.devices import keep_memory, local_device, mixed_precision, one_core_each, type_of
from ..run.engine import EngineConfig, over_blocks
from ..run.files import write_blocks
from ..run.progress import progress_to
from . import layouts, text_cache, weights

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Tensor

    from .minilm import MiniLM

NAME = "all-MiniLM-L6-v2"
WHAT = "a model of sentence-transformers"
DIMENSION = 384
BLOCK, MANY = 4096, 65_536  # texts kept at once, and texts whose vectors are in memory before they go to a file
SHAPES = "fixed"  # how texts share batches; vectors of another way are others by rounding


@lru_cache(maxsize=1)
def tokenizer() -> Tokenizer:
    """The model's tokenizer, which cuts texts at the model's 256 tokens."""
    from tokenizers import Tokenizer

    folder = weights.locate(NAME)
    with layouts.reading(folder, WHAT):
        loaded = Tokenizer.from_file(str(folder / "tokenizer.json"))
        loaded.enable_truncation(json.loads((folder / "sentence_bert_config.json").read_bytes())["max_seq_length"])
        loaded.no_padding()
        return loaded


@lru_cache(maxsize=2)
def _encoder(precision: str) -> MiniLM:
    """The encoder in a precision of `devices.mixed_precision`, on the GPU where there is one."""
    from . import backbones
    from .minilm import MiniLM

    folder, device = weights.locate(NAME), local_device()
    if device.type == "cpu":
        keep_memory()
    (first, *_) = layouts.tensors((path.name for path in folder.iterdir()), layouts.TRANSFORMERS)
    state = backbones.read_state(folder / first)
    with layouts.reading(folder, WHAT):
        return MiniLM(state, json.loads((folder / "config.json").read_bytes()), type_of(precision), device)


def _precision(fast: bool) -> str:
    return mixed_precision(local_device()) if fast else "no"


def encode(prompts: Sequence[str], fast: bool = False, engine: EngineConfig | None = None) -> np.ndarray:
    """Embeds prompts; those that any stage has embedded before come from the disk (see `text_cache`).

    Args:
        prompts: Texts; longer ones are cut at the model's 256 tokens.
        fast: In half precision where the hardware has it: every row within cosine .9999 of float32's. For
            deduplication; targets and submissions are made without it.
        engine: Who embeds; left out: this process.

    Returns:
        float32 array (len(prompts), 384) of unit vectors. What a text gets depends on the text alone, byte for byte.
    """
    if not len(prompts):
        return np.zeros((0, DIMENSION), np.float32)
    precision = _precision(fast)  # of this process, which keeps the vectors, whatever its workers could do
    encoder = f"{layouts.digest(weights.locate(NAME))} {precision} {SHAPES}"
    numbers: dict[str, int] = {}
    rows = [numbers.setdefault(prompt, len(numbers)) for prompt in prompts]
    texts = list(numbers)
    keys = [text_cache.key(encoder, text) for text in texts]
    with contextlib.closing(text_cache.TextCache(DIMENSION)) as cache:
        vectors, there = cache.read(keys)
        if there.all():
            return vectors if len(texts) == len(prompts) else vectors[rows]
        by_length = sorted(range(len(texts)), key=lambda row: len(texts[row]))
        # The same blocks however many texts are there already.
        blocks = [by_length[first : first + BLOCK] for first in range(0, len(texts), BLOCK)]
        blocks = list(filter(None, ([row for row in block if not there[row]] for block in blocks)))
        work = ([texts[row] for row in block] for block in blocks)
        found = over_blocks(engine or EngineConfig(), partial(_start, precision), work)
        with progress_to(len(texts), "encode prompts", int(there.sum())) as advance:
            for block, vectors[block] in zip(blocks, found, strict=True):
                cache.write([keys[row] for row in block], vectors[block])
                advance(len(block))
    return vectors if len(texts) == len(prompts) else vectors[rows]


def encode_to(file: Path, prompts: Sequence[str], fast: bool = False, engine: EngineConfig | None = None) -> np.ndarray:
    """`encode` into a .npy file, for so many prompts that memory does not hold their vectors.

    Returns:
        The array in the file, mapped.
    """

    def blocks() -> Iterator[np.ndarray]:
        with progress_to(len(prompts), "all prompts") as advance:
            for start in range(0, len(prompts), MANY):
                some = prompts[start : start + MANY]
                yield encode(some, fast, engine)
                advance(len(some))

    write_blocks(file, (len(prompts), DIMENSION), np.dtype(np.float32), blocks())
    return np.load(file, mmap_mode="c")


def _start(precision: str) -> Callable[[list[str]], np.ndarray]:
    """What embeds a block of texts."""
    model = _encoder(precision)

    def work(texts: list[str]) -> np.ndarray:
        vectors = np.zeros((len(texts), DIMENSION), np.float32)
        with one_core_each(model.device) as threads:
            for part, found in _embed(model, texts, threads):
                vectors[part] = found
        return vectors

    return work


def encode_once(texts: Sequence[str]) -> np.ndarray:
    """Embeds texts as `encode` does with `fast`, but leaves the disk alone: for many texts that nobody asks for again.

    Returns:
        float32 array (len(texts), 384) of unit vectors.
    """
    return _start(_precision(True))(list(texts)) if len(texts) else np.zeros((0, DIMENSION), np.float32)


def _embed(model: MiniLM, texts: Sequence[str], threads: ThreadPoolExecutor) -> Iterator[tuple[list[int], Tensor]]:
    """Row numbers and embeddings, batch by batch; texts of like length share one."""
    from .minilm import batches

    tokens = [found.ids for found in tokenizer().encode_batch_fast(list(texts))]
    parts = list(batches(tokens, model.device.type))
    encoded = threads.map(lambda part: model.encode([tokens[row] for row in part]), parts)
    yield from zip(parts, encoded, strict=True)
