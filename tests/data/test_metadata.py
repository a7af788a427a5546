"""Metadata CSVs: what is read, what is refused, and that row keys never depend on position."""

import hashlib

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from image_to_prompts.data import metadata
from image_to_prompts.run.errors import UserError


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
        ("image_name,prompt\na.png,a cat\nb.png,a\0b\n", ["row 2", "NUL"]),
        ("image_name,prompt\na\0.png,a cat\n", ["row 1", "NUL"]),
        ("image_name,prompt\na.png,a cat,a dog\0\n", ["NUL"]),
        ("image_name,prompt,seed\nx.png,a,many\n", ["row 1", "seed 'many'"]),
        ('image_name,prompt\nx.png,a,"b\n', ["not a CSV"]),
        ("image_name,prompt\nx.png,a red fox, in snow\ny.png,a dog, oil\n", ["more fields than its header"]),
    ],
)
def test_bad_tables_are_refused_with_file_and_row(tmp_path, text, fragments):
    path = write(tmp_path / "bad.csv", text)
    with pytest.raises(UserError) as error:
        metadata.read(path)
    for fragment in [str(path), *fragments]:
        assert fragment in str(error.value)
    assert "\n" not in str(error.value)


def test_a_name_that_stands_twice_is_refused_unless_it_may(tmp_path):
    frame = pd.DataFrame({"image_name": ["a.png", "b.png", "a.png"]})
    with pytest.raises(UserError, match=r"a\.png"):
        metadata.check_names(frame, tmp_path / "x.csv")
    metadata.check_names(frame, tmp_path / "x.csv", unique=False)


def test_a_header_alone_is_told_from_a_row_without_a_last_line_break(tmp_path):
    path = tmp_path / "x.csv"
    for text, alone in (
        ("prompt\n", True),
        ("prompt", True),
        ("prompt\na cat", False),
        ("prompt\na cat\n", False),
        ("", False),
    ):
        path.write_text(text)
        assert metadata.header_alone(path) == alone, text


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


def digest(text):
    return hashlib.sha256(text.encode()).hexdigest()


def test_keys_are_these_hashes_for_ever():
    """Whoever adds rows later must get the old names, seeds and folds again."""
    assert metadata.hash_text("é") == digest("é")
    assert metadata.row_seed("x") == int(digest("x")[:8], 16) & 0x7FFFFFFF
    assert metadata.own_seed("a.png", "a cat") == metadata.row_seed("a.png\na cat")
    assert metadata.own_name("a cat", 5) == digest("a cat\n5")[:16] + ".png"
    assert metadata.fold_of("g", 7) == int(digest("g")[8:16], 16) % 7
    assert max(metadata.row_seed(str(number)) for number in range(200)) > 2**30


def test_rows_get_the_keys_that_they_lack(tmp_path):
    prompts = ["a cat", "a dog"]
    both = metadata.with_keys(pd.DataFrame({"source": ["s", "t"], "prompt": prompts}), tmp_path)
    assert list(both.columns) == ["image_name", "prompt", "source", "seed"]
    assert both["seed"].tolist() == [metadata.own_seed("", prompt) for prompt in prompts]
    assert both["image_name"].tolist() == [metadata.own_name(*row) for row in zip(prompts, both["seed"], strict=True)]
    named = pd.DataFrame({"image_name": ["a.png", "b.png"], "prompt": prompts})
    found = metadata.with_keys(named, tmp_path)
    assert found["seed"].tolist() == [metadata.own_seed("a.png", "a cat"), metadata.own_seed("b.png", "a dog")]
    assert list(named.columns) == ["image_name", "prompt"]  # its own frame stays as it is
    seeded = metadata.with_keys(pd.DataFrame({"prompt": prompts, "seed": ["7", "8"]}), tmp_path)
    assert seeded["seed"].tolist() == [7, 8] and seeded["image_name"][0] == metadata.own_name("a cat", 7)


def test_what_is_read_has_numbers_where_they_belong(tmp_path):
    path = write(tmp_path / "m.csv", "prompt,image_name,fold,seed,note\na cat,a.png,3,11,\na dog,b.png,0,12,x\n")
    frame = metadata.read(path)
    assert list(frame.columns) == ["image_name", "prompt", "fold", "seed", "note"]
    assert (
        frame["fold"].tolist() == [3, 0] and frame["seed"].tolist() == [11, 12] and frame["note"].tolist() == ["", "x"]
    )
    write(path, "prompt,image_name,fold\na cat,a.png,3\na dog,b.png,first\n")
    with pytest.raises(UserError, match=r"m\.csv: row 2: fold 'first' is not a whole number"):
        metadata.read(path)
    write(path, "prompt,image_name\na cat,a.png\na dog,a.png\n")
    assert metadata.read(path, unique=False)["image_name"].tolist() == ["a.png", "a.png"]
    with pytest.raises(UserError, match=r"m\.csv: row 2: .*a\.png"):
        metadata.read_prompts(path)
    assert metadata.read_prompts(write(path, "prompt\nx\n"))["prompt"].tolist() == ["x"]
    with pytest.raises(UserError, match="no column 'image_name'"):
        metadata.read(path)


@pytest.mark.parametrize("prompt", ["", "   ", "nan", " NaN ", "NULL", "null"])
def test_a_blank_prompt_is_told_with_its_row(prompt, tmp_path):
    path = write(tmp_path / "m.csv", f'prompt,n\na cat,1\n"{prompt}",2\n')
    with pytest.raises(UserError, match="row 2: the prompt is blank"):
        metadata.read_prompts(path)


def test_names_of_200_bytes_are_the_longest(tmp_path):
    for name, good in (
        ("é" * 98 + ".png", True),
        ("é" * 98 + "x.png", False),
        ("a/b/c.png", True),
        ("a/./c.png", False),
    ):
        frame = pd.DataFrame({"image_name": [name]})
        if good:
            metadata.check_names(frame, tmp_path)
        else:
            with pytest.raises(UserError, match="row 1"):
                metadata.check_names(frame, tmp_path)
