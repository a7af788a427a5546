"""Prompts from public sources: `generate --source NAME --input FILE...` reads, cleans and writes them.

readers.py  the sources' native formats
rules.py    what cleans their prompts

Work goes block by block, so that millions of rows need no more memory than thousands, and a killed run goes on after
the last whole block. Of equal prompts the first stays, but where each row is an image.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from .. import metadata, weights
from ..errors import UserError
from ..files import Stamp, atomic_path, write_array, write_json
from ..progress import progress
from . import readers, rules
from .readers import SOURCES, Reading, Source

if TYPE_CHECKING:
    import polars as pl

__all__ = ["SOURCES", "collect", "report_path"]
log = logging.getLogger(__name__)
COLUMNS = ("image_name", "prompt", "seed", "source", "source_id")


def report_path(out: Path) -> Path:
    """`<name>.rules.json` beside `<name>.csv`."""
    return out.with_suffix(".rules.json")


def collect(
    source: str,
    inputs: tuple[str, ...],
    out: Path,
    name: str = "",
    column: str = "prompt",
    rule_names: tuple[str, ...] = (),
    limit: int = 0,
) -> pd.DataFrame:
    """Streams files of a source into a CSV of prompts: image_name, prompt, seed, source, source_id.

    Args:
        source: One of `SOURCES`.
        inputs: Files, folders of DiffusionDB's parts, or `hf://datasets/<owner>/<name>/<path>`.
        out: CSV to write; `report_path` says what the rules did.
        name: What the column `source` says; "" for `source`.
        column: Column of the prompts, for the source `table`.
        rule_names: Rules in their order, names or `file.py:function`; none: the source's usual ones.
        limit: Stop after so many rows; 0: never.

    Returns:
        rule, rows, changed, dropped, examples: the rows that were broken, what each rule did, and the repeats.

    Raises:
        UserError: On files or rules that cannot be used, or if no row is left.
    """
    kind = SOURCES[source]
    paths = [path for given in inputs for path in weights.dataset_files(given)]
    names = rule_names or kind.rules
    chosen = {one: rules.load(one) for one in names}
    own = [Path(one.rpartition(":")[0]) for one in names if one not in rules.RULES]
    settings = {"source": source, "name": name, "column": column, "rules": names, "limit": limit}
    settings["files"] = [(path.name, *(_facts(path))) for path in paths]
    stamp = Stamp(out.with_name(f".{out.stem}.done"), settings, own)
    if stamp.is_current():
        log.info("%s is up to date", out)
        return _frame(json.loads(report_path(out).read_text(encoding="utf-8")))
    work, seen, reports, total = stamp.work_folder(), Seen(), [], 0
    readings = [Reading(path, column) for path in paths]
    for number, block in enumerate(progress(_read(kind, readings), f"blocks of {name or source}", _blocks(paths))):
        part = work / f"part-{number:06d}.csv"
        if not part.with_suffix(".json").is_file():
            _write_block(block, kind, chosen, name or source, seen, part, limit - total if limit else len(block))
        hashes = np.load(part.with_suffix(".npy"))
        seen.add(hashes)
        total += len(hashes)
        reports.append(json.loads(part.with_suffix(".json").read_text(encoding="utf-8")))
        if limit and total >= limit:
            break
    if not total:
        raise UserError(f"{paths[0]}: no prompt is left; look at --rules and --prompt-column")
    report = rules.merge(reports)
    broken = sum(reading.broken for reading in readings)
    told = {"rule": "broken", "rows": report[0]["rows"] + broken, "changed": 0, "dropped": broken, "examples": []}
    report = [told, *report]
    _join([work / f"part-{number:06d}.csv" for number in range(len(reports))], out)
    write_json(report_path(out), report)
    stamp.write([out, report_path(out)])
    log.info("%s: %d prompts\n%s", out, total, _frame(report).iloc[:, :4].to_string(index=False))
    return _frame(report)


def _blocks(paths: list[Path]) -> int | None:
    """About how many blocks there will be."""
    try:
        counts = [readers.count(path) for path in paths]
    except (OSError, ValueError):  # what is wrong with a file, its reader says
        return None
    return None if None in counts else sum(-(-rows // readers.BLOCK) for rows in counts)


def _facts(path: Path) -> tuple[int, int]:
    """Size and time of the last change: hashing terabytes of images would take hours."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def _frame(report: list[dict[str, Any]]) -> pd.DataFrame:
    return pd.DataFrame(report, columns=["rule", "rows", "changed", "dropped", "examples"])


def _read(kind: Source, readings: list[Reading]) -> Iterator[pl.DataFrame]:
    for reading in readings:
        yield from kind.read(reading)


class Seen:
    """Which texts were there already, by 8 bytes of each: a million need 8 MB."""

    def __init__(self) -> None:
        self._hashes = np.empty(0, np.uint64)

    def add(self, hashes: np.ndarray) -> None:
        """Takes sorted hashes that are not there yet."""
        self._hashes = np.insert(self._hashes, np.searchsorted(self._hashes, hashes), hashes)

    def first(self, hashes: np.ndarray) -> np.ndarray:
        """Which of a block's hashes are neither there nor earlier in the block: bool (n,)."""
        found = np.zeros(len(hashes), bool)
        found[np.unique(hashes, return_index=True)[1]] = True
        where = np.minimum(np.searchsorted(self._hashes, hashes), max(len(self._hashes) - 1, 0))
        return found & (self._hashes[where] != hashes) if len(self._hashes) else found


def _write_block(
    block: pl.DataFrame, kind: Source, chosen: dict[str, rules.Rule], name: str, seen: Seen, part: Path, most: int
) -> None:
    """Cleans a block, and writes its rows, the hashes of their keys, and last what the rules did."""
    import polars as pl

    block, report = rules.clean(block, chosen)
    keys = block["image_name" if kind.pairs else "prompt"].to_numpy().astype(object)
    hashes = pd.util.hash_array(keys, categorize=False)
    first = seen.first(hashes)
    examples = [(prompt, None) for prompt in block.filter(pl.Series(~first))["prompt"].head(rules.EXAMPLES)]
    counts = {"rows": len(block), "changed": 0, "dropped": int((~first).sum())}
    report.append({"rule": "repeats", **counts, "examples": examples})
    block, hashes = block.filter(pl.Series(first)).head(most), hashes[first][:most]
    block = block.with_columns(source=pl.lit(name))
    prompts = block["prompt"].to_list()
    names = block["image_name"].to_list() if "image_name" in block.columns else [""] * len(prompts)
    if "seed" not in block.columns:
        seeds = [metadata.row_seed(f"{one}\n{prompt}") for one, prompt in zip(names, prompts, strict=True)]
        block = block.with_columns(pl.Series("seed", seeds, pl.Int64))
    if "image_name" not in block.columns:
        names = [
            metadata.hash_text(f"{prompt}\n{seed}")[:16] + ".png"
            for prompt, seed in zip(prompts, block["seed"].to_list(), strict=True)
        ]
        block = block.with_columns(pl.Series("image_name", names, pl.String))
    with atomic_path(part) as file:
        block.select(COLUMNS).write_csv(file, include_header=False)
    write_array(part.with_suffix(".npy"), np.sort(hashes))
    write_json(part.with_suffix(".json"), report)


def _join(parts: list[Path], out: Path) -> None:
    """Puts the blocks' rows into one CSV."""
    with atomic_path(out) as whole, whole.open("wb") as file:
        file.write((",".join(COLUMNS) + "\n").encode())
        for part in parts:
            with part.open("rb") as rows:
                shutil.copyfileobj(rows, file)
