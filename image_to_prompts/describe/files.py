"""The files of `describe`: images; a record of each in the run, so that none is described twice; texts and tables.

Files that were written from here are known by their hash, so that those of others and edited ones are not replaced.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from urllib.parse import quote_from_bytes

import numpy as np
import pandas as pd

from ..data import images
from ..data.metadata import IMAGE_SUFFIXES
from ..run import archives
from ..run.devices import rank_and_processes
from ..run.errors import UserError
from ..run.files import make_folder, sha256, shown, write_text
from ..run.resume import append_line, read_journal


@dataclass(frozen=True)
class Description:
    """What was found out about an image.

    Attributes:
        path: The image.
        prompt: Its prompt; "" if it cannot be read.
        cosine: Of the prompt's embedding with the predicted one; None without a checkpoint.
        nearest: The nearest known prompts with their cosines, best first.
        error: Why it cannot be read; "" if it can.
        vector: float32 (384,), the predicted embedding; None in what `run` returns, which keeps texts alone.
    """

    path: Path
    prompt: str
    cosine: float | None = None
    nearest: tuple[tuple[str, float], ...] = ()
    error: str = ""
    vector: np.ndarray | None = field(default=None, repr=False, compare=False)


def _key(file: Path) -> str:
    return json.dumps([str(file.absolute()), *archives.stat(file)])


def image_files(paths: Sequence[Path]) -> list[Path]:
    """Image files of paths, none twice; raises UserError."""
    found: list[Path] = []
    for path in paths:
        try:
            if path.is_dir():
                found += images.find(path)
                continue
            archives.stat(path)
        except OSError as error:
            why = "" if isinstance(error, FileNotFoundError) else f" ({error.strerror or error})"
            raise UserError(f"{shown(path)}: no such file or folder{why}; correct it") from error
        if path.suffix.lower() not in IMAGE_SUFFIXES:
            raise UserError(f"{shown(path)}: not an image ({', '.join(IMAGE_SUFFIXES)}); give image files or folders")
        found.append(path)
    return list(dict.fromkeys(found))


class Known:
    """What is known of some images, as they were when the work began."""

    def __init__(self, folder: Path, fingerprint: str, files: Sequence[Path]) -> None:
        """Reads what earlier runs noted.

        Args:
            folder: Folder of the records.
            fingerprint: Of what the descriptions depend on, beside the images.
            files: The images.
        """
        self.journal = folder / f".{fingerprint}.{rank_and_processes()[0]}.jsonl"
        self.keys = {file: _key(file) for file in files}  # before they are read: one that is replaced then is another
        self.done: dict[str, Description] = {}
        for journal in sorted(folder.glob(f".{fingerprint}.*.jsonl")):
            for record in read_journal(journal):
                if not record["error"]:  # what could not be read may have been replaced
                    near = tuple((prompt, cosine) for prompt, cosine in record["nearest"])
                    self.done[record["key"]] = Description(Path(), record["prompt"], record["cosine"], near)

    def of(self, file: Path, top: int) -> Description | None:
        """What is known of an image, with `top` of the nearest prompts."""
        found = self.done.get(self.keys[file])
        return found and replace(found, path=file, nearest=found.nearest[:top])

    def keep(self, found: Sequence[Description]) -> None:
        """Notes descriptions, all at once, so that a resumed run cuts the rest into the same blocks."""
        records = []
        for one in found:
            record = {"key": self.keys[one.path], "prompt": one.prompt, "cosine": one.cosine, "nearest": one.nearest}
            records.append({**record, "error": one.error})
            self.done[self.keys[one.path]] = replace(one, vector=None)
        append_line(self.journal, *records)


class Written:
    """The files that were written from a run."""

    def __init__(self, folder: Path, overwrite: bool) -> None:
        """Takes the folder of the ledger, and whether files that are not from here, or were edited, are replaced."""
        self.folder, self.overwrite = folder, overwrite
        self.ledger = folder / ".written.jsonl"
        self.written = {(record["path"], record["sha256"]) for record in read_journal(self.ledger)}

    def _name(self, path: Path) -> str:
        """A path as seen from the run, which may be moved with what is in it; any bytes may be in it."""
        return quote_from_bytes(os.fsencode(os.path.relpath(path.absolute(), self.folder.absolute())))

    def is_ours(self, path: Path) -> bool:
        """Whether nothing is there, or what was written from here."""
        return not path.exists() or (path.is_file() and (self._name(path), sha256(path)) in self.written)

    def check(self, path: Path) -> None:
        """Raises UserError where a file cannot or must not be written."""
        if path.is_dir():
            raise UserError(f"{path}: is a folder; give a file")
        if not self.overwrite and not self.is_ours(path):
            raise UserError(f"{path}: is not from here or was edited; give another --out, or --overwrite to replace it")
        make_folder(path.parent)
        try:
            with tempfile.TemporaryFile(dir=path.parent):
                pass
        except OSError as error:
            raise UserError(f"{path}: cannot be written here ({error.strerror}); give another path") from error

    def write(self, path: Path, text: str) -> None:
        """Writes a text atomically, after its hash."""
        digest = hashlib.sha256(text.encode("utf-8")).hexdigest()
        name = self._name(path)
        if (name, digest) not in self.written:
            append_line(self.ledger, {"path": name, "sha256": digest})
            self.written.add((name, digest))
        write_text(path, text)

    def beside(self, found: Description) -> Path | None:
        """Writes the prompt of an image beside it; returns the file that is in the way, if one is."""
        path, text = found.path.with_suffix(".txt"), found.prompt + "\n"
        if found.error or (path.is_file() and path.read_bytes() == text.encode("utf-8")):
            return None
        if path.is_dir() or (not self.overwrite and not self.is_ours(path)):
            return path
        self.write(path, text)
        return None


def check_places(files: list[Path]) -> None:
    """Raises UserError where no .txt of its own can lie beside an image."""
    places: dict[Path, Path] = {}
    for file in files:
        if archives.is_member(file):
            raise UserError(f"{shown(file)}: --txt has no place beside an image in an archive; use --out")
        other = places.setdefault(file.with_suffix(".txt"), file)
        if other != file:
            raise UserError(f"{shown(file)}: --txt would write the same file as for {other.name}; use --out")


def table(found: list[Description], out: Path, top: int) -> str:
    """The text of a table, as CSV or JSON lines."""
    if out.suffix.lower() == ".jsonl":
        rows = [{"image": shown(one.path), **asdict(one)} for one in found]
        for row in rows:
            del row["path"], row["vector"]
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    frame = pd.DataFrame({"image": [shown(one.path) for one in found], "prompt": [one.prompt for one in found]})
    frame["cosine"] = [one.cosine for one in found]
    for number in range(top):
        some = [one.nearest[number] if number < len(one.nearest) else ("", None) for one in found]
        frame[f"nearest_{number + 1}"] = [prompt for prompt, _ in some]
        frame[f"cosine_{number + 1}"] = [cosine for _, cosine in some]
    frame["error"] = [one.error for one in found]
    return frame.to_csv(index=False, lineterminator="\n")
