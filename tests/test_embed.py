"""Embeddings: arrays with names, joined by name; bad ones refused; a killed run goes on."""

import numpy as np
import pandas as pd
import pytest

from image_to_prompts import embed, metadata, text_encoder
from image_to_prompts.errors import UserError

LITE = "timm-tf_efficientnet_lite2"


def test_arrays_of_a_run(small_run, tmp_path, command):
    code, _, err = command("embed", "--run", small_run.folder, "--image-size", 64, "--out", tmp_path / "e")
    assert code == 0, err
    rows = metadata.read(small_run.images / "manifest.csv")
    vectors, targets, about = embed.joined(tmp_path / "e", LITE)
    assert vectors.shape == (len(rows), 1280) and about["backbone"]["image_size"] == 64
    names = embed.read(tmp_path / "e", LITE)[1]["image_name"]
    prompts = rows.set_index("image_name")["prompt"].loc[names].tolist()
    np.testing.assert_allclose(targets, text_encoder.encode(prompts), atol=1e-5)
    assert command("embed", "--run", small_run.folder, "--image-size", 64, "--out", tmp_path / "e")[2].endswith(
        "is up to date\n"
    )


def test_an_unreadable_image_has_no_row(small_run, tmp_path, caplog):
    rows = metadata.read(small_run.images / "manifest.csv").head(4)
    folder = tmp_path / "images"
    folder.mkdir()
    for name in rows["image_name"]:
        (folder / name).write_bytes((small_run.images / name).read_bytes())
    (folder / rows["image_name"][1]).write_bytes(b"torn")
    metadata.write_table(tmp_path / "m.csv", rows[["image_name", "prompt"]])
    config = embed.Config(images=(folder,), metadata=(tmp_path / "m.csv",), out=tmp_path / "e", image_size=64)
    assert embed.run(config) == {LITE: (3, 1280), embed.PROMPTS: (4, 384)}
    vectors, targets, _ = embed.joined(tmp_path / "e", LITE)
    assert len(vectors) == len(targets) == 3 and "could not be read" in caplog.text


def test_rows_are_joined_by_name_never_by_order(tmp_path):
    rng = np.random.default_rng(0)
    vectors, targets = rng.normal(size=(5, 3)), rng.normal(size=(5, 384))
    names = pd.DataFrame({"image_name": list("abcde")})
    embed.write(tmp_path, "x", vectors, names, {})
    order = [3, 1, 4, 0, 2]
    embed.write(tmp_path, embed.PROMPTS, targets[order], names.iloc[order], {})
    np.testing.assert_allclose(embed.joined(tmp_path, "x")[1], targets.astype(np.float32))
    embed.write(tmp_path, embed.PROMPTS, targets[:4], names.head(4), {})
    with pytest.raises(UserError, match=r"e has no row in prompt\.names\.csv"):
        embed.joined(tmp_path, "x")


def test_bad_arrays_are_refused_with_one_line(tmp_path):
    names = pd.DataFrame({"image_name": list("abc")})
    embed.write(tmp_path, "x", np.ones((3, 2)), names, {})
    np.save(tmp_path / "x.npy", np.ones((2, 2)))
    with pytest.raises(UserError, match="for 3 names"):
        embed.read(tmp_path, "x")
    np.save(tmp_path / "x.npy", np.array([[1, 2], [1, np.nan], [0, 1]]))
    with pytest.raises(UserError, match=r"row 2 \(b\) is not finite"):
        embed.read(tmp_path, "x")
    (tmp_path / "x.npy").write_bytes(b"")
    with pytest.raises(UserError, match="not an array"):
        embed.read(tmp_path, "x")
    for bad in (np.ones((2, 2)), np.full((3, 2), np.inf)):
        with pytest.raises(ValueError):
            embed.write(tmp_path, "x", bad, names, {})
