"""The network: attention across an image's embeddings."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from image_to_prompts.ensemble import loop
from image_to_prompts.models import ensemble, metrics, networks

WIDTHS = (512, 768, 384)


def inputs(count, widths=WIDTHS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(count, width, generator=generator) for width in widths]


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return networks.Fusion(WIDTHS).eval()


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
    network = networks.Fusion((8, 5)).start(scale, (weight, bias)).eval()
    expected = ensemble.stacked(arrays, scale) @ weight + bias
    predicted = loop.predict(network, arrays)
    assert (metrics.unit(predicted) * metrics.unit(expected)).sum(1).min() > 0.999


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_training_lowers_the_loss_with_and_without_half_precision(precision, monkeypatch):
    for module in (loop, ensemble):
        monkeypatch.setattr(module, "mixed_precision", lambda device: precision)
    torch.manual_seed(0)
    widths = (512, 40)
    network = networks.Fusion(widths)
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
