"""Readers of public sources in their native formats: each streams a file as blocks of rows, and skips what is broken.

A block is a Polars frame with `prompt` and `source_id`, the source's own name of the row, and what else the source
says: `image_name`, `seed`, `generator`, `model`, `width`, `height`, `image_nsfw`, `prompt_nsfw`, `rejected`.
"""

import json
import logging
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
from pyarrow import parquet

from ..data import file_prompt, images, metadata
from ..run import archives
from ..run.errors import UserError
from . import formats, pairs
from .formats import Reading

log = logging.getLogger(__name__)
LARGEST = 100_000_000  # bytes of the JSON of a part; real ones have about 300,000


def count_lines(path: Path) -> int | None:
    """About how many rows a file has; None where only reading all of it could tell."""
    if path.suffix == ".parquet":
        return parquet.read_metadata(path).num_rows
    if path.suffix not in (".csv", ".tsv", ".jsonl", ".txt"):
        return None
    with path.open("rb") as file:
        return sum(part.count(b"\n") for part in iter(lambda: file.read(2**20), b"")) + 1


class Source(NamedTuple):
    """A kind of source.

    Attributes:
        read: Streams a file of it.
        rules: Names of the rules that clean it, unless others are asked for.
        pairs: Whether each row is an image that exists, so that equal prompts are no repeats.
        files: The files that a given path stands for.
        count: About how many rows a given path has, for the bar; None where that is not quickly told.
        block: Rows of a block; 0: `formats.BLOCK`.
        more: Columns beside those that every source has.
    """

    read: Callable[[Reading], Iterator[pl.DataFrame]]
    rules: tuple[str, ...]
    pairs: bool = False
    files: Callable[[Path], list[Path]] = lambda path: [path]
    count: Callable[[Path], Any] = count_lines
    block: int = 0
    more: tuple[str, ...] = ()


def diffusiondb(reading: Reading) -> Iterator[pl.DataFrame]:
    """DiffusionDB's metadata.parquet and metadata-large.parquet (Wang et al. 2022)."""
    kept = {"image_name": "image_name", "prompt": "prompt", "seed": "seed", "width": "width", "height": "height"}
    kept |= {"image_nsfw": "image_nsfw", "prompt_nsfw": "prompt_nsfw"}
    start = 0
    for block in formats.parquet_blocks(reading, kept, ("image_name", "prompt")):
        good = ~block["image_name"].fill_null("").str.contains(r"^\s*\.{0,2}$|[/\\]")
        for row in (~good).arg_true():
            reading.skip(start + row + 1, f"image_name {block['image_name'][row]!r} is no bare file name")
        start += len(block)
        yield block.with_columns(source_id=block["image_name"]).filter(good)


def laion_coco(reading: Reading) -> Iterator[pl.DataFrame]:
    """LAION-COCO's parquet files: the best of the captions that BLIP wrote of each web image."""
    kept = {"top_caption": "prompt", "URL": "source_id", "punsafe": "image_nsfw"}
    yield from formats.parquet_blocks(reading, kept, ("top_caption", "URL"))


def captions_tsv(reading: Reading) -> Iterator[pl.DataFrame]:
    """Conceptual Captions: without header, caption and address (3M) or address and caption (12M), nothing quoted."""

    def rows() -> Iterator[dict[str, Any]]:
        for number, line in formats.lines(reading):
            parts = line.rstrip("\r\n").split("\t")
            addresses = [part.startswith(("http://", "https://")) for part in parts]
            if len(parts) < 2 or not any(addresses[:2]):
                reading.skip(number, "no caption and address with a tab between them")
                continue
            yield {"prompt": parts[1 if addresses[0] else 0], "source_id": parts[0 if addresses[0] else 1]}

    yield from formats.blocks(rows(), ("prompt", "source_id"))


