"""The ensemble stage: its members, its blend, its checkpoint; resumed; bad input; the comparison of all ways."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from image_to_prompts import ensemble, infer
from image_to_prompts.encode import embeddings
from image_to_prompts.ensemble import loop
from image_to_prompts.models import metrics, text_encoder
from image_to_prompts.predict import predictors
from image_to_prompts.run.errors import UserError
from image_to_prompts.training import by_source

ROOT = Path(__file__).resolve().parents[2]
ROWS, WIDTHS = 240, {"one": 24, "two": 12, "three": 16}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Arrays that each know a part of the targets, one of them not for all images."""
    folder, rng = tmp_path_factory.mktemp("made") / "embeddings", np.random.default_rng(0)
    things = ["fox", "owl", "car", "sea", "hut", "bee"]
    ends = ["at night", "in rain", "on mars", "of glass", "by day", "in oil", "up close", "from above", "in fog", "lit"]
    prompts = [f"{kind} {one} {end}" for kind in ("red", "old", "tiny", "loud") for one in things for end in ends]
    frame = pd.DataFrame({"image_name": [f"{i}.png" for i in range(ROWS)], "prompt": prompts, "source": "made"})
    frame["fold"] = np.arange(ROWS) % 4
    targets = text_encoder.encode(prompts)
    for number, (name, width) in enumerate(WIDTHS.items()):
        known = targets[:, number * 100 : number * 100 + 100] @ rng.normal(size=(100, width))
        noisy = known + 0.05 * known.std() * rng.normal(size=known.shape)
        rows = np.arange(ROWS) if number else np.flatnonzero(np.arange(ROWS) % 10 != 3)
        embeddings.write(folder, name, noisy[rows], frame.iloc[rows][["image_name"]], {"imported": "made"})
    embeddings.write(folder, embeddings.PROMPTS, targets, frame, {})
    return folder


def config(made, out, **values):
    return ensemble.Config(**{"embeddings": made, "out": out, "epochs": 3, "arrays": tuple(WIDTHS)} | values)


