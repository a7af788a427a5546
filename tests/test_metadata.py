"""Metadata CSVs: what is read, what is refused, and that row keys never depend on position."""

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from image_to_prompts import metadata
from image_to_prompts.errors import UserError


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        ("", ["empty"]),
        ("image_name,prompt\n", ["no rows"]),
        ("a,b\n1,2\n", ["no column 'image_name'", "found a, b"]),
        ("image_name,prompt\nx.png,a cat\ny.png,\n", ["row 2", "blank"]),
        ("image_name,prompt\nx.png,NaN\n", ["row 1", "blank"]),
        ("image_name,prompt\nx.png,a\nx.png,b\n", ["row 2", "row 1", "unique"]),
        ("image_name,prompt\nsub/../x.png,a\n", ["row 1", "a file name, or a path below"]),
        ("image_name,prompt\n/x.png,a\n", ["row 1", "a file name, or a path below"]),
        ("image_name,prompt\n..,a\n", ["row 1", "a file name, or a path below"]),
        ("image_name,prompt\na.png,a cat\nb.png,a\0b\n", ["row 2", "column 'prompt'", "NUL"]),
        ("image_name,prompt\na\0.png,a cat\n", ["row 1", "column 'image_name'", "NUL"]),
        ("image_name,prompt,seed\nx.png,a,many\n", ["row 1", "seed 'many'"]),
        ('image_name,prompt\nx.png,a,"b\n', ["not a CSV"]),
    ],
)
def test_bad_tables_are_refused_with_file_and_row(tmp_path, text, fragments):
    path = write(tmp_path / "bad.csv", text)
    with pytest.raises(UserError) as error:
        metadata.read(path)
    for fragment in [str(path), *fragments]:
        assert fragment in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_file_and_foreign_bytes(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        metadata.read(tmp_path / "none.csv")
    bad = tmp_path / "latin.csv"
    bad.write_bytes("image_name,prompt\na.png,one\nb.png,caf\xe9\n".encode("latin-1"))
    with pytest.raises(UserError, match="row 2: bytes that are not UTF-8"):
        metadata.read(bad)


def test_names_and_seeds_depend_on_the_row_alone(tmp_path):
    frame = metadata.with_keys(pd.DataFrame({"prompt": ["a cat", "a dog", "a fox"]}), tmp_path)
    reversed_ = metadata.with_keys(pd.DataFrame({"prompt": ["a fox", "a dog", "a cat"]}), tmp_path)
    assert frame.set_index("prompt").loc["a cat"].equals(reversed_.set_index("prompt").loc["a cat"])
    assert frame["image_name"].is_unique and frame["seed"].between(0, 2**31 - 1).all()


def test_seeds_schema_loads_as_it_is(tmp_path):
    path = write(tmp_path / "sd2.csv", "image_name,prompt\nabc.png,a cat\ndef,two dogs\n")
    frame = metadata.read(path)
    assert list(frame.columns[:2]) == ["image_name", "prompt"]
    assert [metadata.stem(name) for name in frame["image_name"]] == ["abc", "def"]


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1), min_size=1))
def test_tables_survive_a_round_trip(tmp_path_factory, prompts):
    prompts = [p for p in prompts if p.strip() and p.strip().lower() not in ("nan", "null")]
    if not prompts:
        return
    path = tmp_path_factory.mktemp("trip") / "x.csv"
    frame = metadata.with_keys(pd.DataFrame({"prompt": list(dict.fromkeys(prompts))}), path)
    metadata.write_table(path, frame)
    assert metadata.read(path)["prompt"].tolist() == frame["prompt"].tolist()


@pytest.mark.parametrize(("name", "stem"), [("a.PNG", "a"), ("photo.v2", "photo.v2"), ("sub/b.c.webp", "sub/b.c")])
def test_only_the_suffix_of_an_image_is_one(name, stem):
    assert metadata.stem(name) == stem


@given(st.text(min_size=1), st.integers(2, 20))
def test_folds_are_stable_and_in_range(group, folds):
    assert 0 <= metadata.fold_of(group, folds) < folds
    assert metadata.fold_of(group, folds) == metadata.fold_of(group, folds)


def test_words_that_mean_nothing_to_pandas_are_prompts(tmp_path):
    path = write(tmp_path / "x.csv", "image_name,prompt\na.png,None\nb.png,NA\nc.png,n/a\nd.png,N/A\n")
    assert metadata.read(path)["prompt"].tolist() == ["None", "NA", "n/a", "N/A"]
