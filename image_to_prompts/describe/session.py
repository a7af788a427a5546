"""What the page does for its users: it describes pictures, judges edited prompts, and keeps the list of many."""

import base64
import io
import logging
import threading
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from .. import pipeline
from ..data import metadata
from ..data.images import UNREADABLE
from ..models import text_encoder, weights
from ..predict import predictors
from ..render import store
from ..run.errors import UserError
from . import gate
from .files import Description
from .ways import Describer

log = logging.getLogger(__name__)
MOST_LETTERS = 1000  # of an edited prompt; all-MiniLM-L6-v2 reads the first 256 tokens
MOST_PHRASES = 24  # of a prompt whose worth is told
THUMBNAIL = 64  # px
Row = dict[str, str]  # of the list of many pictures: path, image, picture (HTML), prompt, first (as described), ...
SOURCES = {
    "file": "found in the file",
    "checkpoint": "predicted",
    "bank": "from prompts that people wrote",
    "interrogator": "by CLIP Interrogator",
    "caption": "a caption",
    "guess": "a guess",
}
AT_ONCE = 8  # pictures between two looks at the list
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
            return Painter(lambda prompt, seed: backend.render([store.Row(0, "", prompt, seed, "")])[0][0])
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
        errors = {file: why for file in files if (why := gate.why_refused(file))}
        with self.lock:
            found = self.describer.describe([file for file in files if file not in errors])
        errors |= {one.path: "The image is damaged and cannot be read." for one in found if one.error}
        known = {one.path: replace(one, nearest=one.nearest[: self.describer.config.top]) for one in found}
        return [Description(file, "", error=errors[file]) if file in errors else known[file] for file in files]

    @property
    def known(self) -> str:
        """What the checkpoint has seen, in words; "" if there is none that can tell."""
        return predictors.knows(self.describer.folders).removeprefix("it ")

    @property
    def introduction(self) -> str:
        """What the page is for, and what its model knows."""
        model = f"The model here {self.known}." if self.known else "There is no model here that knows pictures yet."
        caption = self.describer.config.caption
        private = "No picture leaves the machine on which this page runs."
        if weights.is_address(caption):
            private = f"Pictures without a prompt are sent to {escape(caption)}."
        return (
            "A prompt is the text from which Stable Diffusion made a picture. If it is in the file it is shown; "
            f"otherwise the model says what it can. {model} PNG, JPEG or WebP, up to {gate.MEGABYTES} MB. {private}"
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
        if found.source == "bank":
            return "<b>Put together from prompts that people wrote</b>: the nearest of many, which can be wrong"
        if found.source == "interrogator":
            return "<b>By CLIP Interrogator</b>: a caption, and terms that CLIP finds fitting"
        if found.source == "caption":
            return f"<b>A caption</b> by {escape(self.describer.config.caption)}, not a prompt that somebody wrote"
        why = f"this model {self.known}" if self.known else "there is no model here that knows pictures"
        return f"<b>A guess, not a prompt</b>: {why}. Things that may be in the picture:"

    def refusal(self, found: Description) -> str:
        """Why rendering again makes no sense; "" if it does."""
        if self.painter.undrawn is None or found.source in ("checkpoint", "bank"):
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
        worth = [[f"{cosines[0] - cosine:.3f}", phrase] for phrase, cosine in zip(phrases, cosines[1:], strict=False)]
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

    def rows(self, files: Sequence[Path], taken: Iterable[str] = ()) -> Iterator[list[Row]]:
        """Rows of the list of many pictures, block by block, with names that are not taken yet."""
        before = list(taken)
        names = unique([*before, *(file.name for file in files)])[len(before) :]
        for start in range(0, len(files), AT_ONCE):
            part = range(start, min(start + AT_ONCE, len(files)))
            found = self.describe([files[row] for row in part])
            yield [self._row(names[row], one) for row, one in zip(part, found, strict=True)]

    def _row(self, name: str, found: Description) -> Row:
        familiar = {True: "yes", False: "no", None: ""}[found.familiar]
        row = {"path": str(found.path), "image": name, "familiar": familiar}
        row |= {"prompt": found.prompt, "first": found.prompt}
        if found.error:
            return {**row, "picture": "", "source": found.error}
        return {**row, "picture": thumbnail(found.path), "source": found.source}


def thumbnail(path: Path) -> str:
    """A picture of 64 px as HTML; a gray one of a damaged file."""
    try:
        with Image.open(path) as image:
            image.draft("RGB", (THUMBNAIL, THUMBNAIL))
            small = image.convert("RGB")
            small.thumbnail((THUMBNAIL, THUMBNAIL))
    except UNREADABLE:  # its prompt may have been read for all that
        small = Image.new("RGB", (THUMBNAIL, THUMBNAIL), "gray")
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


def told(rows: Sequence[Row]) -> str:
    """How many pictures were described, and which files could not be read."""
    bad = [row["image"] for row in rows if not row["picture"]]
    good = len(rows) - len(bad)
    text = f"{good} picture{'' if good == 1 else 's'} described."
    return f"{text} Not read: {', '.join(bad)}." if bad else text if rows else "Choose pictures first."


def shown(rows: Sequence[Row], words: str) -> list[Row]:
    """The rows whose file, prompt or source holds all of some words."""
    wanted = words.lower().split()
    said = (f"{row['image']} {row['prompt']} {SOURCES.get(row['source'], row['source'])}".lower() for row in rows)
    return [row for row, text in zip(rows, said, strict=True) if all(word in text for word in wanted)]


def listing(rows: Sequence[Row], locked: bool = False) -> str:
    """The rows as HTML: thumbnail, file and source, and the prompt to be edited; `page.js` reads it again."""
    lines = []
    for row in rows:
        known = "unlike what the model knows" if row["familiar"] == "no" else ""
        said = SOURCES.get(row["source"], row["source"])
        about = f"<b>{escape(row['image'])}</b> {escape(' · '.join(filter(None, [said, known])))}"
        name = f"prompt of {escape(row['image'])}"
        how = f'rows=2 maxlength={MOST_LETTERS} aria-label="{name}"{" readonly" * locked}'
        text = f"<textarea {how}>\n{escape(row['prompt'])}</textarea>"
        undo = f'<button title="Undo the edits" aria-label="undo the edits of the {name}">↶</button>'
        lines.append(
            f'<div class=line data-image="{escape(row["image"])}" data-first="{escape(row["first"])}">'
            f"<div class=thumb>{row['picture']}</div><div class=text>{about}{text if row['picture'] else ''}</div>"
            f"{undo if row['picture'] and not locked else ''}</div>"
        )
    return "".join(lines)


def edited(rows: Sequence[Row], seen: Sequence[Row] | None) -> list[Row]:
    """The rows with the prompts that a user sees, of all or some of them."""
    prompts = {one["image"]: str(one["prompt"]) for one in seen or ()}
    return [{**row, "prompt": prompts.get(row["image"], row["prompt"])} for row in rows]


def only(rows: Sequence[Row], seen: Sequence[Row] | None) -> list[Row]:
    """The rows that a user sees, with the prompts as they are seen."""
    names = {one["image"] for one in seen or ()}
    return [row for row in edited(rows, seen) if row["image"] in names]


def write_csv(rows: Sequence[Row], path: Path) -> Path:
    """Rows without their pictures, as CSV."""
    pd.DataFrame(rows, columns=list(WRITTEN)).to_csv(path, index=False)
    return path


def write_texts(rows: Sequence[Row], path: Path) -> Path:
    """A .txt a picture, in a zip archive; names as `describe --txt` has them."""
    stems = [Path(row["image"]).stem for row in rows]
    twice = {stem for stem in stems if stems.count(stem) > 1}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for row, stem in zip(rows, stems, strict=True):
            if row["prompt"]:
                archive.writestr(f"{row['image'] if stem in twice else stem}.txt", f"{row['prompt']}\n")
    return path
