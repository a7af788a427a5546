"""Rows to train on: sources, folds, what is left out."""

import logging

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from rows import loaded_rows

from image_to_prompts.data import metadata
from image_to_prompts.models import metrics
from image_to_prompts.run.errors import UserError
from image_to_prompts.training import dataset


def units(rows, seed=0):
    return metrics.unit(np.random.default_rng(seed).normal(size=(rows, 384)))


def frame_of(folds, **columns):
    names = [f"{number}.png" for number in range(len(folds))]
    frame = pd.DataFrame({"image_name": names, "prompt": [f"prompt {name}" for name in names], "fold": folds})
    return frame.assign(**columns)


def test_a_fold_validates_and_the_others_train():
    rows = dataset.split(frame_of([0, 1, 2, 0, 1]), units(5), 0)
    assert rows.valid.tolist() == [0, 3] and rows.train.tolist() == [1, 2, 4] and rows.left_out == 0
    rows = dataset.split(frame_of([0, 1, 2, 0, 1]), units(5), 1)
    assert rows.valid.tolist() == [1, 4] and rows.train.tolist() == [0, 2, 3]
    assert rows.weights.tolist() == [1] * 5 and rows.weights.dtype == np.float32
    assert rows.sources.tolist() == [""] * 5


def test_validating_rows_near_a_training_row_are_left_out():
    targets = units(6)
    for row, cosine in ((0, 0.81), (1, 0.79)):
        other = targets[5]
        across = metrics.unit(targets[row] - (targets[row] @ other) * other)
        targets[row] = metrics.unit(cosine * other + np.sqrt(1 - cosine**2) * across)
    rows = dataset.split(frame_of([0, 0, 0, 1, 1, 1]), targets, 0)
    assert rows.valid.tolist() == [1, 2] and rows.left_out == 1 and rows.train.tolist() == [3, 4, 5]


def test_a_source_that_is_left_out_validates_alone():
    frame = frame_of([0, 0, 1, 1, 0, 1], source=["a", "b", "a", "b", None, "b"])
    rows = dataset.split(frame, units(6), 0, leave_out="b")
    assert rows.valid.tolist() == [1] and rows.train.tolist() == [2]
    assert rows.sources.tolist() == ["a", "b", "a", "b", "", "b"]
    rows = dataset.split(frame, units(6), 0, source_weights={"b": 0.25, "a": 2})
    assert rows.weights.tolist() == [2, 0.25, 2, 0.25, 1, 0.25]
    assert rows.valid.tolist() == [0, 1, 4]


@pytest.mark.parametrize(("of_one", "warned"), [(8, False), (9, True), (10, False)])
def test_rows_that_validate_and_are_nearly_all_of_one_source_are_warned_of(of_one, warned, caplog):
    sources = ["a"] * of_one + ["b"] * (10 - of_one)
    names = [f"{number}.png" for number in range(20)]
    frame = pd.DataFrame({"image_name": names, "prompt": names, "fold": [0] * 10 + [1] * 10, "source": sources * 2})
    dataset.split(frame, np.eye(20, 384, dtype=np.float32))
    assert ("of the rows that validate are of" in caplog.text) == warned
    assert not warned or "90 % of the rows that validate are of a:" in caplog.text


@pytest.mark.parametrize("values", [{"leave_out": "c"}, {"source_weights": {"c": 2.0}}])
def test_a_source_that_does_not_occur_is_refused(values):
    frame = frame_of([0, 1], source=["a", "b"])
    with pytest.raises(UserError, match=r"no row of source 'c' \(sources: a, b\)"):
        dataset.split(frame, units(2), 0, **values)


def test_a_fold_without_rows_on_both_sides_is_refused():
    for folds, fold in (([1, 1], 0), ([0, 0], 0)):
        with pytest.raises(UserError, match=rf"fold {fold} holds {folds.count(fold)} of 2 rows"):
            dataset.split(frame_of(folds), units(2), fold)


def test_rows_without_folds_are_grouped_and_folded(caplog):
    caplog.set_level(logging.INFO)
    targets = units(40)
    targets[1] = targets[0]
    frame = frame_of([0] * 40).drop(columns="fold")
    rows = dataset.split(frame, targets, 0)
    assert rows.frame["group"][1] == "0.png" and set(rows.frame["fold"]) <= set(range(8))
    assert rows.frame["fold"].nunique() > 4
    again = dataset.split(frame_of([np.nan] + [3] * 39), targets, 0)
    assert again.frame["fold"].tolist() == rows.frame["fold"].tolist()  # one missing fold: all anew
    assert "the largest group has 5.0 % of the rows" in caplog.text


def write(path, names, **columns):
    frame = pd.DataFrame({"image_name": names, "prompt": [f"a picture of {name}" for name in names], **columns})
    path.parent.mkdir(exist_ok=True, parents=True)
    frame.to_csv(path, index=False)
    return path


def pictures(folder, *names):
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).write_bytes(b"x")
    return folder


def test_rows_of_several_files_are_merged_and_what_repeats_is_counted(tmp_path, caplog):
    one = write(tmp_path / "one.csv", ["a", "b", "a"], source=["s", "", "s"])
    two = write(tmp_path / "two.csv", ["b", "c"])
    found = dataset.load_metadata((one, two))
    assert found["image_name"].tolist() == ["a", "b", "c"] and found["source"].tolist() == ["s", "one", "two"]
    assert set(found.columns) == {"image_name", "prompt", "source", "seed"} and found.index.tolist() == [0, 1, 2]
    assert f"{one}: 1 rows repeat an image_name (a, ...)" in caplog.text
    assert "two.csv: 1 rows stand in an earlier file" in caplog.text


