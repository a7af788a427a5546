"""Prompts from public sources: `generate --source NAME --input FILE...` reads, cleans and writes them.

readers.py  the sources' native layouts, over the file formats of formats.py
rules.py    what cleans their prompts

Work goes block by block, so that millions of rows need no more memory than thousands, and a killed run continues after
the last whole block. Of equal prompts the first stays, but where each row is an image.
"""

import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd
import polars as pl

from ..data import metadata
from ..models import hub
from ..run.errors import UserError
from ..run.files import atomic_path, write_array, write_json
from ..run.progress import progress
from ..run.resume import Stamp, is_sealed, seal
from . import formats, rules
from .readers import SOURCES, Reading, Source

__all__ = ["SOURCES", "collect", "report_path"]
log = logging.getLogger(__name__)
FOLDERS = ("images", "pairs")  # sources of which each is one folder
COLUMNS = ("image_name", "prompt", "seed", "source", "source_id")


def report_path(out: Path) -> Path:
    """`<name>.rules.json` beside `<name>.csv`."""
    return out.with_suffix(".rules.json")


def collect(
    source: str,
    inputs: tuple[str, ...],
    out: Path,
    name: str = "",
    columns: Mapping[str, str] = MappingProxyType({"prompt": "prompt"}),
    rule_names: tuple[str, ...] = (),
    limit: int = 0,
) -> pd.DataFrame:
    """Streams files of a source into a CSV of prompts: image_name, prompt, seed, source, source_id.

    Args:
        source: One of `SOURCES`.
        inputs: Files, folders of DiffusionDB's parts, or `hf://datasets/<owner>/<name>/<path>`.
        out: CSV to write; `report_path` says what the rules did.
        name: What the column `source` says; "" for `source`.
        columns: Of a table its column of prompts, as `prompt`, and perhaps its column of images, as `image_name`.
        rule_names: Rules in their order, names or `file.py:function`; none: the source's usual ones. `blank` always
            comes last, since no later stage takes a blank prompt.
        limit: Stop after so many rows; 0: never.

    Returns:
        rule, rows, changed, dropped, examples: the rows that were broken, what each rule did, and the repeats.

    Raises:
        UserError: On files or rules that cannot be used, or if no row is left.
    """
    kind = SOURCES[source]
    paths = [path for given in inputs for path in hub.dataset_files(given)]
    if source in FOLDERS:
        if len(paths) > 1:
            raise UserError(f"--source {source}: takes one folder, for images are named below it; give the one above")
        if out.resolve().is_relative_to(paths[0].resolve()):
            raise UserError(f"{out}: lies in the folder that is read; choose another --out")
    names = rule_names or kind.rules
    names = (*(one for one in names if one != "blank"), "blank")
    chosen = {one: rules.load(one) for one in names}
    own = [Path(one.rpartition(":")[0]) for one in names if one not in rules.RULES]
    settings = {"source": source, "name": name, "columns": dict(columns), "rules": names, "limit": limit}
    files = [(path, file) for path in paths for file in kind.files(path)]
    settings["files"] = [(path.name, str(file.relative_to(path)), *_facts(file)) for path, file in files]
    stamp = Stamp(out.with_name(f".{out.stem}.done"), "generate", settings, own)
    if stamp.is_current():
        log.info("%s is up to date", out)
        return _frame(json.loads(report_path(out).read_text(encoding="utf-8")))
    stamp.claim([out, report_path(out)], reads=paths)
    work, reports, total = stamp.work_folder(), [], 0
    pairs = kind.pairs or "image_name" in columns.values()
    seen = Seen(("image_name",) if pairs else ("prompt", "image_name"))
    readings = [Reading(path, dict(columns)) for path in paths]
    what = f"blocks of {name or source}"
    for number, block in enumerate(progress(read_blocks(kind, readings), what, _blocks(kind, paths))):
        part = work / f"part-{number:06d}.csv"
        if not is_sealed(part, part.with_suffix(".npy"), part.with_suffix(".json")):
            write_block(block, chosen, name or source, seen, part, limit - total if limit else len(block), kind.more)
        hashes = np.load(part.with_suffix(".npy"))
        seen.add(hashes)
        total += hashes.shape[1]
        reports.append(json.loads(part.with_suffix(".json").read_text(encoding="utf-8")))
        if limit and total >= limit:
            break
    if not total:
        raise UserError(f"{paths[0]}: no prompt is left; look at --rules and --prompt-column")
    report = rules.merge(reports)
    broken = sum(reading.broken for reading in readings)
    told = {"rule": "broken", "rows": report[0]["rows"] + broken, "changed": 0, "dropped": broken, "examples": []}
    report = [told, *report]
    _join([work / f"part-{number:06d}.csv" for number in range(len(reports))], [*COLUMNS, *kind.more], out)
    write_json(report_path(out), report)
    stamp.write([out, report_path(out)])
    log.info("%s: %d prompts\n%s", out, total, _frame(report).iloc[:, :4].to_string(index=False))
    return _frame(report)


