"""The earlier ensemble's network predicts as published, trains and writes a submission; its bare arrays come and go."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import earlier_ensemble
import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from image_to_prompts import ensemble
from image_to_prompts.data import metadata
from image_to_prompts.encode import embeddings
from image_to_prompts.models import networks
from image_to_prompts.run.errors import UserError

TOOL = Path(__file__).resolve().parents[2] / "tools/earlier_ensemble.py"

WIDTHS = (512, 768, 384)


def inputs(count, widths=WIDTHS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(count, width, generator=generator) for width in widths]


def imported(file, folder):
    earlier_ensemble.import_checkpoint(file, folder / "c")
    return earlier_ensemble.load(folder / "c")[0]


def tool(*words):
    return subprocess.run([sys.executable, TOOL, *map(str, words)], capture_output=True, text=True)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Arrays of the published widths for images whose prompts are spread over folds."""
    folder, rng = tmp_path_factory.mktemp("stored") / "embeddings", np.random.default_rng(0)
    things = ["fox", "owl", "car", "sea", "hut", "bee", "elm", "jar", "cup", "hat"]
    ends = ["at night", "in oil", "on mars"]
    prompts = [f"{how} {thing} {end}" for thing in things for how in ("old", "red", "tiny") for end in ends]
    names = pd.DataFrame({"image_name": [f"{row:03d}.png" for row in range(len(prompts))]})
    frame = names.assign(prompt=prompts, fold=np.arange(len(prompts)) % 3)
    targets = earlier_ensemble.text_encoder.encode(prompts)
    for name, width in zip(("clip", "convnext", "text"), WIDTHS, strict=True):
        embeddings.write(folder, name, targets @ rng.normal(size=(384, width)), names, {})
    embeddings.write(folder, embeddings.PROMPTS, targets, frame, {})
    return folder


class Published(nn.Module):
    """The structure of the earlier network as facts.md tells it, with the names of its published checkpoints."""

    def __init__(self):
        super().__init__()
        self.linear1, self.linear2, self.linear3 = nn.Linear(512, 512), nn.Linear(768, 512), nn.Linear(384, 512)
        self.transformer_encoder_layer = nn.TransformerEncoderLayer(d_model=512, nhead=8)
        self.tranformer_encoder = nn.TransformerEncoder(
            self.transformer_encoder_layer, num_layers=3, enable_nested_tensor=False
        )
        self.linear_out = nn.Linear(512, 384)

    def forward(self, clip, convnext, interrogator):
        tokens = [clip, nn.functional.elu(self.linear2(convnext)), nn.functional.elu(self.linear3(interrogator))]
        return self.linear_out(self.tranformer_encoder(torch.stack(tokens, dim=1)))[:, 0]


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    torch.manual_seed(0)
    network = Published().eval()
    with torch.no_grad():  # layers start as copies of each other
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    file = tmp_path_factory.mktemp("published") / "10K_ensemble_model.ckpt"
    torch.save({"state_dict": {f"model.{k}": v for k, v in network.state_dict().items()}, "epoch": 3}, file)
    return network, file


