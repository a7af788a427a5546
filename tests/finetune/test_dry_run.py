"""The plan of a training: counts are the model's, memory grows with the batch, nothing is written."""

from types import SimpleNamespace

import pytest
import torch

from image_to_prompts import finetune, profiles
from image_to_prompts.data import metadata
from image_to_prompts.finetune import dry_run
from image_to_prompts.models import backbones, checkpoints, freezing
from image_to_prompts.run.devices import mixed_precision
from image_to_prompts.run.errors import UserError


def planned(run, **values):
    settings = {"image_size": 64, "batch_size": 8, "epochs": 3, "dry_run": True, **values}
    return finetune.plan(profiles.default_config("finetune", run, "embedded", **settings))


@pytest.mark.parametrize("cache", [True, False])
def test_counts_are_those_of_the_model(small_run, cache):
    found = planned(small_run, cache_features=cache)
    net = checkpoints.build(backbones.describe("timm:tf_efficientnet_lite2", 64))
    trained = freezing.unfreeze(net.backbone, 12)
    own = [p for p in net.parameters() if p.requires_grad]
    assert found.counts["tensors"] == (len(own), len(list(net.parameters()))) and len(own) == len(trained) + 2
    numbers = sum(p.numel() for p in own)
    assert found.counts["parameters"] == (numbers, sum(p.numel() for p in net.parameters()))
    if mixed_precision(torch.device("cpu")) == "bf16":
        freezing.half_frozen(net, torch.bfloat16)
    assert found.memory["weights"] == sum(p.nbytes for p in net.parameters())
    assert found.memory["optimizer"] == 2 * found.memory["gradients"] == 8 * numbers
    parts = {name: size for name, size in found.memory.items() if name != "overhead"}
    assert found.needed == pytest.approx(1.05 * sum(parts.values()), abs=1)
    groups = len(freezing.layer_groups(net.backbone))
    assert found.counts["groups"] == (groups - 12, groups)
    assert planned(small_run, train_from=-1).counts["groups"] == (groups // 4, groups)
    history = finetune.run(profiles.default_config("finetune", small_run, "embedded", image_size=64, dry_run=True))
    assert history.empty and not small_run.checkpoints.exists()


def test_activations_grow_with_the_batch_and_are_those_of_the_trained_part(small_run):
    sizes = [planned(small_run, batch_size=size, cache_features=False).memory["activations"] for size in (8, 16, 24)]
    assert sizes[2] - sizes[1] == sizes[1] - sizes[0] > 0
    images = torch.randint(0, 256, (8, 3, 64, 64), dtype=torch.uint8)
    everything = checkpoints.build(backbones.describe("timm:tf_efficientnet_lite2", 64)).train()
    assert sizes[0] < dry_run.kept_by(everything, lambda: everything(images))
    few, many = (planned(small_run, batch_size=size, cache_features=False, micro_batch=4) for size in (4, 64))
    assert few.memory == many.memory


def test_steps_and_seconds(small_run):
    found = planned(small_run)
    rows = (metadata.read(small_run.images / "manifest.csv")["fold"] != 0).sum()
    assert found.steps == 3 * -(-rows // 8) and found.seconds > 0
    assert "hours" in str(found) and "GB free" in str(found)
    config = profiles.default_config("finetune", small_run, "embedded", image_size=64, batch_size=8, epochs=3)
    assert (finetune.plan(config, 2).micro, finetune.plan(config, 2).steps) == (4, found.steps)


def test_too_large_a_batch_is_told_and_not_tried(small_run, caplog, monkeypatch):
    monkeypatch.setattr(dry_run, "free_memory", lambda device: 10_000_000)
    finetune.run(profiles.default_config("finetune", small_run, "embedded", image_size=64, dry_run=True))
    assert "too large: lower --micro-batch" in caplog.text and "not measured" in caplog.text
    assert caplog.records[-1].levelname == "WARNING"


def test_on_a_gpu_a_fixed_amount_is_added():
    frozen, trained = (SimpleNamespace(numel=lambda: 1000, nbytes=4000, requires_grad=own) for own in (False, True))
    found = {}
    for kind in ("cpu", "cuda"):
        frozen.device = trained.device = SimpleNamespace(type=kind)
        model = SimpleNamespace(parameters=lambda: iter([frozen, trained]))
        found[kind] = dry_run.needed(model, 6000, average=True)
    tensors = {"weights": 8000, "gradients": 4000, "optimizer": 8000, "activations": 6000, "average": 4000}
    assert found == {"cpu": {**tensors, "overhead": 1500}, "cuda": {**tensors, "overhead": 64_000_000}}


def test_bad_input_is_refused(small_run, tmp_path):
    with pytest.raises(UserError, match="unknown backbone"):
        planned(small_run, backbone="timm:nothing")
    with pytest.raises(UserError, match=r"no manifest\.csv"):
        planned(small_run, images=(tmp_path,))


def test_the_command_line_says_the_plan(small_run, command):
    words = ["finetune", "--quiet", "--run", small_run.folder, "--dry-run", "--image-size", 64, "--batch-size", 4]
    code, said, _ = command(*words)
    assert code == 0
    assert [line.split()[0] for line in said.splitlines() if line] == [
        *("groups", "tensors", "parameters", "memory", "steps", "hours")
    ]