def captions_json(reading: Reading) -> Iterator[pl.DataFrame]:
    """COCO's and VizWiz's annotations; VizWiz says which captions it rejected or canned before."""
    found = formats.whole_json(reading.path)
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

    yield from formats.blocks(rows(), ("prompt", "source_id", "rejected"))


def diffusiondb_parts(reading: Reading) -> Iterator[pl.DataFrame]:
    """DiffusionDB's image parts, zip files or folders, by their JSON: p is the prompt, se the seed."""
    if not _parts(reading.path):
        raise UserError(f"{reading.path}: no part-*.zip and no part-*.json in it; give DiffusionDB's image parts")

    def rows() -> Iterator[dict[str, Any]]:
        for number, part in enumerate(_parts(reading.path), start=1):
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

    yield from formats.blocks(rows(), ("prompt", "source_id", "image_name", "seed"))


def table(reading: Reading) -> Iterator[pl.DataFrame]:
    """Any table, without rows whose images have names that no stage takes."""
    for block in formats.table(reading):
        names = block["image_name"].to_list() if "image_name" in block.columns else []
        good = pl.Series([metadata.is_name(name or "") for name in names], dtype=pl.Boolean)
        for row in (~good).arg_true():
            reading.skip(int(block["source_id"][row]), f"{names[row]!r} cannot be an image_name")
        yield block.filter(good) if len(good) else block


def _parts(path: Path) -> list[Path]:
    return sorted([*path.rglob("part-*.zip"), *path.rglob("part-*.json")]) if path.is_dir() else [path]


def carried(reading: Reading) -> Iterator[pl.DataFrame]:
    """Images, also in sub-folders, and the prompts that are in their files, or in a `.txt` of the same stem."""

    def rows() -> Iterator[dict[str, Any]]:
        for number, file in enumerate(images.find(reading.path), start=1):
            name, found = file.relative_to(reading.path).as_posix(), file_prompt.read(file) or file_prompt.beside(file)
            if not name.isprintable() or not metadata.is_name(name):
                reading.skip(number, f"{name!r} cannot be an image_name")
            elif found is None:
                reading.skip(number, f"{name}: no prompt in it, and no .txt beside it")
            else:
                seed = int(found.seed) if found.seed.isdecimal() else None
                row = {"prompt": found.prompt, "source_id": name, "image_name": name, "seed": seed}
                yield {**row, "generator": found.generator, "model": found.model}

    columns = ("prompt", "source_id", "image_name", "seed", *SOURCES["images"].more)
    yield from formats.blocks(rows(), columns, SOURCES["images"].block)


def _images(path: Path) -> list[Path]:
    found = [file.parent if archives.is_member(file) else file for file in images.find(path)]
    return [*dict.fromkeys(found), *sorted(path.rglob("*.txt"))]


REPAIRED = ("mojibake", "html", "unicode", "interface", "urls")
USUAL = ("rejected", *REPAIRED, "nsfw", "english", "truncate", "blank")
FILTER = ("mojibake", "unicode", "words", "characters", "size", "nsfw", "blank")  # the reference's
SOURCES = {
    "diffusiondb": Source(diffusiondb, FILTER),
    "diffusiondb-parts": Source(
        diffusiondb_parts, (*REPAIRED, "blank"), True, _parts, lambda path: 1000 * len(_parts(path))
    ),
    "images": Source(
        *(carried, (*REPAIRED, "blank"), True, _images, lambda path: len(images.find(path)), 1000),
        more=("generator", "model"),
    ),
    "captions-tsv": Source(captions_tsv, USUAL),
    "laion-coco": Source(laion_coco, USUAL),
    "captions-json": Source(captions_json, USUAL),
    "pairs": Source(
        *(pairs.read, (*REPAIRED, "blank"), True, pairs.places),
        count=lambda path: sum(filter(None, map(count_lines, pairs.tables(path)))),
        more=("model", "sampler"),
    ),
    "table": Source(table, USUAL),
}


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
