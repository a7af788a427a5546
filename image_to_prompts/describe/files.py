"""The files of `describe`: images; the table that grows, with a journal beside it; a `.txt` beside each image."""

import csv
import glob
import io
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Self

import numpy as np

from ..data import images
from ..data.metadata import IMAGE_SUFFIXES
from ..data.terms import words
from ..run import archives
from ..run.devices import rank_and_processes
from ..run.errors import UserError
from ..run.files import make_folder, shown, write_text
from ..run.resume import Stamp, append_line, read_journal

CANDIDATES = ("candidate_2", "candidate_3")
FROM_FILE = ("negative_prompt", "seed", "generator", "model")


@dataclass(frozen=True)
class Description:
    """What was found out about an image.

    Attributes:
        path: The image.
        prompt: Its prompt; "" if there is none.
        source: Where the prompt comes from: `file`, `checkpoint`, `bank`, `interrogator`, `caption`, `guess`; "": none.
        familiar: Whether the image is like those that the checkpoint was trained on; None where that is unknown.
        cosine: Of the prompt's embedding with the predicted one; None unless a checkpoint predicted one.
        nearest: The nearest known prompts with their cosines, best first.
        candidates: Further prompts, composed in other ways; at most two.
        negative_prompt: What the file says; "" if nothing. So are seed, generator and model.
        seed: See negative_prompt.
        generator: See negative_prompt; the program that made the image.
        model: See negative_prompt.
        error: Why there is no prompt; "" if there is one.
        vector: float32 (384,), the embedding that the checkpoints predict; None where they were not asked, and in what
            `run` returns, which keeps texts alone.
    """

    path: Path
    prompt: str
    source: str = ""
    familiar: bool | None = None
    cosine: float | None = None
    nearest: tuple[tuple[str, float], ...] = ()
    candidates: tuple[str, ...] = ()
    negative_prompt: str = ""
    seed: str = ""
    generator: str = ""
    model: str = ""
    error: str = ""
    vector: np.ndarray | None = field(default=None, repr=False, compare=False)


def image_files(paths: Sequence[Path], recursive: bool = True) -> list[Path]:
    """Image files of paths, none twice; raises UserError."""
    found: list[Path] = []
    for path in paths:
        try:
            if path.is_dir():
                found += images.find(path, recursive)
                continue
            archives.stat(path)
        except OSError as error:
            why = "" if isinstance(error, FileNotFoundError) else f" ({error.strerror or error})"
            raise UserError(f"{shown(path)}: no such file or folder{why}; correct it") from error
        if path.suffix.lower() not in IMAGE_SUFFIXES:
            raise UserError(f"{shown(path)}: not an image ({', '.join(IMAGE_SUFFIXES)}); give image files or folders")
        found.append(path)
    return list(dict.fromkeys(found))


def key(file: Path) -> str:
    """Tells an image from one by which it may be replaced; "" of one that is gone."""
    try:
        return json.dumps([str(file.absolute()), *archives.stat(file)])
    except OSError:
        return ""


class Known:
    """What models said of images, in journals beside the table, so that none is shown to them twice."""

    def __init__(self, table: Path | None, fingerprint: str, anew: bool) -> None:
        """Reads the journals; those that others left, of other settings and models, are removed.

        Args:
            table: The table; without one nothing is kept.
            fingerprint: Of what the texts depend on, beside the images.
            anew: Whether what was kept does not count.
        """
        self.done: dict[str, Description] = {}
        self.journal = table and table.with_name(f".{table.name}.{fingerprint}.{rank_and_processes()[0]}.journal")
        for path in table.parent.glob(f".{glob.escape(table.name)}.*.journal") if table else ():
            if anew or f".{fingerprint}." not in path.name:
                path.unlink(missing_ok=True)
                continue
            for record in read_journal(path):
                name, near = record.pop("key"), tuple((prompt, cosine) for prompt, cosine in record.pop("nearest"))
                record["candidates"] = tuple(record["candidates"])
                self.done[name] = Description(Path(), nearest=near, **record)

    def of(self, keys: dict[Path, str]) -> dict[Path, Description]:
        """The images, by their keys, that were described."""
        return {file: replace(self.done[name], path=file) for file, name in keys.items() if name in self.done}

    def keep(self, found: dict[str, Description]) -> None:
        """Notes descriptions by key; not those of images that cannot be read, for they may be replaced."""
        names = ("prompt", "source", "familiar", "cosine", "nearest", "candidates")
        good = {name: one for name, one in found.items() if name and not one.error}
        if self.journal:
            records = [{"key": name, **{field: getattr(one, field) for field in names}} for name, one in good.items()]
            append_line(self.journal, *records)


