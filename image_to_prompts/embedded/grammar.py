"""The embedded prompt source: a grammar of scenes that the embedded renderer can draw, and its parser.

A `Scene` is what a picture shows; `write` says it in words, one of many ways, and adds phrases that nothing draws;
`parse` reads a scene back from any text. The renderer sees only the text.
"""

import csv
import random
import re
import tomllib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..run.folders import package_folder

# Phrases for each place, for each style, and for how the first thing stands to the second.
PLACES, STYLES, RELATIONS = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8")).values()
COUNTS = {1: ("a",), 2: ("two", "a couple of"), 3: ("three", "a trio of"), 5: ("five", "a group of", "many")}
JOINS = ("and", "with", "plus", "accompanied by")
STYLE_PREFIX = ("{style} of {scene}", "{a_style} depicting {scene}", "{style}: {scene}", "{scene} as {style}")
STYLE_SUFFIX = ("{scene}, {style}", "{scene} in the style of {style}", "{scene}; {style}")
PART_PROBABILITY = 0.6  # a place, and a style, each in about 60 % of prompts (design)
FLAVORS, ARTISTS = 1500, 500  # how many of clip-interrogator's phrases and artists are used, most frequent first


Table = tuple[re.Pattern[str], dict[str, Any]]  # what finds phrases, and what each means


@dataclass(frozen=True)
class Thing:
    """Something drawable.

    Attributes:
        name: Singular, without article.
        plural: Plural.
        kind: animal, food, object, ...
        code: Code points of its emoji, as `1f436` or `1f468-200d-1f33e`.
        count: How many of 55,494 real prompts name it.
    """

    name: str
    plural: str
    kind: str
    code: str
    count: int


# Nobody misses these in a picture.
UNSAID = {"a", "an", "the", "of", "in", "on", "at", "and", "with", "by", "to", "from", "its", "one", "style"}


@dataclass(frozen=True)
class Scene:
    """What a picture shows.

    Attributes:
        things: One to three (name, count) pairs.
        relation: Key of `RELATIONS` between the first two things; None with one thing.
        place: Key of `PLACES` or None.
        style: Key of `STYLES` or None.
    """

    things: tuple[tuple[str, int], ...]
    relation: str | None = None
    place: str | None = None
    style: str | None = None


@lru_cache(maxsize=1)
def vocabulary() -> dict[str, Thing]:
    """The nameable things by name."""
    with (Path(__file__).parent / "things.csv").open(encoding="utf-8", newline="") as file:
        rows = [(*row.values(),) for row in csv.DictReader(file)]
    return {name: Thing(name, plural, kind, code, int(count)) for name, plural, kind, code, count in rows}


@lru_cache(maxsize=1)
def _weights() -> tuple[int, ...]:
    """How often each thing is drawn: as often as real prompts name it, within bounds that keep variety."""
    return tuple(min(thing.count, 1200) + 2 for thing in vocabulary().values())


@lru_cache(maxsize=1)
def modifiers() -> tuple[str, ...]:
    """Frequent prompt phrases and artists that nothing draws (clip-interrogator's term lists, MIT)."""
    folder = package_folder("clip_interrogator")
    flavors = (folder / "data" / "flavors.txt").read_text(encoding="utf-8").splitlines()[: 2 * FLAVORS]
    artists = (folder / "data" / "artists.txt").read_text(encoding="utf-8").splitlines()

    def undrawn(phrases: list[str]) -> list[str]:
        plain = dict.fromkeys(p.lower() for p in phrases if re.fullmatch(r"[A-Za-z ]{3,40}", p))
        return [p for p in plain if not any(_matches(p, table) for table in _tables())]

    return tuple(undrawn(flavors)[:FLAVORS] + undrawn([f"by {name}" for name in artists])[:ARTISTS])


def words() -> dict[str, list[str]]:
    """What the grammar speaks of: subjects, places and mediums."""
    names = [name for thing in vocabulary().values() for name in (thing.name, thing.plural)]
    places, mediums = ([phrase for phrases in table.values() for phrase in phrases] for table in (PLACES, STYLES))
    return {"subjects": names, "places": places, "mediums": mediums}


def sample(rng: random.Random) -> Scene:
    """Draws a scene: one to three distinct things with counts, a relation, perhaps a place and a style."""
    wanted = rng.choices((1, 2, 3), (0.5, 0.38, 0.12))[0]
    names: list[str] = []
    while len(names) < wanted:
        names += [name for name in rng.choices(tuple(vocabulary()), _weights()) if name not in names]
    counts = rng.choices(tuple(COUNTS), (0.7, 0.12, 0.1, 0.08), k=len(names))
    relation = rng.choices(tuple(RELATIONS), (0.4, 0.2, 0.15, 0.1, 0.15))[0] if len(names) > 1 else None
    if relation == "around":
        counts[1] = 5
    place = rng.choice(list(PLACES)) if rng.random() < PART_PROBABILITY else None
    style = rng.choice(list(STYLES)) if rng.random() < PART_PROBABILITY else None
    return Scene(tuple(zip(names, counts, strict=True)), relation, place, style)


def _with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou8' else 'a'} {words}"


