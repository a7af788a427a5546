"""Readers of public sources in their native formats: each streams a file as blocks of rows, and skips what is broken.

A block is a Polars frame with `prompt` and `source_id`, the source's own name of the row, and what else the source
says: `image_name`, `seed`, `width`, `height`, `image_nsfw`, `prompt_nsfw`, `rejected`.
"""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import logging
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from ..run.errors import UserError

if TYPE_CHECKING:
    import polars as pl

log = logging.getLogger(__name__)
BLOCK = 65_536  # rows
LONGEST = 100_000  # characters of a field; longer ones are a broken quote, not a prompt
NOT_UTF8 = re.compile("[\udc80-\udcff]")  # how Python stands in for such bytes
HALF = re.compile("[\ud800-\udfff]")  # of a character of two
LARGEST = 100_000_000  # bytes of the JSON of a part; real ones have about 300,000
SHOWN = 5  # broken rows that are told one by one


@dataclass
class Reading:
    """One file to read.

    Attributes:
        path: The file, or a folder (DiffusionDB's parts).
        column: Column of the prompts, for `table`.
        broken: Number of rows that could not be read.
    """

    path: Path
    column: str = "prompt"
    broken: int = field(default=0)

    def skip(self, row: int, why: str) -> None:
        """Reports a row, from 1, that cannot be read."""
        self.broken += 1
        if self.broken <= SHOWN:
            log.warning("%s: row %d: %s; skipped", self.path, row, why)


class Source(NamedTuple):
    """A kind of source.

    Attributes:
        read: Streams a file of it.
        rules: Names of the rules that clean it, unless others are asked for.
        pairs: Whether each row is an image that exists, so that equal prompts are no repeats.
    """

    read: Callable[[Reading], Iterator[pl.DataFrame]]
    rules: tuple[str, ...]
    pairs: bool = False


def diffusiondb(reading: Reading) -> Iterator[pl.DataFrame]:
    """DiffusionDB's metadata.parquet and metadata-large.parquet (Wang et al. 2022)."""
    kept = {"image_name": "image_name", "prompt": "prompt", "seed": "seed", "width": "width", "height": "height"}
    kept |= {"image_nsfw": "image_nsfw", "prompt_nsfw": "prompt_nsfw"}
    start = 0
    for block in _parquet(reading, kept, ("image_name", "prompt")):
        good = ~block["image_name"].fill_null("").str.contains(r"^\s*\.{0,2}$|[/\\]")
        for row in (~good).arg_true():
            reading.skip(start + row + 1, f"image_name {block['image_name'][row]!r} is no bare file name")
        start += len(block)
        yield block.with_columns(source_id=block["image_name"]).filter(good)


def laion_coco(reading: Reading) -> Iterator[pl.DataFrame]:
    """LAION-COCO's parquet files: the best of the captions that BLIP wrote of each web image."""
    kept = {"top_caption": "prompt", "URL": "source_id", "punsafe": "image_nsfw"}
    yield from _parquet(reading, kept, ("top_caption", "URL"))


def captions_tsv(reading: Reading) -> Iterator[pl.DataFrame]:
    """Conceptual Captions: without header, caption and address (3M) or address and caption (12M), nothing quoted."""

    def rows() -> Iterator[dict[str, Any]]:
        for number, line in _lines(reading):
            parts = line.rstrip("\r\n").split("\t")
            addresses = [part.startswith(("http://", "https://")) for part in parts]
            if len(parts) < 2 or not any(addresses[:2]):
                reading.skip(number, "no caption and address with a tab between them")
                continue
            yield {"prompt": parts[1 if addresses[0] else 0], "source_id": parts[0 if addresses[0] else 1]}

    yield from _blocks(rows(), ("prompt", "source_id"))


def captions_json(reading: Reading) -> Iterator[pl.DataFrame]:
    """COCO's and VizWiz's annotations; VizWiz says which captions it rejected or canned before."""
    found = _json(reading.path)
    annotations = found.get("annotations") if isinstance(found, dict) else None
    if not isinstance(annotations, list):
        raise UserError(f"{reading.path}: no list called annotations; give a captions JSON of COCO or VizWiz")

    def rows() -> Iterator[dict[str, Any]]:
        for number, one in enumerate(annotations, start=1):
            if not isinstance(one, dict) or not isinstance(one.get("caption"), str):
                reading.skip(number, "an annotation without caption")
                continue
            rejected = bool(one.get("is_rejected") or one.get("is_precanned"))
            yield {"prompt": one["caption"], "source_id": str(one.get("id", number)), "rejected": rejected}

    yield from _blocks(rows(), ("prompt", "source_id", "rejected"))


