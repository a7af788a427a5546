"""CLIP's tokenizer, from the vocabulary that open_clip ships: no download."""

from __future__ import annotations

import gzip
from functools import cache
from typing import TYPE_CHECKING

from ..run.folders import package_folder

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

MERGES = 49152 - 256 - 2  # of the vocabulary: openai/CLIP, simple_tokenizer.py
PRINTABLE = (*range(33, 127), *range(161, 173), *range(174, 256))  # bytes that stand for themselves


@cache
def load() -> CLIPTokenizer:
    """The tokenizer (Radford et al. 2021) as Stable Diffusion 2 uses it: 77 tokens, padded with "!"."""
    from transformers import CLIPTokenizer

    folder = package_folder("open_clip")
    with gzip.open(folder / "bpe_simple_vocab_16e6.txt.gz", "rt", encoding="utf-8") as file:
        merges = [tuple(line.split()) for line in file.read().split("\n")[1 : MERGES + 1]]
    letters = [*map(chr, PRINTABLE), *(chr(256 + number) for number in range(256 - len(PRINTABLE)))]
    tokens = [*letters, *(letter + "</w>" for letter in letters), *map("".join, merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(vocabulary, merges, pad_token="!", unk_token="<|endoftext|>", model_max_length=77)
