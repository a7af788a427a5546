"""The phrases of prompts: where one ends, what kind it is, which ones there are; and how usual words in a row are."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl

from .. import pipeline
from ..data import terms
from ..data.terms import words
from ..models import text_encoder

PLACES = ("at", "during", "in", "inside", "through")  # what follows says where or when
RELATIONS = (
    *("above", "alongside", "among", "behind", "below", "beneath", "beside", "between", "in front of", "near"),
    *("next to", "on", "on top of", "over", "under", "underneath"),
)
STYLES = ("as", "in the style of")
OTHERS = ("and", "by", "from", "made of", "of", "to", "together with", "with")
ACTIONS = (
    *("balancing", "covered", "dancing", "decorated", "deep", "dressed", "encircled", "falling", "fighting", "filled"),
    *("floating", "flying", "hiding", "hovering", "inspired", "looking", "looming", "lost", "lying", "painted"),
    *("playing", "riding", "running", "sitting", "sleeping", "standing", "staring", "surrounded", "swimming"),
    *("walking", "working", "wrapped"),
)
"""Words that belong to the connective behind them."""
VERBS = ("carrying", "depicting", "eating", "facing", "featuring", "holding", "reading", "riding", "showing", "wearing")
WHOLE = {
    "of": ("bottom", "bunch", "couple", "edge", "field", "group", "lake", "middle", "pair", "swarm", "trio"),
    "on": ("featured", "trending"),
    "and": ("black",),
}
"""Words behind which a connective does not begin a new phrase."""
MODIFIERS = 3000  # of clip-interrogator's flavours, most frequent first
OWN = 10_000  # phrases of known prompts, most frequent first
KINDS = ("subjects", "places", "mediums", "artists", "flavors")
NUMBERS = (
    *("a couple of", "a group of", "a pair of", "a trio of"),
    *("a", "an", "one", "the", "two", "three", "four", "five", "many", "several", "some"),
)
_PEOPLE = """
arm arms baby babies beard bikini body boy boys breast breasts child children cleavage ear ears eye eyes face faces
female feet foot girl girls guy hair hands head her him his human humans kid ladies lady leg legs lips male man men
mouth muscular naked nose nude people person sexy skin teeth tooth woman women
"""
PEOPLE = frozenset(_PEOPLE.split())
"""Words of people and their bodies: what nobody wants to read of a picture of a house."""


def _any(words: Iterable[str]) -> str:
    """A pattern of words, the longest first, but not behind their words in `WHOLE`."""
    found = sorted(words, key=len, reverse=True)
    behind = ["".join(rf"(?<!\b{before}\s)" for before in WHOLE.get(word, ())) for word in found]
    return "(?:" + "|".join(map(str.__add__, behind, found)) + ")"


_NUMBER = re.compile(rf"{_any(NUMBERS)}\s+", re.IGNORECASE)
_JOINT = rf"(?:(?:{_any(ACTIONS)}\s+)?{_any((*PLACES, *RELATIONS, *STYLES, *OTHERS))}|{_any(VERBS)})(?=\s)"
_LEADING = re.compile(rf"(?:{_JOINT}\s+)?", re.IGNORECASE)
_MARKS = " ,;:|."
_PLAIN_PHRASE = re.compile(r"(?=.*[^\W\d_])[\w\s'’&!-]+")
_CUT = re.compile(rf"((?:\s*[,;:|]|\.(?=\s))\s*(?:{_JOINT}\s+)*|(?:^|\s+)(?:{_JOINT}\s+)+)", re.IGNORECASE)
_TOKEN = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*|[,;:.|]")
_Gram = tuple[str, ...]


class Part(NamedTuple):
    """A phrase, and what joins it to the one before it: a mark, a connective, or both."""

    joint: str
    phrase: str

    @property
    def connective(self) -> str:
        """The words of the joint, in small letters."""
        return self.joint.strip(_MARKS).lower()

    @property
    def mark(self) -> str:
        """What stands in the joint before its words."""
        return self.joint[: len(self.joint) - len(self.joint.lstrip(_MARKS))]

    @property
    def is_plain(self) -> bool:
        """Whether the phrase has words and no brackets or other signs, so that it may stand in another prompt."""
        return bool(_PLAIN_PHRASE.fullmatch(self.phrase))

    @property
    def said(self) -> str:
        """The phrase as it is said alone: with the connective without which it would mean something else."""
        keep = _ends(self.connective, (*PLACES, *RELATIONS, "by"))
        return f"{self.connective} {self.phrase}" if keep else self.phrase


def _ends(connective: str, with_words: tuple[str, ...]) -> bool:
    return f" {connective}".endswith(tuple(f" {word}" for word in with_words))


def cut(prompt: str) -> list[Part]:
    """The phrases of a prompt; `join` makes it of them again, but for white space and marks at its ends or repeated."""
    pieces = _CUT.split(" ".join(prompt.split()).strip(_MARKS))
    return [Part(joint, phrase) for joint, phrase in zip(["", *pieces[1::2]], pieces[::2], strict=True) if phrase]


def join(parts: Sequence[Part]) -> str:
    """The prompt of phrases; what joined the first one to another is left out."""
    if not parts:
        return ""
    (joint, phrase), *rest = parts
    first = "" if joint[:1].isspace() else joint.lstrip(_MARKS)
    return "".join([first, phrase, *(text for part in rest for text in part)])


def bare(phrase: str) -> str:
    """A phrase in small letters, without article and number."""
    return _NUMBER.sub("", phrase.lower(), count=1).strip()


@dataclass(frozen=True)
class Vocabulary:
    """Phrases to compose with, by kind.

    Attributes:
        kinds: The kind of each phrase of the lists, see `bare`.
        parts: n phrases of each kind.
        vectors: float32 (n, 384), the embeddings of what they say, of each kind.
        artists: Whether names of artists may stand in a prompt.
    """

    kinds: dict[str, str]
    parts: dict[str, list[Part]]
    vectors: dict[str, np.ndarray]
    artists: bool

    def kind(self, part: Part, first: bool) -> str:
        """The kind of a phrase: by the lists, what joins it to the others, its last word, and where it stands."""
        return _kind(part, first, self.kinds)


def _kind(part: Part, first: bool, kinds: dict[str, str]) -> str:
    connective, name = part.connective, bare(part.phrase)
    whole = f"{connective} {part.phrase}".strip().lower()
    if whole in kinds:
        return kinds[whole]
    if _ends(connective, ("by",)) and not connective.startswith(("encircled", "surrounded")):
        return kinds.get(name, "artists")
    if _ends(connective, PLACES):
        return "places"
    if name in kinds:
        return kinds[name]
    if connective.endswith("style of"):
        return "mediums"
    if kinds.get(name.rpartition(" ")[2]) == "subjects":
        return "subjects"
    if _ends(connective, RELATIONS):
        return "places"
    return connective or ("first" if first else "flavors")


def lists(folder: Path | None, artists: bool = True) -> dict[str, list[str]]:
    """Phrases of each of `KINDS`, frequent ones first.

    Args:
        folder: Files in place of some lists: `subjects.txt`, `places.txt`, or as `terms.read` has it.
        artists: Whether names of artists are used.

    Raises:
        UserError: If the folder has none of these files, or one is not UTF-8.
    """
    more = pipeline.embedded("words")()
    own = terms.read(folder, artists, {name: more[name] for name in ("subjects", "places")})
    if not (folder and (folder / "mediums.txt").is_file()):
        own["mediums"] += more["mediums"]
    own["flavors"] = own["flavors"][:MODIFIERS] + own["movements"]
    return {kind: list(dict.fromkeys(own[kind])) for kind in KINDS}


def vocabulary(folder: Path | None = None, artists: bool = True, known: Sequence[str] = ()) -> Vocabulary:
    """The phrases of lists and of known prompts.

    Args:
        folder: See `lists`; errors too.
        artists: See `lists`.
        known: Prompts.
    """
    own = lists(folder, artists)
    both = (own,) if folder is None and artists else (lists(None), own)  # the own ones count, where a phrase is in both
    kinds = {bare(text): kind for one in both for kind, texts in reversed(one.items()) for text in texts}
    counts = Counter[tuple[str, Part]]()
    for prompt in known if artists else without_artists(known):
        counts.update((_kind(part, not place, kinds), part) for place, part in enumerate(cut(prompt)) if part.is_plain)
    found = defaultdict[str, dict[Part, None]](dict)
    for (kind, part), _ in counts.most_common(OWN):
        found[kind][part] = None
    for kind, phrases in own.items():
        if not artists:  # some modifiers name them too
            phrases = [one for one, left in zip(phrases, without_artists(phrases), strict=True) if one == left]
        for phrase in phrases:
            start = _LEADING.match(phrase)
            joint = start[0] if start else ""
            found[kind][Part(joint, phrase.removeprefix(joint))] = None
    said = {kind: [part.said for part in parts] for kind, parts in found.items()}
    vectors = text_encoder.encode([text for texts in said.values() for text in texts])
    ends = np.cumsum([len(texts) for texts in said.values()])[:-1]
    return Vocabulary(
        kinds, {k: list(v) for k, v in found.items()}, dict(zip(said, np.split(vectors, ends), strict=True)), artists
    )


def without_artists(prompts: Sequence[str]) -> list[str]:
    """Prompts without the names in clip-interrogator's list, nor phrases with a surname of it (see `surnames`)."""
    from ..generate import rules

    if not prompts:
        return []
    clean = rules.artists(pl.DataFrame({"prompt": list(prompts)})).fill_null("")
    return [text if surnames().isdisjoint(words(text)) else join(_unnamed(text)) for text in clean]


