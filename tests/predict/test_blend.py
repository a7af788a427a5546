"""Blends: weights fitted on what all predictors validated, kNN among them, and what a blend gains."""

import re
import shutil

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from image_to_prompts import finetune, infer, profiles
from image_to_prompts.encode import embeddings
from image_to_prompts.models import metrics
from image_to_prompts.predict import blend, knn, predictors
from image_to_prompts.run.errors import UserError
from image_to_prompts.training import by_source, dataset


@pytest.fixture(scope="session")
def second_checkpoint(small_run, tmp_path_factory):
    """Trained like `small_checkpoint`, with another seed and head."""
    out = tmp_path_factory.mktemp("second") / "convnext"
    values = {"out": out, "epochs": 1, "image_size": 64, "seed": 7, "learning_rate": 4e-3}
    finetune.run(profiles.default_config("finetune", small_run, "embedded", **values))
    return out


def test_a_blend_is_the_weighted_sum_of_unit_vectors(small_run, small_checkpoint, second_checkpoint, tmp_path):
    def vectors(out, *folders, **flags):
        return infer.run(infer.Config(images=small_run.images, checkpoint=folders, out=tmp_path / out, **flags)).vectors

    one, two = vectors("1.csv", small_checkpoint), vectors("2.csv", second_checkpoint)
    assert (one * two).sum(1).max() < 0.9999
    for weights in ((), (1.0, 3.0)):
        both = vectors("b.csv", small_checkpoint, second_checkpoint, blend=weights)
        w = weights or (0.5, 0.5)
        np.testing.assert_allclose(both, metrics.unit(w[0] * one + w[1] * two), atol=1e-6)


def test_weights_are_fitted_on_the_common_validation(
    small_run, small_checkpoint, second_checkpoint, tmp_path, caplog, monkeypatch
):
    monkeypatch.setattr(blend, "LEAST_TO_FIT", 10)
    caplog.set_level("INFO")
    folders = (small_checkpoint, second_checkpoint)
    key = small_run.images / "manifest.csv"
    settings_ = infer.Config(images=small_run.images, checkpoint=folders, out=tmp_path / "s.csv", key=key)
    weights = predictors.blend_weights(list(folders))
    assert sum(weights) == pytest.approx(1) and min(weights) >= 0 and "of the blend" in caplog.text
    (_, one, targets), (_, two, _) = (by_source.read(folder) for folder in folders)

    def score(share):
        return metrics.mean_cosine(metrics.blend([one, two], [share, 1 - share]), targets)

    assert score(weights[0]) >= max(score(share) for share in np.linspace(0, 1, 21)) - 1e-6
    found = infer.run(settings_)
    assert list(found.alone) == [str(folder) for folder in folders]
    assert infer.run(settings_).alone == found.alone


def test_weights_of_a_blend_go_by_name(tmp_path, monkeypatch, caplog):
    """Two checkpoints validated other images, in another order; the second is right, the first knows nothing."""
    rng = np.random.default_rng(0)
    truth = metrics.unit(rng.normal(size=(40, 384)))
    names = [f"{number}.png" for number in range(40)]
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder, numbers, noise in ((folders[0], range(30), 1e3), (folders[1], rng.permutation(range(5, 40)), 1e-4)):
        folder.mkdir()
        numbers = np.array(numbers)
        frame = pd.DataFrame({"image_name": [names[number] for number in numbers]})
        every = np.arange(len(numbers))
        rows = dataset.Rows(frame, [], truth[numbers], every[:0], every, 0, np.ones(len(every), np.float32))
        by_source.write(folder, rows, metrics.unit(truth[numbers] + noise * rng.normal(size=(len(numbers), 384))))
    caplog.set_level("INFO")
    first, second = predictors.blend_weights(folders)
    assert second > 0.95 and first + second == pytest.approx(1)
    assert f"{folders[1]}: 1.0000 alone on 25 images" in caplog.text and "blend: 1.0000" in caplog.text
    assert re.search(r"beyond the best alone [+-]0\.000", caplog.text)
    monkeypatch.setattr(blend, "LEAST_TO_FIT", 25)
    assert predictors.blend_weights(folders) == [first, second]
    monkeypatch.setattr(blend, "LEAST_TO_FIT", 26)
    assert predictors.blend_weights(folders) == [0.5, 0.5]
    (folders[0] / "validation.safetensors").unlink()
    assert predictors.blend_weights(folders) == [0.5, 0.5]
    caplog.clear()
    assert predictors.blend_weights(folders[:1]) == [1.0] and not caplog.text  # one alone needs no fit
    assert predictors.blend_weights(folders, (0.0, 3.0)) == [0.0, 3.0]
    for given_ in ((1.0,), (0.0, 0.0), (-1.0, 2.0)):
        with pytest.raises(UserError, match="--blend"):
            predictors.blend_weights(folders, given_)


@given(st.integers(2, 4), st.integers(20, 60), st.integers(0, 10**6))
def test_fitted_weights_beat_every_single_model(models_, rows, seed):
    rng = np.random.default_rng(seed)
    targets = metrics.unit(rng.normal(size=(rows, 16)))
    predictions = [metrics.unit(targets + rng.uniform(0.5, 3) * rng.normal(size=(rows, 16))) for _ in range(models_)]
    weights = metrics.fit_weights(predictions, targets)
    assert weights.min() >= -1e-9 and weights.sum() == pytest.approx(1)
    blended = metrics.mean_cosine(metrics.blend(predictions, weights), targets)
    assert blended >= max(metrics.mean_cosine(one, targets) for one in predictions) - 1e-6


