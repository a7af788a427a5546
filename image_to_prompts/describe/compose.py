"""A prompt whose embedding comes as close as possible to a predicted one: composed of phrases, not only looked up.

It starts from the nearest known prompt, cut at commas and connectives, and climbs: of all texts with one phrase
dropped, swapped or added, it goes on with the one of largest cosine. Phrases come from the nearest prompts and a
vocabulary; those are tried whose own embedding lies in the direction that is missing (docs/log.md).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl

from .. import pipeline
from ..data import terms
from ..models import text_encoder

CONNECTIVES = (
    *("above", "alongside", "among", "and", "as", "at", "behind", "below", "beneath", "beside", "between", "by"),
    *("depicting", "facing", "featuring", "from", "in front of", "in the style of", "in", "inside", "made of", "near"),
    *("next to", "of", "on top of", "on", "over", "surrounded by", "through", "to", "together with", "under", "with"),
)
_CONNECTIVE = "(?:" + "|".join(sorted(CONNECTIVES, key=len, reverse=True)) + ")"
_CUT = re.compile(rf"(\s*[,;:|]\s*|\s+{_CONNECTIVE}\s+)", re.IGNORECASE)
_LEADING = re.compile(rf"{_CONNECTIVE}\s", re.IGNORECASE)
MODIFIERS = 3000  # of clip-interrogator's flavours, most frequent first
NEIGHBOURS = 20  # nearest prompts whose phrases are used
ADDED, SWAPPED = 6, 3  # phrases of each source tried at the end, and in the place of each phrase
ROUNDS = 10  # changes at most
GAIN, SWAP_GAIN = 0.01, 0.001  # of cosine, below which a text is not made longer, or changed
WORDS = 30  # a prompt has at most
SMALL = {"a", "an", "the", "one", "two", "three", "five", *" ".join(CONNECTIVES).split()}


class Part(NamedTuple):
    """A phrase, and what joins it to the one before it."""

    joint: str
    phrase: str


@dataclass(frozen=True)
class Vocabulary:
    """Phrases to compose with.

    Attributes:
        phrases: n phrases.
        vectors: float32 (n, 384), their embeddings.
        artists: Whether names of artists may stand in a prompt.
    """

    phrases: list[str]
    vectors: np.ndarray
    artists: bool


def vocabulary(folder: Path | None = None, artists: bool = True) -> Vocabulary:
    """Subjects, media, movements, modifiers and, if wanted, artists.

    Args:
        folder: Files in place of some of these: `subjects.txt`, or as `terms.read` has it.
        artists: Whether names of artists are used.

    Raises:
        UserError: If the folder has none of these files, or one is not UTF-8.
    """
    phrases = phrases_in(folder, artists)
    if not artists:  # some modifiers name them too
        phrases = [phrase for phrase, left in zip(phrases, _without_artists(phrases), strict=True) if phrase == left]
    return Vocabulary(phrases, text_encoder.encode(phrases), artists)


def phrases_in(folder: Path | None, artists: bool = True) -> list[str]:
    """The phrases of `vocabulary`, none twice; arguments and errors as there."""
    own = terms.read(folder, artists, {"subjects": list(pipeline.embedded("subjects")())})
    own["flavors"] = own["flavors"][:MODIFIERS]
    kinds = ("subjects", "mediums", "movements", "flavors", "artists")
    return list(dict.fromkeys(phrase for kind in kinds for phrase in own[kind]))


def cut(prompt: str) -> list[Part]:
    """The phrases of a prompt; `join` makes it of them again, but for white space and marks at its ends or repeated."""
    pieces = _CUT.split(" ".join(prompt.split()).strip(" ,;:|"))
    return [Part(joint, phrase) for joint, phrase in zip(["", *pieces[1::2]], pieces[::2], strict=True) if phrase]


def join(parts: Sequence[Part]) -> str:
    """The prompt of phrases; a connective that would stand twice, or first, is left out."""
    text = ""
    for joint, phrase in parts:
        if text:
            text += " " if joint[:1].isspace() and _LEADING.match(phrase) else joint
        text += phrase
    return text


def phrases_of(prompt: str) -> list[str]:
    """The phrases of a prompt, at least one, as they may stand in another one: an artist keeps the `by`."""
    return [f"by {part.phrase}" if part.joint.strip().lower() == "by" else part.phrase for part in cut(prompt)] or [
        prompt
    ]


def compose(
    targets: np.ndarray, nearest: Sequence[Sequence[str]], words: Vocabulary, most_words: int = WORDS
) -> list[str]:
    """Composes a prompt for each of some predictions, all in the same batches.

    Args:
        targets: float32 (n, 384), predictions of unit length.
        nearest: Known prompts near to each, best first, at least one.
        words: From `vocabulary`.
        most_words: How many words a prompt has at most; of a known one that is longer the first phrases count.

    Returns:
        n prompts. Each is at least as near to its target as the first known one, cut so and without artists, if they
        are not wanted; but for the rounding of half precision.
    """
    known = [list(some[:NEIGHBOURS]) for some in nearest]
    if not words.artists:
        known = [[text for text in _without_artists(some) if text] or ["picture"] for some in known]
    texts = _Texts()
    local = [list(dict.fromkeys(phrase for prompt in some for phrase in phrases_of(prompt))) for some in known]
    texts.know([phrase for some in local for phrase in some])
    climbs = [
        _Climb(target, _first(some[0], most_words), phrases, words, most_words, texts)
        for target, some, phrases in zip(targets, known, local, strict=True)
    ]
    texts.know([join(climb.parts) for climb in climbs])
    live = climbs
    for _ in range(ROUNDS):
        texts.know([join(parts) for climb in live for parts in climb.shorter()])
        moves = [climb.moves() for climb in live]
        texts.know([join(parts) for some in moves for parts, _ in some])
        live = [climb for climb, some in zip(live, moves, strict=True) if climb.step(some)]
    return [join(climb.parts) for climb in climbs]


def _first(prompt: str, most_words: int) -> list[Part]:
    """The first phrases of a prompt that fit, at least a part of one."""
    parts = cut(prompt) or [Part("", prompt)]
    while len(parts) > 1 and len(join(parts).split()) > most_words:
        parts.pop()
    return parts if len(parts) > 1 else [Part("", " ".join(parts[0].phrase.split()[:most_words]) or prompt)]


def _without_artists(prompts: list[str]) -> list[str]:
    """Prompts without the names in clip-interrogator's list, nor phrases with a surname of it (see `surnames`)."""
    from ..generate import rules

    clean = rules.artists(pl.DataFrame({"prompt": prompts})).fill_null("")
    return [text if surnames().isdisjoint(_words(text)) else join(_unnamed(text)) for text in clean]


