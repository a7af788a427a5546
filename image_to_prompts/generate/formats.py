"""Files of rows, whatever they hold: Parquet, CSV, TSV, JSON and text, read as blocks; what is broken is skipped."""

import collections
import csv
import gzip
import io
import itertools
import json
import logging
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import polars as pl
import pyarrow
from pyarrow import parquet

from ..run.errors import UserError

log = logging.getLogger(__name__)
BLOCK = 65_536  # rows
Record = dict[str, Any]
ADVICE = "give --prompt-column, --image-column"
LONGEST = 100_000  # characters of a field; longer ones are a broken quote, not a prompt
NOT_UTF8 = re.compile("[\udc80-\udcff]")  # how Python stands in for such bytes
HALF = re.compile("[\ud800-\udfff]")  # of a character of two
SHOWN = 5  # broken rows that are told one by one


@dataclass
class Reading:
    """One file to read.

    Attributes:
        path: The file, or a folder (DiffusionDB's parts).
        columns: Of a table: its columns that are read, and what they are called here, `prompt` first.
        broken: Number of rows that could not be read.
    """

    path: Path
    columns: dict[str, str] = field(default_factory=lambda: {"prompt": "prompt"})
    broken: int = 0

    def skip(self, row: int, why: str) -> None:
        """Reports a row, from 1, that cannot be read."""
        self.broken += 1
        if self.broken <= SHOWN:
            log.warning("%s: row %d: %s; skipped", self.path, row, why)


def parquet_blocks(
    reading: Reading, columns: dict[str, str], required: Iterable[str], numbered: bool = False
) -> Iterator[pl.DataFrame]:
    """Streams columns of a Parquet file under new names; those not required may be missing."""
    try:
        with parquet.ParquetFile(reading.path) as file:
            there = file.schema_arrow.names
            for column in required:
                if column not in there:
                    found = ", ".join(there)
                    raise UserError(f"{reading.path}: no column {column!r}, found {found}; {ADVICE}")
            chosen, start = [column for column in columns if column in there], 0
            groups = range(file.num_row_groups)  # one by one, for a reader of all keeps all that it has read
            for batch in (one for group in groups for one in file.iter_batches(BLOCK, [group], chosen)):
                batch.validate(full=True)  # else Polars would take any bytes for text
                block = pl.DataFrame(pl.from_arrow(batch)).rename({column: columns[column] for column in chosen})
                types = {name: kind for name, kind in _types().items() if name in block.columns}
                block = block.with_columns(pl.col(name).cast(kind, strict=False) for name, kind in types.items())
                if (kind := block["prompt"].dtype) != pl.String:
                    raise UserError(f"{reading.path}: the prompts are {kind}, not text; correct --prompt-column")
                if numbered:
                    ids = [str(row) for row in range(start + 1, start + 1 + len(block))]
                    block = block.with_columns(pl.Series("source_id", ids, pl.String))
                start += len(block)
                yield block
    except UserError:
        raise
    except Exception as error:  # what pyarrow raises of a damaged file is of many kinds
        said = " ".join(str(error).split())
        raise UserError(f"{reading.path}: not a whole Parquet file: {said}; download it again") from error


def _types() -> dict[str, Any]:
    """Types of the columns besides `prompt`; what is not of its type counts as missing."""
    texts = dict.fromkeys(("image_name", "source_id"), pl.String)
    numbers = dict.fromkeys(("width", "height", "image_nsfw", "prompt_nsfw"), pl.Float64)
    return {**texts, **numbers, "rejected": pl.Boolean, "seed": pl.Int64}


def blocks(rows: Iterator[dict[str, Any]], columns: tuple[str, ...], size: int = 0) -> Iterator[pl.DataFrame]:
    """Rows as blocks; half of a character that stands alone, as JSON may have it, is taken out."""
    types = {column: _types().get(column, pl.String) for column in columns}
    while block := list(itertools.islice(rows, size or BLOCK)):
        lists = {column: [_plain(row[column], column) for row in block] for column in columns}
        yield pl.DataFrame(lists, types)


def _plain(value: Any, column: str) -> Any:
    if column == "seed":
        value = int(value) if isinstance(value, str) and value.isdecimal() else value
        return value if type(value) is int and 0 <= value < 2**63 else None
    return HALF.sub("", value) if isinstance(value, str) and not value.isascii() else value


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path) if path.name.endswith(".gz") else path.open("rb")  # type: ignore[return-value]


def lines(reading: Reading, universal: bool = False) -> Iterator[tuple[int, str]]:
    """Lines of a text file and their numbers, UTF-8 or, with its mark, UTF-16; broken and endless ones are skipped.

    Args:
        reading: The file.
        universal: Whether lines may end with a carriage return alone.
    """
    try:
        with _open(reading.path) as file:
            mark = file.read(2)
        encoding, errors = "utf-8-sig", "surrogateescape"
        if mark in (b"\xff\xfe", b"\xfe\xff"):
            encoding, errors = "utf-16", "replace"
        newline = None if universal else "\n"
        with io.TextIOWrapper(_open(reading.path), encoding, errors, newline) as file:
            for number in itertools.count(1):
                line = part = file.readline(LONGEST)
                if not line:
                    return
                while len(part) == LONGEST and not part.endswith("\n"):
                    part = file.readline(LONGEST)
                if part is not line:
                    reading.skip(number, f"a line of {LONGEST} characters or more")
                elif not line.isascii() and NOT_UTF8.search(line):
                    reading.skip(number, "bytes that are not UTF-8")
                else:
                    yield number, line
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{reading.path}: cannot be read: {error}; download it again") from error


