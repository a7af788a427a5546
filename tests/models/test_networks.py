"""The networks: attention across an image's embeddings, and the seed's across the images of a batch."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from image_to_prompts import ensemble
from image_to_prompts.ensemble import loop
from image_to_prompts.models import metrics, networks
from image_to_prompts.run.errors import UserError

WIDTHS = (512, 768, 384)


def inputs(count, widths=WIDTHS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(count, width, generator=generator) for width in widths]


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return networks.Fusion(WIDTHS).eval()


class Published(nn.Module):
    """The structure of the first seed's network as facts.md tells it, with the names of its published checkpoints."""

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
    ours = ensemble.import_published(file, tmp_path / "c").network
    with torch.no_grad():
        torch.testing.assert_close(ours(inputs(count)), theirs(*inputs(count)), atol=1e-5, rtol=0)


def test_the_seed_depends_on_batch_mates_and_ours_does_not(published, network, tmp_path):
    seed = ensemble.import_published(published[1], tmp_path / "c").network
    some, other = inputs(8), inputs(8, seed=1)
    mixed = [torch.cat([a[:1], b[1:]]) for a, b in zip(some, other, strict=True)]
    with torch.no_grad():
        assert (seed(some)[0] - seed(mixed)[0]).abs().max() > 1e-3
        torch.testing.assert_close(network(some)[0], network(mixed)[0], atol=1e-5, rtol=0)


@given(
    st.integers(1, 9),
    st.permutations(range(9)),
    st.lists(st.sampled_from([(), (0,), (1,), (0, 2)]), min_size=9, max_size=9),
)
def test_an_image_is_predicted_alone(network, size, order, gone):
    """Whatever the batch, its order and what is missing of other images."""
    rows = inputs(9)
    for row, missing in enumerate(gone):
        for number in missing:
            rows[number][row] = torch.nan
    with torch.no_grad():
        whole = network(rows)
        again = torch.empty_like(whole)
        for start in range(0, 9, size):
            part = list(order[start : start + size])
            again[part] = network([one[part] for one in rows])
    assert whole.isfinite().all()
    torch.testing.assert_close(whole, again, atol=1e-5, rtol=1e-5)


def test_a_missing_embedding_is_masked_not_zero(network):
    rows = inputs(4)
    without, zero = copy.deepcopy(rows), copy.deepcopy(rows)
    without[1][:] = torch.nan
    zero[1][:] = 0
    with torch.no_grad():
        alone = networks.Fusion(WIDTHS).eval()
        alone.load_state_dict(network.state_dict())
        assert (alone(without) - alone(zero)).abs().max() > 1e-4


def test_it_begins_as_the_ridge_regression():
    rng = np.random.default_rng(0)
    arrays = [rng.normal(2, 3, (400, width)).astype(np.float32) for width in (8, 5)]
    targets = metrics.unit(np.concatenate(arrays, 1) @ rng.normal(size=(13, 384)))
    scale = ensemble.scale_of(arrays)
    weight, bias = metrics.ridge(ensemble.stacked(arrays, scale), targets)
    network = networks.build("modalities", (8, 5), scale, (weight, bias)).eval()
    expected = ensemble.stacked(arrays, scale) @ weight + bias
    predicted = loop.predict(network, arrays)
    assert (metrics.unit(predicted) * metrics.unit(expected)).sum(1).min() > 0.999


def test_no_checkpoint_of_the_seed_is_one_line(tmp_path):
    torch.save({"state_dict": {"model.linear2.weight": torch.zeros(512, 768)}}, tmp_path / "x.ckpt")
    with pytest.raises(UserError, match="no checkpoint of the first seed's network"):
        ensemble.import_published(tmp_path / "x.ckpt", tmp_path / "c")
    with pytest.raises(UserError, match="not a file of weights"):
        (tmp_path / "torn.ckpt").write_bytes(b"torn")
        ensemble.import_published(tmp_path / "torn.ckpt", tmp_path / "c")


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("attention", ["modalities", "seed"])
def test_training_lowers_the_loss_with_and_without_half_precision(precision, attention, monkeypatch):
    monkeypatch.setattr(loop, "mixed_precision", lambda device: precision)
    torch.manual_seed(0)
    widths = (512, 40)
    network = networks.build(attention, widths)
    trainer = loop.Trainer(network, 1e-3)
    some = inputs(48, widths)
    targets = torch.nn.functional.normalize(some[1] @ torch.randn(40, 384))
    order = list(np.arange(48).reshape(3, 16))
    losses = [trainer.epoch(some, targets, order, [1e-3] * 3) for _ in range(12)]
    assert losses[-1] < losses[0] - 0.1
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}
    with torch.no_grad():  # what was trained is the network itself
        after = 1 - torch.nn.functional.cosine_similarity(network.eval()(some), targets).mean()
    assert after < losses[0] - 0.1
