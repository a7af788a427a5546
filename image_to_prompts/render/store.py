"""Where finished images go, as loose files or as tar shards, and which of them are there already and intact.

A store trusts nothing but what it checks: a row counts as done when its record says the same prompt, seed and settings
and the SHA-256 of the bytes on disk is the recorded one.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..data import metadata
from ..data.metadata import FAILED, FLAGS
from ..run import archives
from ..run.errors import UserError
from ..run.files import atomic_path, write_text
from ..run.folders import MANIFEST
from ..run.progress import progress
from ..run.resume import append_line, read_journal, sweep

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)
Record = dict[str, Any]
RECORDED = ("backend", "model", "model_sha256", "scheduler", "steps", "guidance")
OUTCOME = (*RECORDED, "file", "sha256", "flag")  # what rendering adds to a metadata row
KEYS = {"image_name", "prompt", "seed", *OUTCOME}
LOOSE_UNIT = 64  # rows of loose images that one process or --shard takes at a time


class Row(NamedTuple):
    """One image to render: its number in the whole set, name in the manifest, prompt, seed and bare file name."""

    number: int
    name: str
    prompt: str
    seed: int
    file: str


def read_manifest(folder: Path) -> list[Record]:
    """Records of a folder's manifest and of the journals of unfinished runs, later ones last; [] if it has neither."""
    path, columns = folder / MANIFEST, ("image_name", "prompt", "seed", "file", "sha256", "flag")
    records = metadata.read_table(path, columns).to_dict("records") if path.is_file() else []
    for journal in sorted(folder.glob(".journal-*.jsonl")):
        records += read_journal(journal)
    return records


class FolderStore:
    """Loose files, each written atomically and then noted in this process's journal."""

    unit = LOOSE_UNIT

    def __init__(self, out: Path, settings: Record, journal: str) -> None:
        self.out, self.settings = out, settings
        self.records: dict[str, Record] = {}
        self.known: set[str] = set()  # what earlier runs rendered here, intact or not
        self.journal = out / f".journal-{journal}.jsonl"

    def scan(self, rows: list[Row]) -> None:
        """Finds out which of `rows`, whole units of them, are done and intact.

        Raises:
            UserError: If images made with other settings are there.
        """
        known = {record["image_name"]: record for record in read_manifest(self.out)}
        self.known = set(known)
        for row in progress(rows, "check images"):
            record = known.get(row.name)
            if record and self.is_intact(record) and self.fits(record, row):
                self.records[row.name] = record

    def adopt(self, folders: Sequence[Path], rows: list[Row]) -> set[str]:
        """Names of `rows` that are done in other, read-only folders of earlier runs, and count as done there.

        Raises:
            UserError: If images made with other settings are there.
        """
        wanted, done = {row.name: row for row in rows}, set()
        for folder in folders:
            other = FolderStore(folder, self.settings, "none")
            known = {record["image_name"]: record for record in read_manifest(folder) if record["image_name"] in wanted}
            for name, record in known.items():
                if (folder / record["file"]).is_file() and other.fits(record, wanted[name]):
                    done.add(name)
        return done

    def fits(self, record: Record, row: Row) -> bool:
        """Whether an intact record is that of `row`, and undamaged.

        Raises:
            UserError: If its image was made with other settings: hours of rendering are not overwritten by accident.
        """
        expected = {**self.settings, "format": Path(row.file).suffix}
        found = {**record, "format": Path(record["file"]).suffix or expected["format"]}
        for key, value in expected.items():
            if key == "model" and expected["model_sha256"]:  # which tells more than a name
                continue
            if str(found.get(key, "")) != str(value):
                if record["flag"] == FAILED:
                    return False
                said = (
                    f"{record['image_name']} was rendered with {key} {found.get(key) or 'none'}, not {value or 'none'}"
                )
                raise UserError(f"{self.out}: {said}; choose another --out or the old settings, or delete the folder")
        if record["flag"] not in FLAGS:
            return False
        file = row.file if record["flag"] != FAILED else ""
        return (record["prompt"], str(record["seed"]), record["file"]) == (row.prompt, str(row.seed), file)

    def is_intact(self, record: Record) -> bool:
        """Whether the recorded image is there with the recorded SHA-256; a failed row has none."""
        return record["flag"] == FAILED or archives.digest(self.out / record["file"]) == record["sha256"]

    def record(self, row: Row, data: bytes | None, flag: str) -> Record:
        """What the manifest says of a row."""
        digest = "" if data is None else hashlib.sha256(data).hexdigest()
        identity = {"image_name": row.name, "prompt": row.prompt, "seed": row.seed}
        return {**identity, **self.settings, "file": "" if data is None else row.file, "sha256": digest, "flag": flag}

    def add(self, row: Row, data: bytes | None, flag: str) -> None:
        """Keeps one finished image, or, without data, the fact that it failed.

        Raises:
            UserError: If a file of its name is there that was not rendered here.
        """
        record, path = self.record(row, data, flag), self.out / row.file
        if row.name not in self.known and data is not None and path.exists() and path.read_bytes() != data:
            raise foreign(path)
        append_line(self.journal, record)  # before the file, so that every file is known that a killed run leaves
        if data is not None:
            with atomic_path(path) as part:
                part.write_bytes(data)
        self.records[row.name] = record

    def close(self) -> None:
        """Ends the writing; loose files need nothing."""

    def listed(self) -> dict[str, Record]:
        """Records for the manifest."""
        return self.records


def foreign(path: Path) -> UserError:
    return UserError(f"{path}: not written by render before; move it away, or choose another --out")


def write_manifest(store: FolderStore, frame: pd.DataFrame, own: set[str]) -> pd.DataFrame:
    """Writes `manifest.csv`: of all rows that are done in this folder, by whichever process, in the metadata's order.

    Args:
        store: This process's store, closed.
        frame: image_name, prompt, seed and what else the metadata has, one row an image.
        own: Names of the rows that are this process's to judge; of others, what the manifest said stays.

    Returns:
        The manifest.
    """
    from filelock import FileLock

    path = store.out / MANIFEST
    with FileLock(store.out / ".manifest.lock"):
        known = {record["image_name"]: record for record in read_manifest(store.out)}
        known = {name: record for name, record in known.items() if name not in own} | store.listed()
        done = frame[frame["image_name"].isin(known.keys())].reset_index(drop=True)
        records = [known[name] for name in done["image_name"]]
        for column in OUTCOME:
            done[column] = [record[column] for record in records]
        text = done.to_csv(index=False, lineterminator="\n")
        if done.empty:
            path.unlink(missing_ok=True)
        elif not path.is_file() or path.read_text(encoding="utf-8") != text:
            write_text(path, text)
        sweep([path])
        for journal in store.out.glob(".journal-*.jsonl") if len(done) == len(frame) else [store.journal]:
            journal.unlink(missing_ok=True)
    return done
