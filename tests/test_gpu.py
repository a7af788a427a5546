"""What only a GPU can show: types, scaler, memory that runs out, two processes on one card, equal results.

pytest -m gpu tests/test_gpu.py      wherever there is a GPU; the weights are tiny and random
"""

import io
import os
import socket
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate import PartialState
from PIL import Image
from safetensors.torch import load_file

from image_to_prompts import finetune, render
from image_to_prompts.data import metadata
from image_to_prompts.models import text_encoder
from image_to_prompts.render import stable_diffusion
from image_to_prompts.run import devices
from image_to_prompts.search import near_pairs, nearest
from image_to_prompts.training import loop

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
COUNT = 48


def vectors_of(prompts, *_, **__):
    """Unit vectors by the text alone, instead of MiniLM's, whose weights need not be there."""
    rows = [np.random.default_rng(zlib.crc32(prompt.encode())).standard_normal(384) for prompt in prompts]
    return (np.array(rows) / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(autouse=True)
def no_minilm(monkeypatch):
    monkeypatch.setattr(text_encoder, "encode", vectors_of)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Images of noise with prompts: a folder and a CSV."""
    folder = tmp_path_factory.mktemp("pairs")
    rng = np.random.default_rng(0)
    names = [f"{number}.png" for number in range(COUNT)]
    for name in names:
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(folder / name)
    metadata.write_table(folder / "m.csv", pd.DataFrame({"image_name": names, "prompt": names}))
    return folder


def train(pairs, tower, out, **values):
    """The history of a training."""
    values = {"epochs": 2, "batch_size": 16, "learning_rate": 1e-3, "warm_up": 0, "cache_features": False, **values}
    paths = {"images": (pairs,), "metadata": (pairs / "m.csv",), "out": out}
    return finetune.run(finetune.Config(backbone=f"open_clip:{tower}", image_size=64, **paths, **values))


def trained(pairs, tower, out, **values):
    """The weights at the end of a training, and its history."""
    history = train(pairs, tower, out, **values)
    return load_file(out / "last" / "model.safetensors"), history


def apart(one, two):
    return max(float((one[name].float() - two[name].float()).abs().max()) for name in one)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_learns_and_a_stopped_training_ends_the_same(
    pairs, tiny_open_clip, tmp_path, monkeypatch, precision
):
    monkeypatch.setattr(devices, "mixed_precision", lambda device: precision)
    monkeypatch.setattr("image_to_prompts.training.model.mixed_precision", lambda device: precision)
    whole, history = trained(pairs, tiny_open_clip, tmp_path / "a", ema=0.9)
    assert history["loss"].iloc[2] < history["loss"].iloc[1]
    real, steps = loop.Trainer.begin, []

    def killed(self, *arguments):
        steps.append(self.accelerator.scaler)
        if len(steps) == 4:
            raise KeyboardInterrupt
        self.schedule.save_minutes = 0.0  # a state after every step
        return real(self, *arguments)

    monkeypatch.setattr(loop.Trainer, "begin", killed)
    with pytest.raises(KeyboardInterrupt):
        trained(pairs, tiny_open_clip, tmp_path / "b", ema=0.9)
    assert all((scaler is not None) == (precision == "fp16") for scaler in steps)
    monkeypatch.setattr(loop.Trainer, "begin", real)
    again, _ = trained(pairs, tiny_open_clip, tmp_path / "b", ema=0.9)
    assert apart(whole, again) < 1e-5


def test_memory_that_runs_out_halves_the_pieces(pairs, tiny_open_clip, tmp_path, monkeypatch, caplog):
    whole, _ = trained(pairs, tiny_open_clip, tmp_path / "a", precision="fp32")
    real, free = loop.Trainer.gradients, torch.cuda.mem_get_info()[0]

    def hungry(self, images, *arguments):
        held = torch.empty(free // 6 * len(images) // 4, dtype=torch.uint8, device="cuda")  # 16 images need 2/3
        more = torch.empty(len(images) * (free // 24), dtype=torch.uint8, device="cuda")  # and another 2/3
        del held, more
        return real(self, images, *arguments)

    monkeypatch.setattr(loop.Trainer, "gradients", hungry)
    halved, _ = trained(pairs, tiny_open_clip, tmp_path / "b", precision="fp32")
    assert "out of memory with 1" in caplog.text
    assert apart(whole, halved) < 1e-3


def test_two_processes_on_one_card_train_like_one(pairs, tiny_open_clip, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    both = []
    for rank in range(2):
        own = {"RANK": str(rank), "GLOO_SOCKET_IFNAME": "lo", **shared}
        words = [sys.executable, __file__, pairs, tiny_open_clip, tmp_path / "two"]
        path = os.pathsep.join([str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")])
        both.append(subprocess.Popen(list(map(str, words)), env={**os.environ, **own, "PYTHONPATH": path}))
    assert [one.wait(100) for one in both] == [0, 0]
    one, _ = trained(pairs, tiny_open_clip, tmp_path / "one", precision="fp32")
    assert apart(one, load_file(tmp_path / "two" / "last" / "model.safetensors")) < 1e-4


def test_a_compiled_training_is_the_same(pairs, tiny_open_clip, tmp_path):
    plain, _ = trained(pairs, tiny_open_clip, tmp_path / "a", precision="fp32")
    compiled, _ = trained(pairs, tiny_open_clip, tmp_path / "b", precision="fp32", compile=True)
    assert apart(plain, compiled) < 1e-3


def rendered(tiny_sd2, folder, prompts, **values):
    """Rendered images by name."""
    folder.mkdir(exist_ok=True)
    metadata.write_table(folder / "m.csv", metadata.with_keys(pd.DataFrame({"prompt": prompts}), Path("test")))
    values = {"backend": "sd2", "weights": tiny_sd2, "steps": 3, **values}
    found = render.run(render.Config(metadata=folder / "m.csv", out=folder / "images", **values))
    return {name: (folder / "images" / name).read_bytes() for name in found["file"]}


def pixels(file):
    return np.asarray(Image.open(io.BytesIO(file)), np.int16)


def test_rendering_is_the_same_again_and_compiled(tiny_sd2, tmp_path):
    prompts = ["a fox", "a red castle by night", "a ship", "two cats", "an old man"]
    plain = rendered(tiny_sd2, tmp_path / "a", prompts, batch_size=2)
    again = rendered(tiny_sd2, tmp_path / "b", prompts, batch_size=2)
    assert plain == again
    compiled = rendered(tiny_sd2, tmp_path / "c", prompts, batch_size=2, compile=True)
    # The fifth is drawn alone, compiled beside an empty prompt. Single numbers differ by 10 levels; by other noise
    # the mean would be 40.
    apart_by = [np.abs(pixels(plain[name]) - pixels(compiled[name])).mean() for name in list(plain)[:4]]
    assert max(apart_by) < 1, apart_by
    for name in list(plain)[2:4]:
        (tmp_path / "a" / "images" / name).unlink()
    assert rendered(tiny_sd2, tmp_path / "a", prompts, batch_size=2) == plain


def test_rendering_finds_the_batch_that_fits(tiny_sd2, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    torch.cuda.empty_cache()
    real, free = stable_diffusion.StableDiffusionBackend.call, torch.cuda.mem_get_info()[0]

    def hungry(self, rows, steps):
        held = torch.empty(len(rows) * (free // 12), dtype=torch.uint8, device="cuda")  # 16 images do not fit, 8 do
        del held
        return real(self, rows, steps)

    monkeypatch.setattr(stable_diffusion.StableDiffusionBackend, "call", hungry)
    assert len(rendered(tiny_sd2, tmp_path / "a", [f"{number} ships" for number in range(21)])) == 21
    assert "batches of 8 fit into memory" in caplog.text


def unit(rng, count, width):
    rows = rng.standard_normal((count, width)).astype(np.float32)
    rows[1::4] = rows[::4][: len(rows[1::4])] + 0.7 * rows[1::4]
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def on_cpu(monkeypatch, *modules):
    for module in modules:
        monkeypatch.setattr(module, "local_device", lambda: torch.device("cpu"))


def test_a_gpu_keeps_the_rows_that_a_cpu_keeps(monkeypatch):
    rows = unit(np.random.default_rng(0), 30_001, 384)
    found, cosines = near_pairs.leaders(rows, 0.8)
    pairs = near_pairs.pairs(rows[:9000], 0.8)
    on_cpu(monkeypatch, near_pairs)
    expected, also = near_pairs.leaders(rows, 0.8)
    assert (found == expected).all() and np.abs(cosines - also).max() < 1e-5
    assert (expected != np.arange(len(rows))).sum() > 5000
    both = near_pairs.pairs(rows[:9000], 0.8)
    assert (pairs.later == both.later).all() and (pairs.earlier == both.earlier).all()


@pytest.mark.parametrize("kind", [np.float32, np.float16])
def test_a_gpu_finds_the_rows_that_a_cpu_finds(monkeypatch, kind):
    rng = np.random.default_rng(1)
    rows, queries = unit(rng, 150_001, 256).astype(kind), unit(rng, 1300, 256)
    found = nearest.nearest(queries, rows, 60)
    on_cpu(monkeypatch, nearest)
    expected = nearest.nearest(queries, rows, 60)
    assert (found[0] == expected[0]).all() and np.abs(found[1] - expected[1]).max() < 1e-6


if __name__ == "__main__":
    text_encoder.encode = vectors_of
    if torch.cuda.is_available():
        PartialState(backend="gloo")  # NCCL wants a card for each process
    train(*map(Path, sys.argv[1:]), precision="fp32")
