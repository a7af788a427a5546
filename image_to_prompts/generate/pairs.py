"""Images with tables of their prompts, as others publish them: `generate --source pairs --input FOLDER`.

A table may name each row's image, number the images (row 0 is 0.png), or hold them (Parquet, the Hugging Face hub's
usual form). Its columns are found by their names, its images below the folder in which it lies: absolute paths in it
are those of another machine.
"""

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from itertools import takewhile
from pathlib import Path, PurePosixPath
from typing import Any

import polars as pl

from ..data import images
from ..data.metadata import is_name
from ..pipeline import PAIRS
from ..run import archives
from ..run.errors import UserError
from . import formats
from .formats import Reading

log = logging.getLogger(__name__)
ENDS = (".csv", ".tsv", ".jsonl", ".parquet")
# Names of columns, in small letters, the first that is there counts.
COLUMNS = {
    "prompt": ("prompt", "text", "caption", "description", "prompts"),
    "image_name": ("image_path", "image_file", "file_name", "filename", "image_name", "path", "file", "image"),
    "seed": ("seed",),
    "model": ("model", "model_name"),
    "sampler": ("sampler", "scheduler"),
}
UNKNOWN = "unknown"
MODELS = {one.rpartition("/")[2]: "Stable Diffusion 2" for one in PAIRS}


def tables(folder: Path) -> list[Path]:
    """The tables in a folder and below it."""
    return sorted(path for path in images.visible(folder) if path.suffix.lower() in ENDS)


def places(folder: Path) -> list[Path]:
    """The tables in a folder and below it, and the folders of all files: these change when an image comes or goes."""
    return [*tables(folder), *sorted({folder, *(path.parent for path in images.visible(folder))})]


def read(reading: Reading) -> Iterator[pl.DataFrame]:
    """All rows of all tables of a folder that name an image that is there.

    Raises:
        UserError: If no table has prompts and images.
    """
    root, refused = reading.path, []
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; give the folder of the images and of their table")
    inside = [path.relative_to(root).as_posix() for path in images.find(root)]
    by_name = {name.rpartition(".")[0]: name for name in inside} | {name: name for name in inside}
    known = {"model": MODELS.get(root.name, UNKNOWN), "sampler": UNKNOWN}
    every = tables(root)
    for table in every:
        header = formats.header(table)
        held = list(archives.index(table)) if table.suffix == ".parquet" else []
        columns = _columns(header, reading.columns, but="image_name" if held else "")
        find = _finder(table, root, held, "image_name" in columns.values(), by_name)
        if "prompt" not in columns.values() or find is None:
            refused.append(f"{table.relative_to(root)} ({', '.join(header)[:200]})")
            continue
        one = Reading(table, columns)
        for block in formats.table(one):
            rows = [int(row) - 1 for row in block["source_id"]]
            names = block["image_name"].to_list() if "image_name" in block.columns else rows
            found = pl.Series("image_name", list(map(find, rows, names)), pl.String)
            good = pl.Series([is_name(name) for name in found], dtype=pl.Boolean)
            for row in (~good).arg_true():
                one.skip(rows[row] + 1, "no image of this row")
            more = [pl.lit(value).alias(name) for name, value in known.items() if name not in block.columns]
            yield block.with_columns(found, found.alias("source_id"), *more).filter(good)
        reading.broken += one.broken
    if len(refused) == len(every):
        said = "; ".join(refused) or "no CSV, TSV, JSON lines or Parquet file"
        raise UserError(
            f"{root}: no table of prompts with their images: {said}; name its columns prompt and image_path"
        )
    if refused:
        log.warning("%s: left out, for no prompts or images are named in it: %s", root, "; ".join(refused))


def _columns(header: list[str], asked: dict[str, str], but: str) -> dict[str, str]:
    """The columns that are read of a table, asked for or with usual names, and what they are called here; not `but`."""
    small = {name.lower(): name for name in reversed(header)}
    names = COLUMNS | {ours: (name.lower(),) for name, ours in asked.items() if name != "prompt"}
    first = ((ours, next((small[name] for name in known if name in small), "")) for ours, known in names.items())
    return {name: ours for ours, name in first if name and ours != but}


def _finder(
    table: Path, root: Path, held: list[str], named: bool, by_name: dict[str, str]
) -> Callable[[int, Any], str] | None:
    """What finds a row's image by the row's number, from 0, and what the table calls it; None if nothing can.

    Args:
        table: The table.
        root: The folder of all.
        held: The images that the table itself holds, row by row.
        named: Whether it names images.
        by_name: The images below `root`, with and without suffix.
    """
    above = table.parent.relative_to(root)
    if held:
        return lambda row, _: (above / table.name / held[row]).as_posix()
    if named:
        return lambda _, said: _resolved(said, above, by_name)
    numbered = _numbered(table, by_name.values())
    return (lambda row, _: numbered.get(row, "")) if numbered else None


def _resolved(said: Any, above: Path, by_name: dict[str, str]) -> str:
    """The image that a table calls so: its path, or the end of it, below the table's folder; "" if there is none."""
    parts = PurePosixPath(str(said or "").replace("\\", "/")).parts
    ends = ((above / Path(*parts[start:])).as_posix() for start in range(len(parts)))
    return next((by_name[end] for end in ends if end in by_name), "")


def _numbered(table: Path, names: Iterable[str]) -> dict[int, str]:
    """The image of each row, from 0, in a folder of numbered images; of several the one called like the table."""
    folders: dict[str, dict[str, str]] = defaultdict(dict)
    for name in set(names):
        folders[str(PurePosixPath(name).parent)][PurePosixPath(name).stem] = name
    numbered = {name: files for name, files in folders.items() if all(stem.isdecimal() for stem in files)}
    alike = {name: _in_common(table.stem, PurePosixPath(name).name) for name in numbered}
    best = [name for name, common in alike.items() if common == max(alike.values())]
    if len(best) != 1:
        return {}
    files = {int(stem): name for stem, name in numbered[best[0]].items()}
    first = min(files)  # some count from 1
    return {number - (first == 1): name for number, name in files.items()}


def _in_common(one: str, other: str) -> int:
    """How many letters two names begin with alike."""
    return len(list(takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))))
