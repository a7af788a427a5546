"""Metadata CSVs: `image_name,prompt` first, then optional columns; one reader, one writer, one set of row keys."""

import csv
import hashlib
import io
import re
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from types import MappingProxyType

import pandas as pd

from ..run.errors import UserError
from ..run.files import atomic_path

NOT_IN_NAMES = re.compile(r"[\\\x00-\x1f\x7f]|(^|/)(\.{0,2})(/|$)")
LONGEST_NAME = 200  # bytes; file systems take 255, of which temporary names need some
IMAGE_SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".jfif", ".webp"),
    *(".avif", ".bmp", ".gif", ".heic", ".heif", ".tif", ".tiff"),
)
# What a manifest says of an image; "" of one that is as it should be.
BLANK, NEAR_UNIFORM, NSFW, FAILED = "blank", "near_uniform", "nsfw_blacked", "failed"
NOTHING_KNOWN = "nothing_known"  # an embedded scene shows nothing of its prompt
FLAGS = ("", BLANK, NEAR_UNIFORM, NSFW, FAILED, NOTHING_KNOWN)


def read_table(path: Path, required: tuple[str, ...]) -> pd.DataFrame:
    """Reads a CSV of text columns.

    Args:
        path: UTF-8 CSV with a header.
        required: Columns that must be there.

    Returns:
        All columns as str; empty fields are "".

    Raises:
        UserError: If the file is missing, empty, not UTF-8, not a CSV, or lacks a required column.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; check the path or run the stage that writes it")
    data = path.read_bytes()
    if b"\0" in data:  # pandas 2 would cut a field there without a word
        row = data[: data.index(b"\0")].count(b"\n")
        raise UserError(f"{path}: row {row}: a NUL character; take it out, or save the file as UTF-8")
    try:
        frame = pd.read_csv(io.BytesIO(data), dtype=str, keep_default_na=False, na_filter=False, encoding="utf-8")
    except pd.errors.EmptyDataError as error:
        raise UserError(f"{path}: the file is empty; it needs the header {','.join(required)} and rows") from error
    except UnicodeDecodeError as error:
        text = data.decode("utf-8", "surrogateescape")
        row = re.split("[\udc80-\udcff]", text, maxsplit=1)[0].count("\n")
        raise UserError(f"{path}: row {row}: bytes that are not UTF-8; save the file as UTF-8") from error
    except pd.errors.ParserError as error:
        raise UserError(f"{path}: not a CSV: {error}; quote fields that contain commas") from error
    if len(frame) and not isinstance(frame.index, pd.RangeIndex):  # pandas takes the first fields for row labels
        raise UserError(f"{path}: its rows have more fields than its header; quote fields that contain commas")
    for column in required:
        if column not in frame.columns:
            raise UserError(f"{path}: no column {column!r}, found {', '.join(frame.columns)}; rename or add it")
    if frame.empty:
        raise UserError(f"{path}: a header but no rows; add rows or run the stage that writes it")
    return frame


def read_prompts(
    path: Path,
    required: tuple[str, ...] = ("prompt",),
    unique: bool = True,
    called: Mapping[str, str] = MappingProxyType({}),
) -> pd.DataFrame:
    """Reads a CSV with a `prompt` column and what else is `required`; `image_name` and the rest are optional.

    Args:
        path: The file.
        required: Columns that must be there.
        unique: Whether an `image_name` that stands twice is bad.
        called: What the file calls columns that have another name here.

    Raises:
        UserError: As `read_table`, or if a prompt is blank or the text NaN, or an `image_name` is bad (see `check`).
    """
    frame = read_table(path, tuple(called.get(name, name) for name in required))
    other = {theirs: ours for ours, theirs in called.items() if theirs != ours}
    frame = frame.drop(columns=[ours for ours in other.values() if ours in frame]).rename(columns=other)
    for row, prompt in enumerate(frame["prompt"], start=1):
        if not prompt.strip() or prompt.strip().lower() in ("nan", "null"):
            raise UserError(f"{path}: row {row}: the prompt is blank ({prompt!r}); fill it in or delete the row")
    if "image_name" in frame:
        check_names(frame, path, unique)
    return frame


def read(path: Path, unique: bool = True, called: Mapping[str, str] = MappingProxyType({})) -> pd.DataFrame:
    """Reads a metadata CSV, that is `read_prompts` with `image_name` required.

    Args:
        path: The file.
        unique: See `read_prompts`.
        called: See `read_prompts`.

    Returns:
        A frame with `image_name` and `prompt` first, `seed` (int, derived from the row where the file has none) and,
        where present, `fold` (int) and the other columns as str.

    Raises:
        UserError: See `read_prompts`.
    """
    frame = with_keys(read_prompts(path, ("image_name", "prompt"), unique, called), path)
    if "fold" in frame:
        frame["fold"] = _integers(frame["fold"], path, "fold")
    return frame


def has_prompts(path: Path) -> bool:
    """Whether a file is a CSV with a column of prompts, by its first line."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return "prompt" in next(csv.reader(file), [])
    except (OSError, UnicodeDecodeError, csv.Error):
        return False


