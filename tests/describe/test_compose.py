import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from image_to_prompts.describe import compose
from image_to_prompts.models import text_encoder
from image_to_prompts.run.errors import UserError

KNOWN = ["a photo of a cat, by Greg Rutkowski, sharp focus", "two dogs in a forest, pixel art", "a cat on a roof"]


@pytest.fixture(scope="module")
def words():
    return compose.vocabulary()


@pytest.fixture(scope="module")
def no_artists():
    return compose.vocabulary(artists=False)


NAMES = ("fox", "oil", "owl", "x", "y")
PIECES = ["a fox", "oil", "owl,", "in", "of", " and ", "by", "x|y", "; "]


@given(st.lists(st.sampled_from(PIECES), max_size=9).map(" ".join))
def test_nothing_is_lost_when_a_prompt_is_cut(prompt):
    parts = compose.cut(prompt)
    assert all(part.phrase.strip() for part in parts)
    said = re.findall(r"\w+", " ".join(part.phrase for part in parts))
    assert [word for word in said if word in NAMES] == [word for word in re.findall(r"\w+", prompt) if word in NAMES]


def test_a_prompt_is_cut_at_commas_and_connectives():
    parts = compose.cut("oil painting of a red fox in a forest, by Greg Rutkowski; sharp focus")
    assert [part.phrase for part in parts] == [
        "oil painting",
        "a red fox",
        "a forest",
        "by Greg Rutkowski",
        "sharp focus",
    ]
    assert compose.join(parts) == "oil painting of a red fox in a forest, by Greg Rutkowski; sharp focus"
    assert compose.join(parts[1:]).startswith("a red fox in")
    assert compose.phrases_of("portrait by Ann") == ["portrait", "by Ann"]
    assert compose.join([compose.Part("", "fox"), compose.Part(" in ", "in a forest")]) == "fox in a forest"


def test_the_composed_prompt_is_nearer_than_the_nearest_known(words):
    truths = ["a watercolor painting of a cat on a roof in a forest", "a pixel art dog, cinematic"]
    targets = text_encoder.encode(truths)
    known = [sorted(KNOWN, key=lambda text: -text_encoder.encode([text])[0] @ target) for target in targets]
    found = compose.compose(targets, known, words)
    before = (text_encoder.encode([some[0] for some in known]) * targets).sum(1)
    after = (text_encoder.encode(found) * targets).sum(1)
    assert (after > before + 0.05).all(), (found, before, after)
    assert compose.compose(targets, known, words) == found  # the same again, and alone
    assert compose.compose(targets[:1], known[:1], words) == found[:1]


def test_artists_are_left_out_on_request(words, no_artists):
    target = text_encoder.encode(["a photo of a cat by Greg Rutkowski"])
    (found,) = compose.compose(target, [KNOWN], words)
    assert " by " in found, found
    (found,) = compose.compose(target, [KNOWN], no_artists)
    assert "cat" in found and "rutkowski" not in found.lower() and " by " not in found
    names = {phrase for phrase in words.phrases if phrase.startswith("by ")}
    assert len(names) > 1000 and not names & set(no_artists.phrases)


def test_the_length_limit_holds(words):
    target = text_encoder.encode(["a cat, a dog, a fox, a wolf, a bear in a forest, oil painting, sunset, fog"])
    assert len(compose.compose(target, [KNOWN[2:]], words, 6)[0].split()) <= 6
    for limit in (1, 4):  # shorter than the known prompt
        assert 1 <= len(compose.compose(target, [KNOWN], words, limit)[0].split()) <= limit
    long = compose.compose(target, [KNOWN[2:]], words, 30)[0]
    assert 6 < len(long.split()) <= 30


def test_own_words(tmp_path):
    (tmp_path / "subjects.txt").write_text("a zeppelin\na red zeppelin\n")
    (tmp_path / "flavors.txt").write_text("")
    own = compose.vocabulary(tmp_path, artists=False)
    assert own.phrases[:2] == ["a zeppelin", "a red zeppelin"] and "sharp focus" not in own.phrases
    target = text_encoder.encode(["a red zeppelin over a forest"])
    assert "zeppelin" in compose.compose(target, [KNOWN], own)[0]
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match=r"subjects\.txt"):
        compose.vocabulary(tmp_path / "none")


def test_prompts_without_letters_and_one_phrase_do_not_break_it(words):
    targets = text_encoder.encode(["a cat", "a dog"])
    found = compose.compose(targets, [[", ;"], ["by Greg Rutkowski"]], words)
    assert all(text.strip() for text in found)
    assert np.isfinite(text_encoder.encode(found)).all()
