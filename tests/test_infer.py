"""Inference over any folder: complete, valid, independent of batches, scored against a key."""

import shutil

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from image_to_prompts import infer, metadata, submission


def settings(images, checkpoint, out, **overrides):
    return infer.Config(images=images, checkpoint=checkpoint, out=out, **overrides)


@pytest.fixture
def folder(small_run, tmp_path):
    """A few images in sub-folders, one of them broken."""
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    for i, name in enumerate(metadata.read(small_run.metadata)["image_name"][:6]):
        shutil.copy(small_run.images / name, folder / ("sub" if i % 2 else ".") / name)
    Image.new("RGBA", (30, 60), (255, 0, 0, 90)).save(folder / "odd.webp")
    (folder / "broken.jpg").write_bytes(b"")
    return folder


def test_submission_is_complete_and_valid(folder, small_checkpoint, tmp_path, caplog):
    out = tmp_path / "new" / "submission.csv"
    result = infer.run(settings(folder, small_checkpoint, out))
    assert submission.check(out, folder) == 8
    assert result.broken == [folder / "broken.jpg"] and "broken.jpg could not be read" in caplog.text
    from image_to_prompts import model

    row = result.files.index(folder / "broken.jpg")
    np.testing.assert_allclose(result.vectors[row], model.load(small_checkpoint).mean, atol=1e-6)
    without = infer.run(settings(folder / "sub", small_checkpoint, tmp_path / "sub.csv"))
    for file, vector in zip(without.files, without.vectors, strict=True):
        assert vector @ result.vectors[result.files.index(file)] > 0.9999


def test_batches_change_nothing_that_matters(folder, small_checkpoint, tmp_path):
    one = infer.run(settings(folder, small_checkpoint, tmp_path / "a.csv", batch_size=1))
    many = infer.run(settings(folder, small_checkpoint, tmp_path / "b.csv", batch_size=5))
    assert (one.vectors * many.vectors).sum(1).min() > 0.9999


def test_key_and_bank(small_run, small_checkpoint, tmp_path):
    out = tmp_path / "s.csv"
    with_key = settings(small_run.images, small_checkpoint, out, key=small_run.metadata, bank=small_run.metadata)
    first, second = infer.run(with_key), infer.run(with_key)
    assert first.score > first.constant  # most of these images were trained on
    assert (second.score, second.constant) == (first.score, first.constant)
    pd.testing.assert_frame_equal(first.prompts, second.prompts)
    np.testing.assert_array_equal(first.vectors, second.vectors)
    assert set(first.prompts["prompt"]) <= set(metadata.read(small_run.metadata)["prompt"])
    assert infer.run(settings(small_run.images, small_checkpoint, out)).score is None


def test_newest_checkpoint_is_the_default(small_run, small_checkpoint, tmp_path, command):
    shutil.copytree(small_checkpoint, tmp_path / "run" / "checkpoints" / "mine")
    out = tmp_path / "s.csv"
    code, _, err = command("infer", "--run", tmp_path / "run", "--images", small_run.images, "--out", out)
    assert code == 0, err
    assert submission.check(out, small_run.images) > 0


def test_what_cannot_be_used_is_refused(folder, small_run, small_checkpoint, tmp_path, refused):
    out = tmp_path / "s.csv"
    words = ["infer", "--run", tmp_path / "r", "--out", out]
    empty = tmp_path / "empty"
    empty.mkdir()
    refused([*words, "--images", empty, "--checkpoint", small_checkpoint], "no images")
    refused([*words, "--images", tmp_path / "none", "--checkpoint", small_checkpoint], "no such folder")
    refused([*words, "--images", folder], "no checkpoint under")
    shutil.copy(folder / "odd.webp", folder / "sub" / "odd.webp")
    refused([*words, "--images", folder, "--checkpoint", small_checkpoint], "share the stem 'odd'")
    (folder / "sub" / "odd.webp").unlink()
    base = [*words, "--images", folder, "--checkpoint", small_checkpoint]
    refused([*base, "--key", small_run.metadata], "no row for image")
    (tmp_path / "key.csv").write_text("name,prompt\na,b\n")
    refused([*base, "--key", tmp_path / "key.csv"], "no column 'image_name'")
    (tmp_path / "file").write_text("x")
    refused([*base[:3], "--out", tmp_path / "file" / "s.csv", *base[5:]], "regular file")
    assert not out.exists()


def test_real_images_get_a_valid_submission_and_a_score(shared_data, small_checkpoint, tmp_path):
    sample = shared_data / "diffusiondb_sample"
    out = tmp_path / "s.csv"
    result = infer.run(settings(sample / "images", small_checkpoint, out, key=sample / "prompts.csv"))
    assert submission.check(out, sample / "images") == 6
    assert -1 <= result.score <= 1 and not result.broken