def diffusiondb_parts(reading: Reading) -> Iterator[pl.DataFrame]:
    """DiffusionDB's image parts, zip files or folders, by their JSON: p is the prompt, se the seed."""
    if not files(reading.path):
        raise UserError(f"{reading.path}: no part-*.zip and no part-*.json in it; give DiffusionDB's image parts")

    def rows() -> Iterator[dict[str, Any]]:
        for number, part in enumerate(files(reading.path), start=1):
            try:
                records, images = _part(part)
            except (OSError, EOFError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
                reading.skip(number, f"{part.name}: {error}")
                continue
            for name, record in records.items():
                said = record.get("p") if isinstance(record, dict) else None
                if name not in images or name != Path(name).name or "\\" in name or not isinstance(said, str):
                    reading.skip(number, f"{part.name}: {name} has no image or no prompt")
                    continue
                yield {"prompt": said, "source_id": name, "image_name": name, "seed": record.get("se")}

    yield from _blocks(rows(), ("prompt", "source_id", "image_name", "seed"))


def table(reading: Reading) -> Iterator[pl.DataFrame]:
    """Any CSV, TSV, JSON lines, JSON list, Parquet or text file (a prompt a line), also .gz, by its prompt column."""
    suffix = Path(reading.path.name.removesuffix(".gz")).suffix.lower()
    if suffix == ".parquet":
        yield from _parquet(reading, {reading.column: "prompt"}, (reading.column,), numbered=True)
        return
    readers = {".csv": _delimited, ".tsv": _delimited, ".jsonl": _json_lines, ".json": _json_list, ".txt": _text}
    if suffix not in readers:
        raise UserError(f"{reading.path}: ends with none of {', '.join([*readers, '.parquet'])}; rename or convert it")
    rows = ({"prompt": text, "source_id": str(number)} for number, text in readers[suffix](reading))
    yield from _blocks(rows, ("prompt", "source_id"))


MENDED = ("mojibake", "html", "unicode", "interface", "urls")
USUAL = ("rejected", *MENDED, "nsfw", "english", "truncate", "blank")
FILTER = ("mojibake", "unicode", "words", "characters", "size", "nsfw", "blank")  # the reference's
SOURCES = {
    "diffusiondb": Source(diffusiondb, FILTER),
    "diffusiondb-parts": Source(diffusiondb_parts, (*MENDED, "blank"), pairs=True),
    "captions-tsv": Source(captions_tsv, USUAL),
    "laion-coco": Source(laion_coco, USUAL),
    "captions-json": Source(captions_json, USUAL),
    "table": Source(table, USUAL),
}


def files(path: Path) -> list[Path]:
    """The files that a file or a folder of DiffusionDB's parts stands for."""
    return sorted([*path.rglob("part-*.zip"), *path.rglob("part-*.json")]) if path.is_dir() else [path]


def count(path: Path) -> int | None:
    """About how many rows a file has, where that is quickly told: for the bar that shows how far a run is."""
    if path.is_dir():
        return 1000 * len(files(path))
    if path.suffix == ".parquet":
        from pyarrow import parquet

        return parquet.read_metadata(path).num_rows
    if path.suffix not in (".csv", ".tsv", ".jsonl", ".txt"):
        return None
    with path.open("rb") as file:
        return sum(part.count(b"\n") for part in iter(lambda: file.read(2**20), b"")) + 1


def _parquet(
    reading: Reading, columns: dict[str, str], required: Iterable[str], numbered: bool = False
) -> Iterator[pl.DataFrame]:
    """Streams columns of a Parquet file under new names; those not required may be missing."""
    import polars as pl
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(reading.path) as file:
            there = file.schema_arrow.names
            for column in required:
                if column not in there:
                    raise UserError(
                        f"{reading.path}: no column {column!r}, found {', '.join(there)}; correct --source "
                        "or --prompt-column"
                    )
            chosen, start = [column for column in columns if column in there], 0
            groups = range(file.num_row_groups)  # one by one, for a reader of all keeps all that it has read
            for batch in (one for group in groups for one in file.iter_batches(BLOCK, [group], chosen)):
                batch.validate(full=True)  # else Polars would take any bytes for text
                block = pl.DataFrame(pl.from_arrow(batch)).rename({column: columns[column] for column in chosen})
                types = {name: kind for name, kind in _types().items() if name in block.columns}
                block = block.with_columns(pl.col(name).cast(kind, strict=False) for name, kind in types.items())
                if block["prompt"].dtype != pl.String:
                    raise UserError(
                        f"{reading.path}: the prompts are {block['prompt'].dtype}, not text; correct --prompt-column"
                    )
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
    import polars as pl

    texts = dict.fromkeys(("image_name", "source_id"), pl.String)
    numbers = dict.fromkeys(("width", "height", "image_nsfw", "prompt_nsfw"), pl.Float64)
    return {**texts, **numbers, "rejected": pl.Boolean, "seed": pl.Int64}


def _blocks(rows: Iterator[dict[str, Any]], columns: tuple[str, ...]) -> Iterator[pl.DataFrame]:
    """Rows as blocks; half of a character that stands alone, as JSON may have it, is taken out."""
    import polars as pl

    types = {column: _types().get(column, pl.String) for column in columns}
    while block := list(itertools.islice(rows, BLOCK)):
        lists = {column: [_plain(row[column], column) for row in block] for column in columns}
        yield pl.DataFrame(lists, types)


def _plain(value: Any, column: str) -> Any:
    if column == "seed":
        return value if type(value) is int and 0 <= value < 2**63 else None
    return HALF.sub("", value) if isinstance(value, str) and not value.isascii() else value


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path) if path.name.endswith(".gz") else path.open("rb")  # type: ignore[return-value]


