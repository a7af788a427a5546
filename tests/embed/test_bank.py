"""`embed --texts`: the tower's own vectors, in shards, whatever their size; bad input gets a line."""

import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch

from image_to_prompts import embed
from image_to_prompts.data import metadata
from image_to_prompts.embed import bank
from image_to_prompts.encode import banks, text_tower
from image_to_prompts.models import metrics, text_encoder

PROMPTS = ["a red fox", "two boats at sea", "an owl, oil painting", "a lighthouse", "a red fox", *map(str, range(40))]


@pytest.fixture
def csvs(tmp_path):
    files = [tmp_path / "one.csv", tmp_path / "two.csv"]
    for file, rows in zip(files, (PROMPTS[:4], PROMPTS[3:]), strict=True):
        metadata.write_table(file, pd.DataFrame({"prompt": rows}))
    return files


@pytest.fixture
def words(tiny_encoders, csvs, tmp_path):
    return ["embed", "--texts", *csvs, "--encoders", f"open_clip:{tiny_encoders['clip']}", "--out", tmp_path / "bank"]


def arrays(folder):
    found = banks.open_bank(folder)
    return found.vectors[:].astype(np.float32), found.targets[:].astype(np.float32), found.texts.to_pylist()


def test_a_bank_holds_the_towers_vectors_and_minilms(words, tiny_encoders, tmp_path, command):
    code, _, err = command(*words)
    assert code == 0, err
    vectors, targets, texts = arrays(tmp_path / "bank")
    assert texts == list(dict.fromkeys(PROMPTS))
    clip, tokenize = text_tower.towers(
        f"open_clip:{tiny_encoders['clip']}", tiny_encoders["clip"] / "open_clip_model.safetensors"
    )
    with torch.inference_mode():
        expected = clip.eval().encode_text(tokenize(texts), normalize=True).numpy()
    assert (vectors * expected).sum(1).min() > 0.999
    assert (metrics.unit(targets) * text_encoder.encode(texts)).sum(1).min() > 0.9999
    about = json.loads((tmp_path / "bank" / "bank.json").read_text())
    assert about["shards"] == [len(texts)] and about["sources"] == ["one.csv", "two.csv"] and not about["projected"]
    assert f"{len(texts)} prompts" in (tmp_path / "bank" / "README.md").read_text()
    assert command(*words)[2].endswith("is up to date\n")


def test_shards_and_blocks_of_any_size_hold_the_same(words, tmp_path, command, monkeypatch):
    command(*words)
    whole = arrays(tmp_path / "bank")
    monkeypatch.setattr(bank, "SHARD", 10)
    monkeypatch.setattr(bank, "BLOCK", 3)
    assert command(*words[:-1], tmp_path / "parts")[0] == 0
    assert len(list((tmp_path / "parts").glob("vectors-*.npy"))) == 5
    for one, other in zip(whole, arrays(tmp_path / "parts"), strict=True):
        assert np.array_equal(one, other)
    monkeypatch.setattr(bank, "MOST_SHARDS", 2)  # the fewer, the larger
    assert command(*words[:-1], tmp_path / "two")[0] == 0
    assert len(list((tmp_path / "two").glob("texts-*.arrow"))) == 2


def test_fewer_numbers_keep_most_of_the_nearest(words, tmp_path, command):
    command(*words)
    code, _, err = command(*words[:-1], tmp_path / "small", "--dimensions", 6)
    assert code == 0 and "6 of 24 numbers" in err, err
    whole, small = (banks.open_bank(tmp_path / name) for name in ("bank", "small"))
    assert small.vectors.shape == (len(whole.texts), 6) and small.projection.shape == (24, 6)
    np.testing.assert_allclose(small.vectors[:], small.queries(whole.vectors[:].astype(np.float32)), atol=2e-3)
    assert np.allclose(np.linalg.norm(small.vectors[:].astype(np.float32), axis=1), 1, atol=1e-2)


def test_a_projection_keeps_what_has_the_largest_products():
    rng = np.random.default_rng(0)
    strong, weak = rng.standard_normal((300, 4)), 0.05 * rng.standard_normal((300, 12))
    vectors = metrics.unit(np.concatenate([strong, weak], 1) @ np.linalg.qr(rng.standard_normal((16, 16)))[0])
    projection = banks.principal(vectors, 4)
    assert np.allclose(projection.T @ projection, np.eye(4), atol=1e-5)
    assert banks.kept_share(vectors, projection, vectors[:50], 10) > 0.8
    worst = np.eye(16, 4, dtype=np.float32)
    assert banks.kept_share(vectors, worst, vectors[:50], 10) < 0.6
    assert banks.kept_share(vectors, np.eye(16, dtype=np.float32), vectors[:50], 10) == 1


