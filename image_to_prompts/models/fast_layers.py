"""Ways to compute a network faster: depthwise convolutions that train faster on CPUs, and compiled layers on GPUs."""

import copy
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.functional import conv2d

# Layers that networks repeat: timm's ConvNeXt, ViT and EVA, open_clip's ViT, diffusers' U-Net and VAE.
REPEATED = {"ConvNeXtBlock", "Block", "EvaBlock", "ResidualAttentionBlock", "Transformer2DModel", "ResnetBlock2D"}
SHAPES = 256  # inputs of different shape or precision for which one kind of layer may be compiled


class DepthwiseFunction(torch.autograd.Function):
    """A depthwise convolution with stride 1 and an output as large as its input.

    The gradient of its weight is a depthwise convolution too, of the images with the gradients that come in; PyTorch's
    own takes four to seven times as long (docs/log.md).
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        padding: tuple[int, int],
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.padding = padding
        return conv2d(x, weight, bias, 1, padding, 1, len(weight))

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, gradient: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor | None, None]:
        x, weight, bias = ctx.saved_tensors
        n, channels, *size = x.shape
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = conv2d(gradient, weight.flip(2, 3), None, 1, ctx.padding, 1, channels)
        images, kernels = x.reshape(1, n * channels, *size), gradient.reshape(n * channels, 1, *size)
        of_weight = conv2d(images, kernels, None, 1, ctx.padding, 1, n * channels).view(n, *weight.shape)
        of_bias = None if bias is None else gradient.sum((0, 2, 3))
        return of_x, of_weight.float().sum(0).to(weight.dtype), of_bias, None


class Depthwise(nn.Module):
    """A convolution that `DepthwiseFunction` can compute, with it on CPUs."""

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.convolution = convolution

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        convolution = self.convolution
        kind = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        bias = None if convolution.bias is None else convolution.bias.to(kind)
        return DepthwiseFunction.apply(x.to(kind), convolution.weight.to(kind), bias, convolution.padding)


def rebuilt(module: nn.Module, replace: Callable[[nn.Module], nn.Module | None]) -> nn.Module:
    """A network with other layers in some places; whatever is not replaced is shared.

    Args:
        module: The network.
        replace: Says what stands in for a layer below it; None: look inside that layer.

    Returns:
        A shallow copy, or the module itself where nothing in it was replaced.
    """
    children = {}
    for name, child in module.named_children():
        new = replace(child)
        children[name] = rebuilt(child, replace) if new is None else new
    if all(module._modules[name] is child for name, child in children.items()):
        return module
    copied = copy.copy(module)
    copied._modules = {**module._modules, **children}
    return copied


def faster(module: nn.Module) -> nn.Module:
    """A network that computes the same faster on CPUs, with the same parameters; on GPUs it is as fast as before.

    Args:
        module: The network. What is frozen by now must stay so.

    Returns:
        A shallow copy, or the module itself where nothing in it can be faster. (A copy of a compiled layer would not be
        compiled.)
    """
    if next(module.parameters()).device.type != "cpu":
        return module
    new = _depthwise(module)
    return rebuilt(module, _depthwise) if new is None else new


def _depthwise(layer: nn.Module) -> nn.Module | None:
    """The faster way to compute a layer that trains, None if there is none."""
    # A subclass, such as timm's Conv2dSame, computes something else.
    if type(layer) is not nn.Conv2d or not layer.weight.requires_grad or layer.padding_mode != "zeros":
        return None
    same = layer.padding == tuple((side - 1) / 2 for side in layer.kernel_size)
    plain = same and layer.stride == layer.dilation == (1, 1)
    return Depthwise(layer) if plain and layer.groups == layer.in_channels == layer.out_channels else None


def compiled(network: nn.Module) -> nn.Module:
    """Has `torch.compile` compile a network's repeated layers when they are first used; what it gives rounds otherwise.

    Layer by layer, since layers of a kind share what was compiled: a whole network takes several times as long.

    Args:
        network: The network, its frozen layers in eval mode; it is changed in place, its parameters and their names
            are not.

    Returns:
        The network.
    """
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, SHAPES)
    limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, 4 * SHAPES)
    for layer in [one for one in network.modules() if type(one).__name__ in REPEATED]:
        if not any(parameter.requires_grad for parameter in layer.parameters()):
            for name, child in layer.named_children():
                if type(child).__name__ == "DropPath":  # its rate differs by layer: each would be compiled for itself
                    setattr(layer, name, nn.Identity())
        layer.compile(dynamic=False)
    return network
