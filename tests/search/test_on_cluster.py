"""Leaders found by tasks are those that one process finds: any pieces, any actors, killed or not."""

import contextlib
import os
import signal
import threading
from dataclasses import replace

import numpy as np
import pandas as pd
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from image_to_prompts import dedupe
from image_to_prompts.data import metadata
from image_to_prompts.embedded import grammar
from image_to_prompts.models.metrics import unit
from image_to_prompts.run.engine import EngineConfig
from image_to_prompts.search import near_pairs, on_cluster

SMALL = {"BLOCK": 11, "PIECE": 5, "SHARD": 7}


def clustered(count, seed, width=24):
    """Rows of which many nearly agree, some are twins, and some lie in bunches."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(max(1, count // 3), width))
    rows = centres[rng.integers(len(centres), size=count)] + rng.uniform(0, 1, (count, 1)) * rng.normal(
        size=(count, width)
    )
    rows[rng.integers(count, size=count // 5)] = rows[0]
    return unit(rows)


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


@given(
    st.integers(1, 90),
    st.integers(0, 10**6),
    st.sampled_from([0.003, 0.7, 0.8, 1.0]),
    st.integers(0, 12),
    st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40)),
)
@settings(max_examples=60)
def test_the_law_in_pieces_of_any_size(tmp_path_factory, count, seed, threshold, fixed, sizes):
    vectors, fixed = clustered(count, seed), min(fixed, count)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in zip(SMALL, sizes, strict=True):
            patch.setattr(on_cluster, name, value)
        found = on_cluster.leaders(vectors, threshold, fixed, EngineConfig(), tmp_path_factory.mktemp("work"))
    assert_same(found, near_pairs.leaders(vectors, threshold, fixed))


def test_decided_blocks_are_not_compared_again(tmp_path, monkeypatch):
    for name, value in SMALL.items():
        monkeypatch.setattr(on_cluster, name, value)
    vectors, asked, stops, plain = clustered(60, 5), [], [9], near_pairs.between

    def between(rows, others, threshold):
        asked.append(len(rows))
        if len(asked) in stops:
            stops.clear()
            raise KeyboardInterrupt
        return plain(rows, others, threshold)

    monkeypatch.setattr(near_pairs, "between", between)
    with pytest.raises(KeyboardInterrupt):
        on_cluster.leaders(vectors, 0.8, 3, EngineConfig(), tmp_path)
    assert_same(on_cluster.leaders(vectors, 0.8, 3, EngineConfig(), tmp_path), near_pairs.leaders(vectors, 0.8, 3))
    in_all = len(asked)
    asked.clear()
    on_cluster.leaders(vectors, 0.8, 3, EngineConfig(), tmp_path / "whole")
    assert len(asked) <= in_all < 2 * len(asked)
    asked.clear()
    on_cluster.leaders(vectors, 0.8, 3, EngineConfig(), tmp_path)
    assert not asked
    assert_same(on_cluster.leaders(vectors, 0.7, 3, EngineConfig(), tmp_path), near_pairs.leaders(vectors, 0.7, 3))
    assert asked, "another threshold is other work"


@pytest.mark.slow
def test_any_number_of_actors_and_one_that_is_killed(ray, tmp_path, monkeypatch):
    for name, value in {"BLOCK": 1500, "PIECE": 400, "SHARD": 700}.items():
        monkeypatch.setattr(on_cluster, name, value)
    vectors = clustered(4000, 1, 384)
    expected = near_pairs.leaders(vectors, 0.8)
    config, killed, done = EngineConfig(engine="ray"), [], threading.Event()

    def kill():
        while not done.wait(0.05) and not killed:
            for one in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):  # it is gone
                    if one.name().startswith("ray::MapBatches"):
                        os.kill(one.pid, signal.SIGKILL)
                        killed.append(one.pid)

    killer = threading.Thread(target=kill)
    try:
        for actors in (1, 2, 3):
            if actors == 2:
                killer.start()
            found = on_cluster.leaders(vectors, 0.8, 0, replace(config, actors=actors), tmp_path / str(actors))
            assert_same(found, expected)
    finally:
        done.set()
    killer.join()
    assert killed


@pytest.mark.slow
def test_dedupe_writes_the_same_rows_by_a_cluster(ray, tmp_path, monkeypatch):
    for name, value in {"BLOCK": 90, "PIECE": 40, "SHARD": 50}.items():
        monkeypatch.setattr(on_cluster, name, value)
    prompts = [f"{grammar.prompt(0, number % 250)}{', detailed' * (number % 2)}" for number in range(400)]
    metadata.write_table(tmp_path / "p.csv", pd.DataFrame({"prompt": prompts}))
    metadata.write_table(tmp_path / "old.csv", pd.DataFrame({"prompt": prompts[:5]}))
    for name, values in (("local", {}), ("ray", {"engine": "ray", "actors": 2})):
        out = tmp_path / name / "kept.csv"
        dedupe.run(dedupe.Config(prompts=(tmp_path / "p.csv",), against=(tmp_path / "old.csv",), out=out, **values))
    for name in ("kept.csv", "kept.removed.csv"):
        assert (tmp_path / "ray" / name).read_bytes() == (tmp_path / "local" / name).read_bytes()
    assert not list((tmp_path / "ray").glob(".kept-*")), "half-done work is removed"
