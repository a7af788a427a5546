"""Honest evaluation: by source, with intervals, against what other sources teach, and how far it carries."""

import shutil

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import load_file, save_file

from image_to_prompts.data import images, metadata
from image_to_prompts.models import checkpoints, metrics
from image_to_prompts.run import folders
from image_to_prompts.run.errors import UserError
from image_to_prompts.training import by_source, clusters, dataset
from image_to_prompts.training.frozen_features import Baselines


def test_a_checkpoint_says_how_well_it_does_on_what(small_run, small_checkpoint):
    frame, predicted, targets = by_source.read(small_checkpoint)
    cosines = (metrics.unit(predicted) * targets).sum(1)
    np.testing.assert_allclose(frame["cosine"].astype(float), cosines, atol=1e-4)
    expected = checkpoints.load(small_checkpoint).config["metrics"]
    assert cosines.mean() == pytest.approx(expected["validation_cosine"], abs=1e-4)
    table = pd.read_csv(small_checkpoint / "sources.csv").set_index("source")
    assert table.loc["all", "rows"] == len(frame)
    assert table.loc["all", "cosine"] == pytest.approx(cosines.mean(), abs=1e-3)
    assert table.loc["all", "constant"] == pytest.approx(expected["constant"], abs=1e-3)
    assert table.loc["all", "knn"] == pytest.approx(expected["knn"], abs=1e-3)
    assert np.isfinite(table.loc["all", "clusters_out"])
    assert table.loc["all", "low"] < table.loc["all", "cosine"] < table.loc["all", "high"]
    with Image.open(small_checkpoint / "best_and_worst.png") as picture:
        assert picture.width > 1000
    said = (small_checkpoint / "README.md").read_text()
    assert "tf_efficientnet_lite2 at 64 px" in said and f"{expected['validation_cosine']:.4g}" in said