class Table:
    """A table of descriptions, .csv or .jsonl, that grows block by block."""

    def __init__(self, path: Path, top: int, overwrite: bool, reads: Sequence[Path]) -> None:
        """Takes the file over.

        Raises:
            UserError: If it is read here, or was not written by `describe`, or was edited, and `overwrite` is not set.
        """
        self.path, self.top = path, top
        self.stamp = Stamp(path.with_name(f".{path.name}.done"), "describe", {})
        if path.is_dir():
            raise UserError(f"{path}: is a folder; give a file")
        make_folder(path.parent)
        self.stamp.check([path], reads, overwrite)
        self.at, self.changing = 0, False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Notes what the file holds, so that a later run knows whether someone edited it."""
        ended = kind is None and self.at and not self.changing
        if ended and not (self.stamp.is_current() and self.path.stat().st_size == self.at):
            self._change()
        if self.changing:
            self.stamp.write([self.path])

    def _change(self) -> None:
        """Cuts the file off where it begins to differ."""
        self.stamp.claim([self.path], (), True)
        with self.path.open("ab") as file:
            file.truncate(self.at)
        self.changing = True

    def _is_json(self) -> bool:
        return self.path.suffix.lower() == ".jsonl"

    def add(self, found: Sequence[Description]) -> None:
        """Adds rows; those that are there already, in their place, stay as they are."""
        text = "".join(map(_json, found)) if self._is_json() else _csv([self._row(one) for one in found])
        if not self.at and not self._is_json():
            nearest = [f"{name}_{number}" for number in range(1, self.top + 1) for name in ("nearest", "cosine")]
            first = ["image", "prompt", "source", "familiar", "cosine", *CANDIDATES]
            text = _csv([[*first, *FROM_FILE, *nearest, "error"]]) + text
        data = text.encode("utf-8")
        if not self.changing:
            there = b""
            if self.path.is_file():
                with self.path.open("rb") as file:
                    file.seek(self.at)
                    there = file.read(len(data))
            if there != data:
                self._change()
        if self.changing:
            with self.path.open("ab") as file:
                file.write(data)
        self.at += len(data)

    def _row(self, one: Description) -> list[object]:
        familiar = "" if one.familiar is None else str(one.familiar).lower()
        nearest = [value for pair in (*one.nearest, *[("", "")] * self.top)[: self.top] for value in pair]
        others = [*one.candidates, *[""] * len(CANDIDATES)][: len(CANDIDATES)]
        about = [getattr(one, name) for name in FROM_FILE]
        return [shown(one.path), one.prompt, one.source, familiar, one.cosine, *others, *about, *nearest, one.error]


def _csv(rows: Sequence[Sequence[object]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _json(one: Description) -> str:
    row = {"image": shown(one.path), **asdict(one)}
    del row["path"], row["vector"]
    return json.dumps(row, ensure_ascii=False) + "\n"


def banned(given: Sequence[str]) -> frozenset[str]:
    """The words of `--ban`, in small letters; of one with a hyphen its parts, with a blank between them.

    Raises:
        UserError: If a file cannot be read.
    """
    found: list[str] = []
    for word in given:
        try:
            found += Path(word).read_text(encoding="utf-8").split() if word.endswith(".txt") else word.split()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--ban {word}: cannot be read ({error}); give words, or text files of them") from error
    return frozenset(" ".join(words(word)) for word in found) - {""}


def worded(found: Description, prefix: str, suffix: str, banned: frozenset[str], top: int) -> Description:
    """A description as it is told: without banned words, with prefix and suffix, and `top` of the nearest prompts."""

    def holds_banned(text: str) -> bool:
        said = f" {' '.join(words(text))} "
        return any(f" {one} " in said for one in banned)

    def told(prompt: str) -> str:
        if holds_banned(prompt):
            prompt = ", ".join(part for part in re.split(r"\s*,\s*", prompt) if not holds_banned(part))
        return f"{prefix}{prompt}{suffix}" if prompt else prompt

    others = tuple(filter(None, map(told, found.candidates)))
    near = found.nearest[:top]
    return replace(found, prompt=told(found.prompt), candidates=others, nearest=near, vector=None)


def beside(file: Path) -> Path:
    """Where the text of an image goes."""
    return file.with_suffix(".txt")


def check_places(files: list[Path]) -> None:
    """Raises UserError if two images would get one text file, or one lies in an archive."""
    places: dict[Path, Path] = {}
    for file in files:
        if archives.is_member(file):
            raise UserError(f"{shown(file)}: --txt has no place beside an image in an archive; use --out")
        other = places.setdefault(beside(file), file)
        if other != file:
            raise UserError(f"{shown(file)}: --txt would write the same file as for {other.name}; use --out")


def write_beside(found: Description, overwrite: bool, append: bool) -> bool:
    """Writes a prompt beside its image.

    Args:
        found: The prompt.
        overwrite: Whether a text that is there is replaced.
        append: Whether the prompt is added to it, behind a comma, unless it is in it already.

    Returns:
        False if another text is there and stays.
    """
    path, text = beside(found.path), found.prompt
    if text and path.exists() and not overwrite:
        there = path.read_text(encoding="utf-8", errors="surrogateescape").strip() if path.is_file() else ""
        if f", {text}, " in f", {there}, ":
            return True
        if not append or not path.is_file():
            return False
        text = f"{there}, {text}" if there else text
    if text:
        write_text(path, f"{text}\n")
    return True
