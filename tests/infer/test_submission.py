"""The submission format: what is written is valid, what is wrong is found, with its line."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from image_to_prompts import infer
from image_to_prompts.infer import submission
from image_to_prompts.run.errors import UserError

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


def test_a_vector_that_cannot_be_scored_is_not_written(tmp_path):
    path, whole = tmp_path / "s.csv", np.full((2, 384), 0.5, np.float32)
    for row, column, value in ((1, slice(None), 0), (0, 3, np.nan), (1, 383, np.inf)):
        vectors = whole.copy()
        vectors[row, column] = value
        with pytest.raises(ValueError, match="a vector is zero or not finite"):
            submission.write(path, ["a", "b"], vectors)
    for shape in ((3, 384), (2, 383)):
        with pytest.raises(ValueError, match="need"):
            submission.write(path, ["a", "b"], np.ones(shape, np.float32))
    vectors = whole.copy()
    vectors[0, 1:] = 0
    submission.write(path, ["a", "b"], vectors)
    assert submission.check(path) == 2


def test_the_file_is_what_the_competition_reads(tmp_path):
    submission.write(tmp_path / "s.csv", ["b", "a é"], np.arange(768, dtype=np.float32).reshape(2, 384) + 0.5)
    content = (tmp_path / "s.csv").read_bytes().decode("utf-8")
    lines = content.split("\n")
    assert lines[:3] == ["imgId_eId,val", "a é_0,384.5", "a é_1,385.5"] and lines[385] == "b_0,0.5"
    assert lines[-1] == "" and len(lines) == 1 + 768 + 1 and "\r" not in content
    found = submission.read(tmp_path / "s.csv", ["b", "a é"])
    np.testing.assert_array_equal(found, np.arange(768).reshape(2, 384) + 0.5)


def test_two_images_of_one_stem_are_both_named(tmp_path):
    files = [tmp_path / name for name in ("x.png", "a.png", "sub/a.jpg", "b.png")]
    with pytest.raises(UserError, match=r"'a': .*/a\.png, .*/sub/a\.jpg; rename one"):
        submission.check_stems(files)
    assert submission.check_stems(files[:2]) == ["x", "a"]


def test_it_covers_the_images_of_a_folder(good, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (4, 4)).save(folder / f"{name}.png")
    assert submission.check(good, folder) == 2
    Image.new("RGB", (4, 4)).save(folder / "c.png")
    with pytest.raises(UserError, match=r"line 770: image 'c' is missing"):
        submission.check(good, folder)
    (folder / "c.png").unlink()
    (folder / "b.png").unlink()
    with pytest.raises(UserError, match=r"line 386: image 'b', one image more than the folder has"):
        submission.check(good, folder)


@pytest.mark.parametrize(
    ("number", "new", "said"),
    [(1, "imgId_eId,val ", "header is"), (5, "a_3,1,2", "value '1,2'"), (5, "a_3 ,0.5", "expected 'a_3'")],
)
def test_a_line_that_is_nearly_right_is_wrong(good, number, new, said):
    good.write_text(line(good.read_text(), number, new))
    with pytest.raises(UserError, match=said):
        submission.check(good)


def test_line_ends_of_windows_are_taken(good):
    good.write_bytes(good.read_bytes().replace(b"\n", b"\r\n"))
    assert submission.check(good) == 2


def test_a_name_with_a_comma_is_refused_before_anything_is_predicted(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a, b.png")
    with pytest.raises(UserError, match=r"a, b\.png: .* comma"):
        infer.run(infer.Config(images=tmp_path, checkpoint=(tmp_path / "none",), out=tmp_path / "s.csv"))
    with pytest.raises(UserError, match="comma"):
        submission.write(tmp_path / "s.csv", ["a,b"], np.ones((1, 384), np.float32))
    assert not (tmp_path / "s.csv").exists()
