"""Layers that are faster on CPUs: same outputs, same gradients, and others left as they are."""

import pytest
import timm
import torch
from torch import nn

from image_to_prompts.models.fast_layers import Depthwise, FrozenBlock, Patches, faster


@pytest.mark.parametrize(
    ("layer", "kind", "size"),
    [
        (nn.Conv2d(6, 6, 7, padding=3, groups=6), Depthwise, (11, 9)),
        (nn.Conv2d(6, 6, (3, 5), padding=(1, 2), groups=6, bias=False), Depthwise, (8, 8)),
        (nn.Conv2d(6, 10, 2, 2), Patches, (9, 8)),
        (nn.Conv2d(6, 10, (3, 1), (3, 1), bias=False), Patches, (9, 8)),
        (nn.Conv2d(6, 10, 1), Patches, (5, 5)),
    ],
)
@pytest.mark.parametrize("into", [True, False])
def test_outputs_and_gradients_are_those_of_the_convolution(layer, kind, size, into):
    fast = faster(layer)
    assert isinstance(fast, kind)
    x = torch.randn(3, 6, *size).to(memory_format=torch.channels_last).requires_grad_(into)
    inputs = [*([x] if into else []), *layer.parameters()]
    expected, found = layer(x), fast(x)
    torch.testing.assert_close(found, expected)
    gradient = torch.randn_like(expected)
    of_layer, of_fast = (torch.autograd.grad(y, inputs, gradient) for y in (expected, found))
    torch.testing.assert_close(of_fast, of_layer, rtol=1e-4, atol=1e-4)


def test_gradients_under_autocast_are_as_exact_as_autocast_own():
    layer = nn.Conv2d(16, 16, 7, padding=3, groups=16)
    x, gradient = torch.randn(2, 16, 32, 32), torch.randn(2, 16, 32, 32)

    def gradients(module):
        with torch.autocast("cpu", torch.bfloat16):
            y = module(x)
        assert y.dtype == torch.bfloat16
        return torch.autograd.grad(y, [layer.weight, layer.bias], gradient.bfloat16())

    exact = torch.autograd.grad(layer(x), [layer.weight, layer.bias], gradient)
    for truth, plain, fast in zip(exact, gradients(layer), gradients(faster(layer)), strict=True):
        assert fast.dtype == torch.float32
        assert (fast - truth).norm() < 1.5 * (plain - truth).norm()


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(6, 6, 3, 2, 1, groups=6),
        nn.Conv2d(6, 6, 3, groups=6),
        nn.Conv2d(6, 6, 4, padding=2, groups=6),
        nn.Conv2d(6, 12, 3, padding=1, groups=6),
        nn.Conv2d(6, 6, 3, padding="same", groups=6),
        nn.Conv2d(6, 6, 3, padding=1, groups=6, padding_mode="reflect"),
        nn.Conv2d(6, 6, 3, padding=2, dilation=2, groups=6),
        nn.Conv2d(6, 6, 3, padding=1),
        nn.Conv2d(6, 6, 2, 2, groups=2),
        type("Conv2dSame", (nn.Conv2d,), {})(6, 6, 1),
    ],
)
def test_others_stay(layer):
    assert faster(layer) is layer
    assert faster(nn.Conv2d(6, 10, 1).requires_grad_(False)).kernel_size == (1, 1)


@pytest.mark.parametrize("name", ["convnext_atto", "convnext_tiny", "convnextv2_atto", "convnext_tiny_hnf", "resnet18"])
def test_a_frozen_network_predicts_the_same(name):
    """On CPUs with bf16, plain blocks with matrix products have a faster way; the others stay as they are."""
    network = timm.create_model(name).eval().requires_grad_(False)
    for layer in network.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            layer.bfloat16()
    fast = faster(network)
    replaced = [layer for layer in fast.modules() if isinstance(layer, FrozenBlock)]
    assert len(replaced) == (18 if name == "convnext_tiny" else 0)
    assert (fast is network) == (not replaced)
    images = torch.randn(2, 3, 64, 64).to(memory_format=torch.channels_last)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        expected, found = network(images), fast(images)
    assert torch.nn.functional.cosine_similarity(found.float(), expected.float()).min() > 0.9999


def test_a_frozen_block_is_timm_s_own_in_float32():
    block = timm.create_model("convnext_tiny").stages[0].blocks[0].eval().requires_grad_(False)
    x = torch.randn(2, 96, 8, 8)
    assert isinstance(faster(block), FrozenBlock)
    assert torch.equal(faster(block)(x), block(x))
