"""What a prediction will take is known before an image is read."""

import time

import numpy as np
import pytest
from PIL import Image

from image_to_prompts.data.rows import Fit
from image_to_prompts.predict import forecast
from image_to_prompts.predict.predictors import BLOCK, Predictor, Viewing
from image_to_prompts.run.progress import Deadline


class Slow:
    """An encoder that takes 4 ms an image."""

    fits = (Fit(224),)

    def __init__(self, name):
        self.about = {"encoder": name}

    def see(self, squares):
        time.sleep(0.004 * len(squares[0]))
        return squares[0].float().mean((2, 3)).numpy()


def predictor(block, each):
    """One with two encoders whose search takes some seconds a block and some an image."""

    def finish(arrays):
        time.sleep(block + each * len(arrays[0]))
        return np.zeros((len(arrays[0]), 384), np.float32)

    return Predictor(np.zeros(384, np.float32), [Slow("one"), Slow("two")], finish)


def test_each_part_is_told_by_its_share():
    found = forecast.seconds(predictor(0.05, 0.002), 3 * BLOCK, Viewing(views=("whole", "centre")))
    assert list(found) == ["one", "two", "search and prediction"]
    assert found["one"] == pytest.approx(2 * 3 * BLOCK * 0.004, rel=0.3)
    assert found["search and prediction"] == pytest.approx(2 * (3 * 0.05 + 3 * BLOCK * 0.002), rel=0.4)


def test_what_will_not_be_reached_is_said_first(caplog, monkeypatch):
    caplog.set_level("INFO")
    monkeypatch.setattr(Deadline, "left", 8.0)
    forecast.tell("bank", predictor(0, 0.002), 2000, Viewing(views=("whole",)), Deadline(1))
    assert "bank, 2000 images: one 8" in caplog.text and "images will get the mean prediction" in caplog.text
    caplog.clear()
    forecast.tell("bank", predictor(0, 0), forecast.LEAST - 1, Viewing(views=("whole",)), Deadline(1))
    forecast.tell("mean", Predictor(np.zeros(384, np.float32)), 5000, Viewing(), Deadline(1))
    assert not caplog.text


def test_infer_tells_it(small_checkpoint, tmp_path, command, monkeypatch):
    monkeypatch.setattr(forecast, "LEAST", 1)
    (tmp_path / "i").mkdir()
    Image.new("RGB", (40, 40), "red").save(tmp_path / "i" / "a.png")
    words = ["infer", "--images", tmp_path / "i", "--checkpoint", small_checkpoint, "--out", tmp_path / "s.csv"]
    code, _, err = command(*words, "--views", "whole")
    assert code == 0 and "1 images: " in err and "search and prediction" in err, err
    assert err.index("search and prediction") < err.index("s.csv: 1 images")
