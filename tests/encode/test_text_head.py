"""A head from a bank's texts: what `finetune` starts from where images are few, if it helps."""

import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from image_to_prompts.data import metadata
from image_to_prompts.encode import banks, text_head
from image_to_prompts.models import checkpoints, metrics

WORLD = np.random.default_rng(1).standard_normal((384, 24)).astype(np.float32)


def units(rows, seed):
    return metrics.unit(np.random.default_rng(seed).standard_normal((rows, 384), np.float32))


def seen(targets, seed):
    """What a tower makes of images: longer than texts, elsewhere, and blurred."""
    noise = np.random.default_rng(seed).standard_normal((len(targets), 24), np.float32)
    return 7 * (metrics.unit(targets @ WORLD) + 0.05 * noise) + 3


@pytest.fixture
def bank(tmp_path):
    targets = units(2000, 0)
    banks.write_shard(tmp_path / "bank", 0, metrics.unit(targets @ WORLD), targets, list(map(str, range(2000))))
    about = {"tower": "open_clip:x", "weights": "", "projected": False, "width": 24, "shards": [2000]}
    banks.write_about(tmp_path / "bank", about, "")
    return banks.open_bank(tmp_path / "bank")


def fitted(features, targets, text=None):
    model = SimpleNamespace(head=torch.nn.Linear(24, 384))
    checkpoints.fit_head(model, features, targets, text)
    return model.head


def score(head, features, targets):
    with torch.no_grad():
        return metrics.mean_cosine(head(torch.from_numpy(features)).numpy(), targets)


def test_few_images_learn_from_texts_and_bad_texts_do_no_harm(bank, caplog):
    caplog.set_level("INFO")
    few, others = units(30, 2), units(200, 3)
    features, asked = seen(few, 4), seen(others, 5)
    head = text_head.fit(bank, bank.queries(features), few)
    text = head.linear(features, None)
    alone, both = fitted(features, few), fitted(features, few, text)
    assert score(both, asked, others) > score(alone, asked, others) + 0.05
    assert "from the bank's texts and images" in caplog.text
    nonsense = text[0][::-1].copy(), text[1]
    worse = fitted(features, few, nonsense)
    assert torch.equal(worse.weight, alone.weight) and torch.equal(worse.bias, alone.bias)


def test_as_a_linear_map_it_says_nearly_the_same(bank):
    targets = units(100, 6)
    features = seen(targets, 7)
    head = text_head.fit(bank, bank.queries(features), targets)
    weight, bias = head.linear(features, None)
    linear, said = metrics.unit(features @ weight + bias), head(bank.queries(features))
    assert (linear * said).sum(1).mean() > 0.95
    assert metrics.mean_cosine(linear, targets) > metrics.mean_cosine(said, targets) - 0.02
    mixed = np.random.default_rng(2).standard_normal((30, 24)).astype(np.float32)  # a projection
    wide = np.random.default_rng(3).standard_normal((5, 30)).astype(np.float32)
    length = np.linalg.norm(wide, axis=1).mean()
    own, _ = head.linear(wide, mixed)
    assert np.allclose(wide @ own, (wide @ mixed) @ head.weight / length, atol=1e-4)


def test_prompts_that_validate_are_not_learnt_from(bank):
    """A bank that holds them gives the head that it would give without them."""
    rows = np.arange(0, 2000, 2)
    held_out = metrics.unit(bank.targets[rows].astype(np.float32))
    targets = units(100, 8)
    queries = bank.queries(seen(targets, 9))
    without = text_head.fit(bank, queries, targets, held_out)
    known = bank.vectors[:].astype(np.float32), bank.targets[:].astype(np.float32)
    weight, _ = metrics.ridge(*(side[1::2] for side in known), (metrics.unit(queries + without.shift), targets))
    assert np.allclose(without.weight, weight, atol=1e-4)


def test_finetune_starts_from_a_bank(small_run, tiny_encoders, tmp_path, command, refused):
    texts = tmp_path / "t.csv"
    metadata.write_table(texts, pd.DataFrame({"prompt": [f"a thing number {row}" for row in range(60)]}))
    tower = f"open_clip:{tiny_encoders['clip']}"
    assert command("embed", "--texts", texts, "--encoders", tower, "--out", tmp_path / "bank")[0] == 0
    words = ["finetune", "--run", small_run.folder, "--images", small_run.images, "--image-size", 32, "--epochs", 1]
    words += ["--no-cache-features"]
    words += ["--bank", tmp_path / "bank", "--out", tmp_path / "c"]
    code, _, err = command(*words, "--backbone", tower)
    assert code == 0 and "head on a tenth of the rows: from images alone" in err, err
    assert json.loads((tmp_path / "c" / "config.json").read_text())["backbone"]["name"] == tower
    again = [word for word in words if word != "--no-cache-features"]
    refused([*again, "--backbone", tower, "--out", tmp_path / "d"], "cannot be cached; add --no-cache-features")
    refused(words, "bank: made by open_clip:", "not by --backbone timm:tf_efficientnet_lite2")
