"""Bounds beside the defaults: each is checked, whoever makes the settings."""

from dataclasses import dataclass
from typing import Annotated, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from image_to_prompts.run.bounds import Amount, AtLeast, Positive, check
from image_to_prompts.run.errors import UserError


@dataclass
class Settings:
    epochs: Positive = 1
    max_hours: Amount = 0.0
    some_views: Annotated[tuple[str, ...], AtLeast(1)] = ("whole",)
    way: Literal["exact", "faiss"] = "exact"


@given(st.integers(-3, 3), st.floats(-2, 2), st.integers(0, 2))
def test_what_is_below_its_bound_is_refused(epochs, hours, views):
    settings = Settings(epochs, hours, ("whole",) * views)
    if epochs >= 1 and hours >= 0 and views:
        check(settings)
        return
    with pytest.raises(UserError, match=r"--(epochs|max-hours|some-views)"):
        check(settings)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (Settings(epochs=0), "--epochs 0: must be at least 1"),
        (Settings(max_hours=float("nan")), "--max-hours nan: must be at least 0"),
        (Settings(some_views=()), "--some-views: give at least one"),
        (Settings(way="none"), "--way none: must be one of exact, faiss"),
    ],
)
def test_the_message_names_the_flag(settings, said):
    with pytest.raises(UserError, match=said):
        check(settings)
