"""The catalogue of metadata CSVs: where their prompts come from, and the commands that rebuild them.

image-to-prompts catalogue [--data data_meta]
"""

from pathlib import Path

import pandas as pd

from ..run.errors import UserError
from . import metadata

COLUMNS = ("file", "reference", "source", "where", "licence", "rows", "generate", "dedupe", "note")


def read(folder: Path) -> pd.DataFrame:
    """Reads `catalogue.csv`.

    Returns:
        `COLUMNS` as text, and `found`: the rows of each file that is there, -1 of one that cannot be read, 0 of others.

    Raises:
        UserError: If it is missing or lacks a column.
    """
    frame = metadata.read_table(folder / "catalogue.csv", COLUMNS)
    return frame.assign(found=[_rows(folder / name) for name in frame["file"]])


def _rows(path: Path) -> int:
    if not path.is_file():
        return 0
    try:
        return len(metadata.read_table(path, ("image_name", "prompt")))
    except UserError:
        return -1


def describe(frame: pd.DataFrame) -> str:
    """What is there and what is missing, as text, with the commands for what is missing."""
    lines = []
    for row in frame.to_dict("records"):
        there = {0: "missing", -1: "there, but no metadata CSV"}.get(row["found"], f"there, {row['found']:,} rows")
        expected = f", about {int(row['rows']):,} rows expected" if row["rows"].isdigit() and not row["found"] else ""
        lines += [f"{row['file']}: {there}{expected}", f"    {row['source']}; {row['where']}; {row['licence']}"]
        if not row["found"]:
            lines += [f"    $ {command}" for command in (*row["generate"].split(" && "), row["dedupe"]) if command]
    return "\n".join(lines)
