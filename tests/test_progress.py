"""Estimates in words."""

import pytest

from image_to_prompts.progress import Estimate, short


@pytest.mark.parametrize(
    ("value", "said"), [(0.02816, "0.028"), (1.53, "1.5"), (26.4, "26"), (266.4, "266"), (2664.4, "2,664"), (0, "0")]
)
def test_numbers_are_short(value, said):
    assert short(value) == said


def test_an_estimate_says_images_seconds_hours_and_room():
    slow = Estimate("images", 100_000, 90_000, 19.2, 464_000)
    assert str(slow) == "100,000 images, 90,000 to do, 19.20 s each: 480 h, 46 GB in all"
    fast = Estimate("prompts", 3000, 3000, 0.01, 100)
    assert str(fast) == "3,000 prompts, 3,000 to do, 100 a second: 0.0083 h, 0.0003 GB in all"
    assert str(Estimate("images", 5, 0, 0.0, 0.0)) == "5 images: all done"
