"""Deduplication: the greedy law against a plain oracle, the files, the groups, the refusals."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from image_to_prompts import dedupe, metadata
from image_to_prompts.errors import UserError


def oracle(vectors, threshold):
    """First-kept greedy clustering, the slow way."""
    kept, leader = [], []
    for row, vector in enumerate(vectors):
        near = [k for k in kept if vectors[k] @ vector >= np.float32(threshold)]
        leader.append(near[0] if near else row)
        if not near:
            kept.append(row)
    return np.array(leader)


@given(st.integers(1, 60), st.integers(0, 10**6), st.sampled_from([0.5, 0.7, 0.8, 0.95, 1.0]))
@settings(max_examples=60, deadline=None)
def test_leaders_equal_the_oracle(count, seed, threshold):
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(count, 4)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    leader, similarity = dedupe.leaders(vectors, threshold)
    # Random reals never lie on the threshold but for rounding, so both must agree row by row.
    products = vectors @ vectors.T
    if np.abs(products - np.float32(threshold)).min() > 1e-6:
        np.testing.assert_array_equal(leader, oracle(vectors, threshold))
    kept = np.flatnonzero(leader == np.arange(count))
    inside = products[np.ix_(kept, kept)] - 2 * np.eye(len(kept))
    assert inside.max(initial=-1) < threshold + 1e-6
    assert (similarity >= threshold - 1e-6).all()


def test_blocks_do_not_change_the_result(monkeypatch):
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(300, 5)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    whole = dedupe.leaders(vectors, 0.8)
    monkeypatch.setattr(dedupe, "SEARCH_BLOCK", 7)
    for a, b in zip(whole, dedupe.leaders(vectors, 0.8), strict=True):
        np.testing.assert_array_equal(a, b)


def test_files_groups_and_reasons(tmp_path):
    a, b = tmp_path / "a.csv", tmp_path / "b.csv"
    a.write_text("prompt\na cat sitting on a sofa\na red sports car\na cat sitting on a sofa\n")
    b.write_text("prompt\na cat sitting on the sofa\nan astronaut riding a horse\n")
    out = tmp_path / "meta" / "x.csv"
    kept = dedupe.run(dedupe.Config(prompts=(a, b), out=out))
    removed = pd.read_csv(out.with_name("x.removed.csv"))
    assert kept["prompt"].tolist() == ["a cat sitting on a sofa", "a red sports car", "an astronaut riding a horse"]
    assert list(removed.columns) == ["prompt", "kept_prompt", "similarity", "reason"]
    assert removed["reason"].tolist() == ["exact", "similar"]
    assert (removed["similarity"] >= 0.8).all() and set(removed["kept_prompt"]) == {"a cat sitting on a sofa"}
    assert kept["source"].tolist() == ["a", "a", "b"]
    assert set(kept["group"]) <= set(kept["image_name"]) and kept["fold"].between(0, 4).all()
    assert metadata.read(out)["prompt"].tolist() == kept["prompt"].tolist()


def test_adding_rows_at_the_end_moves_no_old_one(small_run, tmp_path):
    frame = metadata.read(small_run.prompts)
    metadata.write_table(tmp_path / "half.csv", frame.head(len(frame) // 2))
    half = dedupe.run(dedupe.Config(prompts=(tmp_path / "half.csv",), out=tmp_path / "h.csv"))
    whole = dedupe.run(dedupe.Config(prompts=(small_run.prompts,), out=tmp_path / "w.csv"))
    pd.testing.assert_frame_equal(half, whole.head(len(half)))


def test_variety_of_the_grammar():
    from image_to_prompts import text_encoder
    from image_to_prompts.generate import grammar

    vectors = text_encoder.encode([grammar.prompt(0, i) for i in range(400)])
    mean = vectors.mean(0)
    assert (vectors @ mean).mean() / np.linalg.norm(mean) <= 0.50
    leader, _ = dedupe.leaders(vectors, dedupe.GROUP_THRESHOLD)
    assert np.bincount(leader).max() <= 0.05 * len(vectors)


@pytest.mark.parametrize("bad", [{"threshold": 0.0}, {"threshold": 1.5}, {"folds": 1}, {"prompts": ()}])
def test_bad_settings_are_refused(tmp_path, bad):
    source = tmp_path / "p.csv"
    source.write_text("prompt\na cat\n")
    with pytest.raises(UserError):
        dedupe.run(dedupe.Config(**{"prompts": (source,), "out": tmp_path / "o.csv", **bad}))
    assert not (tmp_path / "o.csv").exists()


def test_competition_prompts_embed_as_the_competition_did(shared_data):
    from image_to_prompts import submission, text_encoder

    prompts = pd.read_csv(shared_data / "kaggle_sample" / "prompts.csv")
    ours = text_encoder.encode(prompts["prompt"].tolist())
    theirs = submission.read(shared_data / "kaggle_sample" / "sample_submission.csv", prompts["imgId"].tolist())
    assert np.abs(ours - theirs).max() <= 1e-5