def test_a_source_unlike_the_others_scores_less_when_left_out(tmp_path):
    """Two sources whose features mean opposite things: each fits itself, neither teaches the other."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(400, 8)).astype(np.float32)
    features[:, 0] = np.repeat([-3.0, 3.0], 200)  # tells the sources apart
    targets = metrics.unit(features[:, 1:] @ rng.normal(size=(7, 16)))
    targets[200:] *= -1
    names = [f"{i}.png" for i in range(400)]
    frame = pd.DataFrame({"image_name": names, "prompt": names, "source": ["a"] * 200 + ["b"] * 200})
    split = np.arange(400) % 4 == 0
    valid, train = np.flatnonzero(split), np.flatnonzero(~split)
    rows = dataset.Rows(frame, [], targets, train, valid, 0, np.ones(400, np.float32))
    base = Baselines(features[train], targets[train], metrics.unit(targets[train].mean(0)), 5, {})
    by_source.write(tmp_path, rows, targets[valid])
    kinds = np.arange(400) // 200 * by_source.PARTS  # both held out together, so that nothing is left to fit on
    table = by_source.by_source(tmp_path, rows, features, base, kinds).set_index("source")
    assert table["clusters_out"].isna().all()
    table = by_source.by_source(tmp_path, rows, features, base, np.arange(400) // 200).set_index("source")
    assert table["clusters_out"].tolist() == pytest.approx(table["left_out"].tolist())
    assert table.loc["all", "cosine"] == pytest.approx(1, abs=1e-5)
    assert (table.loc[["a", "b"], "left_out"] < -0.5).all()
    assert (table.loc[["a", "b"], "left_out"] < table.loc[["a", "b"], "ridge"] - 0.3).all()


def test_rows_that_are_added_move_no_prompt_to_another_cluster(tmp_path):
    rng = np.random.default_rng(0)
    middles = metrics.unit(rng.normal(size=(4, 384)))
    kind = rng.integers(4, size=200)
    spread = np.array([0.01, 0.01, 0.01, 0.1])[kind, None]  # the centroid of a wide cluster is short
    vectors = metrics.unit(middles[kind] + spread * rng.normal(size=(200, 384))).astype(np.float32)
    found = clusters.of(vectors, tmp_path / clusters.FILE)
    assert all(len(set(kind[found == one])) == 1 for one in set(found)), "a cluster holds prompts of a kind"
    more = np.concatenate([metrics.unit(rng.normal(size=(300, 384))).astype(np.float32), vectors])
    again = clusters.of(more, tmp_path / clusters.FILE)
    np.testing.assert_array_equal(again[300:], found)
    centroids = load_file(tmp_path / clusters.FILE)["centroids"]
    nearest = np.linalg.norm(more[:, None] - centroids, axis=2).argmin(1)
    np.testing.assert_array_equal(again, nearest)
    assert not np.array_equal(clusters.of(more, tmp_path / "new" / clusters.FILE)[300:], found)
    (tmp_path / clusters.FILE).write_bytes(b"torn")
    with pytest.raises(UserError, match="damaged"):
        clusters.of(vectors, tmp_path / clusters.FILE)
    save_file({"others": centroids}, tmp_path / clusters.FILE)
    with pytest.raises(UserError, match=r"damaged.*made anew"):
        clusters.of(vectors, tmp_path / clusters.FILE)


def test_a_kaggle_kernel_goes_on_with_the_clusters_of_an_attached_one(tmp_path, monkeypatch):
    vectors = metrics.unit(np.random.default_rng(0).normal(size=(200, 384))).astype(np.float32)
    attached = tmp_path / "input" / "notebooks" / "someone" / "session-1" / "checkpoints" / clusters.FILE
    attached.parent.mkdir(parents=True)
    found = clusters.of(vectors[:100], attached)
    monkeypatch.setattr(folders, "KAGGLE_INPUT", tmp_path / "input")
    np.testing.assert_array_equal(clusters.of(vectors, tmp_path / clusters.FILE)[:100], found)
    assert (tmp_path / clusters.FILE).read_bytes() == attached.read_bytes()


@given(st.integers(0, 10**6), st.integers(30, 200))
def test_the_interval_holds_the_mean_and_narrows(seed, count):
    values = np.random.default_rng(seed).uniform(0, 1, count)
    low, high = metrics.bootstrap(values, 300)
    assert low <= values.mean() <= high
    wide = metrics.bootstrap(np.tile(values, 9), 300)
    assert wide[1] - wide[0] < high - low


def test_the_interval_is_that_of_the_mean():
    """Its 95 %: of 400 halves, 1.96 times their deviation over the root of their number on either side."""
    low, high = metrics.bootstrap(np.arange(400) % 2.0)
    assert low == pytest.approx(0.5 - 0.049, abs=0.0025) and high == pytest.approx(0.5 + 0.049, abs=0.0025)


def test_domain_gap_tells_far_from_near():
    rng = np.random.default_rng(0)
    one, same, far = rng.normal(size=(80, 5)), rng.normal(size=(80, 5)), rng.normal(size=(80, 5)) + 2
    assert metrics.domain_gap(one, far)[0] > 0.95
    near, likeness = metrics.domain_gap(one, same)
    assert 0.3 < near < 0.7 and likeness.shape == (80,)


def test_domain_gap_of_a_checkpoint(small_run, small_checkpoint, tmp_path):
    same = images.find(small_run.images)
    near, frame = by_source.domain_gap(small_checkpoint, (small_run.images,), same)
    noise = tmp_path / "noise"
    noise.mkdir()
    for i in range(12):
        values = np.random.default_rng(i).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(values).save(noise / f"{i}.png")
    far, _ = by_source.domain_gap(small_checkpoint, (small_run.images,), images.find(noise))
    assert far > 0.95 > near and list(frame) == ["image_name", "source", "likeness"]
    with pytest.raises(UserError, match="no image of"):
        by_source.domain_gap(small_checkpoint, (noise,), same)
    some = shutil.copytree(small_run.images, tmp_path / "some")
    for name in frame["image_name"][2:]:
        (some / name).unlink()
    _, rest = by_source.domain_gap(small_checkpoint, (some,), images.find(noise))
    assert rest["image_name"].tolist() == frame["image_name"][:2].tolist()
    names = set(metadata.read(small_run.metadata)["image_name"])
    assert set(frame["image_name"]) <= names