def delimited(reading: Reading) -> Iterator[tuple[int, Record]]:
    """Number and columns of each row of a CSV or TSV with a header."""
    comma = "\t" if ".tsv" in reading.path.name.lower() else ","
    header: list[str] | None = None
    number = 0
    for row in _rows((line for _, line in lines(reading)), comma):
        if isinstance(row, csv.Error):
            number += 1
            reading.skip(number, f"{row}")
            continue
        if not row:
            continue
        if header is None:
            header = row
            for column in reading.columns:
                if column not in header:
                    there = ", ".join(header)[:200]
                    raise UserError(f"{reading.path}: no column {column!r}, found {there}; {ADVICE}")
            positions = {name: header.index(column) for column, name in reading.columns.items()}
            continue
        number += 1
        if len(row) != len(header):
            reading.skip(number, f"{len(row)} fields for {len(header)} columns")
        else:
            yield number, {name: row[position] for name, position in positions.items()}


def _rows(source: Iterator[str], comma: str) -> Iterator[list[str] | csv.Error]:
    """The fields of each row; of a broken one the error, and the lines that its open quote took are read again."""
    again, taken, width = collections.deque[str](), list[str](), 0

    def feed() -> Iterator[str]:
        while (line := again.popleft() if again else next(source, None)) is not None:
            taken.append(line)
            yield line

    csv.field_size_limit(LONGEST)
    while True:
        rows = csv.reader(feed(), delimiter=comma, strict=True)
        try:
            for row in rows:
                width = width or len(row)
                if len(taken) > 1 and len(row) != width:
                    raise csv.Error(f"{len(row)} fields for {width} columns")
                taken.clear()
                yield row
            return
        except csv.Error as error:
            again.extendleft(reversed(taken[1:]))
            taken.clear()
            yield error


def json_lines(reading: Reading) -> Iterator[tuple[int, Record]]:
    for number, line in lines(reading):
        if line.strip():
            try:
                yield number, _fields(json.loads(line), reading.columns)
            except (ValueError, RecursionError) as error:
                reading.skip(number, str(error))


def json_list(reading: Reading) -> Iterator[tuple[int, Record]]:
    found = whole_json(reading.path)
    if not isinstance(found, list):
        raise UserError(f"{reading.path}: not a list of objects; give JSON lines, or a list")
    for number, record in enumerate(found, start=1):
        try:
            alone = isinstance(record, str) and len(reading.columns) == 1
            yield number, {"prompt": record} if alone else _fields(record, reading.columns)
        except ValueError as error:
            reading.skip(number, str(error))


def _fields(record: Any, columns: dict[str, str]) -> Record:
    for column, name in columns.items():
        if name in ("prompt", "image_name") and not (isinstance(record, dict) and isinstance(record.get(column), str)):
            raise ValueError(f"no text called {column!r}; {ADVICE}")
    found = {name: record.get(column) for column, name in columns.items()}
    return {name: value if name == "seed" or value is None else str(value) for name, value in found.items()}


def text_lines(reading: Reading) -> Iterator[tuple[int, Record]]:
    if len(reading.columns) > 1:
        raise UserError(f"{reading.path}: a text file has no columns; leave --image-column out")
    for number, line in lines(reading, universal=True):
        if line.strip():
            yield number, {"prompt": line.rstrip("\n")}


def table(reading: Reading) -> Iterator[pl.DataFrame]:
    """The columns of any CSV, TSV, JSON lines, JSON list, Parquet or text file (a prompt a line), also .gz."""
    if _suffix(reading.path) == ".parquet":
        yield from parquet_blocks(reading, reading.columns, reading.columns, numbered=True)
        return
    if _suffix(reading.path) not in TABLES:
        raise UserError(f"{reading.path}: ends with none of {', '.join([*TABLES, '.parquet'])}; rename or convert it")
    rows = ({**record, "source_id": str(number)} for number, record in TABLES[_suffix(reading.path)](reading))
    yield from blocks(rows, (*reading.columns.values(), "source_id"))


def _suffix(path: Path) -> str:
    return Path(path.name.removesuffix(".gz")).suffix.lower()


def header(path: Path) -> list[str]:
    """The names of a table's columns: of JSON lines those of the first."""
    if _suffix(path) == ".parquet":
        try:
            return parquet.read_schema(path).names
        except (OSError, pyarrow.ArrowException) as error:
            raise UserError(f"{path}: not a whole Parquet file: {error}; download it again") from error
    _, line = next(lines(Reading(path)), (0, ""))
    if _suffix(path) == ".jsonl":
        try:
            return list(json.loads(line))
        except (ValueError, TypeError, RecursionError) as error:
            raise UserError(f"{path}: not JSON lines: {error}; download it again") from error
    return next(csv.reader([line], delimiter="\t" if ".tsv" in path.name.lower() else ","), [])


TABLES: dict[str, Callable[[Reading], Iterator[tuple[int, Record]]]] = {
    **{".csv": delimited, ".tsv": delimited, ".txt": text_lines},
    **{".jsonl": json_lines, ".json": json_list},
}


def whole_json(path: Path) -> Any:
    try:
        with _open(path) as file:
            return json.load(file)
    except (OSError, EOFError, ValueError, RecursionError, zlib.error) as error:
        raise UserError(f"{path}: not JSON: {error}; download it again") from error