@pytest.mark.parametrize("count", [1, 2, 5, 64])
def test_a_published_checkpoint_predicts_as_it_did(count, published, tmp_path):
    theirs, file = published
    ours = imported(file, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(ours(inputs(count)), theirs(*inputs(count)), atol=1e-5, rtol=0)


def test_the_seed_depends_on_batch_mates_and_ours_does_not(published, tmp_path):
    seed = imported(published[1], tmp_path)
    torch.manual_seed(0)
    network = networks.Fusion(WIDTHS).eval()
    some, other = inputs(8), inputs(8, seed=1)
    mixed = [torch.cat([a[:1], b[1:]]) for a, b in zip(some, other, strict=True)]
    with torch.no_grad():
        assert (seed(some)[0] - seed(mixed)[0]).abs().max() > 1e-3
        torch.testing.assert_close(network(some)[0], network(mixed)[0], atol=1e-5, rtol=0)


def test_no_checkpoint_of_the_seed_is_one_line(tmp_path):
    torch.save({"state_dict": {"model.linear2.weight": torch.zeros(512, 768)}}, tmp_path / "x.ckpt")
    with pytest.raises(UserError, match="no checkpoint of the earlier ensemble's network"):
        earlier_ensemble.import_checkpoint(tmp_path / "x.ckpt", tmp_path / "c")
    with pytest.raises(UserError, match="not a file of weights"):
        (tmp_path / "torn.ckpt").write_bytes(b"torn")
        earlier_ensemble.import_checkpoint(tmp_path / "torn.ckpt", tmp_path / "c")


def test_it_trains_and_writes_a_submission(stored, tmp_path):
    words = ["--embeddings", stored, "--arrays", "clip", "convnext", "text"]
    done = tool("train", *words, "--out", tmp_path / "c", "--epochs", 3)
    assert done.returncode == 0 and "validation cosine" in done.stdout, done.stderr
    assert json.loads((tmp_path / "c/config.json").read_text())["batch_size"] == 64
    done = tool("predict", tmp_path / "c", "--embeddings", stored, "--out", tmp_path / "s.csv")
    assert done.returncode == 0, done.stderr
    vectors = earlier_ensemble.submission.read(tmp_path / "s.csv", [f"{row:03d}" for row in range(90)])
    network, _ = earlier_ensemble.load(tmp_path / "c")
    arrays = embeddings.load(stored, ["clip", "convnext", "text"]).arrays.values()
    with torch.no_grad():
        expected = torch.nn.functional.normalize(network([torch.from_numpy(one[:64]) for one in arrays]))
    assert (vectors[:64] * expected.numpy()).sum(1).min() > 0.99


def test_bare_arrays_come_and_go(stored, tmp_path):
    done = tool("export-embeddings", stored, "--out", tmp_path / "bare")
    assert done.returncode == 0, done.stderr
    files = [tmp_path / "bare" / f"{name}.npy" for name in ("clip", "prompt")]
    earlier_ensemble.import_embeddings(tuple(files), tmp_path / "bare/images.txt", tmp_path / "e")
    again, before = embeddings.load(tmp_path / "e"), embeddings.load(stored)
    np.testing.assert_array_equal(again.arrays["clip"], before.arrays["clip"])
    assert ensemble.run(ensemble.Config(embeddings=tmp_path / "e", out=tmp_path / "o", epochs=1)).notna().any().all()


def test_it_overwrites_neither_what_it_reads_nor_what_it_did_not_write(stored, tmp_path):
    shutil.copytree(stored, tmp_path / "e")
    (tmp_path / "e/config.json").write_text("mine\n")
    before = {path.name: path.read_bytes() for path in (tmp_path / "e").iterdir()}
    with pytest.raises(UserError, match="is read here"):
        earlier_ensemble.export_embeddings(tmp_path / "e", tmp_path / "e")
    with pytest.raises(UserError, match="is read here"):
        earlier_ensemble.import_embeddings(
            (tmp_path / "e/prompt.npy",), tmp_path / "e/prompt.names.csv", tmp_path / "e"
        )
    with pytest.raises(UserError, match="not written by"):
        earlier_ensemble.train(stored, tmp_path / "e", epochs=1)
    assert {path.name: path.read_bytes() for path in (tmp_path / "e").iterdir() if path.suffix != ".lock"} == before


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.ones((3, 8)), "shape (3, 8) for a list of 4 images"),
        (np.array([[1.0], [2.0], [np.nan], [3.0]]), "row 3 (c.png) is not finite"),
        (None, "not a .npy array"),
    ],
)
def test_wrong_bare_arrays_are_refused(array, said, tmp_path):
    (tmp_path / "images.txt").write_text("a.png\nb.png\nc.png\nd.png\n")
    (tmp_path / "clip.npy").write_text("no") if array is None else np.save(tmp_path / "clip.npy", array)
    with pytest.raises(UserError, match=re.escape(said)):
        earlier_ensemble.import_embeddings((tmp_path / "clip.npy",), tmp_path / "images.txt", tmp_path / "e")


def test_what_cannot_be_used_is_one_line(stored, tmp_path):
    np.save(tmp_path / "clip.npy", np.ones((3, 5)))
    (tmp_path / "names.txt").write_text("a.png\nb.png\n")
    done = tool("import-embeddings", tmp_path / "clip.npy", "--images", tmp_path / "names.txt", "--out", tmp_path / "e")
    assert done.returncode == 1 and "for a list of 2 images; correct --images" in done.stderr.splitlines()[-1]
    shutil.copytree(stored, tmp_path / "less")
    metadata.write_table(tmp_path / "less/clip.names.csv", metadata.read_table(stored / "clip.names.csv", ()).iloc[1:])
    np.save(tmp_path / "less/clip.npy", np.load(stored / "clip.npy")[1:])
    with pytest.raises(UserError, match=r"clip\.npy: no row for 000\.png"):
        earlier_ensemble.train(tmp_path / "less", tmp_path / "c")
    earlier_ensemble.train(stored, tmp_path / "c", arrays=("text", "clip"), epochs=1)
    with pytest.raises(UserError, match="needs"):
        (tmp_path / "c/config.json").write_text((tmp_path / "c/config.json").read_text().replace("text", "convnext"))
        (tmp_path / "c/.earlier-ensemble.done").unlink()
        earlier_ensemble.predict(tmp_path / "c", stored, tmp_path / "s.csv")
