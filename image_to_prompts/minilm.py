"""all-MiniLM-L6-v2's forward pass in batches of tokens, not of texts.

Same weights and same result as sentence-transformers' (cosine 1.0000 in float32, at least .9999 in half precision). It
is faster because texts of like length share a batch, and, on CPUs with bf16, because bias and GELU are computed inside
oneDNN's products; what is summed up from layer to layer stays float32 (docs/log.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import gelu, layer_norm, linear, normalize, scaled_dot_product_attention

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from torch import Tensor, nn

TOKENS = 2048  # a batch; from 1,024 to 4,096 they are as fast
Pair = tuple["Tensor", "Tensor"]  # weight and bias


@dataclass
class Layer:
    """Weights of a transformer layer (BERT, Devlin et al. 2019); matrices in the precision to compute in."""

    attention: Pair
    out: Pair
    norm: Pair
    inner: Pair
    outer: Pair
    last_norm: Pair


class MiniLM:
    """A BERT encoder with mean pooling."""

    def __init__(self, model: SentenceTransformer, kind: torch.dtype) -> None:
        """Takes the weights of a model.

        Args:
            model: A BERT with mean pooling and normalisation.
            kind: Type to multiply matrices in.
        """
        bert = model[0].auto_model
        self.kind, self.device = kind, model.device
        self.heads, self.epsilon = bert.config.num_attention_heads, bert.config.layer_norm_eps
        embeddings = bert.embeddings
        self.words = embeddings.word_embeddings.weight.detach()
        kinds = embeddings.token_type_embeddings.weight.detach()
        self.positions = embeddings.position_embeddings.weight.detach() + kinds[0]
        self.norm = _pair(embeddings.LayerNorm)
        self.layers = [self._layer(layer) for layer in bert.encoder.layer]

    def _layer(self, layer: nn.Module) -> Layer:
        own, attention = layer.attention.self, layer.attention.output
        parts = [_pair(part, self.kind) for part in (own.query, own.key, own.value)]
        return Layer(
            (torch.cat([weight for weight, _ in parts]), torch.cat([bias for _, bias in parts])),
            _pair(attention.dense, self.kind),
            _pair(attention.LayerNorm),
            _pair(layer.intermediate.dense, self.kind),
            _pair(layer.output.dense, self.kind),
            _pair(layer.output.LayerNorm),
        )

    def _product(self, x: Tensor, pair: Pair, activation: str = "none") -> Tensor:
        if self.device.type == "cpu" and self.kind == torch.bfloat16:
            return torch.ops.mkldnn._linear_pointwise(x, *pair, activation, [], "none" if activation == "gelu" else "")
        y = linear(x, *pair)
        return gelu(y) if activation == "gelu" else y

    @torch.inference_mode()
    def encode(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        """Embeds a batch.

        Args:
            tokens: Numbers of the tokens of each text, best of like length.

        Returns:
            float32 (n, width) unit vectors on the CPU.
        """
        lengths = torch.tensor([len(text) for text in tokens])
        longest = int(lengths.max())
        words = torch.zeros(len(tokens), longest, dtype=torch.int64)
        there = torch.arange(longest) < lengths[:, None]
        words[there] = torch.tensor([token for text in tokens for token in text])
        words, there = words.to(self.device), there.to(self.device)
        mask = None
        if int(lengths.min()) < longest:
            mask = torch.zeros_like(there, dtype=self.kind).masked_fill(~there, -torch.inf)[:, None, None]
        x = layer_norm(self.words[words] + self.positions[:longest], self.norm[0].shape, *self.norm, self.epsilon)
        x = x.flatten(0, 1)
        for layer in self.layers:
            y = self._product(x.to(self.kind), layer.attention)
            query, key, value = y.view(len(tokens), longest, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            y = scaled_dot_product_attention(query, key, value, mask).transpose(1, 2).reshape(x.shape)
            x = self._add(x, self._product(y, layer.out), layer.norm)
            y = self._product(x.to(self.kind), layer.inner, "gelu")
            x = self._add(x, self._product(y, layer.outer), layer.last_norm)
        x = x.view(len(tokens), longest, -1) * there[..., None]
        return normalize(x.sum(1)).cpu()

    def _add(self, x: Tensor, y: Tensor, norm: Pair) -> Tensor:
        return layer_norm(x.add_(y), norm[0].shape, *norm, self.epsilon)


def _pair(module: nn.Module, kind: torch.dtype = torch.float32) -> Pair:
    return module.weight.detach().to(kind), module.bias.detach().to(kind)


def batches(tokens: Sequence[Sequence[int]], order: Sequence[int]) -> Iterator[Sequence[int]]:
    """Cuts rows, ordered by length, into batches of `TOKENS` tokens, padding counted.

    Args:
        tokens: Tokens of each row.
        order: Rows, longer ones later.
    """
    start = 0
    for end in range(1, len(order) + 1):
        if end == len(order) or len(tokens[order[end]]) * (end + 1 - start) > TOKENS:
            yield order[start:end]
            start = end
