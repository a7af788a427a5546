"""The catalogue of metadata CSVs: where their prompts come from, and the commands that rebuild them.

image-to-prompts catalogue [--data data_meta]
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from . import metadata

COLUMNS = ("file", "reference", "source", "where", "licence", "rows", "generate", "dedupe", "note")


@dataclass
class Config:
    """Lists the metadata CSVs of the catalogue, and how to rebuild those that are missing."""

    data: Path = Path("data_meta")
    """Folder of catalogue.csv and of the metadata CSVs."""


def read(folder: Path) -> pd.DataFrame:
    """Reads `catalogue.csv`.

    Returns:
        `COLUMNS` as text, and `found`: the rows of each file that is there, 0 of the others.

    Raises:
        UserError: If it is missing or lacks a column.
    """
    frame = metadata.read_table(folder / "catalogue.csv", COLUMNS)
    paths = [folder / name for name in frame["file"]]
    return frame.assign(found=[len(metadata.read_prompts(path)) if path.is_file() else 0 for path in paths])


def describe(frame: pd.DataFrame) -> str:
    """What is there and what is missing, as text, with the commands for what is missing."""
    lines = []
    for row in frame.to_dict("records"):
        there = f"there, {row['found']:,} rows" if row["found"] else "missing"
        expected = f", about {int(row['rows']):,} rows expected" if row["rows"] and not row["found"] else ""
        lines += [f"{row['file']}: {there}{expected}", f"    {row['source']}; {row['where']}; {row['licence']}"]
        if not row["found"]:
            lines += [f"    $ {command}" for command in (*row["generate"].split(" && "), row["dedupe"]) if command]
    return "\n".join(lines)