def _blocks(kind: Source, paths: list[Path]) -> int | None:
    """About how many blocks there will be."""
    try:
        counts = [kind.count(path) for path in paths]
    except Exception:  # what is wrong with a file, its reader says
        return None
    known = [rows for rows in counts if rows is not None]
    return sum(-(-rows // (kind.block or formats.BLOCK)) for rows in known) if len(known) == len(counts) else None


def _facts(path: Path) -> tuple[int, ...]:
    """Size and time of the last change, of a JSON beside its images of their folder too; hashing would take hours."""
    found = path.stat()
    beside = [path.parent.stat().st_mtime_ns] if path.match("part-*.json") else []
    return (found.st_size, found.st_mtime_ns, *beside)


def _frame(report: list[dict[str, Any]]) -> pd.DataFrame:
    return pd.DataFrame(report, columns=["rule", "rows", "changed", "dropped", "examples"])


def read_blocks(kind: Source, readings: list[Reading]) -> Iterator[pl.DataFrame]:
    """The rows of all files of a source, block by block."""
    for reading in readings:
        yield from kind.read(reading)


class Seen:
    """What was there already, by 8 bytes of each key: a million rows need 8 MB a key."""

    def __init__(self, keys: Sequence[str]) -> None:
        """Takes the columns none of whose values may stand twice."""
        self.keys = keys
        self._hashes = [np.empty(0, np.uint64) for _ in keys]

    def add(self, hashes: np.ndarray) -> None:
        """Takes what `first` returned of rows that stay."""
        for number, some in enumerate(np.sort(hashes)):
            self._hashes[number] = np.insert(self._hashes[number], np.searchsorted(self._hashes[number], some), some)

    def first(self, frame: pl.DataFrame) -> tuple[np.ndarray, np.ndarray]:
        """Which rows repeat none that is there and none of the frame that stays: bool (n,); uint64 (keys, n) hashes."""
        columns = [frame[key].fill_null("").to_numpy().astype(object) for key in self.keys]
        hashes = np.stack([pd.util.hash_array(column, categorize=False) for column in columns])
        new = np.ones(len(frame), bool)
        for some, there in zip(hashes, self._hashes, strict=True):
            if len(there):  # sorted, so that looking up a block takes no time that grows with what is there
                new &= there[np.minimum(np.searchsorted(there, some), len(there) - 1)] != some
        own: list[set[int]] = [set() for _ in self.keys]
        for row in np.flatnonzero(new):
            values = hashes[:, row].tolist()
            if any(value in some for value, some in zip(values, own, strict=True)):
                new[row] = False
            else:
                for value, some in zip(values, own, strict=True):
                    some.add(value)
        return new, hashes


def write_block(
    block: pl.DataFrame,
    chosen: dict[str, rules.Rule],
    name: str,
    seen: Seen,
    part: Path,
    most: int,
    more: Sequence[str] = (),
) -> None:
    """Cleans a block, and writes its rows, the hashes of their keys, and last what the rules did."""
    block, report = rules.clean(block, chosen)
    block = _with_keys(block)
    first, hashes = seen.first(block)
    examples = [(prompt, None) for prompt in block.filter(pl.Series(~first))["prompt"].head(rules.EXAMPLES)]
    counts = {"rows": len(block), "changed": 0, "dropped": int((~first).sum())}
    report.append({"rule": "repeats", **counts, "examples": examples})
    block = block.filter(pl.Series(first)).head(most).with_columns(source=pl.lit(name))
    with atomic_path(part) as file:
        block.select(*COLUMNS, *more).write_csv(file, include_header=False)
    write_array(part.with_suffix(".npy"), hashes[:, first][:, :most])
    write_json(part.with_suffix(".json"), report)
    seal(part, part.with_suffix(".npy"), part.with_suffix(".json"))


def _with_keys(block: pl.DataFrame) -> pl.DataFrame:
    """Adds `image_name` and `seed` where a row has none, as `metadata.with_keys` does."""
    none = [None] * len(block)
    names, seeds = (block[key].to_list() if key in block.columns else none for key in ("image_name", "seed"))
    prompts = block["prompt"].to_list()
    seeds = [
        metadata.own_seed(name or "", prompt) if seed is None else seed
        for name, prompt, seed in zip(names, prompts, seeds, strict=True)
    ]
    names = [name or metadata.own_name(prompt, seed) for name, prompt, seed in zip(names, prompts, seeds, strict=True)]
    return block.with_columns(pl.Series("seed", seeds, pl.Int64), pl.Series("image_name", names, pl.String))


def _join(parts: list[Path], columns: list[str], out: Path) -> None:
    """Puts the blocks' rows into one CSV."""
    with atomic_path(out) as whole, whole.open("wb") as file:
        file.write((",".join(columns) + "\n").encode())
        for part in parts:
            with part.open("rb") as rows:
                shutil.copyfileobj(rows, file)
