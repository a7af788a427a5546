"""Embeddings: arrays with names, joined by name; bad ones refused; a killed run continues."""

import shutil

import numpy as np
import pandas as pd
import pytest

from image_to_prompts import embed
from image_to_prompts.data import images, metadata
from image_to_prompts.encode import embeddings, encoders
from image_to_prompts.models import text_encoder
from image_to_prompts.run.errors import UserError

LITE, CLASSES = "timm-tf_efficientnet_lite2", "classes"


def tiny(small_run, out, **overrides):
    encoders = ("timm:tf_efficientnet_lite2", "classes")
    return embed.Config(
        **{"images": (small_run.images,), "encoders": encoders, "out": out, "image_size": 64} | overrides
    )


def test_arrays_of_a_run(small_run, tmp_path, command):
    words = ["embed", "--run", small_run.folder, "--image-size", 64, "--out", tmp_path / "e"]
    code, _, err = command(*words)
    assert code == 0, err
    rows = metadata.read(small_run.images / "manifest.csv")
    table = embeddings.load(tmp_path / "e")
    assert {name: array.shape[1] for name, array in table.arrays.items()} == {
        "classes": 384,
        "timm-tf_efficientnet_lite0": 1280,
        LITE: 1280,
    }
    assert table.about[LITE]["backbone"]["image_size"] == 64 and len(table.frame) == len(rows)
    prompts = rows.set_index("image_name")["prompt"].loc[table.frame["image_name"]].tolist()
    np.testing.assert_allclose(table.targets, text_encoder.encode(prompts), atol=1e-5)
    vectors, said, _ = embeddings.read(tmp_path / "e", CLASSES)
    np.testing.assert_allclose(vectors, text_encoder.encode(said["text"].tolist()), atol=1e-5)
    assert command(*words)[2].endswith("is up to date\n")


def test_the_reference_encoders(small_run, tiny_encoders, tmp_path, command):
    names = (
        "--encoders",
        f"open_clip:{tiny_encoders['clip']}",
        f"transformers:{tiny_encoders['convnext']}",
        "interrogator",
    )
    words = ["embed", "--run", small_run.folder, *names, "--caption", tiny_encoders["blip"], "--image-size", 32]
    words += ["--ranker", f"open_clip:{tiny_encoders['clip']}", "--terms", tiny_encoders["terms"], "--no-artists"]
    code, _, err = command(*words, "--out", tmp_path / "e")
    assert code == 0, err
    widths = {name: array.shape[1] for name, array in embeddings.load(tmp_path / "e").arrays.items()}
    assert sorted(widths.values()) == [24, 32, 384]
    texts = embeddings.read(tmp_path / "e", "interrogator")[1]["text"]
    assert texts.str.contains("sharp focus").any() and not texts.str.contains("Ann Black").any()


def test_an_unreadable_image_has_no_row(small_run, tmp_path, caplog):
    rows = metadata.read(small_run.images / "manifest.csv").head(4)
    folder = tmp_path / "images"
    folder.mkdir()
    for name in rows["image_name"]:
        (folder / name).write_bytes((small_run.images / name).read_bytes())
    (folder / rows["image_name"][1]).write_bytes(b"torn")
    metadata.write_table(tmp_path / "m.csv", rows[["image_name", "prompt"]])
    config = tiny(small_run, tmp_path / "e", images=(folder,), metadata=(tmp_path / "m.csv",))
    assert embed.run(config) == {LITE: (3, 1280), CLASSES: (3, 384), embeddings.PROMPTS: (4, 384)}
    table = embeddings.load(tmp_path / "e", [LITE])
    assert len(table.arrays[LITE]) == len(table.targets) == 3 and "; left out" in caplog.text


def interrupted(config, monkeypatch):
    """Stops a run after two blocks; returns how many images each block had, and keeps counting in later runs."""
    seen, see, limit = [], encoders.see, 2

    def counted(batch_size, built, rows, workers):
        if len(seen) == limit:
            raise KeyboardInterrupt
        seen.append(len(rows))
        return see(batch_size, built, rows, workers)

    monkeypatch.setattr(encoders, "see", counted)
    with pytest.raises(KeyboardInterrupt):
        embed.run(config)
    limit = None
    return seen


def test_a_part_that_is_done_is_not_done_again(small_run, tmp_path, monkeypatch):
    monkeypatch.setattr(embed, "BLOCK", 16)
    whole, torn = tiny(small_run, tmp_path / "whole"), tiny(small_run, tmp_path / "torn")
    embed.run(whole)
    seen = interrupted(torn, monkeypatch)
    embed.run(torn)
    assert sum(seen) == len(metadata.read(small_run.images / "manifest.csv"))
    for file in sorted((tmp_path / "whole").iterdir()):
        if file.suffix != ".done":
            assert file.read_bytes() == (tmp_path / "torn" / file.name).read_bytes(), file.name