def test_wrong_blends_are_refused(small_run, small_checkpoint, second_checkpoint, tmp_path, refused, caplog):
    words = ["infer", "--images", small_run.images, "--out", tmp_path / "s.csv", "--checkpoint", small_checkpoint]
    refused([*words, "--blend", "1", "2"], "--blend has 2 numbers for 1 checkpoints")
    refused([*words, second_checkpoint, "--blend", "1", "-2"], "must not be negative")
    bare = tmp_path / "bare"
    shutil.copytree(second_checkpoint, bare)
    (bare / "validation.safetensors").unlink()
    assert predictors.blend_weights([small_checkpoint, bare]) == [0.5, 0.5]
    assert "without validation predictions" in caplog.text


def test_knn_joins_a_blend_and_knows_nothing_of_what_it_is_asked(
    small_run, small_checkpoint, small_embeddings, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(blend, "LEAST_TO_FIT", 10)
    caplog.set_level("INFO")
    folders = (small_checkpoint, small_embeddings)
    weights = predictors.blend_weights(list(folders))
    assert sum(weights) == pytest.approx(1) and min(weights) >= 0
    assert f"{small_embeddings}: " in caplog.text and "beyond the best alone" in caplog.text

    frame, _, targets = by_source.read(small_checkpoint)
    asked = pd.DataFrame(targets, frame["image_name"])
    found = knn.validation(small_embeddings, asked)
    assert list(found.index) == [
        name for name in embeddings.load(small_embeddings).frame["image_name"] if name in asked.index
    ]
    honest = metrics.mean_cosine(found.to_numpy(), asked.loc[found.index].to_numpy())
    key = small_run.images / "manifest.csv"
    values = {"images": small_run.images, "key": key, "out": tmp_path / "s.csv", "views": ("whole",)}
    result = infer.run(infer.Config(checkpoint=folders, blend=(1.0, 1.0), **values))
    assert list(result.alone) == [str(folder) for folder in folders]
    assert result.alone[str(small_embeddings)] > honest + 0.05, "of all images it knows the prompts"
    assert "have prompts that the checkpoint was trained on" in caplog.text


def test_knn_validates_without_prompts_near_to_those_that_are_asked(small_embeddings, tmp_path):
    """Each asked image has a twin of nearly the same prompt, from which it would be predicted perfectly."""
    rng = np.random.default_rng(0)
    truth, features = metrics.unit(rng.normal(size=(60, 384))), metrics.unit(rng.normal(size=(60, 8)))
    twins = metrics.unit(truth[:20] + 0.01 * rng.normal(size=(20, 384)))
    names = pd.DataFrame({"image_name": [f"{number}.png" for number in range(80)], "prompt": "a"})
    about = embeddings.load(small_embeddings).about["classes"]
    for name, vectors in (
        ("classes", np.concatenate([features, features[:20]])),
        ("prompt", np.concatenate([truth, twins])),
    ):
        embeddings.write(tmp_path, name, vectors.astype(np.float32), names, about)
    asked = pd.DataFrame(truth[:20].astype(np.float32), names["image_name"][:20])
    found = knn.validation(tmp_path, asked)
    assert list(found.index) == list(asked.index)
    assert metrics.mean_cosine(found.to_numpy(), asked.to_numpy()) < 0.3
    assert knn.validation(tmp_path, asked.iloc[:0]).empty


def test_the_gain_is_measured_on_images_that_gave_no_weights():
    """Two predictors with errors of their own gain in a blend; one that is pure noise gains nothing."""
    rng = np.random.default_rng(0)
    truth = metrics.unit(rng.normal(size=(200, 384)))
    one, two = (metrics.unit(truth + rng.normal(0, 0.05, truth.shape)) for _ in range(2))
    gain = blend.gains([one, two], truth, 0)
    assert metrics.bootstrap(gain)[0] > 0.02
    same = blend.gains([one, one], truth, 1)
    np.testing.assert_allclose(same, 0, atol=1e-6)
    noise = blend.gains([one, *(metrics.unit(rng.normal(size=truth.shape)) for _ in range(8))], truth, 0)
    assert noise.mean() < 0, "fitted on the same images it would seem to gain"


def test_images_of_one_name_and_other_prompts_are_not_common(tmp_path, monkeypatch, small_embeddings):
    """Two sets call their images alike: what is said of one must not be judged by the other's prompts."""
    monkeypatch.setattr(blend, "LEAST_TO_FIT", 5)
    rng = np.random.default_rng(0)
    truth = metrics.unit(rng.normal(size=(40, 384))).astype(np.float32)
    folders = [tmp_path / "one", tmp_path / "two"]
    every, noise = np.arange(20), (1e-4, 0.05)
    frame = pd.DataFrame({"image_name": [f"{number}.png" for number in every], "prompt": "a"})
    for folder, numbers, much in zip(folders, (every, [*range(8), *range(20, 32)]), noise, strict=True):
        folder.mkdir()
        rows = dataset.Rows(frame, [], truth[numbers], every[:0], every, 0, np.ones(20, np.float32))
        by_source.write(folder, rows, metrics.unit(truth[numbers] + much * rng.normal(size=(20, 384))))
    first, second = predictors.blend_weights(folders)
    assert first > 0.95 and first + second == pytest.approx(1), "the better one by the eight that are the same"
    about = embeddings.load(small_embeddings).about["classes"]
    embeddings.write(tmp_path, "classes", rng.normal(size=(20, 8)).astype(np.float32), frame, about)
    embeddings.write(tmp_path, "prompt", truth[[*range(3), *range(20, 37)]], frame, about)
    asked = pd.DataFrame(truth[:20], frame["image_name"])
    assert list(knn.validation(tmp_path, asked).index) == ["0.png", "1.png", "2.png"]