def test_each_file_has_its_folder_or_all_have_one(tmp_path, caplog):
    one, two = write(tmp_path / "one.csv", ["a", "x"]), write(tmp_path / "two.csv", ["b"])
    here, there = pictures(tmp_path / "here", "a.png", "b.png"), pictures(tmp_path / "there", "b.jpg")
    found = dataset.load_metadata((one, two), (here, there))
    assert found["path"].tolist() == [here / "a.png", there / "b.jpg"]
    assert f"{one}: row 2: no image of x in {here} (1 of 2 rows have none and were left out)" in caplog.text
    assert dataset.load_metadata((one, two), (here,))["path"].tolist() == [here / "a.png", here / "b.png"]
    with pytest.raises(UserError, match="--metadata has 2 files, --images 3 folders"):
        dataset.load_metadata((one, two), (here, there, here))
    with pytest.raises(UserError, match="--metadata has 0 files"):
        dataset.load_metadata(())
    with pytest.raises(UserError, match=r"two\.csv: row 1: no image of b .*1 of 1 rows have none\); run render"):
        dataset.load_metadata((two,), (pictures(tmp_path / "other", "z.png"),))


def test_rows_whose_image_shows_nothing_are_left_out_and_later_rows_keep_their_numbers(tmp_path, caplog):
    caplog.set_level("INFO")
    folder = pictures(tmp_path / "images", "a.png", "b.png", "c.png", "d.png", "e.png")
    names = ["a.png", "b.png", "c.png", "d.png", "e.png", "gone.png"]
    csv = write(folder / "manifest.csv", names, flag=["blank", "", "nsfw_blacked", "failed", "near_uniform", ""])
    found = dataset.load_metadata(csv, folder)
    assert found["image_name"].tolist() == ["b.png", "e.png"] and found.index.tolist() == [0, 1]
    assert "index" not in found and "2 rows of 2 prompts, manifest 100.0 %" in caplog.text
    assert "3 rows left out: blank, blacked or failed images" in caplog.text
    assert "row 6: no image of gone.png" in caplog.text and "1 of 3 rows" in caplog.text


def test_the_manifests_are_the_metadata_where_none_is_given(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        write(folder / "manifest.csv", ["a"])
    assert dataset.tables((), (one, two)) == (one / "manifest.csv", two / "manifest.csv")
    assert dataset.tables((tmp_path / "x.csv",), (one,)) == (tmp_path / "x.csv",) and dataset.tables((), ()) == ()
    with pytest.raises(UserError, match=r"no manifest\.csv and no \.txt beside the images; run render first"):
        dataset.tables((), (one, tmp_path))


def test_loading_rows_joins_embeds_and_splits(small_run):
    from image_to_prompts.models import text_encoder

    rows = loaded_rows(small_run.metadata, small_run.images, fold=1)
    frame = metadata.read(small_run.metadata)
    assert rows.frame["prompt"].tolist() == frame["prompt"].tolist()
    np.testing.assert_array_equal(rows.targets, text_encoder.encode(frame["prompt"].tolist()))
    assert [path.name for path in rows.paths] == frame["image_name"].tolist() and "path" not in rows.frame
    assert (frame["fold"].to_numpy()[rows.valid] == 1).all() and not (frame["fold"].to_numpy()[rows.train] == 1).any()
    grammar = loaded_rows(small_run.metadata, small_run.images, source_weights={"grammar": 3.0})
    assert set(grammar.weights) == {3.0}


def test_texts_beside_images_are_their_prompts(tmp_path, caplog):
    for number in range(4):
        path = tmp_path / "set" / ("sub" if number % 2 else ".") / f"IMG_{number}.jpg"
        path.parent.mkdir(exist_ok=True, parents=True)
        Image.new("RGB", (8, 8)).save(path)
        path.with_suffix(".txt").write_text(f"prompt {number}\n") if number else None
    (table,) = dataset.tables((), (tmp_path / "set",))
    frame = dataset.load_metadata(table, tmp_path / "set")
    assert frame[["image_name", "prompt", "source"]].to_numpy().tolist() == [
        ["IMG_2.jpg", "prompt 2", "set"],
        ["sub/IMG_1.jpg", "prompt 1", "set"],
        ["sub/IMG_3.jpg", "prompt 3", "set"],
    ]
    assert "1 images have no .txt beside them" in caplog.text


def test_other_images_of_the_same_name_are_told_apart(tmp_path):
    """As `train_images/00000000.jpg` in two public sets; a row that another session has, too, is no other image."""
    csvs, folders = [], []
    for which, prompts in (("a", ["a fox", "an owl"]), ("b", ["a cat", "an owl"])):
        folder = tmp_path / which
        folder.mkdir()
        for name in ("0.png", "1.png"):
            Image.new("RGB", (8, 8)).save(folder / name)
        metadata.write_table(
            folder / f"{which}.csv", pd.DataFrame({"image_name": ["0.png", "1.png"], "prompt": prompts})
        )
        csvs.append(folder / f"{which}.csv")
        folders.append(folder)
    frame = dataset.load_metadata(csvs, folders)
    assert frame["image_name"].tolist() == ["0.png", "1.png", "b/0.png"]
    assert frame["path"].tolist() == [tmp_path / "a" / "0.png", tmp_path / "a" / "1.png", tmp_path / "b" / "0.png"]
    assert dataset.load_metadata(csvs, folders[0])["image_name"].tolist() == ["0.png", "1.png"], "one folder for all"
