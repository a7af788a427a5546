"""The training loop: any batch in any pieces, exact resume at any step, several processes, clear ends."""

import contextlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rows import loaded_rows
from safetensors.torch import load_file

from image_to_prompts import finetune, profiles
from image_to_prompts.data import metadata
from image_to_prompts.data.rows import ImageRows
from image_to_prompts.models import backbones, checkpoints, freezing
from image_to_prompts.run import folders, progress
from image_to_prompts.run.errors import UserError
from image_to_prompts.training import epochs, loop
from image_to_prompts.training import model as models
from image_to_prompts.training import state as state_file


def config(run, out, tower, **overrides):
    values = {
        "backbone": f"open_clip:{tower}",
        "image_size": 64,
        "epochs": 1,
        "batch_size": 16,
        "learning_rate": 1e-3,
        "warm_up": 0,
        "precision": "fp32",
        "cache_features": False,
        "out": out,
        **overrides,
    }
    return profiles.default_config("finetune", run, "embedded", **values)


def weights_of(folder):
    return load_file(folder / "last" / "model.safetensors")


def difference(one, two):
    return max(float((one[name] - two[name]).abs().max()) for name in one)


@given(st.integers(1, 200), st.integers(1, 64), st.integers(0, 3), st.integers(1, 3))
def test_an_epoch_sees_every_row_once(count, batch_size, seed, epoch):
    found = epochs.batches(np.arange(count), seed, epoch, batch_size)
    assert sorted(np.concatenate(found)) == list(range(count))
    sizes = [len(batch) for batch in found]
    assert max(sizes) <= batch_size and max(sizes) - min(sizes) <= 1
    again = epochs.batches(np.arange(count), seed, epoch, batch_size)
    assert all((one == two).all() for one, two in zip(found, again, strict=True))


def test_a_batch_in_pieces_is_the_same_batch(small_run, tiny_open_clip, tmp_path):
    whole = finetune.run(config(small_run, tmp_path / "a", tiny_open_clip))
    pieces = finetune.run(config(small_run, tmp_path / "b", tiny_open_clip, micro_batch=3))
    assert difference(weights_of(tmp_path / "a"), weights_of(tmp_path / "b")) < 1e-4
    assert whole["loss"].iloc[-1] == pytest.approx(pieces["loss"].iloc[-1], abs=1e-5)


def test_out_of_memory_halves_the_pieces(small_run, tiny_open_clip, tmp_path, monkeypatch, caplog):
    plain = loop.Trainer.gradients

    def limited(self, images, rows, planned, last):
        if len(rows) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return plain(self, images, rows, planned, last)

    finetune.run(config(small_run, tmp_path / "a", tiny_open_clip))
    monkeypatch.setattr(loop.Trainer, "gradients", limited)
    finetune.run(config(small_run, tmp_path / "b", tiny_open_clip))
    assert caplog.text.count("out of memory") == 2  # 16 -> 8 -> 4, then never again
    assert difference(weights_of(tmp_path / "a"), weights_of(tmp_path / "b")) < 1e-4
    monkeypatch.setattr(
        loop.Trainer, "gradients", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory."))
    )
    with pytest.raises(UserError, match=r"memory does not suffice for one image: .*; lower --micro-batch"):
        finetune.run(config(small_run, tmp_path / "c", tiny_open_clip))


def test_gradient_checkpointing_changes_nothing(small_run, tiny_open_clip, tmp_path):
    for name, on in (("a", False), ("b", True)):
        finetune.run(config(small_run, tmp_path / name, tiny_open_clip, grad_checkpointing=on))
    assert difference(weights_of(tmp_path / "a"), weights_of(tmp_path / "b")) < 1e-4


def test_a_time_budget_stops_and_the_same_command_goes_on(small_run, tiny_open_clip, tmp_path, monkeypatch, caplog):
    whole = finetune.run(config(small_run, tmp_path / "a", tiny_open_clip, epochs=2))
    calls = iter(range(1000))
    monkeypatch.setattr(progress.Deadline, "passed", lambda self, _: next(calls) % 3 == 2)
    for _ in range(20):
        history = finetune.run(config(small_run, tmp_path / "b", tiny_open_clip, epochs=2, max_hours=1))
        if not list((tmp_path / "b").glob("unfinished-*")):
            break
        assert "stopped by --max-hours 1" in caplog.text and len(history) < 3
    pd.testing.assert_frame_equal(history, whole)
    assert difference(weights_of(tmp_path / "a"), weights_of(tmp_path / "b")) == 0
    assert not list((tmp_path / "b").glob("unfinished-*"))


