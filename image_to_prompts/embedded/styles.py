"""One image filter a style, applied to the finished 512-px picture."""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageChops, ImageEnhance, ImageFilter, ImageOps


def _edges(image: Image.Image) -> Image.Image:
    """Outlines as light grey on black."""
    grey = image.convert("L").filter(ImageFilter.GaussianBlur(1))
    return ImageChops.difference(grey.filter(ImageFilter.MaxFilter(3)), grey.filter(ImageFilter.MinFilter(3)))


def _ramp(image: Image.Image, *colours: str) -> Image.Image:
    """Maps brightness onto two or three colours."""
    black, *mid, white = colours
    return ImageOps.colorize(image.convert("L"), black, white, mid=mid[0] if mid else None)


def pencil(image: Image.Image) -> Image.Image:
    lines = ImageOps.invert(_edges(image).point(lambda v: min(255, v * 3)))
    return _ramp(Image.blend(lines, image.convert("L"), 0.35), "#26262b", "#fdfcf7")


def oil(image: Image.Image) -> Image.Image:
    small = image.resize((160, 160), Image.Resampling.BOX).filter(ImageFilter.ModeFilter(5))
    smeared = small.resize(image.size, Image.Resampling.BICUBIC).filter(ImageFilter.EMBOSS)
    base = small.resize(image.size, Image.Resampling.BICUBIC)
    return ImageEnhance.Color(Image.blend(base, smeared, 0.25)).enhance(1.4)


def watercolor(image: Image.Image) -> Image.Image:
    soft = image.resize((256, 256), Image.Resampling.BOX).filter(ImageFilter.MedianFilter(3))
    paler = Image.blend(soft, Image.new("RGB", soft.size, "#fffaf0"), 0.42)
    return ImageChops.subtract(paler, _edges(soft).convert("RGB")).resize(image.size, Image.Resampling.BICUBIC)


def pixel(image: Image.Image) -> Image.Image:
    small = image.resize((64, 64), Image.Resampling.BOX)
    return ImageOps.posterize(small, 4).resize(image.size, Image.Resampling.NEAREST)


def monochrome(image: Image.Image) -> Image.Image:
    return ImageOps.autocontrast(image.convert("L"), cutoff=1).convert("RGB")


def sepia(image: Image.Image) -> Image.Image:
    return _ramp(image.filter(ImageFilter.GaussianBlur(0.8)), "#2b1a0c", "#b58a55", "#f6e7c8")


def neon(image: Image.Image) -> Image.Image:
    mask = _edges(image).point(lambda v: min(255, v * 4))
    bright = ImageEnhance.Color(image).enhance(3).point(lambda v: min(255, v + 70))
    lines = Image.composite(bright, Image.new("RGB", image.size, "#08020f"), mask)
    glow = ImageChops.add(lines, lines.filter(ImageFilter.BoxBlur(5)))
    return ImageChops.add(glow, image.point(lambda v: v // 5))


def blueprint(image: Image.Image) -> Image.Image:
    lines = ImageChops.add(_edges(image).point(lambda v: min(255, v * 3)), image.convert("L").point(lambda v: v // 4))
    drawing = _ramp(lines, "#123a8c", "#eaf2ff")
    pixels = np.asarray(drawing).copy()
    pixels[::32], pixels[:, ::32] = (70, 110, 190), (70, 110, 190)
    return Image.fromarray(pixels)


def popart(image: Image.Image) -> Image.Image:
    flat = ImageOps.posterize(ImageEnhance.Color(ImageOps.autocontrast(image)).enhance(2.2), 2)
    pixels = np.asarray(flat).copy()
    y, x = np.ogrid[: image.height, : image.width]
    pixels[((x % 10 - 5) ** 2 + (y % 10 - 5) ** 2) < 6] //= 2
    return Image.fromarray(pixels)


def woodcut(image: Image.Image) -> Image.Image:
    grey = ImageOps.autocontrast(image.convert("L").filter(ImageFilter.GaussianBlur(1)))
    values = np.asarray(grey, np.int16)
    hatch = (np.arange(image.height) % 8 * 14 - 50)[:, None]
    return _ramp(Image.fromarray(np.where(values + hatch > 118, 255, 0).astype(np.uint8)), "#14110f", "#f1e6d0")


def mosaic(image: Image.Image) -> Image.Image:
    tiles = ImageEnhance.Color(image.resize((32, 32), Image.Resampling.BOX)).enhance(1.5)
    pixels = np.asarray(tiles.resize(image.size, Image.Resampling.NEAREST)).copy()
    pixels[::16], pixels[:, ::16] = 25, 25
    pixels[1::16], pixels[:, 1::16] = 25, 25
    return Image.blend(Image.fromarray(pixels), image, 0.4)


def infrared(image: Image.Image) -> Image.Image:
    values = np.asarray(ImageOps.autocontrast(image.convert("L").filter(ImageFilter.GaussianBlur(3))), np.float32)
    stops = np.array([(10, 0, 60), (120, 0, 150), (230, 60, 60), (255, 170, 0), (255, 255, 200)], np.float32)
    table = np.stack([np.interp(np.arange(256), np.linspace(0, 255, 5), stops[:, c]) for c in range(3)], 1)
    return Image.fromarray(table.astype(np.uint8)[values.astype(np.uint8)])


def blurry(image: Image.Image) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(6))


STYLES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "pencil": pencil,
    "oil": oil,
    "watercolor": watercolor,
    "pixel": pixel,
    "monochrome": monochrome,
    "sepia": sepia,
    "neon": neon,
    "blueprint": blueprint,
    "popart": popart,
    "woodcut": woodcut,
    "mosaic": mosaic,
    "infrared": infrared,
    "blurry": blurry,
}
"""The filter of each style of `embedded.grammar.STYLES`."""


def apply(style: str | None, image: Image.Image) -> Image.Image:
    """Applies a style to an RGB image; None leaves it as it is."""
    return STYLES[style](image) if style else image
