"""What the page does for its users: it describes pictures, judges edited prompts, and keeps a folder's table."""

import base64
import io
import logging
import threading
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from html import escape
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
COLUMNS = ("picture", "prompt", "image", "source", "familiar")
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

    def scene(prompt: str, seed: int) -> Image.Image | None:
        image, nothing_known = picture(prompt, seed)
        return None if nothing_known else image

    return Painter(scene, pipeline.embedded("undrawn"))


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

    @property
    def introduction(self) -> str:
        """What the page is for, and what its model knows."""
        known = predictors.knows(self.describer.folders).removeprefix("it ")
        model = f"The model here {known}." if known else "There is no model here that knows pictures yet."
        return (
            "A prompt is the text from which Stable Diffusion made a picture. If it is in the file it is shown; "
            f"otherwise the model says what it can. {model} PNG, JPEG or WebP, up to {gate.MEGABYTES} MB. No picture "
            "leaves the machine on which this page runs."
        )

    def source(self, found: Description) -> str:
        """Where a prompt comes from, in words, as HTML."""
        if found.source == "file":
            about = [found.generator, f"seed {found.seed}" if found.seed else "", found.model]
            said = f" ({', '.join(filter(None, about))})" if any(about) else ""
            without = f"<br>Negative prompt: {escape(found.negative_prompt)}" if found.negative_prompt else ""
            return f"<b>Found in the file</b>{escape(said)}{without}"
        if found.source == "checkpoint":
            return "<b>The model's prediction</b>, which can be wrong"
        if found.source == "interrogator":
            return "<b>By CLIP Interrogator</b>: a caption, and terms that CLIP finds fitting"
        known = predictors.knows(self.describer.folders).removeprefix("it ")
        why = f"this model {known}" if known else "there is no model here that knows pictures"
        return f"<b>A guess, not a prompt</b>: {why}. Things that may be in the picture:"

    def refusal(self, found: Description) -> str:
        """Why rendering again makes no sense; "" if it does."""
        if self.painter.undrawn is None or found.source == "checkpoint":
            return ""
        return (
            "This page can redraw only emoji scenes. To redraw any picture, stop it and run "
            "`image-to-prompts weights get render`, then `image-to-prompts demo --profile full`."
        )

    def seed(self, found: Description) -> int:
        """The seed that the file says, or one that depends on the prompt."""
        return int(found.seed) % 2**32 if found.seed.isdigit() else seed_of(found.prompt)

    def rated(self, prompts: Sequence[str], vector: np.ndarray | None) -> list[tuple[str, str]]:
        """Candidates as (what is shown, the text): with how well each fits."""
        if vector is None:
            return [(text, text) for text in prompts]
        with self.lock:
            cosines = text_encoder.encode_once(list(prompts)) @ vector
        return [(f"{cosine:.2f}  {text}", text) for text, cosine in zip(prompts, cosines, strict=True)]

    def judge(self, prompt: str, vector: np.ndarray | None) -> tuple[str, list[list[str]]]:
        """How near a prompt comes to the prediction, in words, and what each of its phrases adds to that."""
        text = prompt[:MOST_LETTERS].strip()
        if vector is None or not text:
            return "", []
        phrases = [phrase.strip() for phrase in text.split(",") if phrase.strip()][:MOST_PHRASES]
        rests = [", ".join(phrases[:row] + phrases[row + 1 :]) for row in range(len(phrases))]
        asked = [text, *rests] if len(phrases) > 1 else [text]
        with self.lock:
            cosines = text_encoder.encode_once(asked) @ vector
        worth = [[f"{cosines[0] - cosine:+.3f}", phrase] for phrase, cosine in zip(phrases, cosines[1:], strict=False)]
        return f"Fits what the model sees: **{cosines[0]:.3f}** (1 would be perfect)", worth

    def draw(self, prompt: str, seed: int) -> tuple[Image.Image | None, str]:
        """The picture of a prompt, and what of it was not drawn, as HTML."""
        text = prompt[:MOST_LETTERS]
        with self.lock:
            picture = self.painter.draw(text, seed)
        if picture is None:
            return None, "Nothing of this text can be drawn here."
        missing = self.painter.undrawn(text) if self.painter.undrawn else []
        left_out = f"<br>Not drawn: {escape(', '.join(missing))}." if missing else ""
        return picture, f"Drawn from: {escape(text)}{left_out}"

    def rows(self, files: Sequence[Path], taken: Iterable[str] = ()) -> Iterator[list[dict[str, Any]]]:
        """Rows of the table of many pictures, block by block, with names that are not taken yet."""
        before = list(taken)
        names = unique([*before, *(file.name for file in files)])[len(before) :]
        for start in range(0, len(files), AT_ONCE):
            part = range(start, min(start + AT_ONCE, len(files)))
            found = self.describe([files[row] for row in part])
            yield [self._row(names[row], one) for row, one in zip(part, found, strict=True)]

    def _row(self, name: str, found: Description) -> dict[str, Any]:
        familiar = {True: "yes", False: "no", None: ""}[found.familiar]
        row = {"path": str(found.path), "image": name, "prompt": found.prompt, "familiar": familiar}
        if found.error:
            return {**row, "picture": "", "source": found.error}
        return {**row, "picture": thumbnail(found.path), "source": found.source}


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


def told(rows: Sequence[dict[str, Any]]) -> str:
    """How many pictures were described, and which files could not be read."""
    bad = [row["image"] for row in rows if not row["picture"]]
    good = len(rows) - len(bad)
    text = f"{good} picture{'' if good == 1 else 's'} described. Double-click a prompt to edit it."
    return f"{text} Not read: {', '.join(bad)}." if bad else text if rows else "Choose pictures first."


def shown(rows: Sequence[dict[str, Any]], words: str) -> pd.DataFrame:
    """The rows that hold all of some words, as the table shows them."""
    wanted = words.lower().split()
    said = (f"{row['image']} {row['prompt']} {row['source']}".lower() for row in rows)
    kept = [row for row, text in zip(rows, said, strict=True) if all(word in text for word in wanted)]
    return pd.DataFrame([[row[column] for column in COLUMNS] for row in kept], columns=["", *COLUMNS[1:]])


def named(table: pd.DataFrame) -> pd.DataFrame:
    """The table as it comes from the page, with its columns' names; one of them is not shown there."""
    return table.set_axis(list(COLUMNS), axis=1)


def edited(rows: Sequence[dict[str, Any]], table: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows with the prompts that stand in the table, which may show a part of them."""
    table = named(table)
    prompts = dict(zip(table["image"], table["prompt"].fillna("").astype(str), strict=True))
    return [{**row, "prompt": prompts.get(row["image"], row["prompt"])} for row in rows]


def surrounded(rows: Sequence[dict[str, Any]], table: pd.DataFrame, prefix: str, suffix: str) -> list[dict[str, Any]]:
    """The rows with a text before and behind each prompt that the table shows."""
    names = set(named(table)["image"])
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