def test_what_an_early_end_leaves_is_a_smaller_bank(words, tmp_path, command, monkeypatch):
    monkeypatch.setattr(bank, "SHARD", 10)
    monkeypatch.setattr(bank, "BLOCK", 5)
    passed = iter([False] * 5 + [True] * 9)
    monkeypatch.setattr(bank.Deadline, "passed", lambda self: next(passed))
    code, _, err = command(*words, "--max-hours", 1)
    assert code == 0 and "a bank of 20 of 44 prompts" in err, err
    assert arrays(tmp_path / "bank")[2] == list(dict.fromkeys(PROMPTS))[:20]
    monkeypatch.setattr(bank.Deadline, "passed", lambda self: False)
    assert command(*words, "--max-hours", 1)[0] == 0 and len(arrays(tmp_path / "bank")[2]) == 44
    passed = iter([True] * 9)
    monkeypatch.setattr(bank.Deadline, "passed", lambda self: next(passed))
    code, _, err = command(*words[:-1], tmp_path / "none", "--max-hours", 1)
    assert code == 2 and "--max-hours 1: not enough for 10 prompts" in err


def test_what_cannot_become_a_bank_gets_a_line(words, tiny_encoders, csvs, tmp_path, refused, monkeypatch):
    start, out = ["embed", "--texts", csvs[0], "--encoders"], ["--out", tmp_path / "bank"]
    refused([*start, "timm:tf_efficientnet_lite0", *out], "no text tower", "open_clip:<model>")
    clip = f"open_clip:{tiny_encoders['clip']}"
    refused([*start, clip, "timm:tf_efficientnet_lite0", *out], "--texts takes one encoder")
    refused([*start, f"dual:{tmp_path}", *out], "no dual encoder there")
    refused([*words, "--dimensions", 25], "--dimensions 25", "24 numbers")
    refused(["embed", "--texts", tmp_path / "none.csv", "--encoders", clip, *out], "none.csv: no such file")
    room = bank.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(bank.shutil, "disk_usage", lambda _: room._replace(free=1000))
    refused(words, "44 prompts need", "there are 0.0 GB", "--dimensions")


def test_a_damaged_bank_gets_a_line(words, tmp_path, command, refused):
    command(*words)
    infer = ["infer", "--images", tmp_path, "--bank", tmp_path / "bank", "--out", tmp_path / "s.csv"]
    whole = (tmp_path / "bank" / "vectors-0000.npy").read_bytes()
    from PIL import Image

    Image.new("RGB", (40, 40), "red").save(tmp_path / "a.png")
    (tmp_path / "bank" / "vectors-0000.npy").write_bytes(whole[:-100])
    refused(infer, "bank: damaged", "make the bank again")
    assert command(*words)[0] == 0  # what was damaged is made again
    assert (tmp_path / "bank" / "vectors-0000.npy").read_bytes() == whole
    (tmp_path / "bank" / "bank.json").write_text("{}")
    refused(infer, "not a bank")


@pytest.mark.slow
def test_rays_actors_make_the_same_bank(ray, words, tmp_path, command):
    command(*words)
    code, _, err = command(*words[:-1], tmp_path / "ray", "--engine", "ray", "--actors", 2)
    assert code == 0, err
    for one, other in zip(arrays(tmp_path / "bank"), arrays(tmp_path / "ray"), strict=True):
        assert np.array_equal(one, other)


@pytest.mark.slow
def test_two_processes_make_the_same_bank(words, tmp_path, command):
    """As `accelerate launch --num_processes 2` starts them, with blocks of four prompts and shards of twenty."""
    start = "import sys; from image_to_prompts.embed import bank; bank.BLOCK, bank.SHARD = 4, 20; "
    (tmp_path / "start.py").write_text(f"{start}from image_to_prompts.__main__ import main; main(sys.argv[1:])")
    command(*words)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", tmp_path / "start.py"]
    done = subprocess.run([*launch, *words[:-1], tmp_path / "two"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("44 prompts") >= 2 and len(list((tmp_path / "two").glob("vectors-*.npy"))) == 3
    for one, other in zip(arrays(tmp_path / "bank"), arrays(tmp_path / "two"), strict=True):
        assert np.array_equal(one, other)


def test_the_shape_of_a_bank_is_what_run_returns(words, csvs, tiny_encoders, tmp_path):
    tower = f"open_clip:{tiny_encoders['clip']}"
    assert embed.run(embed.Config(texts=tuple(csvs), encoders=(tower,), out=tmp_path / "b")) == {tower: (44, 24)}


def test_a_bank_and_embeddings_of_images_never_share_a_folder(words, small_run, tmp_path, command, refused):
    """Both are what `embed` has written, so one would be taken for an old output of the other."""
    run = ["--run", tmp_path / "run"]
    code, _, err = command(*words[:-2], *run)
    assert code == 0 and (tmp_path / "run" / "banks" / "prompts" / "bank.json").is_file(), err
    images = ["embed", "--images", small_run.images, *run, "--encoders", "classes"]
    refused([*images, "--out", tmp_path / "run" / "banks" / "prompts"], "holds a bank of prompts", "--out")
    code, _, err = command(*images)
    assert code == 0, err
    before = (tmp_path / "run" / "embeddings" / "classes.npy").read_bytes()
    assert command(*words[:-2], *run)[0] == 0
    refused([*words[:-1], tmp_path / "run" / "embeddings", *run, "--run", tmp_path], "holds embeddings of images")
    assert (tmp_path / "run" / "embeddings" / "classes.npy").read_bytes() == before
