"""What the page does for its users: it describes pictures, judges edited prompts, and keeps a folder's table."""

import base64
import io
import logging
import threading
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from .. import pipeline
from ..data import metadata
from ..models import text_encoder
from ..predict import predictors
from ..render.store import Row
from ..run.errors import UserError
from . import gate
from .files import Description
from .ways import Describer

log = logging.getLogger(__name__)
MOST_LETTERS = 1000  # of an edited prompt; all-MiniLM-L6-v2 reads the first 256 tokens
MOST_PHRASES = 24  # of a prompt whose worth is told
THUMBNAIL = 64  # px
AT_ONCE = 8  # pictures of a folder between two looks at the table
COLUMNS = ("picture", "image", "prompt", "source", "familiar")
WRITTEN = ("image", "prompt", "source", "familiar")  # columns of the CSV


@dataclass(frozen=True)
class Painter:
    """What draws a prompt.

    Attributes:
        draw: Maps a prompt and a seed to a picture.
        undrawn: The parts of a prompt that it draws nothing for; None if it can draw all.
    """

    draw: Callable[[str, int], Image.Image | None]
    undrawn: Callable[[str], list[str]] | None = None


def painter(profile: str) -> Painter:
    """What draws prompts: in the profile `full` Stable Diffusion 2 if its weights are at hand, else emoji scenes."""
    if profile == "full":
        from ..render.stable_diffusion import StableDiffusionBackend

        try:
            backend = StableDiffusionBackend(fast=True)
            backend.start()
        except UserError as error:
            log.warning("embedded scenes instead of Stable Diffusion 2: %s", error)
        else:
            return Painter(lambda prompt, seed: backend.render([Row(0, "", prompt, seed, "")])[0][0])
    picture = pipeline.embedded("picture")
    return Painter(lambda prompt, seed: picture(prompt, seed)[0], pipeline.embedded("undrawn"))


def seed_of(prompt: str) -> int:
    """The seed with which a prompt is drawn where nobody gives one."""
    return metadata.own_seed("", prompt)


class Session:
    """The models, which all users share; what the page knows of a picture lies in its user's own state."""

    def __init__(self, describer: Describer, painter: Painter) -> None:
        """Takes the models."""
        self.describer, self.painter, self.lock = describer, painter, threading.Lock()

    def describe(self, files: Sequence[Path]) -> list[Description]:
        """Describes uploads; one that is refused or broken has an error, which a user may read."""
        errors: dict[Path, str] = {}
        for file in files:
            try:
                gate.check_upload(file)
            except ValueError as error:
                errors[file] = str(error)
        with self.lock:
            found = iter(self.describer.describe([file for file in files if file not in errors]))
        top = self.describer.config.top
        described = (Description(file, "", error=errors[file]) if file in errors else next(found) for file in files)
        broken = "The image is damaged and cannot be read."
        return [
            Description(d.path, "", error=errors.get(d.path, broken))
            if d.error
            else replace(d, nearest=d.nearest[:top])
            for d in described
        ]

    def source(self, found: Description) -> str:
        """Where a prompt comes from, in words."""
        if found.source == "file":
            return f"found in the file{f', written by {found.generator}' if found.generator else ''}"
        if found.source == "checkpoint":
            return "predicted"
        if found.source == "interrogator":
            return "by CLIP Interrogator"
        known = predictors.knows(self.describer.folders).removeprefix("it ")
        return f"a guess: this model {known}" if known else "a guess: there is no model here that knows pictures"

    def refusal(self, found: Description) -> str:
        """Why rendering again makes no sense; "" if it does."""
        if self.painter.undrawn is None or found.source == "checkpoint":
            return ""
        return (
            "Rendering again: without Stable Diffusion 2 this page can draw emoji scenes alone, which says nothing "
            "about this picture. `image-to-prompts weights get render` gets it; then `demo --profile full`."
        )

    def judge(self, prompt: str, vector: np.ndarray | None) -> tuple[str, list[list[str]]]:
        """How near a prompt comes to the prediction, and what each of its phrases adds to that."""
        text = prompt[:MOST_LETTERS].strip()
        if vector is None or not text:
            return "", []
        phrases = [phrase.strip() for phrase in text.split(",") if phrase.strip()][:MOST_PHRASES]
        rests = [", ".join(phrases[:row] + phrases[row + 1 :]) for row in range(len(phrases))]
        asked = [text, *rests] if len(phrases) > 1 else [text]
        with self.lock:
            cosines = text_encoder.encode_once(asked) @ vector
        worth = [[f"{cosines[0] - cosine:+.3f}", phrase] for phrase, cosine in zip(phrases, cosines[1:], strict=False)]
        return f"{cosines[0]:.3f}", worth

    def draw(self, prompt: str, seed: int) -> tuple[Image.Image | None, str]:
        """The picture of a prompt, and what of it was not drawn, in words."""
        text = prompt[:MOST_LETTERS]
        with self.lock:
            picture = self.painter.draw(text, seed)
        missing = self.painter.undrawn(text) if self.painter.undrawn else []
        return picture, f"Not drawn: {', '.join(missing)}." if missing else ""

    def rows(self, files: Sequence[Path]) -> Iterator[list[dict[str, Any]]]:
        """Rows of a folder's table, block by block: name, thumbnail, prompt, source, familiar."""
        names = unique([file.name for file in files])
        for start in range(0, len(files), AT_ONCE):
            part = range(start, min(start + AT_ONCE, len(files)))
            found = self.describe([files[row] for row in part])
            yield [self._row(names[row], one) for row, one in zip(part, found, strict=True)]

    def _row(self, name: str, found: Description) -> dict[str, Any]:
        familiar = {True: "yes", False: "no", None: ""}[found.familiar]
        row = {"image": name, "prompt": found.prompt, "familiar": familiar}
        if found.error:
            return {**row, "picture": "", "source": found.error}
        return {**row, "picture": thumbnail(found.path), "source": self.source(found).partition(":")[0]}


