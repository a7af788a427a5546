"""One background a place, painted from gradients and simple shapes; a plain gradient where no place is named."""

import colorsys
import math
import random
from collections.abc import Callable

from PIL import Image, ImageDraw

Colour = tuple[int, int, int]
Painter = Callable[[ImageDraw.ImageDraw, int, random.Random], None]


def gradient(size: int, top: Colour, bottom: Colour) -> Image.Image:
    """A vertical gradient, RGB, size x size px."""
    mask = Image.linear_gradient("L").resize((1, size))
    column = Image.composite(Image.new("RGB", (1, size), bottom), Image.new("RGB", (1, size), top), mask)
    return column.resize((size, size), Image.Resampling.NEAREST)


def _hill(draw: ImageDraw.ImageDraw, size: int, base: float, height: float, waves: float, shift: float, fill: str):
    steps = range(0, size + 16, 16)
    edge = [(x, size * (base - height * math.sin(waves * math.tau * x / size + shift))) for x in steps]
    draw.polygon([(0, size), *edge, (size, size)], fill=fill)


def _dots(draw: ImageDraw.ImageDraw, size: int, rng: random.Random, count: int, radius: tuple[int, int], fills):
    for _ in range(count):
        x, y, r = rng.random() * size, rng.random() * size, rng.randint(*radius)
        draw.ellipse((x - r, y - r, x + r, y + r), fill=rng.choice(fills))


def _forest(draw, size, rng):
    for depth, fill in ((0.42, "#2f6b34"), (0.55, "#245529"), (0.7, "#173d1c")):
        for i in range(9):
            x = (i + rng.uniform(-0.4, 0.4)) * size / 8
            base, tall, wide = depth * size + 180, size * 0.42, size * 0.075
            draw.rectangle((x - 9, base - 90, x + 9, base + 60), fill="#4a2f1b")
            draw.polygon(((x - wide, base - 40), (x, base - tall), (x + wide, base - 40)), fill=fill)
    draw.rectangle((0, size * 0.9, size, size), fill="#2b3b17")


def _desert(draw, size, rng):
    x = rng.uniform(0.1, 0.9) * size
    draw.ellipse((x - 60, 50, x + 60, 170), fill="#fff3b0")
    for base, fill in ((0.5, "#e2b566"), (0.63, "#d49d48"), (0.78, "#bf8436")):
        _hill(draw, size, base, 0.06, rng.uniform(0.6, 1.3), rng.random() * 6, fill)


def _beach(draw, size, rng):
    draw.rectangle((0, size * 0.42, size, size * 0.66), fill="#2a9fc9")
    for y in (0.48, 0.54, 0.6):
        draw.line((0, size * y, size, size * y), fill="#9fe3f2", width=5)
    _hill(draw, size, 0.67, 0.02, 1.5, rng.random() * 6, "#f3dda2")
    x = rng.uniform(0.1, 0.9) * size
    draw.ellipse((x - 50, 40, x + 50, 140), fill="#ffe14d")


def _underwater(draw, size, rng):
    for i in range(5):
        x = (i + rng.random()) * size / 5
        draw.polygon(((x, 0), (x + 40, 0), (x + 160, size), (x - 60, size)), fill="#2c9dbb")
    _dots(draw, size, rng, 40, (4, 14), ("#bdeff7", "#8fdcec"))
    _hill(draw, size, 0.9, 0.03, 2, rng.random() * 6, "#c9b27a")
    for i in range(8):
        x = (i + rng.random()) * size / 8
        draw.line([(x + 14 * math.sin(k), size - 26 * k) for k in range(8)], fill="#1f8a4c", width=12)


def _space(draw, size, rng):
    for colour, r in (("#2a1a55", 240), ("#3b2372", 150)):
        x, y = rng.random() * size, rng.random() * size
        draw.ellipse((x - r, y - r / 2, x + r, y + r / 2), fill=colour)
    _dots(draw, size, rng, 160, (1, 4), ("#ffffff", "#cfd8ff", "#ffe9c4"))