def test_the_next_kernel_goes_on_from_what_the_last_one_left(small_run, tiny_open_clip, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    settings = config(small_run, tmp_path / "first", tiny_open_clip, epochs=2, max_hours=1)
    finetune.run(replace(settings, out=tmp_path / "whole", max_hours=0))
    calls = iter(range(1000))
    with monkeypatch.context() as patch:
        patch.setattr(progress.Deadline, "passed", lambda self, _: next(calls) == 1)
        finetune.run(settings)
    assert list((tmp_path / "first").glob("unfinished-*.pt"))
    (tmp_path / "input").mkdir()
    (tmp_path / "first").rename(tmp_path / "input" / "kernel-output")
    monkeypatch.setattr(folders, "KAGGLE_INPUT", tmp_path / "input")
    finetune.run(replace(settings, out=tmp_path / "second"))
    assert "continuing at epoch 1, step 3" in caplog.text
    assert difference(weights_of(tmp_path / "second"), weights_of(tmp_path / "whole")) == 0
    assert "begins anew" not in caplog.text
    state_file.adopt(tmp_path / "third" / "unfinished-0123456789ab.pt")
    assert "begins anew" in caplog.text


def test_deadline_counts_the_longest_piece(monkeypatch):
    now = [progress.BEGUN]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    deadline = progress.Deadline(1)
    assert not deadline.passed()
    now[0] += 1000
    assert not deadline.passed(2) and deadline.passed(3)
    now[0] += 1650  # 2,650 s are over, another 1,650 would end after the hour
    assert deadline.passed()
    assert not progress.Deadline(0).passed()


def test_no_better_epoch_stops_early(small_run, tiny_open_clip, tmp_path):
    history = finetune.run(config(small_run, tmp_path / "a", tiny_open_clip, epochs=9, learning_rate=1e-12, patience=2))
    assert len(history) < 9
    assert checkpoints.load(tmp_path / "a" / "last").config["metrics"]["epoch"] == history["epoch"].iloc[-1]


def test_nan_names_the_batch_and_keeps_the_checkpoint(small_run, tiny_open_clip, tmp_path, monkeypatch):
    plain = loop.Trainer.gradients

    def poisoned(self, images, rows, planned, last):
        if self.standing.epoch == 2:
            self.parameters[0].data.fill_(float("nan"))
        return plain(self, images, rows, planned, last)

    monkeypatch.setattr(loop.Trainer, "gradients", poisoned)
    names = set(metadata.read(small_run.metadata)["image_name"])
    with pytest.raises(UserError, match=r"epoch 2, step 1: the loss is not a number \(images ") as raised:
        finetune.run(config(small_run, tmp_path / "c", tiny_open_clip, epochs=3, batch_size=4))
    named = str(raised.value).partition("(images ")[2].partition(")")[0].split(", ")
    assert 1 <= len(named) <= 4 and set(named) <= names
    kept = checkpoints.load(tmp_path / "c")
    assert all(torch.isfinite(p).all() for p in kept.model.parameters())


def test_sources_weigh_and_are_left_out(small_run, tmp_path, tiny_open_clip):
    frame = metadata.read(small_run.metadata)
    frame["source"] = np.where(np.arange(len(frame)) % 2, "odd", "even")
    csv = tmp_path / "two.csv"
    metadata.write_table(csv, frame)
    given_ = {"metadata": (csv,), "images": (small_run.images,)}
    finetune.run(config(small_run, tmp_path / "b", tiny_open_clip, **given_))
    finetune.run(config(small_run, tmp_path / "c", tiny_open_clip, leave_out="odd", **given_))
    rows = json.loads((tmp_path / "c" / "config.json").read_text())["rows"]
    all_rows = json.loads((tmp_path / "b" / "config.json").read_text())["rows"]
    assert rows["train"] < 0.7 * all_rows["train"] and 0 < rows["validate"] < all_rows["validate"]
    for flags in ({"leave_out": "none"}, {"source_weights": ("none=2",)}):
        with pytest.raises(UserError, match=r"no row of source 'none' \(sources: even, odd\)"):
            finetune.run(config(small_run, tmp_path / "d", tiny_open_clip, **flags, **given_))
    with pytest.raises(UserError, match="write SOURCE=WEIGHT"):
        finetune.run(config(small_run, tmp_path / "d", tiny_open_clip, source_weights=("odd",), **given_))


def test_rows_that_weigh_nothing_move_nothing(small_run, tmp_path, tiny_open_clip):
    """The first step's gradient is that of the other rows alone, by their part of the batch."""
    frame = metadata.read(small_run.metadata)
    frame["source"] = np.where(np.arange(len(frame)) % 2, "odd", "even")
    rows = loaded_rows(small_run.metadata, small_run.images)
    sources = frame.set_index("image_name")["source"].loc[rows.frame["image_name"]].to_numpy()
    weights = np.where(sources == "odd", 0, 1).astype(np.float32)

    def gradients(which, weights, planned):
        settings = config(small_run, tmp_path / "x", tiny_open_clip)
        accelerator = models.accelerator_for(False)
        model_, _ = models.build(backbones.describe(settings.backbone, 64), accelerator, pretrained=False)
        source = ImageRows(rows.paths, 64)
        trainer = loop.Trainer(
            *(accelerator, model_, model_, source, replace(rows, weights=weights)),
            *(settings, tmp_path / "no-state"),
        )
        batch, numbers = source.collate([source[row] for row in which])
        trainer.gradients(batch, numbers, planned, True)
        return [parameter.grad for parameter in trainer.parameters]

    which = rows.train[:8]
    assert {sources[row] for row in which} == {"odd", "even"}
    weighted = gradients(which, weights, 8)
    alone = gradients(which[sources[which] == "even"], np.ones_like(weights), 8)
    everything = gradients(which, np.ones_like(weights), 8)
    for one, other in zip(weighted, alone, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)
    assert any(not torch.allclose(one, other, atol=1e-4) for one, other in zip(weighted, everything, strict=True))


def test_a_large_gradient_is_clipped(small_run, tiny_open_clip, tmp_path, monkeypatch):
    """AdamW hides the size of a gradient that never changes; what it is given shows it."""
    norms, settings = [], config(small_run, tmp_path / "x", tiny_open_clip)
    monkeypatch.setattr(loop.Trainer, "gradients", blown_up(loop.Trainer.gradients))
    plain = torch.optim.AdamW.step

    def watched(self, *values, **named):
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norms.append(float(torch.linalg.vector_norm(torch.stack([grad.norm() for grad in grads]))))
        return plain(self, *values, **named)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    finetune.run(settings)
    assert norms and max(norms) == pytest.approx(1.0, abs=1e-3)


def blown_up(plain):
    def gradients(self, *values):
        found = plain(self, *values)
        for parameter in self.parameters:
            parameter.grad.mul_(1e4)
        return found

    return gradients


def stopped_after(monkeypatch, steps, settings):
    """Runs a training that --max-hours ends after some steps."""
    calls = iter(range(1000))
    with monkeypatch.context() as patch:
        patch.setattr(progress.Deadline, "passed", lambda self, _: next(calls) == steps - 1)
        finetune.run(replace(settings, max_hours=1))


def test_a_resumed_training_takes_the_micro_batch_that_is_asked_for(small_run, tiny_open_clip, tmp_path, monkeypatch):
    """As the error of several processes that run out of memory advises."""
    settings, sizes = config(small_run, tmp_path / "a", tiny_open_clip), []
    stopped_after(monkeypatch, 1, settings)
    plain = loop.Trainer.gradients
    monkeypatch.setattr(
        loop.Trainer,
        "gradients",
        lambda self, images, rows, *rest: sizes.append(len(rows)) or plain(self, images, rows, *rest),
    )
    finetune.run(replace(settings, micro_batch=3))
    assert sizes and max(sizes) <= 3


def test_what_a_training_of_other_settings_left_goes_when_another_has_ended(
    small_run, tiny_open_clip, tmp_path, monkeypatch, caplog
):
    caplog.set_level("INFO")
    out = tmp_path / "a"
    settings = config(small_run, out, tiny_open_clip, epochs=3)
    stopped_after(monkeypatch, 1, settings)
    (first,) = out.glob("unfinished-*.pt")
    stopped_after(monkeypatch, 1, replace(settings, epochs=2))
    assert len(list(out.glob("unfinished-*.pt"))) == 2  # neither has ended: both may go on
    finetune.run(replace(settings, epochs=1))
    assert not list(out.glob("unfinished-*")) and not list(out.glob(".finetune-*"))
    assert first.name in caplog.text


def test_a_replaced_image_is_trained_on_anew(small_run, tiny_open_clip, tmp_path):
    images_ = tmp_path / "images"
    shutil.copytree(small_run.images, images_)
    settings = config(small_run, tmp_path / "a", tiny_open_clip, images=(images_,), metadata=(small_run.metadata,))
    finetune.run(settings)
    before = weights_of(tmp_path / "a")
    stamp = (tmp_path / "a" / ".finetune.done").read_bytes()
    finetune.run(settings)
    assert (tmp_path / "a" / ".finetune.done").read_bytes() == stamp
    rows = loaded_rows(small_run.metadata, images_)
    first, second = (rows.paths[row] for row in rows.train[:2])
    times, size = first.stat(), first.stat().st_size
    first.write_bytes(second.read_bytes().ljust(size, b"\0")[: max(size, second.stat().st_size)])
    os.utime(first, ns=(times.st_atime_ns, times.st_mtime_ns))
    finetune.run(settings)
    assert difference(before, weights_of(tmp_path / "a")) > 0


def test_a_second_stage_starts_from_a_checkpoint(small_run, small_checkpoint, tiny_open_clip, tmp_path):
    values = {"image_size": 64, "epochs": 1, "learning_rate": 1e-9, "init": small_checkpoint, "out": tmp_path / "c"}
    history = finetune.run(profiles.default_config("finetune", small_run, "embedded", **values))
    first = json.loads((small_checkpoint / "config.json").read_text())["metrics"]["validation_cosine"]
    assert history["cosine"].iloc[0] == pytest.approx(first, abs=0.003)
    with pytest.raises(UserError, match=r"a checkpoint of timm:tf_efficientnet_lite2, not open_clip"):
        finetune.run(config(small_run, tmp_path / "d", tiny_open_clip, init=small_checkpoint))


def test_augmented_epochs_differ_and_repeat(small_run, tiny_open_clip, tmp_path):
    options = {"augment": True, "epochs": 2}
    for name in ("a", "b"):
        finetune.run(config(small_run, tmp_path / name, tiny_open_clip, **options))
    finetune.run(config(small_run, tmp_path / "plain", tiny_open_clip, epochs=2))
    assert difference(weights_of(tmp_path / "a"), weights_of(tmp_path / "b")) == 0
    assert difference(weights_of(tmp_path / "a"), weights_of(tmp_path / "plain")) > 0


def _train(settings, kill_at, before_saving):
    """Trains in a process of its own, with one thread; kills itself at a step."""
    torch.set_num_threads(1)
    steps = 0
    name = "save" if before_saving else "_summed"
    plain = getattr(loop.Trainer, name)

    def counted(self, *values):
        nonlocal steps
        steps += 1
        if steps == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(self, *values)

    setattr(loop.Trainer, name, counted)
    finetune.run(settings)


@pytest.mark.slow
def test_killed_at_random_steps_ends_with_the_same_weights(small_run, tiny_open_clip, tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "timm", "open_clip", "sentence_transformers", "faiss", "accelerate"])
    settings = config(
        small_run, tmp_path / "whole", tiny_open_clip, epochs=4, batch_size=4, save_minutes=0, augment=True
    )

    def train(values, kill_at=0, before_saving=False):
        process = context.Process(target=_train, args=(values, kill_at, before_saving))
        process.start()
        process.join()
        return process.exitcode

    assert train(settings) == 0
    rng, killed, torn = random.Random(0), 0, replace(settings, out=tmp_path / "torn")
    while True:
        code = train(torn, rng.randint(1, 5) if killed < 12 else 0, rng.random() < 0.5)
        if code == 0:
            break
        assert code == -signal.SIGKILL
        killed += 1
    assert killed >= 10
    for name in ("model.safetensors", "last/model.safetensors", "history.csv", "config.json"):
        assert (tmp_path / "torn" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def launched(words: list[object], folders: dict[str, Path]) -> list[tuple[str, int]]:
    """Runs a stage in processes as docs/scale.md starts them: "one", "two" of one machine, or "0" and "1" as nodes.

    Returns:
        What each said, and its exit code.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    nodes = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", 2, "--num_processes", 2]
    nodes += ["--main_process_ip", "127.0.0.1", "--main_process_port", port]
    starts = {
        "one": [],
        "two": ["-m", "torch.distributed.run", "--nproc_per_node", 2, "--standalone"],
        "0": [*nodes, "--machine_rank", 0],
        "1": [*nodes, "--machine_rank", 1],
    }
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": environment}
    started = []
    for name, folder in folders.items():
        command = [str(word) for word in (sys.executable, *starts[name], "-m", "image_to_prompts", *words)]
        started.append(subprocess.Popen(command, cwd=folder, **pipes))
    return [(process.communicate(timeout=1800)[0], process.returncode) for process in started]


RECIPE = {"ema": 0.9, "layer_decay": 0.6, "lowest_rate": 1e-6, "warm_up": 5, "train_from": 0}


def finetune_words(small_run, tiny_open_clip, images) -> list[object]:
    words = ["finetune", "--backbone", f"open_clip:{tiny_open_clip}", "--image-size", 64, "--precision", "fp32"]
    words += ["--metadata", small_run.metadata, "--images", images, "--epochs", 3, "--batch-size", 8]
    return [*words, "--no-cache-features", "--learning-rate", 1e-3]


@pytest.mark.slow
@pytest.mark.parametrize(("several", "damaged", "recipe"), [(["two"], 0, RECIPE), (["0", "1"], 0.7, {})])
def test_two_processes_and_two_nodes_train_like_one(small_run, tiny_open_clip, tmp_path, several, damaged, recipe):
    """float32, the same global batch, LayerNorm (nothing to normalise over the batch): same losses within 1e-5.

    With most images damaged, some shares of four hold none that can be read.
    """
    images, rng = tmp_path / "images", random.Random(0)
    shutil.copytree(small_run.images, images)
    for file in sorted(images.glob("*.png")):
        if rng.random() < damaged:
            file.write_bytes(b"")
    words, found = finetune_words(small_run, tiny_open_clip, images), {}
    words += [f"--{name.replace('_', '-')}={value}" for name, value in recipe.items()]
    for names in (["one"], several):
        out = tmp_path / "-".join(names)
        done = launched([*words, "--out", out], dict.fromkeys(names, tmp_path))
        assert not any(code for _, code in done), done
        processes = 1 if names == ["one"] else 2
        assert "".join(said for said, _ in done).count("rows train") == processes  # there really are two
        found[names[0]] = pd.read_csv(out / "history.csv")
    for column in ("loss", "cosine"):
        np.testing.assert_allclose(found["one"][column], found[several[0]][column], atol=1e-5)
    assert found["one"]["loss"].nunique() == 3


@pytest.mark.slow
def test_nodes_that_do_not_share_the_output_are_told(small_run, tiny_open_clip, tmp_path):
    words = [*finetune_words(small_run, tiny_open_clip, small_run.images), "--out", "here"]
    folders = {name: tmp_path / name for name in ("0", "1")}
    for folder in folders.values():
        folder.mkdir()
    for said, code in launched(words, folders):
        assert code and "not seen by process 1; --out must lie on a file system" in said


def test_the_learning_rate_follows_a_cosine_in_each_cycle():
    for done, factor in ((0, 1), (0.25, 0.8535534), (0.5, 0.5), (0.75, 0.1464466)):
        assert epochs.learning_rate_factor(done, 1) == pytest.approx(factor)
        assert epochs.learning_rate_factor(done / 2, 2) == pytest.approx(factor)
        assert epochs.learning_rate_factor(0.5 + done / 2, 2) == pytest.approx(factor)


def test_an_epochs_order_depends_on_seed_and_epoch():
    rows = np.arange(10, 60)
    orders = {(s, e): np.concatenate(epochs.batches(rows, s, e, 8)).tolist() for s in (0, 1) for e in (1, 2)}
    assert len({tuple(order) for order in orders.values()}) == 4
    assert orders[0, 1] == np.random.default_rng((0, 1)).permutation(rows).tolist()
    assert [len(batch) for batch in epochs.batches(rows, 0, 1, 8)] == [8, 7, 7, 7, 7, 7, 7]
    assert [len(batch) for batch in epochs.batches(rows, 0, 1, 50)] == [50]


@pytest.mark.parametrize(
    ("cosines", "patience", "stalled"),
    [
        ([0.5, 0.4, 0.4], 2, True),
        ([0.5, 0.4, 0.5], 2, True),
        ([0.5, 0.4, 0.51], 2, False),
        ([0.4, 0.5, 0.4], 2, False),
        ([0.5, 0.4], 2, False),
        ([0.5, 0.4, 0.3, 0.2], 0, False),
        ([0.5, 0.4], 1, True),
    ],
)
def test_a_training_has_stalled_when_its_last_epochs_brought_nothing(cosines, patience, stalled):
    assert epochs.has_stalled([{"cosine": cosine} for cosine in cosines], patience) == stalled


@pytest.fixture
def trainer(small_run, tiny_open_clip, tmp_path):
    """A trainer of the tiny tower, with its images."""
    settings = config(small_run, tmp_path / "x", tiny_open_clip, epochs=5, cycles=2, learning_rate=1e-3)
    rows = loaded_rows(small_run.metadata, small_run.images)
    accelerator = models.accelerator_for(False)
    model_, _ = models.build(backbones.describe(settings.backbone, 64), accelerator, pretrained=False)
    source = ImageRows(rows.paths, 64)
    return loop.Trainer(accelerator, model_, model_, source, rows, settings, tmp_path / "state.pt")


def test_gradients_that_are_not_finite_are_told_with_their_images(trainer, monkeypatch):
    batch, rows = trainer.source.collate([trainer.source[row] for row in trainer.rows.train[:2]])
    monkeypatch.setattr(trainer.accelerator, "clip_grad_norm_", lambda *_: torch.tensor(torch.inf))
    names = ", ".join(trainer.rows.frame["image_name"].iloc[rows.tolist()])
    with pytest.raises(UserError, match=rf"step 1: the gradients' norm is inf \(images {names}\)"):
        trainer.read(trainer.begin(batch, rows, 2, 0.0))


def test_a_scale_that_only_falls_ends_a_training_in_float16(trainer, monkeypatch):
    batch, rows = trainer.source.collate([trainer.source[row] for row in trainer.rows.train[:2]])
    for scale, ends in ((1.0, False), (0.5, True)):
        scaler = SimpleNamespace(get_scale=lambda scale=scale: scale, scale=lambda loss: loss)
        monkeypatch.setattr(trainer.accelerator, "scaler", scaler)
        with pytest.raises(UserError, match="gradients are not finite") if ends else contextlib.nullcontext():
            trainer.read(trainer.begin(batch, rows, 2, 0.0))


def test_a_steps_random_numbers_are_those_of_its_place(trainer):
    batch, rows = trainer.source.collate([trainer.source[row] for row in trainer.rows.train[:2]])

    def seed(epoch, step):
        trainer.standing.epoch, trainer.standing.step = epoch, step
        trainer.read(trainer.begin(batch, rows, 2, 0.0))
        return torch.initial_seed()

    first = seed(1, 0)
    assert len({first, seed(1, 1), seed(2, 0)}) == 3 and seed(1, 0) == first


def test_a_step_sets_the_rate_of_its_place_and_moves_what_trains(trainer):
    batch, rows = trainer.source.collate([trainer.source[row] for row in trainer.rows.train[:6]])
    before = [parameter.detach().clone() for parameter in trainer.parameters]
    frozen = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if not p.requires_grad}
    trainer.standing.epoch = 2
    loss, *_ = trainer.read(trainer.begin(batch, rows, 6, 0.5))
    assert 0 < loss / 6 < 2
    rate = 1e-3 * epochs.learning_rate_factor((2 - 1 + 0.5) / 5, 2)
    assert [group["lr"] for group in trainer.optimizer.param_groups] == [pytest.approx(rate)]
    assert {group["weight_decay"] for group in trainer.optimizer.param_groups} == {1e-4}
    assert all(not torch.equal(one, other) for one, other in zip(before, trainer.parameters, strict=True))
    assert all(torch.equal(p, frozen[n]) for n, p in trainer.model.named_parameters() if n in frozen)
    assert all(parameter.grad is None for parameter in trainer.parameters)


def test_the_loss_is_one_minus_the_cosine_and_its_gradient_the_batches_mean(trainer):
    batch, rows = trainer.source.collate([trainer.source[row] for row in trainer.rows.train[:4]])
    trainer.model.eval()
    predicted = trainer.model(batch)
    cosines = torch.nn.functional.cosine_similarity(predicted, torch.from_numpy(trainer.rows.targets)[rows])
    expected = torch.autograd.grad((1 - cosines).mean(), trainer.parameters)
    loss = trainer.gradients(batch, rows, 4, True)
    torch.testing.assert_close(loss, (1 - cosines).detach(), atol=1e-5, rtol=0)
    for parameter, gradient in zip(trainer.parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-6, rtol=1e-3)


def test_an_epoch_sums_up_and_a_finished_one_is_noted_and_kept(trainer, tmp_path):
    loss = trainer.epoch()
    count = len(epochs.batches(trainer.rows.train, 0, 1, 16))
    assert trainer.standing.step == count and trainer.standing.rows == len(trainer.rows.train)
    assert loss == pytest.approx(trainer.standing.loss / len(trainer.rows.train))
    trainer.finish_epoch({"epoch": 1, "loss": loss, "cosine": 0.3})
    assert trainer.standing == loop.Standing(2, history=[{"epoch": 1, "loss": loss, "cosine": 0.3}])
    kept = state_file.read(tmp_path / "state.pt", "cpu")
    assert kept["standing"]["epoch"] == 2 and kept["micro"] == 16
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    buffers = {name for name, _ in trainer.model.named_buffers()} & set(trainer.model.state_dict())
    assert set(kept["model"]) == trained | buffers


def test_an_epoch_trains_what_trains_and_adds_up_its_steps(trainer, monkeypatch):
    """In training mode, with the augmentation of its number, each step told how much of the epoch was done."""
    modes, steps, begin = [], [], trainer.begin
    trains = next(
        m for m in trainer.model.modules() if (p := [*m.parameters()]) and all(one.requires_grad for one in p)
    )
    trains.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    monkeypatch.setattr(trainer, "begin", lambda *told: steps.append((begin(*told), *told[2:])) or steps[-1][0])
    trainer.standing.epoch = 3
    trainer.epoch()
    sizes = [len(batch) for batch in epochs.batches(trainer.rows.train, 0, 3, 16)]
    assert modes == [True] * len(sizes) and trainer.source.epoch == 3  # images vary with it
    assert [told[1:] for told in steps] == [(size, place / len(sizes)) for place, size in enumerate(sizes)]
    assert trainer.standing.loss == pytest.approx(sum(trainer.read(told[0])[0] for told in steps))


@pytest.mark.parametrize(("minutes", "ago", "saved"), [(10, 0, False), (10, 590, False), (10, 605, True), (0, 1, True)])
def test_a_state_is_saved_when_the_last_one_is_old(trainer, monkeypatch, minutes, ago, saved):
    saves = []
    monkeypatch.setattr(trainer, "save", lambda: saves.append(1))
    trainer.schedule = replace(trainer.schedule, save_minutes=minutes)
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: 10_000.0))
    trainer.saved = 10_000.0 - ago
    trainer.epoch()
    assert bool(saves) == saved


@pytest.mark.parametrize(("count", "more"), [(1, ""), (5, ""), (7, " and 2 more")])
def test_a_loss_that_is_no_number_names_five_images_at_most(trainer, count, more):
    batch, rows = trainer.source.collate([trainer.source[row] for row in trainer.rows.train[:count]])
    trainer.parameters[0].data.fill_(float("nan"))
    trainer.standing.step = 3
    with pytest.raises(UserError) as raised:
        trainer.read(trainer.begin(batch, rows, count, 0.0))
    named = ", ".join(trainer.rows.frame["image_name"].iloc[rows.tolist()][:5])
    assert f"epoch 1, step 4: the loss is not a number (images {named}{more});" in str(raised.value)


def test_a_share_without_images_gives_a_gradient_of_zero(trainer):
    begun = trainer.begin(torch.empty(0), torch.empty(0, dtype=torch.int64), 4, 0.0)
    assert trainer.read(begun) == (0.0, 0, False)
    trainer.no_gradients()
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in trainer.parameters)


@pytest.fixture
def trainer_of(small_run, tiny_open_clip, tmp_path):
    """Makes a trainer of a small tower with some settings."""

    def make(**values):
        settings = config(small_run, tmp_path / "c", tiny_open_clip, **values)
        rows = loaded_rows(small_run.images / "manifest.csv", small_run.images)
        accelerator = models.accelerator_for(False)
        spec = backbones.describe(settings.backbone, 64)
        model, _ = models.build(spec, accelerator, train_from=settings.train_from)
        return loop.Trainer(accelerator, model, model, ImageRows(rows.paths, 64), rows, settings, tmp_path / "state.pt")

    return make


def test_the_moving_average_is_one_kept_by_hand(trainer_of):
    trainer = trainer_of(ema=0.9, epochs=100)
    by_hand = [p.detach().clone() for p in trainer.parameters]
    begin = trainer.begin

    def followed(*arguments):
        begun = begin(*arguments)
        step = (trainer.standing.epoch - 1) * trainer.steps + trainer.standing.step
        share = [0.1, 2 / 11, 3 / 12, 4 / 13][step] if step < 4 else min(0.9, (1 + step) / (10 + step))
        for kept, now in zip(by_hand, trainer.parameters, strict=True):
            kept.mul_(share).add_(now.detach(), alpha=1 - share)
        return begun

    trainer.begin = followed
    steps = 0
    while steps < 50:
        trainer.standing.step = 0
        trainer.epoch()
        steps += trainer.steps
        trainer.standing.epoch += 1
    own = [p.detach().clone() for p in trainer.parameters]
    assert max(float((a - b).abs().max()) for a, b in zip(trainer.averages, by_hand, strict=True)) < 1e-6
    with trainer.averaged():
        inside = [p.detach().clone() for p in trainer.parameters]
    assert all(torch.equal(a, b) for a, b in zip(inside, trainer.averages, strict=True))
    assert all(torch.equal(p, o) for p, o in zip(trainer.parameters, own, strict=True)), "outside they are its own"
    assert any(not torch.equal(a, o) for a, o in zip(inside, own, strict=True))


def test_each_group_of_layers_gets_its_share_of_the_rate(trainer_of):
    trainer = trainer_of(layer_decay=0.5, lowest_rate=1e-4, learning_rate=1e-3, train_from=0)
    shares = {id(p): group["share"] for group in trainer.optimizer.param_groups for p in group["params"]}
    groups = freezing.layer_groups(trainer.model.backbone)
    named = dict(trainer.model.backbone.named_parameters())
    for place, group in enumerate(groups):
        expected = max(0.1, 0.5 ** (len(groups) - 1 - place))
        assert {shares[id(named[name])] for name in group} == {expected}
    assert {shares[id(p)] for p in trainer.model.head.parameters()} == {1.0}
    trainer.read(trainer.begin(torch.zeros(2, 3, 64, 64, dtype=torch.uint8), torch.arange(2), 2, 0.5))
    half = epochs.learning_rate_factor(0.5, 1)
    assert all(g["lr"] == pytest.approx(1e-3 * half * g["share"]) for g in trainer.optimizer.param_groups)


def test_the_rate_rises_to_its_peak(trainer_of):
    trainer = trainer_of(warm_up=10, learning_rate=1e-3, epochs=100)
    rates = []
    for step in range(12):
        trainer.standing.epoch, trainer.standing.step = 1 + step // trainer.steps, step % trainer.steps
        trainer.read(trainer.begin(torch.zeros(2, 3, 64, 64, dtype=torch.uint8), torch.arange(2), 2, 0.0))
        rates.append(trainer.optimizer.param_groups[0]["lr"])
    flat = [1e-3 * epochs.learning_rate_factor((step // trainer.steps) / 100, 1) for step in range(12)]
    assert rates == pytest.approx([rate * min(1, (step + 1) / 10) for step, rate in enumerate(flat)])


@pytest.mark.slow
def test_a_recipe_is_resumed_to_the_byte(small_run, tiny_open_clip, tmp_path):
    """With average, decay, warm-up, pieces and augmentation, stopped after each of its first steps."""
    how = {**RECIPE, "augment": True, "micro_batch": 5, "epochs": 2}
    whole = finetune.run(config(small_run, tmp_path / "whole", tiny_open_clip, **how))
    for _ in range(3):
        finetune.run(config(small_run, tmp_path / "torn", tiny_open_clip, **how, max_hours=1e-6))
    torn = finetune.run(config(small_run, tmp_path / "torn", tiny_open_clip, **how))
    pd.testing.assert_frame_equal(whole, torn)
    for name in ("model.safetensors", "last/model.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "torn" / name).read_bytes()
    plain = finetune.run(config(small_run, tmp_path / "plain", tiny_open_clip, **{**how, "ema": 0.0}))
    assert np.allclose(plain["loss"], whole["loss"], equal_nan=True), "an average changes no step"
    assert not np.allclose(plain["cosine"][1:], whole["cosine"][1:]), "but what validates"