def test_rows_are_joined_by_name_never_by_order(tmp_path):
    rng = np.random.default_rng(0)
    vectors, targets = rng.normal(size=(5, 3)), rng.normal(size=(5, 384))
    names = pd.DataFrame({"image_name": list("abcde")})
    embeddings.write(tmp_path, "x", vectors, names, {})
    embeddings.write(tmp_path, "y", vectors[:2], names.head(2), {})
    order = [3, 1, 4, 0, 2]
    embeddings.write(tmp_path, embeddings.PROMPTS, targets[order], names.iloc[order].assign(prompt="p"), {})
    table = embeddings.load(tmp_path)
    np.testing.assert_allclose(table.targets, targets[order].astype(np.float32))
    np.testing.assert_allclose(table.arrays["x"], vectors[order].astype(np.float32))
    assert np.isnan(table.arrays["y"][[0, 2, 4]]).all() and np.isfinite(table.arrays["y"][[1, 3]]).all()
    assert len(embeddings.load(tmp_path, ["y"]).frame) == 2
    embeddings.write(tmp_path, embeddings.PROMPTS, targets[:4], names.head(4), {})
    with pytest.raises(UserError, match=r"e has no row in prompt\.names\.csv"):
        embeddings.load(tmp_path, ["x"])


def test_bad_arrays_are_refused_with_one_line(tmp_path):
    names = pd.DataFrame({"image_name": list("abc")})
    embeddings.write(tmp_path, "x", np.ones((3, 2)), names, {})
    np.save(tmp_path / "x.npy", np.ones((2, 2)))
    with pytest.raises(UserError, match="for 3 names"):
        embeddings.read(tmp_path, "x")
    np.save(tmp_path / "x.npy", np.array([[1, 2], [1, np.nan], [0, 1]]))
    with pytest.raises(UserError, match=r"row 2 \(b\) is not finite"):
        embeddings.read(tmp_path, "x")
    (tmp_path / "x.npy").write_bytes(b"")
    with pytest.raises(UserError, match="not an array"):
        embeddings.read(tmp_path, "x")
    for bad in (np.ones((2, 2)), np.full((3, 2), np.inf)):
        with pytest.raises(ValueError):
            embeddings.write(tmp_path, "x", bad, names, {})
    with pytest.raises(UserError, match="no arrays of embeddings"):
        embeddings.load(tmp_path / "empty")


@pytest.mark.parametrize("name", ["prompt.npy", "prompt.names.csv", "classes.npy", "classes.names.csv", "classes.json"])
def test_a_missing_file_is_told_beside_a_stamp_that_lists_it(name, small_embeddings, tmp_path):
    shutil.copytree(small_embeddings, tmp_path / "e")
    (tmp_path / "e" / name).unlink()
    with pytest.raises(UserError, match=name.partition(".")[0]):
        embeddings.load(tmp_path / "e", ("classes",))


def test_fewer_images_at_once_go_on_from_the_blocks_that_are_done(small_run, tmp_path, monkeypatch):
    """As the error advises where memory runs out; and nothing of the killed run stays."""
    monkeypatch.setattr(embed, "BLOCK", 16)
    seen = interrupted(tiny(small_run, tmp_path / "e"), monkeypatch)
    embed.run(tiny(small_run, tmp_path / "e", batch_size=3))
    assert sum(seen) == len(metadata.read(small_run.images / "manifest.csv"))
    assert not list((tmp_path / "e").glob(".embed-*"))


def test_a_session_that_ends_writes_the_first_images_and_the_next_goes_on(small_run, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(embed, "BLOCK", 16)
    whole = embed.run(tiny(small_run, tmp_path / "whole"))
    deadline = iter([False, True])
    monkeypatch.setattr(embed.Deadline, "passed", lambda _: next(deadline))
    some = embed.run(tiny(small_run, tmp_path / "some", max_hours=1.0))
    assert {rows for rows, _ in some.values()} == {16} and "with 16 of " in caplog.text
    assert len(embeddings.load(tmp_path / "some").frame) == 16
    monkeypatch.setattr(embed.Deadline, "passed", lambda _: True)
    with pytest.raises(UserError, match="no block of 16 images fits"):
        embed.run(tiny(small_run, tmp_path / "none", max_hours=1.0))
    monkeypatch.undo()
    monkeypatch.setattr(embed, "BLOCK", 16)
    assert embed.run(tiny(small_run, tmp_path / "some")) == whole
    for path in (tmp_path / "whole").glob("*.npy"):
        assert (tmp_path / "some" / path.name).read_bytes() == path.read_bytes()


def test_a_text_beside_an_image_that_changes_is_embedded_anew(small_run, tmp_path):
    (tmp_path / "own").mkdir()
    for number, file in enumerate(images.find(small_run.images)[:4]):
        shutil.copy(file, tmp_path / "own" / f"{number}.png")
        (tmp_path / "own" / f"{number}.txt").write_text(f"prompt {number}")
    config = tiny(small_run, tmp_path / "e", images=(tmp_path / "own",), encoders=("classes",))
    embed.run(config)
    (tmp_path / "own" / "2.txt").write_text("a red fox")
    embed.run(config)
    found = embeddings.load(tmp_path / "e")
    assert found.frame["prompt"].tolist() == ["prompt 0", "prompt 1", "a red fox", "prompt 3"]
    np.testing.assert_allclose(found.targets[2], text_encoder.encode(["a red fox"])[0], atol=1e-5)
