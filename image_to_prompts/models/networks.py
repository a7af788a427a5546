"""The transformer that fuses several embeddings of an image into its prompt's embedding."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

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

    def __init__(self, widths: Sequence[int]) -> None:
        """Takes the width of each embedding."""
        super().__init__()
        self.widths = list(widths)
        self.register_buffer("mean", torch.zeros(sum(widths)))
        self.register_buffer("std", torch.ones(sum(widths)))
        self.projections = nn.ModuleList(nn.Linear(one, WIDTH) for one in widths)
        self.marks = nn.Parameter(0.02 * torch.randn(len(widths), WIDTH))
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, FEED_FORWARD, 0.0, "gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, LAYERS, nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, DIMENSION)
        self.linear = nn.Linear(sum(widths), DIMENSION)

    def start(self, scale: tuple[np.ndarray, np.ndarray], ridge: tuple[np.ndarray, np.ndarray]) -> Fusion:
        """Sets the scale of the inputs, and lets the network begin as the ridge regression.

        Args:
            scale: Mean and deviation of each number of all inputs, float32 (d,) both.
            ridge: Weight (d, 384) and bias (384,) over the standardised inputs.

        Returns:
            The network itself.
        """
        with torch.no_grad():
            self.mean.copy_(torch.from_numpy(scale[0]))
            self.std.copy_(torch.from_numpy(scale[1]))
            self.linear.weight.copy_(torch.from_numpy(ridge[0].T))
            self.linear.bias.copy_(torch.from_numpy(ridge[1]))
            self.head.weight.zero_()
            self.head.bias.zero_()
        return self

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