def _lines(reading: Reading, universal: bool = False) -> Iterator[tuple[int, str]]:
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


def _delimited(reading: Reading) -> Iterator[tuple[int, str]]:
    """Row number and prompt of each row of a CSV or TSV with a header."""
    comma = "\t" if ".tsv" in reading.path.name.lower() else ","
    rows = csv.reader((line for _, line in _lines(reading)), delimiter=comma, strict=True)
    csv.field_size_limit(LONGEST)
    header: list[str] | None = None
    number = 0
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            number += 1
            reading.skip(number, f"{error}")
            continue
        if not row:
            continue
        if header is None:
            header = row
            if reading.column not in header:
                there = ", ".join(header)[:200]
                raise UserError(f"{reading.path}: no column {reading.column!r}, found {there}; give --prompt-column")
            position = header.index(reading.column)
            continue
        number += 1
        if len(row) != len(header):
            reading.skip(number, f"{len(row)} fields for {len(header)} columns")
        else:
            yield number, row[position]


def _json_lines(reading: Reading) -> Iterator[tuple[int, str]]:
    for number, line in _lines(reading):
        if line.strip():
            try:
                yield number, _field(json.loads(line), reading.column)
            except (ValueError, RecursionError) as error:
                reading.skip(number, str(error))


def _json_list(reading: Reading) -> Iterator[tuple[int, str]]:
    found = _json(reading.path)
    if not isinstance(found, list):
        raise UserError(f"{reading.path}: not a list of objects; give JSON lines, or a list")
    for number, record in enumerate(found, start=1):
        try:
            yield number, record if isinstance(record, str) else _field(record, reading.column)
        except ValueError as error:
            reading.skip(number, str(error))


def _field(record: Any, column: str) -> str:
    if not isinstance(record, dict) or not isinstance(record.get(column), str):
        raise ValueError(f"no text called {column!r}; give --prompt-column")
    return record[column]


def _text(reading: Reading) -> Iterator[tuple[int, str]]:
    for number, line in _lines(reading, universal=True):
        if line.strip():
            yield number, line.rstrip("\n")


def _json(path: Path) -> Any:
    try:
        with _open(path) as file:
            return json.load(file)
    except (OSError, EOFError, ValueError, RecursionError, zlib.error) as error:
        raise UserError(f"{path}: not JSON: {error}; download it again") from error


def _part(path: Path) -> tuple[dict[str, dict[str, Any]], set[str]]:
    """The records of a part of DiffusionDB by image name, and the names of its images."""
    if path.suffix == ".json":
        records, names = json.loads(path.read_bytes()), [file.name for file in path.parent.iterdir()]
    else:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            listing = next((name for name in names if name.endswith(".json")), None)
            if listing is None:
                raise ValueError("no JSON of the images in it")
            if archive.getinfo(listing).file_size > LARGEST:
                raise ValueError(f"a JSON of more than {LARGEST} bytes")
            records = json.loads(archive.read(listing))
    if not isinstance(records, dict):
        raise ValueError("its JSON is no object with a record for each image")
    return records, {Path(name).name for name in names}
