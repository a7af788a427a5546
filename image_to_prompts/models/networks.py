"""Transformers that fuse several embeddings of an image into its prompt's embedding.

`Fusion` attends across an image's embeddings. `SeedFusion` is the first seed's published network, which attends across
the images of a batch instead: its layers take (sequence, batch, width) and were given (batch, 3, width). It serves to
load what was published, and to show the difference.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn
from torch.nn.functional import elu

from .text_encoder import DIMENSION

WIDTH, LAYERS, HEADS, FEED_FORWARD = 512, 3, 8, 2048  # the seed's size, 10.2 million parameters
DROPPED = 0.5  # share of the input's numbers


class Fusion(nn.Module):
    """Attention across the embeddings of one image, beside a linear map of all of them.

    Each embedding is standardised, projected to a token and marked by a learned vector; a transformer encoder lets the
    tokens of an image see each other; the mean of those that are there is mapped to the prompt's embedding. One that is
    missing is masked, so it changes nothing but what it would have said. Other images have no influence.

    In training half of the numbers of all embeddings are dropped, and nothing within the encoder: that overfits least,
    and dropout within costs a third of a step on CPUs (docs/log.md).
    """

    def __init__(
        self,
        widths: Sequence[int],
        width: int = WIDTH,
        layers: int = LAYERS,
        heads: int = HEADS,
        feed_forward: int = FEED_FORWARD,
    ) -> None:
        """Takes the width of each embedding, and the size of the encoder."""
        super().__init__()
        self.widths = list(widths)
        self.register_buffer("mean", torch.zeros(sum(widths)))
        self.register_buffer("std", torch.ones(sum(widths)))
        self.projections = nn.ModuleList(nn.Linear(one, width) for one in widths)
        self.marks = nn.Parameter(0.02 * torch.randn(len(widths), width))
        layer = nn.TransformerEncoderLayer(width, heads, feed_forward, 0.0, "gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, DIMENSION)
        self.linear = nn.Linear(sum(widths), DIMENSION)

    def start(self, scale: tuple[np.ndarray, np.ndarray], ridge: tuple[np.ndarray, np.ndarray]) -> None:
        """Sets the scale of the inputs, and lets the network begin as the ridge regression.

        Args:
            scale: Mean and deviation of each number of all inputs, float32 (d,) both.
            ridge: Weight (d, 384) and bias (384,) over the standardised inputs.
        """
        with torch.no_grad():
            self.mean.copy_(torch.from_numpy(scale[0]))
            self.std.copy_(torch.from_numpy(scale[1]))
            self.linear.weight.copy_(torch.from_numpy(ridge[0].T))
            self.linear.bias.copy_(torch.from_numpy(ridge[1]))
            self.head.weight.zero_()
            self.head.bias.zero_()

    def forward(self, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        """Maps embeddings, float32 (n, widths[i]) with NaN rows where one is missing, to float32 (n, 384)."""
        missing = torch.stack([values[:, 0].isnan() for values in inputs], 1)
        values = ((torch.cat(list(inputs), 1) - self.mean) / self.std).nan_to_num()
        if self.training:  # functional.dropout draws one number after the other: 2.5 ms of a step's 70 on two cores
            values = values * (torch.rand_like(values) >= DROPPED) / (1 - DROPPED)
        parts = values.split(self.widths, 1)
        tokens = torch.stack([project(part) for project, part in zip(self.projections, parts, strict=True)], 1)
        tokens = self.encoder(tokens + self.marks, src_key_padding_mask=missing if missing.any() else None)
        there = (~missing).unsqueeze(-1)
        pooled = (tokens * there).sum(1) / there.sum(1).clamp_min(1)
        return (self.head(pooled) + self.linear(values)).float()


class SeedFusion(nn.Module):
    """The first seed's network, attention across the images of a batch included.

    Its first embedding, CLIP's, has the width of the encoder and is a token as it is.
    """

    def __init__(self, widths: Sequence[int], width: int = WIDTH, layers: int = LAYERS, heads: int = HEADS) -> None:
        """Takes the width of each embedding, and the size of the encoder."""
        super().__init__()
        self.widths = list(widths)
        projected = {number: one for number, one in enumerate(widths) if number or one != width}
        self.projections = nn.ModuleDict({str(number): nn.Linear(one, width) for number, one in projected.items()})
        layer = nn.TransformerEncoderLayer(width, heads, FEED_FORWARD)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, DIMENSION)

    def forward(self, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        """Maps embeddings, float32 (n, widths[i]), to float32 (n, 384); each row depends on all n."""
        tokens = list(inputs)
        for number, project in self.projections.items():
            tokens[int(number)] = elu(project(inputs[int(number)]))
        return self.head(self.encoder(torch.stack(tokens, 1).to(self.head.weight.dtype))[:, 0])

    def load_published(self, state: dict[str, torch.Tensor]) -> None:
        """Takes the state dict of a published checkpoint.

        Its keys begin with `model.`; `linear2` and `linear3` are the projections, `tranformer_encoder` (so spelled)
        the encoder, `linear_out` the head; `linear1` and `transformer_encoder_layer` were never used.

        Raises:
            RuntimeError: If a tensor is missing or has another shape.
        """
        names = {"linear_out.": "head.", "tranformer_encoder.": "encoder."}
        names |= {f"linear{int(number) + 1}.": f"projections.{number}." for number in self.projections}
        own = {}
        for key, value in state.items():
            key = key.removeprefix("model.")
            for theirs, ours in names.items():
                if key.startswith(theirs):
                    own[ours + key.removeprefix(theirs)] = value
        self.load_state_dict(own)


def build(
    attention: str,
    widths: Sequence[int],
    scale: tuple[np.ndarray, np.ndarray] | None = None,
    ridge: tuple[np.ndarray, np.ndarray] | None = None,
) -> nn.Module:
    """A network: `modalities` is `Fusion`, which starts as told if a scale and a ridge are given; `seed` is
    `SeedFusion`.
    """
    if attention == "seed":
        return SeedFusion(widths)
    network = Fusion(widths)
    if scale and ridge:
        network.start(scale, ridge)
    return network
