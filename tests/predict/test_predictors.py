"""What predicts where: the ladder from checkpoints over kNN to the mean prompt, time limits, memory."""

import shutil

import numpy as np
import pandas as pd
import pytest

from image_to_prompts import infer
from image_to_prompts.data import metadata
from image_to_prompts.encode import encoders
from image_to_prompts.infer import submission
from image_to_prompts.models import metrics, text_encoder
from image_to_prompts.predict import predictors
from image_to_prompts.run import folders
from image_to_prompts.run.errors import UserError


@pytest.fixture
def mounted(tmp_path, monkeypatch):
    """An empty folder of Kaggle inputs."""
    folder = tmp_path / "input"
    folder.mkdir()
    monkeypatch.setattr(folders, "KAGGLE_INPUT", folder)
    return folder


def settings(small_run, tmp_path, **overrides):
    return infer.Config(
        run=tmp_path / "run",
        images=small_run.images,
        out=tmp_path / "out" / "submission.csv",
        fallback=True,
        **overrides,
    )


def test_each_rung_predicts_when_the_better_ones_are_gone(
    mounted, small_embeddings, small_run, small_checkpoint, tmp_path, caplog
):
    config = settings(small_run, tmp_path, key=small_run.images / "manifest.csv")
    with pytest.raises(UserError, match="nothing to predict from"):
        infer.run(config)

    prompts = mounted / "datasets" / "ada" / "prompts" / "some.csv"
    metadata.write_table(prompts, pd.DataFrame({"prompt": ["a red fox", "a red fox", "two owls at night", ""]}))
    (prompts.parent / "torn.csv").write_bytes(b'prompt,x\n"a\xff')
    mean = infer.run(config)
    expected = metrics.unit(text_encoder.encode(["a red fox", "two owls at night"]).mean(0))
    np.testing.assert_allclose(mean.vectors, np.broadcast_to(expected, mean.vectors.shape), atol=1e-6)
    assert "mean embedding" in mean.how and submission.check(config.out, config.images) == len(mean.files)

    shutil.copytree(small_embeddings, mounted / "datasets" / "ada" / "embeddings")
    knn = infer.run(config)
    assert "kNN over" in knn.how and knn.score > mean.score + 0.05

    shutil.copytree(small_checkpoint, mounted / "notebooks" / "ada" / "04-finetune-convnext" / "convnext")
    best = infer.run(config)
    assert best.how.startswith("checkpoint") and best.score > mean.score
    assert infer.run(config).how == best.how  # up to date

    torn = mounted / "notebooks" / "ada" / "04-finetune-convnext" / "convnext" / "model.safetensors"
    torn.write_bytes(torn.read_bytes()[:1000])
    caplog.clear()
    again = infer.run(config)
    assert "kNN over" in again.how and "failed" in caplog.text and "convnext" in caplog.text
    np.testing.assert_allclose(again.vectors, knn.vectors, atol=1e-6)
    with pytest.raises(UserError, match=r"model\.safetensors: damaged"):
        infer.run(infer.Config(images=small_run.images, checkpoint=(torn.parent,), out=tmp_path / "x.csv"))


def test_images_not_reached_in_time_get_the_mean(small_run, small_checkpoint, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(predictors, "BLOCK", 16)
    config = infer.Config(images=small_run.images, checkpoint=(small_checkpoint,), out=tmp_path / "submission.csv")
    whole = infer.run(config)
    config.out = tmp_path / "short" / "submission.csv"
    config.max_hours = 1.0
    asked = []
    monkeypatch.setattr(predictors.Deadline, "passed", lambda self: len(asked) == 2 or asked.append(1))
    short = infer.run(config)
    assert short.unreached == len(whole.files) - 32 and not short.broken
    np.testing.assert_allclose(short.vectors[:32], whole.vectors[:32], atol=1e-6)
    mean = predictors.checkpoint(small_checkpoint).mean
    np.testing.assert_allclose(short.vectors[32:], np.broadcast_to(mean, short.vectors[32:].shape), atol=1e-6)
    assert submission.check(config.out, config.images) == len(whole.files)
    assert f"{short.unreached} of {len(whole.files)} images not reached in time" in caplog.text
    read = infer.read(config)
    assert (read.unreached, read.how, read.broken) == (short.unreached, short.how, short.broken)
    np.testing.assert_allclose(read.vectors, short.vectors, atol=1e-6)
    monkeypatch.setattr(predictors.Deadline, "passed", lambda self: False)
    computed, see = [], encoders.see
    monkeypatch.setattr(encoders, "see", lambda size, e, rows, n: computed.append(len(rows)) or see(size, e, rows, n))
    again = infer.run(config)  # continues after the blocks that were done
    assert not again.unreached and sum(computed) == 3 * short.unreached
    np.testing.assert_allclose(again.vectors, whole.vectors, atol=1e-6)


def test_a_batch_that_does_not_fit_is_made_smaller_once(small_run, small_checkpoint, tmp_path, monkeypatch):
    sizes, see = [], encoders.see

    def short_of_memory(batch_size, built, rows, workers):
        sizes.append(batch_size)
        if batch_size > 8:
            raise RuntimeError("CUDA out of memory.")
        return see(batch_size, built, rows, workers)

    monkeypatch.setattr(encoders, "see", short_of_memory)
    monkeypatch.setattr(predictors, "BLOCK", 16)  # four blocks
    config = infer.Config(images=small_run.images, checkpoint=(small_checkpoint,), out=tmp_path / "s.csv")
    config.views = ("whole",)
    infer.run(config)
    assert sizes[0] == 32 and sizes == sorted(sizes, reverse=True)
    assert len(set(sizes[sizes.index(8) :])) == 1 and sizes.count(8) == 4
