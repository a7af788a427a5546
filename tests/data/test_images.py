"""Images of every kind that people have."""

import contextlib
from pathlib import Path

import numpy as np
import pillow_heif
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from image_to_prompts.data import images, metadata
from image_to_prompts.data.rows import fit
from image_to_prompts.run.errors import UserError

RED = (200, 30, 30)


def test_formats_modes_and_orientation(tmp_path):
    base = Image.new("RGB", (40, 20), RED)
    base.save(tmp_path / "a.PNG")
    base.save(tmp_path / "b.jpg", quality=95)
    base.save(tmp_path / "c.webp", quality=95)
    base.convert("CMYK").save(tmp_path / "d.jpeg", quality=95)
    base.convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "e.png")
    for name in "abcde":
        file = next(tmp_path.glob(f"{name}.*"))
        values = np.asarray(images.read(file), np.int16)
        assert values.shape == (20, 40, 3) and np.abs(values - RED).max() < 25, file


def test_exif_orientation_is_applied(tmp_path):
    image = Image.new("RGB", (40, 20), RED)
    image.paste((0, 0, 255), (0, 0, 5, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter clockwise to show
    image.save(tmp_path / "a.jpg", exif=exif, quality=95)
    turned = images.read(tmp_path / "a.jpg")
    assert turned.size == (20, 40)
    assert turned.getpixel((10, 1))[2] > 200 > turned.getpixel((10, 38))[2]


@pytest.mark.parametrize("suffix", ["png", "webp", "jpg"])
def test_a_damaged_exif_block_says_nothing(tmp_path, suffix):
    for number, block in enumerate((b"Exif\0\0II*\0", b"Exif\0\0", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\1\x12")):
        path = tmp_path / f"{number}.{suffix}"
        Image.new("RGB", (40, 20), RED).save(path, exif=block)
        assert images.read(path).size == (40, 20)


def test_alpha_is_laid_on_white(tmp_path):
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "a.png")
    assert images.read(tmp_path / "a.png").getpixel((3, 3)) == (255, 255, 255)
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.save(tmp_path / "b.png", transparency=0)
    assert images.read(tmp_path / "b.png").getpixel((3, 3)) == (255, 255, 255)


def test_sixteen_bits_keep_their_brightness(tmp_path):
    Image.fromarray(np.full((8, 8), 40000, np.uint16)).save(tmp_path / "a.png")
    assert abs(images.read(tmp_path / "a.png").getpixel((1, 1))[0] - 40000 / 257) < 2


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, (0, 255, 0))]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:], lossless=True)
    frames[0].save(tmp_path / "b.png", save_all=True, append_images=frames[1:])
    for name in ("a.webp", "b.png"):
        assert images.read(tmp_path / name).getpixel((1, 1)) == RED


def test_broken_files_raise_one_kind_of_error(tmp_path):
    whole = tmp_path / "whole.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(whole)
    cases = {"empty.png": b"", "cut.png": whole.read_bytes()[:2000], "text.jpg": b"hello", "head.webp": b"RIFF"}
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(images.BrokenImageError, match=name):
            images.read(tmp_path / name)


def test_find_looks_below_and_sorts(tmp_path):
    for name in ("b/x.png", "a.JPG", "b/c/y.webp", ".hidden.png", ".thumbnails/x.png", "b/.trash/c/x.png", "notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert [f.relative_to(tmp_path).as_posix() for f in images.find(tmp_path)] == ["a.JPG", "b/c/y.webp", "b/x.png"]
    with pytest.raises(UserError, match="no images"):
        images.find(tmp_path / "b" / "c" / "..").clear() or images.find(_empty(tmp_path))
    with pytest.raises(UserError, match="no such folder"):
        images.find(tmp_path / "none")


def _empty(tmp_path):
    folder = tmp_path / "empty"
    folder.mkdir()
    return folder


def test_fit_crops_the_centre():
    wide = Image.new("RGB", (300, 100), "white")
    wide.paste(RED, (100, 0, 200, 100))
    fitted = fit(wide, 50)
    assert fitted.shape == (3, 50, 50) and fitted.dtype == np.uint8
    assert (fitted[0, :, 5:45] == RED[0]).all()


def test_what_is_passed_over_is_counted_by_kind(tmp_path, caplog):
    Image.new("RGB", (8, 8), RED).save(tmp_path / "a.png")
    for name in ("b.jxl", "c.JXL", "d.psd", "e.svg", "f.jp2"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "notes.txt").write_text("not an image at all")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    assert [path.name for path in images.find(tmp_path)] == ["a.png"]
    (said,) = [record.getMessage() for record in caplog.records]
    for kind in ("2 .jxl", "1 .psd", "1 .svg", "1 .jp2", "1 dangling link"):
        assert kind in said
    assert "txt" not in said


@pytest.mark.parametrize("suffix", [".avif", ".bmp", ".gif", ".heic", ".tif", ".webp"])
def test_every_kind_of_image_is_read(tmp_path, suffix):
    pillow_heif.register_heif_opener()
    Image.new("RGB", (64, 48), RED).save(tmp_path / f"a{suffix}")
    (path,) = images.find(tmp_path)
    image = images.read(path)
    assert image.size == (64, 48) and np.abs(np.asarray(image, int) - RED).max() < 8


@pytest.mark.parametrize("suffix", metadata.IMAGE_SUFFIXES)
def test_a_damaged_image_is_a_broken_one(tmp_path, suffix):
    rng, whole = np.random.default_rng(0), tmp_path / f"a{suffix}"
    pillow_heif.register_heif_opener()
    Image.fromarray(rng.integers(0, 255, (48, 64, 3), np.uint8)).save(whole)
    data = whole.read_bytes()
    for _ in range(60):
        damaged = bytearray(data)
        for place in rng.integers(min(500, len(data)), size=4):
            damaged[place] = rng.integers(256)
        whole.write_bytes(damaged)
        with contextlib.suppress(images.BrokenImageError):
            images.read(whole)


NAMES = st.sampled_from(["a", "b", "a.v2", "b.png", "x/a", "x/b", "y/a", "y/a.v2"])


@given(st.lists(st.tuples(NAMES, st.sampled_from([".png", ".jpg"])), unique=True), st.lists(NAMES))
def test_rows_and_images_are_joined_by_one_rule(files, names):
    """By the path below the folder, suffix included; by less of it only where that fits one image alone."""
    folder = Path("pictures")
    paths = [folder / f"{name}{suffix}" for name, suffix in files]
    wanted = [*names, *(f"{name}{suffix}" for name, suffix in files)]
    for name, found in zip(wanted, images.join(wanted, paths, folder), strict=True):
        if folder / name in paths:
            assert found == folder / name
            continue
        plain = name.removesuffix(".png").removesuffix(".jpg")
        whole = [path for path in paths if path.relative_to(folder).with_suffix("").as_posix() == plain]
        bare = [path for path in paths if path.stem == plain.rpartition("/")[2]] if "/" not in plain else []
        fitting = whole or bare
        assert found == (fitting[0] if len(fitting) == 1 else None), (name, fitting)