def _mountains(draw, size, rng):
    for i in range(4):
        x, peak = (i + rng.uniform(-0.2, 0.2)) * size / 3, rng.uniform(0.15, 0.35) * size
        draw.polygon(((x - 260, size * 0.8), (x, peak), (x + 260, size * 0.8)), fill="#6f7f95")
        draw.polygon(((x - 78, peak + 130), (x, peak), (x + 78, peak + 130)), fill="#ffffff")
    draw.rectangle((0, size * 0.76, size, size), fill="#e9eff5")


def _city(draw, size, rng):
    x = 0
    while x < size:
        wide, top = rng.randint(60, 120), rng.uniform(0.15, 0.5) * size
        draw.rectangle((x, top, x + wide, size * 0.86), fill=rng.choice(("#22263d", "#2c3150", "#1a1d30")))
        for wx in range(x + 10, x + wide - 12, 22):
            for wy in range(int(top) + 12, int(size * 0.84), 30):
                if rng.random() < 0.55:
                    draw.rectangle((wx, wy, wx + 10, wy + 14), fill=rng.choice(("#ffe27a", "#ff5fb0", "#5fe6ff")))
        x += wide
    draw.rectangle((0, size * 0.86, size, size), fill="#101018")


def _kitchen(draw, size, rng):
    shift = rng.randint(0, 95)
    for x in range(-shift, size, 96):
        for y in range(int(size * 0.6), size, 96):
            red = ((x + shift) // 96 + (y - int(size * 0.6)) // 96) % 2
            draw.rectangle((x, y, x + 96, y + 96), fill="#d9483b" if red else "#fdf6ec")
    for x in range(-shift, size, 128):
        draw.rectangle((x + 6, 20, x + 122, size * 0.36), fill="#c28b52", outline="#8a5a2b", width=6)


def _meadow(draw, size, rng):
    _hill(draw, size, 0.5, 0.05, 0.9, rng.random() * 6, "#7cc24a")
    _hill(draw, size, 0.62, 0.04, 1.2, rng.random() * 6, "#5fae36")
    for _ in range(110):
        x, y = rng.random() * size, size * rng.uniform(0.66, 1)
        draw.ellipse((x - 6, y - 6, x + 6, y + 6), fill=rng.choice(("#ffe14d", "#ff7fb0", "#ffffff", "#b07fff")))


def _cave(draw, size, rng):
    draw.ellipse((size * 0.08, size * 0.1, size * 0.92, size * 0.95), fill="#4d443c")
    for top in (True, False):
        for i in range(10):
            x, tall = (i + rng.random()) * size / 10, rng.uniform(0.1, 0.26) * size
            y, tip = (0, tall) if top else (size, size - tall)
            draw.polygon(((x - 40, y), (x + 40, y), (x, tip)), fill="#1d1815")
    for x in (0.12, 0.88):
        draw.ellipse((size * x - 34, size * 0.4, size * x + 34, size * 0.52), fill="#ff9a2e")


def _lava(draw, size, rng):
    for i in range(5):
        x = (i + rng.uniform(0, 1)) * size / 5
        draw.polygon(((x - 130, size * 0.6), (x, size * rng.uniform(0.2, 0.4)), (x + 130, size * 0.6)), fill="#1e0d0b")
    draw.rectangle((0, size * 0.6, size, size), fill="#ff4d12")
    for _ in range(26):
        x, y, w = rng.random() * size, size * rng.uniform(0.62, 1), rng.randint(30, 120)
        draw.ellipse((x - w, y - 9, x + w, y + 9), fill=rng.choice(("#ffb52e", "#a81c05", "#ffd94d")))


def _sunset(draw, size, rng):
    x = rng.uniform(0.3, 0.7) * size
    draw.ellipse((x - 150, size * 0.42, x + 150, size * 0.42 + 300), fill="#ffdf6b")
    for _ in range(7):
        cx, cy, w = rng.random() * size, size * rng.uniform(0.08, 0.5), rng.randint(70, 160)
        draw.ellipse((cx - w, cy - 11, cx + w, cy + 11), fill="#f58ba8")
    _hill(draw, size, 0.78, 0.03, 1.1, rng.random() * 6, "#4a1f4d")


def _ice(draw, size, rng):
    draw.rectangle((0, size * 0.5, size, size), fill="#5fa9cf")
    for _ in range(12):
        x, y, w = rng.random() * size, size * rng.uniform(0.5, 1), rng.randint(50, 130)
        draw.polygon(((x - w, y + 20), (x - w * 0.6, y - 22), (x + w * 0.7, y - 16), (x + w, y + 20)), fill="#f2fbff")
    for _ in range(3):
        x, w = rng.random() * size, rng.randint(70, 150)
        draw.polygon(((x - w, size * 0.52), (x, size * rng.uniform(0.22, 0.4)), (x + w, size * 0.52)), fill="#d5f0fb")


def _stage(draw, size, rng):
    for x in range(0, size, 48):
        inner = size * 0.2 < x < size * 0.76
        draw.rectangle((x, 0, x + 24, size * (0.2 if inner else 0.86)), fill="#8f1020")
        draw.rectangle((x + 24, 0, x + 48, size * (0.2 if inner else 0.86)), fill="#b81d2f")
    x = rng.uniform(0.4, 0.6) * size
    draw.polygon(((x, 0), (size * 0.16, size * 0.9), (size * 0.84, size * 0.9)), fill="#6b6042")
    draw.rectangle((0, size * 0.86, size, size), fill="#7a4a22")
    draw.ellipse((size * 0.16, size * 0.84, size * 0.84, size * 0.99), fill="#e8d9a0")


PLACES: dict[str, tuple[str, str, Painter]] = {
    "forest": ("#9fc7a0", "#3f6b3f", _forest),
    "desert": ("#7fc4ee", "#f7e2b5", _desert),
    "beach": ("#79cdf5", "#d7f3fc", _beach),
    "underwater": ("#37b6d3", "#06365f", _underwater),
    "space": ("#050414", "#150c33", _space),
    "mountains": ("#6aaee6", "#dcecf7", _mountains),
    "city": ("#160b35", "#57256b", _city),
    "kitchen": ("#f6e3c2", "#ead0a4", _kitchen),
    "meadow": ("#66bdf2", "#d4effb", _meadow),
    "cave": ("#120e0c", "#26201b", _cave),
    "lava": ("#2b0605", "#8f1a08", _lava),
    "sunset": ("#5b2a86", "#ff8a3c", _sunset),
    "ice": ("#b9def2", "#eef9ff", _ice),
    "stage": ("#1a0508", "#2d0a10", _stage),
}
"""Sky colours, top and bottom, and the painter of each place of `embedded.grammar.PLACES`."""


def _pastel(rng: random.Random) -> Colour:
    red, green, blue = colorsys.hls_to_rgb(rng.random(), rng.uniform(0.78, 0.92), rng.uniform(0.3, 0.7))
    return round(red * 255), round(green * 255), round(blue * 255)


def _rgb(text: str) -> Colour:
    return int(text[1:3], 16), int(text[3:5], 16), int(text[5:7], 16)


def paint(place: str | None, size: int, rng: random.Random) -> Image.Image:
    """Paints a place, or a pastel gradient for None, as an RGB image of size x size px."""
    if place is None:
        return gradient(size, _pastel(rng), _pastel(rng))
    top, bottom, painter = PLACES[place]
    canvas = gradient(size, _rgb(top), _rgb(bottom))
    painter(ImageDraw.Draw(canvas), size, rng)
    return canvas


def scribble(canvas: Image.Image, rng: random.Random) -> None:
    """Draws abstract shapes: the picture of a prompt that names no thing."""
    draw = ImageDraw.Draw(canvas)
    for _ in range(rng.randint(6, 12)):
        x, y, r = rng.random() * canvas.width, rng.random() * canvas.height, rng.randint(30, 170)
        draw.ellipse((x - r, y - r, x + r, y + r), outline=_pastel(rng), width=rng.randint(6, 40))
