"""Which images a checkpoint of finetune calls strange: six kinds that it never saw, and scenes of the kind it knows.

python benchmarks/doubt.py [--run runs/default] [--files DIR...]                     prints a table, writes doubt.json

Drawn here: scenes of a seed that no run has, plots, screenshots of text, noise, gradients. Photographs are those that
installed packages ship: scikit-image (which the project does not need: pip install scikit-image), scikit-learn, Gradio,
Matplotlib. `--files` adds folders of images, a row each; what their files say plays no part.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from turns import record

SEED = 20_261_126  # of scenes
COUNTS = {"scenes of a new seed": 250, "plots": 40, "screenshots of text": 25, "noise": 20, "gradients": 20}
SHIPPED = {
    "skimage": "data/*.[pj]*g",
    "sklearn": "datasets/images/*.jpg",
    "gradio": "media_assets/images/*.jp*g",
    "matplotlib": "mpl-data/sample_data/grace_hopper.jpg",
}


def scenes(number: int) -> Image.Image:
    from image_to_prompts.embedded import grammar
    from image_to_prompts.embedded.scenes import picture

    return picture(grammar.prompt(SEED, number), SEED + number)[0]


def plots(number: int) -> Image.Image:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rng = np.random.default_rng(number)
    figure, axes = pyplot.subplots(figsize=rng.uniform(3, 8, 2))
    draw: list[Callable[[], object]] = [
        lambda: axes.plot(rng.normal(size=(50, 3)).cumsum(0)),
        lambda: axes.bar(range(8), rng.random(8), color=pyplot.cm.tab10(rng.integers(0, 10, 8))),
        lambda: axes.scatter(*rng.normal(size=(2, 200)), c=rng.random(200), s=rng.random(200) * 80),
        lambda: axes.imshow(rng.normal(size=(20, 20)), cmap=rng.choice(["viridis", "magma", "gray", "jet"])),
        lambda: axes.pie(rng.random(5), labels=list("abcde")),
    ]
    draw[number % len(draw)]()
    axes.set_title(f"Figure {number}")
    figure.canvas.draw()
    found = Image.fromarray(np.asarray(figure.canvas.buffer_rgba()))
    pyplot.close(figure)
    return found


def text(number: int) -> Image.Image:
    words = (Path(__file__).parents[1] / "docs" / "performance.md").read_text(encoding="utf-8").split()
    rng = random.Random(number)
    dark = number % 3 == 0
    image = Image.new("RGB", (800, 600), "#1e1e1e" if dark else "white")
    font = ImageFont.load_default(rng.randint(11, 24))
    for line in range(10, 580, 24):
        start = rng.randrange(len(words) - 12)
        said = " ".join(words[start : start + rng.randint(4, 12)])
        ImageDraw.Draw(image).text((10, line), said, font=font, fill="#ddd" if dark else "black")
    return image


def noise(number: int) -> Image.Image:
    rng = np.random.default_rng(number)
    size = int(rng.integers(200, 600))
    colours = rng.integers(0, 256, (size, size, 3)).astype(np.uint8)
    kinds: list[Callable[[], Image.Image]] = [
        lambda: Image.fromarray(colours),
        lambda: Image.fromarray(colours[: size // 16, : size // 16]).resize((size, size), Image.Resampling.NEAREST),
        lambda: Image.fromarray(rng.normal(128, 40, (size, size)).clip(0, 255).astype(np.uint8)),
        lambda: Image.fromarray(colours).filter(ImageFilter.GaussianBlur(4)),
    ]
    return kinds[number % len(kinds)]()


def gradients(number: int) -> Image.Image:
    down, right = np.mgrid[:400, :400] / 400
    shapes = (down, right, (down + right) / 2, (np.hypot(down - 0.5, right - 0.5) * 1.4).clip(0, 1))
    part = shapes[number % len(shapes)][..., None]
    first, second = np.random.default_rng(number).integers(0, 256, (2, 3))
    return Image.fromarray((first * (1 - part) + second * part).astype(np.uint8))


def photographs() -> Iterator[Path]:
    for package, pattern in SHIPPED.items():
        spec = find_spec(package)
        for folder in (spec and spec.submodule_search_locations) or ():
            yield from sorted(Path(folder).glob(pattern))


def kinds(folder: Path, more: list[Path]) -> Iterator[tuple[str, list[Path]]]:
    """The images of each kind; those that are drawn go into the folder."""
    for (name, count), draw in zip(COUNTS.items(), (scenes, plots, text, noise, gradients), strict=True):
        files = [folder / f"{draw.__name__}-{number}.png" for number in range(count)]
        for number, file in enumerate(files):
            draw(number).convert("RGB").save(file)
        yield name, files
    yield "photographs", list(photographs())
    from image_to_prompts.data import images

    for path in more:
        yield path.name, images.find(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/default"))
    parser.add_argument("--files", type=Path, nargs="*", default=[])
    options = parser.parse_args()
    from image_to_prompts.predict import predictors
    from image_to_prompts.run import folders

    of = folders.Run(options.run)
    checkpoint = predictors.checkpoint(of.checkpoint)
    openmoji = [options.run / "images/test-openmoji"]
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, files in kinds(Path(folder), [*openmoji, *options.files]):
            if files:
                far = predictors.predict(checkpoint, files, predictors.Viewing(("whole",))).strangeness
                low, middle, high = np.percentile(far, (5, 50, 95))
                rows[name] = {"images": len(far), "strange": float((far > 1).mean()), "5 %": low, "median": middle}
                rows[name]["95 %"] = high
    table = pd.DataFrame(rows).T
    print(table.round(3).to_string())
    record(__file__, "strange", table.T.to_dict())


if __name__ == "__main__":
    main()