def _unnamed(prompt: str) -> list[Part]:
    return [part for part in cut(prompt) if surnames().isdisjoint(words(part.phrase))]


@lru_cache(maxsize=1)
def surnames() -> frozenset[str]:
    """Surnames of artists that all-MiniLM-L6-v2's tokenizer knows as no word: rutkowski, but not white."""
    known = text_encoder.tokenizer().get_vocab()
    names = [phrase.removeprefix("by ").lower().split() for phrase in terms.read()["artists"]]
    return frozenset(name[-1] for name in names if len(name) > 1 and name[-1] not in known)


class Trigrams:
    """Counts of one, two and three words in a row, interpolated by Witten and Bell's method.

    How much weight a longer context gets depends on how often, and before how many different words, it was seen
    (Witten & Bell, IEEE Transactions on Information Theory 37, 1991; method C). NLTK's model of the same kind takes 20
    times as long for a word (docs/log.md), and KenLM has no wheel.
    """

    def __init__(self, prompts: Iterable[str]) -> None:
        """Counts.

        Args:
            prompts: Any number of texts, also none.
        """
        self.counts = Counter[_Gram]()
        for prompt in prompts:
            tokens = _tokens(prompt)
            for end in range(3, len(tokens) + 1):
                self.counts.update((tokens[end - 1 : end], tokens[end - 2 : end], tokens[end - 3 : end]))
        seen, kinds = Counter[_Gram](), Counter(gram[:-1] for gram in self.counts)
        for gram, count in self.counts.items():
            seen[gram[:-1]] += count
        self.contexts = {context: (count, kinds[context]) for context, count in seen.items()}

    def surprise(self, text: str) -> list[float]:
        """What each word, each mark and the end of a text surprise by: -log of their probability, in nats."""
        tokens = _tokens(text)
        return [-math.log(self._probability(tokens[end - 3 : end])) for end in range(3, len(tokens) + 1)]

    def perplexity(self, text: str) -> float:
        """The geometric mean of 1 / probability over words, marks and end."""
        found = self.surprise(text)
        return math.exp(sum(found) / len(found))

    def _probability(self, gram: _Gram) -> float:
        probability = 1 / (self.contexts.get((), (0, 0))[1] + 1)  # one more for all words that were never seen
        for size in (1, 2, 3):
            count, kinds = self.contexts.get(gram[3 - size : 2], (0, 0))
            if not count:
                break
            probability = (self.counts[gram[3 - size :]] + kinds * probability) / (count + kinds)
        return probability


def _tokens(text: str) -> _Gram:
    return ("<s>", "<s>", *_TOKEN.findall(text.lower()), "</s>")
