"""Layers that are faster: same outputs, same gradients, and others left as they are."""

import pytest
import timm
import torch
from torch import nn

from image_to_prompts.models import fast_layers, freezing
from image_to_prompts.models.fast_layers import Depthwise, faster


@pytest.mark.parametrize(
    ("layer", "size"),
    [
        (nn.Conv2d(6, 6, 7, padding=3, groups=6), (11, 9)),
        (nn.Conv2d(6, 6, (3, 5), padding=(1, 2), groups=6, bias=False), (8, 8)),
    ],
)
@pytest.mark.parametrize("into", [True, False])
def test_outputs_and_gradients_are_those_of_the_convolution(layer, size, into):
    fast = faster(layer)
    assert isinstance(fast, Depthwise)
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
        nn.Conv2d(6, 10, 1),
        type("Conv2dSame", (nn.Conv2d,), {})(6, 6, 1),
    ],
)
def test_others_stay(layer):
    assert faster(layer) is layer
    frozen = nn.Conv2d(6, 6, 3, padding=1, groups=6).requires_grad_(False)
    assert faster(frozen) is frozen


def test_on_a_gpu_all_stays():
    network = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1, groups=6))
    assert faster(network) is not network
    assert faster(network.to("meta")) is not None and faster(network) is network


def convnext():
    """timm's small ConvNeXt with stochastic depth, its first three stages frozen."""
    network = timm.create_model("convnext_atto", drop_path_rate=0.1, num_classes=0)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name.startswith("stages.3"))
    freezing.set_training(network, True)
    return network


def test_only_repeated_layers_are_compiled_and_names_stay(monkeypatch):
    network, asked = convnext(), []
    names = list(network.state_dict())
    monkeypatch.setattr(nn.Module, "compile", lambda self, **how: asked.append((type(self).__name__, how)))
    assert fast_layers.compiled(network) is network
    assert asked == [("ConvNeXtBlock", {"dynamic": False})] * 12
    assert list(network.state_dict()) == names
    kinds = [{type(block.drop_path).__name__ for block in stage.blocks} for stage in network.stages]
    assert all("DropPath" not in kind for kind in kinds[:3]) and kinds[3] == {"DropPath"}


@pytest.mark.slow
def test_compiled_layers_compute_and_train_the_same():
    network = convnext()
    x = torch.randn(2, 3, 64, 64)
    wanted = [p for p in network.parameters() if p.requires_grad]

    def found():
        torch.manual_seed(0)
        y = network(x)
        return y, *torch.autograd.grad(y.square().sum(), wanted)

    network.eval()
    before = found()
    fast_layers.compiled(network)
    for plain, fast in zip(before, found(), strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-3, atol=1e-4)