def header_alone(path: Path) -> bool:
    """Whether a CSV has a header and no row, as `dedupe` writes where it removes nothing."""
    with path.open("rb") as file:
        return len(list(islice(file, 2))) == 1


def is_name(text: str) -> bool:
    """Whether a text may be an image_name."""
    return bool(text.strip()) and not NOT_IN_NAMES.search(text) and len(text.encode()) <= LONGEST_NAME


def check_names(frame: pd.DataFrame, path: Path, unique: bool = True) -> None:
    """Refuses image names that lead out of a folder or, if `unique`, stand twice; raises UserError naming the row."""
    seen: dict[str, int] = {}
    for row, name in enumerate(frame["image_name"], start=1):
        if not is_name(name):
            must = f"must be a file name, or a path below the image folder, of at most {LONGEST_NAME} bytes"
            raise UserError(f"{path}: row {row}: image_name {name!r} {must}; rename it")
        if unique and name in seen:
            raise UserError(f"{path}: row {row}: image_name {name!r} stands in row {seen[name]} too; make it unique")
        seen[name] = row


def with_keys(frame: pd.DataFrame, path: Path) -> pd.DataFrame:
    """Adds `image_name` and `seed` where they are missing: hashes of the row, never of its position.

    Args:
        frame: Rows with `prompt`.
        path: File they came from, for error messages.
    """
    frame = frame.copy()
    if "seed" in frame:
        frame["seed"] = _integers(frame["seed"], path, "seed")
    else:
        names = frame["image_name"] if "image_name" in frame else [""] * len(frame)
        frame["seed"] = [own_seed(name, prompt) for name, prompt in zip(names, frame["prompt"], strict=True)]
    if "image_name" not in frame:
        frame["image_name"] = [own_name(*row) for row in zip(frame["prompt"], frame["seed"], strict=True)]
    front = ["image_name", "prompt"]
    return frame[front + [column for column in frame.columns if column not in front]]


def own_seed(image_name: str, prompt: str) -> int:
    """Seed of a row that has none; `image_name` is "" where it has no name either."""
    return row_seed(f"{image_name}\n{prompt}")


def own_name(prompt: str, seed: int) -> str:
    """Image name of a row that has none."""
    return hash_text(f"{prompt}\n{seed}")[:16] + ".png"


def _integers(column: pd.Series, path: Path, name: str) -> list[int]:
    values = []
    for row, text in enumerate(column, start=1):
        try:
            values.append(int(text))
        except ValueError as error:
            raise UserError(f"{path}: row {row}: {name} {text!r} is not a whole number; correct it") from error
    return values


def hash_text(text: str) -> str:
    """SHA-256 of a text, as hexadecimal digits."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def row_seed(key: str) -> int:
    """A 31-bit seed that depends on `key` alone."""
    return int(hash_text(key)[:8], 16) & 0x7FFFFFFF


def fold_of(group: str, folds: int) -> int:
    """Fold of a group: a hash of its name, so that adding rows never moves an old one."""
    return int(hash_text(group)[8:16], 16) % folds


def stem(image_name: str) -> str:
    """`image_name` without its image suffix, if it has one; other dots belong to the name."""
    return image_name.rpartition(".")[0] if image_name.lower().endswith(IMAGE_SUFFIXES) else image_name


def write_table(path: Path, frame: pd.DataFrame) -> None:
    """Writes a CSV atomically, UTF-8 with `\\n` line ends."""
    with atomic_path(path) as part:
        frame.to_csv(part, index=False, encoding="utf-8", lineterminator="\n")