def _unnamed(prompt: str) -> list[Part]:
    return [part for part in cut(prompt) if surnames().isdisjoint(_words(part.phrase))]


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


@lru_cache(maxsize=1)
def surnames() -> frozenset[str]:
    """Surnames of artists that all-MiniLM-L6-v2's tokenizer knows as no word: rutkowski, but not white."""
    words = text_encoder.load().tokenizer.get_vocab()
    names = [phrase.removeprefix("by ").lower().split() for phrase in terms.read()["artists"]]
    return frozenset(name[-1] for name in names if len(name) > 1 and name[-1] not in words)


class _Texts:
    """Embeddings of texts that are tried, none computed twice; thousands an image, so none goes to the disk."""

    def __init__(self) -> None:
        self.vectors: dict[str, np.ndarray] = {}

    def know(self, texts: Sequence[str]) -> None:
        """Embeds those that are new, all at once."""
        new = [text for text in dict.fromkeys(texts) if text not in self.vectors]
        self.vectors.update(zip(new, text_encoder.encode_once(new), strict=True))

    def of(self, parts: Sequence[Part]) -> np.ndarray:
        return self.vectors[join(parts)]


Move = tuple[list[Part], float]  # a text, and the gain that it must bring


@dataclass
class _Climb:
    """One prompt on its way."""

    target: np.ndarray
    parts: list[Part]
    phrases: list[str]
    words: Vocabulary
    most_words: int
    texts: _Texts

    def shorter(self) -> list[list[Part]]:
        """The text without each of its phrases."""
        places = range(len(self.parts)) if len(self.parts) > 1 else ()
        return [self.parts[:place] + self.parts[place + 1 :] for place in places]

    def moves(self) -> list[Move]:
        """What to try next; needs the embeddings of the text, of `shorter` and of the phrases."""
        shorter = self.shorter()
        found: list[Move] = [(parts, 0.0) for parts in shorter]
        if len(join(self.parts).split()) < self.most_words:
            missing = self._missing(self.texts.of(self.parts), ADDED)
            longer = [[*self.parts, Part(", ", phrase)] for phrase in missing]
            found += [(parts, GAIN) for parts in longer if len(join(parts).split()) <= self.most_words]
        for place, part in enumerate(self.parts):
            rest = self.texts.of(shorter[place]) if shorter else np.zeros_like(self.target)
            for phrase in self._missing(rest, SWAPPED, part.phrase):
                swapped = [*self.parts[:place], Part(part.joint, phrase), *self.parts[place + 1 :]]
                if len(join(swapped).split()) <= self.most_words:
                    found.append((swapped, SWAP_GAIN))
        return found

    def _missing(self, vector: np.ndarray, count: int, instead: str = "") -> list[str]:
        """The phrases that lie most in the direction in which the target lies from a text, if they say anything new."""
        direction = self.target - (self.target @ vector) * vector
        own = np.stack([self.texts.vectors[phrase] for phrase in self.phrases]) @ direction
        others = self.words.vectors @ direction
        said = _content(join(self.parts)) - _content(instead)
        found = [self.phrases[row] for row in np.argsort(-own)[:count]]
        found += [self.words.phrases[row] for row in np.argsort(-others)[:count]]
        return [phrase for phrase in found if phrase != instead and not _content(phrase) <= said]

    def step(self, moves: list[Move]) -> bool:
        """Takes the best move; False if none is good enough."""
        now = self.texts.of(self.parts) @ self.target
        gains = [self.texts.of(parts) @ self.target - now - least for parts, least in moves]
        if not gains or max(gains) <= 0:
            return False
        self.parts = moves[int(np.argmax(gains))][0]
        return True


def _content(text: str) -> set[str]:
    """Words that mean something, plurals as singulars."""
    return {word.removesuffix("s") for word in _words(text)} - SMALL
