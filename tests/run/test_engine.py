"""Ray's actors give what this process gives, also when one of them is killed."""

import contextlib
import os
import signal
import time

import numpy as np
import pandas as pd
import psutil
import pytest

from image_to_prompts import embed, infer, profiles, render
from image_to_prompts.data import metadata
from image_to_prompts.embedded import grammar, scenes
from image_to_prompts.encode import embeddings
from image_to_prompts.models import text_cache, text_encoder
from image_to_prompts.render import stable_diffusion
from image_to_prompts.run.engine import EngineConfig, over_blocks
from image_to_prompts.run.errors import UserError

RAY = {"engine": "ray", "actors": 2}


def test_this_process_works_block_by_block_and_gets_ready_once():
    ready = []

    def start():
        ready.append(1)
        return lambda number: 2 * number

    assert list(over_blocks(EngineConfig(), start, [])) == [] and not ready
    assert list(over_blocks(EngineConfig(), start, iter([1, 2, 3]))) == [2, 4, 6] and ready == [1]


def test_a_cluster_that_is_not_there_is_one_line(tmp_path, small_run, refused):
    pytest.importorskip("ray")
    words = ["render", "--run", tmp_path, "--metadata", small_run.metadata, "--engine", "ray"]
    refused([*words, "--address", "127.0.0.1:1"], "no Ray cluster")


@pytest.mark.slow
def test_blocks_keep_their_order(ray):
    def squares():
        return lambda numbers: [number**2 for number in numbers]

    blocks = [[number, number + 1] for number in range(40)]
    assert list(over_blocks(EngineConfig(**RAY), squares, blocks)) == [[a**2, b**2] for a, b in blocks]


@pytest.mark.slow
def test_a_killed_actor_changes_nothing(ray, tmp_path):
    def seen() -> set[str]:
        return set((tmp_path / "pids").read_text().split())

    def start():
        def work(number: int) -> tuple[int, int]:
            with (tmp_path / "pids").open("a") as file:
                file.write(f"{os.getpid()}\n")
            if number == 5 and not (tmp_path / "killed").exists():
                (tmp_path / "killed").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            ends = time.monotonic() + 600
            while (tmp_path / "killed").exists() and len(seen()) < 3 and time.monotonic() < ends:
                time.sleep(0.05)  # the rest waits until another has taken its place
            return number, number**2

        return work

    assert list(over_blocks(EngineConfig(**RAY), start, range(20))) == [(n, n**2) for n in range(20)]
    assert (tmp_path / "killed").exists() and len(seen()) == 3


@pytest.fixture
def killing(monkeypatch):
    """Kills one of Ray's actors while a stage works; all actors that were seen, and what was killed."""
    seen, killed = set(), []

    def actors() -> set[int]:
        found = set()
        for one in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):  # it is gone
                found |= {one.pid} if one.name().startswith("ray::MapWorker") else set()
        return found

    def over(config, start, blocks):
        before = actors()  # of the test before, on their way out
        for number, found in enumerate(over_blocks(config, start, blocks)):
            seen.update(actors() - before)
            if number == 2 and config.engine == "ray":
                killed.append(max(actors() - before))
                os.kill(killed[0], signal.SIGKILL)
                ends = time.monotonic() + 600
                while len(seen) < 3 and time.monotonic() < ends:  # the rest waits until another has taken its place
                    time.sleep(0.1)
                    seen.update(actors() - before)
            yield found

    monkeypatch.setattr(text_encoder, "over_blocks", over)
    monkeypatch.setattr(render, "over_blocks", over)
    yield
    assert len(killed) == 1 and len(seen) >= 3, "one was killed, another took its place"


@pytest.mark.slow
def test_encoding_with_an_actor_killed_gives_the_same(ray, killing, tmp_path, monkeypatch):
    """Each engine with a cache of its own."""
    monkeypatch.setattr(text_encoder, "BLOCK", 64)
    texts = [f"a picture of {number} {'foxes and ' * (number % 7)}owls" for number in range(1000)]
    found = []
    for name, values in (("local", {}), ("ray", RAY)):
        monkeypatch.setenv(text_cache.FOLDER, str(tmp_path / name))
        found.append(text_encoder.encode(texts, engine=EngineConfig(**values)))
    np.testing.assert_array_equal(*found)


