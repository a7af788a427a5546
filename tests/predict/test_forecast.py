"""What a prediction will take is known before an image is read."""

import numpy as np
import pytest
from PIL import Image

from image_to_prompts.data.rows import Fit
from image_to_prompts.predict import forecast
from image_to_prompts.predict.predictors import BLOCK, Predictor, Viewing
from image_to_prompts.run.progress import Deadline


class Clock:
    """A clock that moves by what is asked for alone: a busy machine changes nothing."""

    now = 0.0

    def perf_counter(self):
        return self.now

    def pass_by(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    found = Clock()
    monkeypatch.setattr(forecast, "time", found)
    return found


class Slow:
    """An encoder that takes 4 ms an image, and a second the first time."""

    fits = (Fit(224),)

    def __init__(self, name, clock):
        self.about, self.clock, self.first = {"encoder": name}, clock, 1.0

    def see(self, squares):
        self.clock.pass_by(0.004 * len(squares[0]) + self.first)
        self.first = 0.0
        return squares[0].float().mean((2, 3)).numpy()


def predictor(clock, block, each):
    """One with two encoders whose search takes some seconds a block and some an image."""

    def finish(arrays):
        clock.pass_by(block + each * len(arrays[0]))
        return np.zeros((len(arrays[0]), 384), np.float32)

    return Predictor(np.zeros(384, np.float32), [Slow("one", clock), Slow("two", clock)], finish)


def test_each_part_is_told_by_its_share(clock):
    found = forecast.seconds(predictor(clock, 0.05, 0.002), 3 * BLOCK, Viewing(views=("whole", "centre")))
    assert list(found) == ["one", "two", "search and prediction"]
    assert found["one"] == found["two"] == pytest.approx(2 * 3 * BLOCK * 0.004)
    assert found["search and prediction"] == pytest.approx(2 * (3 * 0.05 + 3 * BLOCK * 0.002))


def test_what_will_not_be_reached_is_said_first(clock, caplog, monkeypatch):
    caplog.set_level("INFO")
    monkeypatch.setattr(Deadline, "left", 8.0)
    forecast.tell("bank", predictor(clock, 0, 0.002), 2000, Viewing(views=("whole",)), Deadline(1))
    assert "bank, 2000 images: one 8 s, two 8 s, search and prediction 4 s" in caplog.text
    assert "about 120" in caplog.text and "images will get the mean prediction" in caplog.text
    caplog.clear()
    forecast.tell("bank", predictor(clock, 0, 0), forecast.LEAST - 1, Viewing(views=("whole",)), Deadline(1))
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
