import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from image_to_prompts.describe import phrases
from image_to_prompts.describe.phrases import Part, Trigrams, cut, join
from image_to_prompts.run.errors import UserError

NAMES = ("fox", "oil", "owl", "x", "y")
PIECES = ["a fox", "oil", "owl,", "in", "of", " and ", "by", "x|y", "; ", "standing on", "wearing"]


@pytest.fixture(scope="module")
def vocabulary():
    return phrases.vocabulary(
        known=["a red fox on the roof of an observatory, by Ann Lee", "a fox; sharp focus", "(boats:1.2), <lora>"]
    )


@given(st.lists(st.sampled_from(PIECES), max_size=9).map(" ".join))
def test_nothing_is_lost_when_a_prompt_is_cut(prompt):
    parts = cut(prompt)
    assert all(part.phrase.strip() for part in parts)
    said = re.findall(r"\w+", " ".join(part.phrase for part in parts))
    assert [word for word in said if word in NAMES] == [word for word in re.findall(r"\w+", prompt) if word in NAMES]


def test_a_prompt_is_cut_at_marks_and_connectives():
    prompt = "oil painting of a red fox in a forest, by Greg Rutkowski; sharp focus. on fire"
    parts = cut(prompt)
    assert [part.phrase for part in parts] == [
        *("oil painting", "a red fox", "a forest", "Greg Rutkowski", "sharp focus", "fire")
    ]
    assert [part.connective for part in parts] == ["", "of", "in", "by", "", "on"]
    assert [part.said for part in parts][2:4] == ["in a forest", "by Greg Rutkowski"]
    assert join(parts) == prompt
    assert join(parts[1:]).startswith("a red fox in")
    assert join(parts[3:5]) == "by Greg Rutkowski; sharp focus"


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a couple of dogs standing on two cats", ["a couple of dogs", "two cats"]),
        ("a black and white photo of a man wearing a red hat", ["a black and white photo", "a man", "a red hat"]),
        ("a fox on top of a haystack", ["a fox", "a haystack"]),
        ("a city, trending on artstation", ["a city", "trending on artstation"]),
        ("in a city at night, a pill surrounded by ghosts", ["a city", "night", "a pill", "ghosts"]),
        ("one cloud at the bottom of the sea as woodcut", ["one cloud", "the bottom of the sea", "woodcut"]),
    ],
)
def test_words_that_belong_together_stay_together(prompt, expected):
    parts = cut(prompt)
    assert [part.phrase for part in parts] == expected
    assert join(parts) == prompt


@pytest.mark.parametrize(
    ("part", "kind"),
    [
        (Part("", "two dogs"), "subjects"),
        (Part(" on top of ", "a small red dog"), "subjects"),
        (Part(" on top of ", "a haystack"), "places"),
        (Part(", ", "an oil painting"), "mediums"),
        (Part(" in the style of ", "needlework"), "mediums"),
        (Part(", by ", "Ann Lee"), "artists"),
        (Part(" surrounded by ", "stuff"), "surrounded by"),
        (Part(" in ", "a city"), "places"),
        (Part(", ", "on a beach"), "places"),
        (Part(", ", "something new"), "flavors"),
    ],
)
def test_kinds(part, kind, vocabulary):
    assert vocabulary.kind(part, first=False) == kind


def test_phrases_of_known_prompts_and_of_lists_are_used(vocabulary):
    assert Part(" on ", "the roof") in vocabulary.parts["places"]
    assert Part("", "a red fox") in vocabulary.parts["subjects"]
    assert Part(", by ", "Ann Lee") in vocabulary.parts["artists"]
    phrases_ = {part.phrase for parts in vocabulary.parts.values() for part in parts}
    assert "sharp focus" in phrases_ and not phrases_ & {"(boats:1.2)", "<lora>"}
    assert Part("by ", "Greg Rutkowski") in vocabulary.parts["artists"]
    for kind, parts in vocabulary.parts.items():
        assert vocabulary.vectors[kind].shape == (len(parts), 384)
        np.testing.assert_allclose(np.linalg.norm(vocabulary.vectors[kind], axis=1), 1, atol=1e-3)


def test_own_lists(tmp_path):
    (tmp_path / "subjects.txt").write_text("a zeppelin\na red zeppelin\n")
    (tmp_path / "flavors.txt").write_text("")
    own = phrases.vocabulary(tmp_path, artists=False)
    assert own.parts["subjects"] == [Part("", "a zeppelin"), Part("", "a red zeppelin")]
    assert "sharp focus" not in [part.phrase for part in own.parts["flavors"]] and not own.parts.get("artists")
    assert own.kind(Part("", "two zeppelin"), first=True) == "subjects"
    assert "woodcut print" in [part.phrase for part in own.parts["mediums"]]
    (tmp_path / "mediums.txt").write_text("a batik\n")
    assert phrases.lists(tmp_path)["mediums"] == ["a batik"]
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match=r"subjects\.txt"):
        phrases.vocabulary(tmp_path / "none")


KNOWN = ["a cat on a roof", "a cat in a box, oil painting", "two dogs on a roof, oil painting"]
WORDS = ["a", "cat", "on", "roof", "dogs", ",", "zebra"]


@given(st.lists(st.sampled_from(WORDS), max_size=3), st.lists(st.sampled_from(KNOWN), max_size=4))
def test_probabilities_of_what_comes_next_sum_to_one(start, known):
    model = Trigrams(known)
    words = {gram[0] for gram in model.counts if len(gram) == 1}
    following = [w for w in words if w != "</s>"]
    at = len(start)
    total = sum(math.exp(-model.surprise(" ".join([*start, word]))[at]) for word in following)
    total += math.exp(-model.surprise(" ".join(start))[at])  # the end
    unseen = math.exp(-model.surprise(" ".join([*start, "unseen"]))[at])
    assert total + unseen == pytest.approx(1 if known else 2)  # without counts, only the one place of unseen words


def test_what_people_write_is_less_surprising():
    model = Trigrams(KNOWN)
    assert (
        model.perplexity("a cat on a roof")
        < model.perplexity("two dogs in a box")
        < model.perplexity("roof a on cat a")
    )
    assert model.surprise("a cat on a roof")[-1] < model.surprise("a cat on a")[-1]  # no prompt ends so
    assert model.surprise("A CAT") == model.surprise("a cat")


def test_words_and_marks_are_counted_once_each():
    assert len(Trigrams(KNOWN).surprise("a well-known cat, it's new")) == 7  # and the end


def test_one_word_by_hand():
    # "x" twice and the end once: three kinds with <s> left out; one more for what was never seen.
    model = Trigrams(["x x"])
    unigram = (2 + 2 * (1 / 3)) / (3 + 2)  # 2 of 3 words, 2 kinds, 1/3 for each of x, end, unseen
    bigram = (1 + 1 * unigram) / (1 + 1)  # after <s>: once, one kind
    assert math.exp(-model.surprise("x")[0]) == pytest.approx((1 + bigram) / 2)