@pytest.mark.slow
def test_rendering_with_an_actor_killed_gives_the_same(ray, killing, tmp_path, monkeypatch):
    monkeypatch.setattr(scenes.SceneBackend, "block", 4)
    csv, written = tmp_path / "many.csv", []
    prompts = list(dict.fromkeys(grammar.prompt(0, index) for index in range(100)))
    metadata.write_table(csv, metadata.with_keys(pd.DataFrame({"prompt": prompts}), tmp_path))
    for name, values in (("local", {}), ("ray", RAY)):
        done = render.run(render.Config(metadata=csv, out=tmp_path / name, workers=1, **values))
        render.verify(tmp_path / name)
        written.append(done[["image_name", "sha256"]].to_numpy())
    np.testing.assert_array_equal(*written)


@pytest.mark.slow
def test_an_actors_complaint_is_the_stages(ray):
    def start():
        raise UserError("weights of x not found; give them")

    with pytest.raises(UserError, match="weights of x not found"):
        list(over_blocks(EngineConfig(**RAY), start, [1, 2]))


@pytest.mark.slow
@pytest.mark.parametrize("per_tar", [0, 7])
def test_pictures_are_the_same_files(ray, per_tar, small_run, tmp_path):
    written = []
    for name, values in (("local", {}), ("ray", RAY)):
        out = tmp_path / name
        render.run(
            profiles.default_config("render", small_run, "embedded", out=out, workers=1, per_tar=per_tar, **values)
        )
        written.append(
            {f.name: f.read_bytes() for f in out.iterdir() if not f.name.startswith(".") and f.suffix != ".log"}
        )
    assert len(written[0]) > 5 and written[0] == written[1]


@pytest.mark.slow
def test_stable_diffusion_too(ray, small_run, tiny_sd2, tmp_path, monkeypatch):
    """Without a batch size: an actor takes blocks of the largest, and finds out what fits."""
    monkeypatch.setattr(stable_diffusion, "LARGEST_BATCH", 2)
    csv = tmp_path / "few.csv"
    metadata.write_table(csv, metadata.read(small_run.metadata).head(6))
    written = []
    for name, values in (("local", {}), ("ray", RAY)):
        config = render.Config(metadata=csv, out=tmp_path / name, backend="sd2", weights=tiny_sd2, steps=2)
        for key, value in values.items():
            setattr(config, key, value)
        written.append(render.run(config)[["image_name", "file", "flag"]])
    assert written[0].equals(written[1]) and len(list((tmp_path / "ray").glob("*.png"))) == 6


@pytest.mark.slow
def test_embed_and_infer(ray, small_run, small_checkpoint, tmp_path, monkeypatch):
    from image_to_prompts.predict import predictors

    monkeypatch.setattr(embed, "BLOCK", 16)
    monkeypatch.setattr(predictors, "BLOCK", 16)
    tables, vectors = [], []
    for name, values in (("local", {}), ("ray", RAY)):
        config = embed.Config(images=(small_run.images,), out=tmp_path / name, image_size=64, **values)
        embed.run(config)
        tables.append(embeddings.load(tmp_path / name))
        values = {**values, "actors": 1}  # each imports all libraries
        config = profiles.default_config("infer", small_run, "embedded", checkpoint=(small_checkpoint,), **values)
        config.out = tmp_path / name / "s.csv"
        vectors.append(infer.run(config).vectors)
    for name, array in tables[0].arrays.items():
        np.testing.assert_allclose(tables[1].arrays[name], array, atol=2e-2 * np.abs(array).max())
    assert (np.sum(vectors[0] * vectors[1], 1) > 0.999).all()


@pytest.mark.slow
def test_actors_embed_in_the_precision_of_the_process_that_keeps_their_vectors(ray, tmp_path, monkeypatch):
    """A driver without bf16 keeps vectors under float32's key; training reads them as its targets."""
    texts, found = [f"a picture of {number} foxes" for number in range(40)], []
    monkeypatch.setattr(text_encoder, "mixed_precision", lambda device: "no")
    for name, values in (("local", {}), ("ray", RAY)):
        monkeypatch.setenv(text_cache.FOLDER, str(tmp_path / name))
        found.append(text_encoder.encode(texts, fast=True, engine=EngineConfig(**values)))
    np.testing.assert_array_equal(*found)
