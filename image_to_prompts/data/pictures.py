"""Pictures of a run: galleries, strips that compare a prediction with the truth, a histogram of cosines."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw, ImageFont

from ..run.files import atomic_path
from . import images

TILE, CAPTION, FONT_SIZE = 224, 62, 13


def save(image: Image.Image, path: Path) -> None:
    """Writes a PNG atomically."""
    with atomic_path(path) as part:
        image.save(part, "PNG", optimize=False, compress_level=6)


def tile(image: Path | Image.Image, caption: str) -> Image.Image:
    """An image of 224 px with up to four lines of caption below it."""
    picture = images.read(image) if isinstance(image, Path) else image
    sheet = Image.new("RGB", (TILE, TILE + CAPTION), "white")
    sheet.paste(picture.resize((TILE, TILE), Image.Resampling.BICUBIC))
    lines = textwrap.wrap(caption, 34)
    if len(lines) > 4:
        lines = [*lines[:3], lines[3][:31] + "..."]
    ImageDraw.Draw(sheet).text((4, TILE + 2), "\n".join(lines), "black", ImageFont.load_default(FONT_SIZE), spacing=1)
    return sheet


def grid(tiles: Sequence[Image.Image], columns: int) -> Image.Image:
    """Tiles of one size in rows of `columns`; a white square if there are none."""
    tiles = tiles or [Image.new("RGB", (TILE, TILE), "white")]
    wide, high = tiles[0].size
    sheet = Image.new("RGB", (columns * (wide + 6), -(-len(tiles) // columns) * (high + 6)), "white")
    for i, one in enumerate(tiles):
        sheet.paste(one, (i % columns * (wide + 6), i // columns * (high + 6)))
    return sheet


def gallery(frame: pd.DataFrame, folder: Path, count: int = 24, columns: int = 6) -> Image.Image:
    """The first `count` images of a folder with their prompts.

    Args:
        frame: Rows with `file` and `prompt`, for example a render manifest.
        folder: Where the files lie.
        count: How many.
        columns: How many side by side.
    """
    rows = frame[frame["file"] != ""].head(count)
    return grid([tile(folder / f, p) for f, p in zip(rows["file"], rows["prompt"], strict=True)], columns)


def strip(true_image: Path, true_prompt: str, cosine: float, nearest: str, again: Path) -> Image.Image:
    """True image and prompt | nearest known prompt with its cosine to the true one | that prompt rendered again."""
    middle = Image.new("RGB", (TILE, TILE), "#f3f3ef")
    text = "\n".join(textwrap.wrap(f"“{nearest}”", 26)[:9])
    font = ImageFont.load_default(FONT_SIZE + 2)
    ImageDraw.Draw(middle).multiline_text((TILE / 2, TILE / 2), text, "black", font, "mm", align="center")
    return grid(
        [
            tile(true_image, true_prompt),
            tile(middle, f"nearest known prompt to the prediction; cosine to the true one {cosine:.2f}"),
            tile(again, "that prompt rendered again"),
        ],
        3,
    )


def histogram(cosines: np.ndarray, constant: np.ndarray, path: Path) -> None:
    """Draws the cosines of predictions beside those of the constant mean prediction, both (n,)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    bins = np.linspace(0, 1, 41)
    axes.hist(constant, bins, alpha=0.6, label=f"constant mean, {constant.mean():.3f}", color="grey")
    axes.hist(cosines, bins, alpha=0.6, label=f"model, {cosines.mean():.3f}")
    axes.set(xlabel="cosine to the true prompt's embedding", ylabel="test images")
    axes.legend()
    with atomic_path(path) as part:
        figure.savefig(part, format="png", dpi=110, metadata={"Software": None})


def learning_curve(history: pd.DataFrame, scores: dict[str, float], path: Path) -> None:
    """Draws the learning curve beside the baselines."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(history["epoch"], 1 - history["loss"], "o-", label="training (train mode)")
    axes.plot(history["epoch"], history["cosine"], "o-", label="validation (eval mode)")
    for name, style in (("constant", ":"), ("knn", "--")):
        axes.axhline(scores[name], linestyle=style, color="grey")
        axes.annotate(f"{name} {scores[name]:.3f}", (history["epoch"].iloc[-1], scores[name]), va="bottom", ha="right")
    axes.set(xlabel="epoch", ylabel="mean cosine", xticks=history["epoch"])
    axes.legend()
    with atomic_path(path) as part:
        figure.savefig(part, format="png", dpi=110, metadata={"Software": None})