def thumbnail(path: Path) -> str:
    """A picture of 64 px as HTML."""
    with Image.open(path) as image:
        image.draft("RGB", (THUMBNAIL, THUMBNAIL))
        small = image.convert("RGB")
        small.thumbnail((THUMBNAIL, THUMBNAIL))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=70)
    return f'<img src="data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}">'


def unique(names: Iterable[str]) -> list[str]:
    """Names, numbered where one comes twice: a.png, a (2).png."""
    seen: set[str] = set()
    found = []
    for name in names:
        stem, dot, suffix = name.rpartition(".")
        number, one = 1, name
        while one in seen:
            number += 1
            one = f"{stem or suffix} ({number}){dot}{suffix if stem else ''}"
        seen.add(one)
        found.append(one)
    return found


def shown(rows: Sequence[dict[str, Any]], words: str) -> pd.DataFrame:
    """The rows that hold all of some words, as the table shows them."""
    wanted = words.lower().split()
    said = (f"{row['image']} {row['prompt']} {row['source']}".lower() for row in rows)
    kept = [row for row, text in zip(rows, said, strict=True) if all(word in text for word in wanted)]
    return pd.DataFrame([[row[column] for column in COLUMNS] for row in kept], columns=list(COLUMNS))


def edited(rows: Sequence[dict[str, Any]], table: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows with the prompts that stand in the table, which may show a part of them."""
    prompts = dict(zip(table["image"], table["prompt"].fillna("").astype(str), strict=True))
    return [{**row, "prompt": prompts.get(row["image"], row["prompt"])} for row in rows]


def surrounded(rows: Sequence[dict[str, Any]], table: pd.DataFrame, prefix: str, suffix: str) -> list[dict[str, Any]]:
    """The rows with a text before and behind each prompt that the table shows."""
    names = set(table["image"])
    return [
        {**row, "prompt": f"{prefix}{row['prompt']}{suffix}"} if row["image"] in names and row["prompt"] else row
        for row in edited(rows, table)
    ]


def write_csv(table: pd.DataFrame, path: Path) -> Path:
    """The table without its pictures, as CSV."""
    table[list(WRITTEN)].to_csv(path, index=False)
    return path


def write_texts(table: pd.DataFrame, path: Path) -> Path:
    """A .txt a picture, in a zip archive; names as `describe --txt` has them."""
    stems = [Path(name).stem for name in table["image"]]
    twice = {stem for stem in stems if stems.count(stem) > 1}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, stem, prompt in zip(table["image"], stems, table["prompt"].fillna("").astype(str), strict=True):
            if prompt:
                archive.writestr(f"{name if stem in twice else stem}.txt", f"{prompt}\n")
    return path