@pytest.fixture(scope="module")
def trained(made, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "ensemble"
    return out, ensemble.run(config(made, out))


def test_the_blend_is_at_least_as_good_as_every_member(trained):
    members = trained[1].set_index("member")
    assert members.loc["blend", "validation"] >= members.loc[list(ensemble.MEMBERS), "validation"].max() - 1e-6
    assert members["weight"].sum() == pytest.approx(1)
    assert (members.loc[["attention", "ridge", "knn"], "test"] > members.loc["constant", "test"]).all()


def test_a_checkpoint_says_what_it_did(trained, made):
    out, _ = trained
    again = ensemble.load(out)
    table = embeddings.load(made, list(WIDTHS))
    rows, test = ensemble.load_rows(table, 0, 1)
    assert not set(test) & set(rows.train) and not set(rows.valid) & set(rows.train)
    frame, predicted, _ = by_source.read(out)
    order = pd.Index(table.frame["image_name"]).get_indexer(frame["image_name"])
    np.testing.assert_allclose(again([array[order] for array in table.arrays.values()]), predicted, atol=2e-3)
    assert "ensemble of one, two, three" in (out / "README.md").read_text()
    assert (out / "history.png").stat().st_size > 1000


def test_a_second_run_does_nothing_and_a_killed_one_goes_on(trained, made, tmp_path, monkeypatch):
    out, members = trained
    before = (out / "model.safetensors").stat().st_mtime_ns
    pd.testing.assert_frame_equal(ensemble.run(config(made, out)).round(4), members.round(4))
    assert (out / "model.safetensors").stat().st_mtime_ns == before

    epochs, epoch = [], loop.Trainer.epoch

    def stopped(*arguments):
        if len(epochs) == 2:
            raise KeyboardInterrupt
        epochs.append(1)
        return epoch(*arguments)

    torn = config(made, tmp_path / "torn", save_minutes=0)
    monkeypatch.setattr(loop.Trainer, "epoch", stopped)
    with pytest.raises(KeyboardInterrupt):
        ensemble.run(torn)
    monkeypatch.setattr(loop.Trainer, "epoch", lambda *arguments: epochs.append(1) or epoch(*arguments))
    ensemble.run(torn)
    assert len(epochs) == 3
    for name in ("model.safetensors", "config.json", "history.csv", "members.csv", "validation.csv"):
        assert (torn.out / name).read_bytes() == (out / name).read_bytes(), name


def test_what_cannot_be_used_is_refused(made, tmp_path, refused):
    words = ["ensemble", "--run", tmp_path / "r", "--out", tmp_path / "o", "--embeddings"]
    refused([*words, tmp_path / "none"], "no arrays of embeddings")
    refused([*words, made, "--arrays", "four"], "four.names.csv")
    refused([*words, made, "--epochs", 0], "--epochs 0: must be at least 1")
    refused([*words, made, "--fold", 9], "fold 9 holds 0 of 240 rows")
    torn = tmp_path / "torn"
    shutil.copytree(made, torn)
    vectors = np.load(torn / "two.npy")
    vectors[5, 3] = np.nan
    np.save(torn / "two.npy", vectors)
    refused([*words, torn], "row 6", "is not finite")
    np.save(torn / "two.npy", vectors[:7])
    refused([*words, torn], "for 240 names")


def test_a_damaged_checkpoint_is_refused(trained, tmp_path):
    for name in ("config.json", "model.safetensors"):
        torn = tmp_path / name
        shutil.copytree(trained[0], torn)
        (torn / name).write_bytes((torn / name).read_bytes()[:500])
        with pytest.raises(UserError, match=f"{name}: damaged"):
            ensemble.load(torn)
        (torn / ".ensemble.done").unlink()
        with pytest.raises(UserError, match="not a checkpoint of this project"):
            ensemble.load(torn)


def test_infer_blends_it_with_a_backbone(small_run, small_checkpoint, small_embeddings, tmp_path, caplog):
    """The ensemble's encoders look at the images; weights come from the images that both kept for validation."""
    caplog.set_level("INFO")
    ensemble.run(ensemble.Config(embeddings=small_embeddings, out=tmp_path / "ensemble", epochs=1))
    folders = (small_checkpoint, tmp_path / "ensemble")
    key = small_run.images / "manifest.csv"
    values = {"images": small_run.images, "out": tmp_path / "s.csv", "key": key, "views": ("whole",)}
    found = infer.run(infer.Config(checkpoint=folders, **values))
    assert set(found.alone) == {str(one) for one in folders} and found.score > found.constant

    table = embeddings.load(small_embeddings)
    ours, viewing = ensemble.load(tmp_path / "ensemble"), predictors.Viewing(("whole",))
    vectors = predictors.predict(predictors.checkpoint(tmp_path / "ensemble"), found.files, viewing).vectors
    order = pd.Index(table.frame["image_name"]).get_indexer([file.name for file in found.files])
    cosines = (vectors * ours([array[order] for array in table.arrays.values()])).sum(1)
    assert cosines.min() > 0.999


def test_ways_are_compared_on_the_same_rows(made, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import compare

    words = ["--embeddings", made, "--arrays", "two", "three", "--seeds", "0", "1", "--epochs", "2"]
    done = subprocess.run([sys.executable, ROOT / "benchmarks/compare.py", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = done.stdout
    for way in ("constant", "two, ridge", "mean of these", "ridge on all", "across images", "across embeddings"):
        assert way in said
    found = compare.run(compare.Config(made, ("two", "three"), seeds=(0,), epochs=1))
    table = embeddings.load(made, ["two", "three"])
    rows, test = ensemble.load_rows(table, 0, 1)
    mean = metrics.unit(table.targets[rows.train].mean(0))
    constant = found.set_index("way").loc["constant"]
    assert constant["test"] == pytest.approx(metrics.constant_score(mean, table.targets[test]))
    with pytest.raises(UserError, match="lacks images"):
        compare.run(compare.Config(made))


def test_of_two_processes_one_trains(made, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    words = ["-m", "image_to_prompts", "ensemble", "--embeddings", made, "--epochs", 2, "--out", tmp_path / "out"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [*torchrun, *map(str, words)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=1800)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("rows train") == 1 and result.stderr.count("is up to date") == 1
    assert ensemble.load(tmp_path / "out").config["rows"]["train"]


def test_a_session_that_ends_writes_what_there_is_and_the_next_goes_on(trained, made, tmp_path, caplog, monkeypatch):
    some = ensemble.run(config(made, tmp_path / "some", max_hours=1e-6))
    assert "stopped by --max-hours" in caplog.text and set(some["member"]) >= {"attention", "blend"}
    assert len(pd.read_csv(tmp_path / "some" / "history.csv")) == 2, "before the first epoch, and that"
    epochs, epoch = [], loop.Trainer.epoch
    monkeypatch.setattr(loop.Trainer, "epoch", lambda *arguments: epochs.append(1) or epoch(*arguments))
    ensemble.run(config(made, tmp_path / "some"))
    assert len(epochs) == len(pd.read_csv(tmp_path / "some" / "history.csv")) - 2, "the first is not trained again"
    for name in ("history.csv", "members.csv", "model.safetensors"):
        assert (tmp_path / "some" / name).read_bytes() == (trained[0] / name).read_bytes()
