"""The submission format: what is written is valid, what is wrong is found, with its line."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from image_to_prompts import submission
from image_to_prompts.errors import UserError

STEMS = st.text(st.characters(codec="ascii", categories=["L", "N"], include_characters="-_."), min_size=1, max_size=12)


@given(
    st.lists(STEMS.filter(lambda s: not s.startswith(".") and not s.endswith(".")), min_size=1, unique=True),
    st.integers(0, 999),
)
@settings(max_examples=25, deadline=None)
def test_whatever_is_written_is_valid_and_reads_back(tmp_path_factory, stems, seed):
    vectors = np.random.default_rng(seed).normal(size=(len(stems), 384)).astype(np.float32)
    path = tmp_path_factory.mktemp("s") / "submission.csv"
    submission.write(path, stems, vectors)
    assert submission.check(path) == len(stems)
    np.testing.assert_array_equal(submission.read(path, stems), vectors)


def test_the_competitions_own_file_is_valid(command, shared_data):
    code, out, _ = command("check-submission", shared_data / "kaggle_sample" / "sample_submission.csv")
    assert code == 0 and "7 images" in out


@pytest.fixture
def good(tmp_path):
    path = tmp_path / "good.csv"
    submission.write(path, ["b", "a"], np.full((2, 384), 0.5, np.float32))
    return path


def line(text, number, new):
    lines = text.splitlines()
    lines[number - 1] = new
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    ("damage", "fragments"),
    [
        (lambda t: line(t, 1, "id,val"), ["line 1", "header"]),
        (lambda t: t.replace("a_7,", "a_8,"), ["line 9", "a_7"]),
        (lambda t: line(t, 3, "a_1"), ["line 3"]),
        (lambda t: line(t, 5, "a_3,nan"), ["line 5", "finite"]),
        (lambda t: line(t, 5, "a_3,inf"), ["line 5", "finite"]),
        (lambda t: line(t, 5, "a_3,x"), ["line 5", "finite"]),
        (lambda t: "\n".join(t.splitlines()[:700]) + "\n", ["line 701", "ends after 315"]),
        (lambda t: t.replace("a_", "c_"), ["line 386", "sort"]),
        (lambda t: t.replace("b_", "a_"), ["line 386", "twice"]),
        (lambda t: t.replace(",0.5", ",0"), ["line 2", "zero vector"]),
        (lambda t: t.splitlines()[0] + "\n", ["line 2", "no rows"]),
        (lambda t: t + "b_384,0.5\n", ["line 770"]),
    ],
)
def test_each_damage_is_found_with_its_line(good, refused, damage, fragments):
    good.write_text(damage(good.read_text()))
    refused(["check-submission", good], good, *fragments)


@pytest.mark.parametrize(
    ("names", "fragment"), [("abc", "'c' is missing"), ("a", "more than the folder"), ("ac", "'c'")]
)
def test_images_of_a_folder_must_match(good, refused, tmp_path, names, fragment):
    folder = tmp_path / "images"
    folder.mkdir()
    for name in names:
        Image.new("RGB", (8, 8)).save(folder / f"{name}.png")
    refused(["check-submission", good, "--images", folder], fragment)


def test_no_file_and_foreign_bytes(refused, tmp_path):
    refused(["check-submission", tmp_path / "none.csv"], "no such file")
    bad = tmp_path / "bad.csv"
    bad.write_bytes(b"imgId_eId,val\n\xff\xfe_0,1\n")
    refused(["check-submission", bad], "UTF-8")


def test_zero_or_odd_vectors_are_never_written(tmp_path):
    for vectors in (np.zeros((1, 384)), np.full((1, 384), np.nan), np.ones((1, 383))):
        with pytest.raises(ValueError):
            submission.write(tmp_path / "s.csv", ["a"], vectors)
    with pytest.raises(UserError, match="share the stem"):
        submission.write(tmp_path / "s.csv", ["a", "a"], np.ones((2, 384)))
    assert not (tmp_path / "s.csv").exists()
