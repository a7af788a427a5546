"""A prompt whose embedding comes close to a predicted one, and which reads as if someone had written it.

It starts from a known prompt that is near, cut into phrases, and climbs: of all texts in which a phrase is left out,
gives way to one of its kind, or a modifier is added at the end, the best one is taken next. Texts are judged by their
cosine to the prediction, less a price for words that are unusual where they stand (see `Trigrams`). Phrases come from
the nearest prompts and a vocabulary; those are tried whose own embedding lies in the direction that is missing
(docs/log.md).
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch

from ..data.terms import words
from ..models import metrics, text_encoder
from .phrases import PEOPLE, Part, Trigrams, Vocabulary, cut, join, without_artists

NEIGHBOURS = 20  # nearest prompts whose phrases are used
STARTS = 3  # prompts from which a climb starts
TRIED = 6  # phrases of each source tried in a place
MOVES = 20  # texts of a climb embedded a round
ROUNDS = 8  # changes at most
GAIN, SWAP_GAIN = 0.01, 0.001  # below which a text is not made longer, or changed
WORTH = 0.02  # of cosine, by which a composed prompt must be nearer than the nearest known one
USUAL, PRICE = 4.0, 0.004  # nats of surprise that cost nothing, and what each further one costs
FIT = 0.3  # of how far a phrase lies in the missing direction, what the text's cosine gains by it, roughly
DEAR = 0.05  # a text that costs so much more is not looked at
WORDS = 30  # a prompt has at most
ADDED = ("flavors", "mediums", "artists")  # kinds that may be added at the end
_SMALL = "a an and as at by for from in of on the to with one two three five many couple group trio"
SMALL = frozenset(_SMALL.split())  # words that say nothing new


def compose(
    targets: np.ndarray,
    nearest: Sequence[Sequence[str]],
    vocabulary: Vocabulary,
    language: Trigrams,
    most_words: int = WORDS,
) -> list[list[str]]:
    """Composes prompts for each of some predictions, all in the same batches.

    Args:
        targets: float32 (n, 384), predictions of unit length.
        nearest: Known prompts near to each, best first, at least one.
        vocabulary: Phrases to choose from.
        language: A model of known prompts.
        most_words: How many words a prompt has at most; of a known one that is longer the first phrases count.

    Returns:
        For each prediction one to three different prompts, the best first. Where none is nearer than the nearest known
        prompt by `WORTH`, the first is that one.
    """
    known = [list(some[:NEIGHBOURS]) for some in nearest]
    if not vocabulary.artists:
        known = [[text for text in without_artists(some) if text] or ["picture"] for some in known]
    texts = _Texts(language)
    phrases = [_Phrases(some, vocabulary) for some in known]
    climbs = [
        [_Climb(target, _first(start, most_words), own, most_words, texts) for start in some[:STARTS]]
        for target, some, own in zip(targets, known, phrases, strict=True)
    ]
    live = [climb for some in climbs for climb in some]
    texts.know([part.said for some in phrases for parts in some.own.values() for part in parts])
    texts.know([join(climb.parts) for climb in live])
    for _ in range(ROUNDS):
        texts.know([join(parts) for climb in live for parts in climb.shorter()])
        gaps = [climb.gaps() for climb in live]
        _look_up([gap for some in gaps for gap in some], vocabulary)
        moves = [climb.moves(some) for climb, some in zip(live, gaps, strict=True)]
        texts.know([join(parts) for some in moves for parts, _ in some])
        live = [climb for climb, some in zip(live, moves, strict=True) if climb.step(some)]
    return [_best(some, join(_first(near[0], most_words))) for some, near in zip(climbs, known, strict=True)]


def _best(climbs: list["_Climb"], known: str) -> list[str]:
    """The different texts of climbs, best first; a known one before them unless they are worth the change."""
    found = sorted(climbs, key=lambda climb: -climb.value(climb.parts))
    texts, target = found[0].texts, found[0].target
    first = join(found[0].parts)
    start = [] if (texts.vectors[first] - texts.vectors[known]) @ target >= WORTH else [known]
    return list(dict.fromkeys([*start, *(join(climb.parts) for climb in found)]))[:STARTS]


def _first(prompt: str, most_words: int) -> list[Part]:
    """The first phrases of a prompt that fit, at least a part of one."""
    parts = cut(prompt) or [Part("", prompt)]
    while len(parts) > 1 and len(join(parts).split()) > most_words:
        parts.pop()
    return parts if len(parts) > 1 else [Part("", " ".join(parts[0].phrase.split()[:most_words]) or prompt)]


@dataclass
class _Gap:
    """A place in a text where a phrase may go: that of another one, or the end."""

    kind: str
    place: int
    direction: np.ndarray
    fits: dict[Part, float] = field(default_factory=dict)
    """Phrases, and how far they lie in that direction."""


def _look_up(gaps: list[_Gap], vocabulary: Vocabulary) -> None:
    """Adds the phrases of the vocabulary that fit each gap best."""
    rows = defaultdict[str, list[int]](list)
    for row, gap in enumerate(gaps):
        rows[gap.kind].append(row)
    for kind, some in rows.items():
        if kind not in vocabulary.parts:
            continue
        directions = np.stack([gaps[row].direction for row in some])
        cosines = metrics.in_fixed_rows(partial(_products, vocabulary.vectors[kind]), [directions])
        best = np.argsort(-cosines, axis=1, kind="stable")[:, :TRIED]
        for row, chosen, found in zip(some, best.tolist(), cosines, strict=True):
            gaps[row].fits |= {vocabulary.parts[kind][one]: float(found[one]) for one in chosen}


def _products(vectors: np.ndarray, directions: list[np.ndarray]) -> np.ndarray:
    return (torch.from_numpy(directions[0]) @ torch.from_numpy(vectors).T).numpy()


class _Phrases:
    """The phrases of an image's neighbours by kind, and the words of people that they use."""

    def __init__(self, known: list[str], vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self.own = defaultdict[str, list[Part]](list)
        for prompt in known:
            for place, part in enumerate(cut(prompt)):
                kind = vocabulary.kind(part, not place)
                if part.is_plain and part not in self.own[kind]:
                    self.own[kind].append(part)
        self.barred = PEOPLE.difference(*(words(prompt) for prompt in known))


class _Texts:
    """Embeddings and prices of texts that are tried, none computed twice.

    There are hundreds an image, so that they are not kept on the disk.
    """

    def __init__(self, language: Trigrams) -> None:
        self.language = language
        self.vectors: dict[str, np.ndarray] = {}
        self.prices: dict[str, float] = {}

    def know(self, texts: Sequence[str]) -> None:
        """Embeds those that are new, all at once."""
        new = [text for text in dict.fromkeys(texts) if text not in self.vectors]
        self.vectors.update(zip(new, text_encoder.encode_once(new), strict=True))

    def of(self, parts: Sequence[Part]) -> np.ndarray:
        return self.vectors[join(parts)]

    def price(self, parts: Sequence[Part]) -> float:
        """What the unusual words of a text cost."""
        text = join(parts)
        if text not in self.prices:
            self.prices[text] = PRICE * sum(max(0.0, nats - USUAL) for nats in self.language.surprise(text))
        return self.prices[text]


Move = tuple[list[Part], float]  # a text, and the gain that it must bring


@dataclass
class _Climb:
    """One prompt on its way."""

    target: np.ndarray
    parts: list[Part]
    phrases: _Phrases
    most_words: int
    texts: _Texts

    def value(self, parts: list[Part]) -> float:
        """What a text is worth: its cosine to the target, less its price."""
        return float(self.texts.of(parts) @ self.target) - self.texts.price(parts)

    def shorter(self) -> list[list[Part]]:
        """The text without each of its phrases."""
        places = range(len(self.parts)) if len(self.parts) > 1 else ()
        return [self.parts[:place] + self.parts[place + 1 :] for place in places]

    def gaps(self) -> list[_Gap]:
        """Where phrases may go, and in which direction they should lie; needs the embeddings of `shorter`."""
        kinds = [self.phrases.vocabulary.kind(part, not place) for place, part in enumerate(self.parts)]
        rests = [self.texts.of(rest) for rest in self.shorter()] or [np.zeros_like(self.target)]
        found = [
            _Gap(kind, place, self._missing(rest)) for place, (kind, rest) in enumerate(zip(kinds, rests, strict=True))
        ]
        missing, end = self._missing(self.texts.of(self.parts)), len(self.parts)
        found += [_Gap(kind, end, missing) for kind in ADDED if kind != "mediums" or kind not in kinds]
        for gap in found:
            own = {part: float(self.texts.vectors[part.said] @ gap.direction) for part in self.phrases.own[gap.kind]}
            gap.fits = dict(sorted(own.items(), key=lambda one: -one[1])[:TRIED])
        return found

    def _missing(self, vector: np.ndarray) -> np.ndarray:
        return self.target - (self.target @ vector) * vector

    def moves(self, gaps: list[_Gap]) -> list[Move]:
        """What to try next."""
        found: list[Move] = [(parts, 0.0) for parts in self.shorter()]
        price = self.texts.price(self.parts)
        tried: list[tuple[float, Move]] = []
        for gap in gaps:
            ends, before, after = gap.place == len(self.parts), self.parts[: gap.place], self.parts[gap.place + 1 :]
            others = set[str]().union(*map(_content, before + after))
            for part, fit in gap.fits.items():
                new = _content(part)
                if new <= others or new & self.phrases.barred:
                    continue
                put = _added(part, gap.kind) if ends else _instead(part, self.parts[gap.place], gap.kind)
                parts = [*before, put, *after]
                if parts == self.parts or len(join(parts).split()) > self.most_words:
                    continue
                if (dearer := self.texts.price(parts) - price) < DEAR:
                    tried.append((FIT * fit - dearer, (parts, GAIN if ends else SWAP_GAIN)))
        tried.sort(key=lambda one: -one[0])
        return found + [move for _, move in tried[:MOVES]]

    def step(self, moves: list[Move]) -> bool:
        """Takes the best move; False if none is good enough."""
        now = self.value(self.parts)
        gains = [self.value(parts) - now - least for parts, least in moves]
        if not gains or max(gains) <= 0:
            return False
        self.parts = moves[int(np.argmax(gains))][0]
        return True


def _instead(part: Part, old: Part, kind: str) -> Part:
    """A phrase in the place of another one: with its own connective where that belongs to it."""
    if kind == "places" and part.connective:
        return Part(f"{old.mark}{part.connective} ", part.phrase)
    return Part(old.joint, part.phrase)


def _added(part: Part, kind: str) -> Part:
    """A phrase at the end."""
    return Part(", by " if kind == "artists" else ", ", part.phrase)


def _content(part: Part) -> set[str]:
    """Words that mean something, plurals as singulars."""
    return {word.removesuffix("s") for word in words(part.phrase)} - SMALL
