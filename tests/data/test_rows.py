"""Colours of a folder, by which its images can be normalised."""

import numpy as np
import pytest
from PIL import Image

from image_to_prompts.data import rows
from image_to_prompts.run.errors import UserError


def test_colours_are_mean_and_deviation_of_the_channels(tmp_path, monkeypatch):
    files = [tmp_path / f"{number}.png" for number in range(4)]
    for file, colour in zip(files, [(0, 255, 51), (255, 255, 51), (0, 255, 51), (255, 255, 51)], strict=True):
        Image.new("RGB", (40, 30), colour).save(file)
    torn = tmp_path / "torn.png"
    torn.write_bytes(b"")
    mean, deviation = rows.colours([*files, torn])
    assert mean == (0.5, 1.0, 0.2) and deviation == (0.5, 0.0, 0.0)
    monkeypatch.setattr(rows, "SAMPLED", 2)
    assert rows.colours(files)[0] == (0.0, 1.0, 0.2), "every second one"
    with pytest.raises(UserError, match="no image can be read"):
        rows.colours([torn])


def test_colours_of_halves(tmp_path):
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[:, :16] = 204
    Image.fromarray(picture).save(tmp_path / "a.png")
    mean, deviation = rows.colours([tmp_path / "a.png"])
    assert mean == (0.2,) * 3 and deviation == pytest.approx((0.8 * np.sqrt(0.25 * 0.75),) * 3, abs=1e-4)