def _phrase(name: str, count: int, rng: random.Random) -> str:
    if count == 1:
        return rng.choice((name, _with_article(name), f"one {name}"))
    return f"{rng.choice(COUNTS[count])} {vocabulary()[name].plural}"


def write(scene: Scene, rng: random.Random) -> str:
    """Says a scene in words, one of many ways, with zero to three phrases that nothing draws.

    Args:
        scene: What to say.
        rng: Source of every choice.

    Returns:
        A prompt from which `parse` reads the same scene.
    """
    phrases = [_phrase(name, count, rng) for name, count in scene.things]
    text = phrases[0]
    if len(phrases) > 1:
        text += f" {rng.choice(RELATIONS[scene.relation])} {phrases[1]}"
    if len(phrases) > 2:
        text += f" {rng.choice(JOINS)} {phrases[2]}"
    if scene.place:
        place = rng.choice(PLACES[scene.place])
        text = rng.choice((f"{text} {place}", f"{text}, {place}", f"{place}, {text}", f"{text} {place}"))
    if scene.style:
        template = rng.choice(STYLE_PREFIX + STYLE_SUFFIX)
        style = rng.choice(STYLES[scene.style])
        text = template.format(style=style, a_style=_with_article(style), scene=text)
    extra = rng.sample(modifiers(), rng.choices((0, 1, 2, 3), (0.4, 0.3, 0.2, 0.1))[0])
    if extra and rng.random() < 0.2:
        text = f"{extra.pop()}, {text}"
    return ", ".join([text, *extra])


def prompt(seed: int, index: int) -> str:
    """The prompt of a seed and an index, independent of every other index."""
    rng = random.Random(f"{seed}-{index}")
    return write(sample(rng), rng)


@lru_cache(maxsize=1)
def _tables() -> tuple[Table, ...]:
    """One (pattern, meaning) pair each for places, styles and things, longest phrases first."""
    places = {phrase: key for key, phrases in PLACES.items() for phrase in phrases}
    styles = {phrase: key for key, phrases in STYLES.items() for phrase in phrases}
    things: dict[str, Any] = {}
    for thing in vocabulary().values():
        things.setdefault(thing.plural, (thing.name, thing.plural != thing.name))
    for thing in vocabulary().values():
        if thing.plural != thing.name:
            things[thing.name] = (thing.name, False)
    return tuple((_pattern(table), table) for table in (places, styles, things))


def _pattern(table: dict[str, Any]) -> re.Pattern[str]:
    longest_first = sorted(table, key=len, reverse=True)
    return re.compile(r"(?<![\w-])(" + "|".join(map(re.escape, longest_first)) + r")(?![\w-])")


def _matches(text: str, table: Table) -> list[re.Match[str]]:
    return list(table[0].finditer(text))


@lru_cache(maxsize=1)
def _small_words() -> tuple[Table, Table]:
    counts = {word: count for count, words in COUNTS.items() for word in words}
    relations = {phrase: key for key, phrases in RELATIONS.items() for phrase in phrases}
    return (re.compile(_pattern(counts).pattern + r"\s*$"), counts), (_pattern(relations), relations)


def parse(text: str) -> Scene:
    """Reads the scene that the renderer can draw from any text.

    Args:
        text: A prompt, from the grammar or not.

    Returns:
        The scene; `things` is empty where the text names nothing of the vocabulary.
    """
    return _read(text)[0]


def undrawn(text: str) -> list[str]:
    """The parts of a text that the renderer draws nothing for, in order; words such as "a" and "with" do not count."""
    parts = (re.findall(r"[\w'-]+", part) for part in re.split(r"[,|]", _read(text)[1]))
    rest = (" ".join(word for word in words if word not in UNSAID) for words in parts)
    return list(dict.fromkeys(filter(None, rest)))


def _read(text: str) -> tuple[Scene, str]:
    """The scene of a text, and the text with a bar for each letter that the scene says."""
    text = " ".join(text.lower().split())
    places, styles, things = _tables()
    counts, relations = _small_words()
    found: list[str | None] = [None, None]
    for i, table in enumerate((places, styles)):
        if matches := _matches(text, table):
            found[i] = table[1][matches[0][1]]
            # Blanked, not cut, so that no new phrase can form across the gap.
            text = table[0].sub(lambda match: "|" * len(match[0]), text)
    named: list[tuple[str, int]] = []
    relation, end, rest = None, 0, text
    for match in _matches(text, things):
        between = text[end : match.start()]
        name, many = things[1][match[1]]
        number = counts[0].search(between)
        count = counts[1][number[1]] if number else (2 if many else 1)
        said = [(match.start(), match.end())] + ([(end + number.start(), end + number.end())] if number else [])
        if len(named) == 1 and (words := _matches(between, relations)):
            relation = relations[1][words[0][1]]
            said.append((end + words[0].start(), end + words[0].end()))
        for first, last in said:
            rest = rest[:first] + "|" * (last - first) + rest[last:]
        end = match.end()
        if name not in dict(named):
            named.append((name, count))
        if len(named) == 3:
            break
    place, style = found
    return Scene(tuple(named), (relation or "beside") if len(named) > 1 else None, place, style), rest
