import numpy as np
import pytest

from image_to_prompts.data.terms import words
from image_to_prompts.describe import compose, phrases
from image_to_prompts.describe.phrases import Trigrams
from image_to_prompts.models import metrics, text_encoder

KNOWN = ["a photo of a cat, by Greg Rutkowski, sharp focus", "two dogs in a forest, pixel art", "a cat on a roof"]


@pytest.fixture(scope="module")
def vocabulary():
    return phrases.vocabulary(known=KNOWN)


@pytest.fixture(scope="module")
def language():
    return Trigrams(KNOWN)


def first(targets, known, *rest):
    return [some[0] for some in compose.compose(targets, known, *rest)]


def test_the_composed_prompt_is_nearer_than_the_nearest_known(vocabulary, language):
    truths = ["a watercolor painting of a cat on a roof in a forest", "a pixel art dog, cinematic"]
    targets = text_encoder.encode(truths)
    known = [sorted(KNOWN, key=lambda text: -text_encoder.encode([text])[0] @ target) for target in targets]
    found = compose.compose(targets, known, vocabulary, language)
    before = (text_encoder.encode([some[0] for some in known]) * targets).sum(1)
    after = (text_encoder.encode([some[0] for some in found]) * targets).sum(1)
    assert (after > before + 0.05).all(), (found, before, after)
    assert all(1 < len(some) <= 3 and len(set(some)) == len(some) for some in found)
    assert compose.compose(targets, known, vocabulary, language) == found  # the same again, and alone
    assert compose.compose(targets[:1], known[:1], vocabulary, language) == found[:1]


@pytest.mark.parametrize(("share", "shown"), [(0, 0), (0.44, 0), (0.48, 1)])
def test_where_composing_wins_little_the_known_prompt_is_shown(share, shown, vocabulary, language):
    known, more = text_encoder.encode([KNOWN[2], "sharp focus"])
    target = metrics.unit((known + share * more)[None])
    texts = [KNOWN[2], f"{KNOWN[2]}, sharp focus"]
    gain = (text_encoder.encode(texts) @ target[0]) @ [-1, 1]
    assert (gain >= compose.WORTH) == bool(shown)
    found = compose.compose(target, [[KNOWN[2], *KNOWN[:2]]], vocabulary, language)[0]
    assert found[0] == texts[shown]
    assert gain < 0 or texts[1] in found


def test_like_goes_for_like(vocabulary, language):
    target = text_encoder.encode(["a photo of a horse, sharp focus"])
    (found,) = first(target, [KNOWN[:1]], vocabulary, language)
    assert found.startswith("a photo of") and "horse" in found.partition(",")[0], found


def test_nothing_is_said_twice(vocabulary):
    target = text_encoder.encode(["two cats and a cat on a roof"])
    for text in compose.compose(target, [["a dog and a fox on a roof", "a cat"]], vocabulary, Trigrams([]))[0]:
        assert sum(word in ("cat", "cats") for word in words(text)) <= 1, text


def test_what_is_added_must_be_worth_it_and_an_artist_has_a_by(vocabulary, monkeypatch):
    target = text_encoder.encode(["a cat on a roof by Greg Rutkowski"])
    known = [KNOWN[2], KNOWN[1]]
    assert "roof, by greg rutkowski" in first(target, [known], vocabulary, Trigrams([]))[0].lower()
    monkeypatch.setattr(compose, "GAIN", 1.0)
    assert "," not in compose.compose(target, [known[:1]], vocabulary, Trigrams([]))[0][0]


def test_nobody_is_in_a_prompt_who_is_in_no_neighbour(vocabulary, language):
    target = text_encoder.encode(["a naked woman and a man with long hair in a bikini"])
    for known in (KNOWN, [*KNOWN[:2], "a woman on a roof"]):
        for text in compose.compose(target, [known], vocabulary, language)[0]:
            assert phrases.PEOPLE & set(words(text)) <= {"woman"} & set(words(" ".join(known))), text


def test_a_language_model_keeps_unusual_words_out(vocabulary):
    target = text_encoder.encode(["a watercolor painting of a cat and a dragon on a roof in a forest"])
    usual = [
        f"a {animal} on a roof, {style}" for animal in ("cat", "dog", "fox") for style in ("oil painting", "sketch")
    ]
    strict = Trigrams(usual * 500)
    free, kept = (
        first(target, [["a cat on a roof", *KNOWN]], vocabulary, model)[0] for model in (Trigrams([]), strict)
    )
    assert strict.perplexity(kept) < strict.perplexity(free), (free, kept)


def test_artists_are_left_out_on_request(vocabulary, language):
    target = text_encoder.encode(["a photo of a cat by Greg Rutkowski"])
    assert " by " in first(target, [KNOWN], vocabulary, language)[0]
    without = phrases.vocabulary(artists=False, known=KNOWN)
    found = compose.compose(target, [KNOWN], without, language)[0]
    assert "cat" in found[0]
    for text in found:
        assert "rutkowski" not in text.lower() and " by " not in text
    assert not without.parts.get("artists") and len(vocabulary.parts["artists"]) > 1000


def test_the_length_limit_holds(vocabulary, language):
    target = text_encoder.encode(["a cat, a dog, a fox, a wolf, a bear in a forest, oil painting, sunset, fog"])
    for limit in (1, 4, 6):  # shorter than the known prompt
        for text in compose.compose(target, [KNOWN], vocabulary, language, limit)[0]:
            assert 1 <= len(text.split()) <= limit
    long = first(target, [KNOWN[2:]], vocabulary, Trigrams([]), 30)[0]
    assert 6 < len(long.split()) <= 30


def test_own_words(tmp_path, language):
    (tmp_path / "subjects.txt").write_text("a zeppelin\na red zeppelin\n")
    own = phrases.vocabulary(tmp_path, artists=False, known=KNOWN)
    target = text_encoder.encode(["a red zeppelin over a forest"])
    assert "zeppelin" in first(target, [KNOWN], own, language)[0]


def test_prompts_without_letters_and_one_phrase_do_not_break_it(vocabulary, language):
    targets = text_encoder.encode(["a cat", "a dog"])
    found = first(targets, [[", ;"], ["by Greg Rutkowski"]], vocabulary, language)
    assert all(text.strip() for text in found)
    assert np.isfinite(text_encoder.encode(found)).all()
