"""all-MiniLM-L6-v2's forward pass over the tokens of many texts at once.

Same weights and same result as sentence-transformers' (cosine 1.0000 in float32, at least .9999 in half precision). It
is faster because nothing is padded, and, on CPUs with bf16, because bias and GELU are computed inside
oneDNN's products; what is summed up from layer to layer stays float32 (docs/log.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import gelu, layer_norm, linear, normalize, scaled_dot_product_attention

if TYPE_CHECKING:
    from torch import Tensor

TOKENS, BLOCK = (65_536, 1024), (4096, 128)  # of a batch, and of a product, on a GPU and on a CPU
# cuDNN's attention would plan anew for each number and length of texts.
ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
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

    def __init__(
        self, state: Mapping[str, Tensor], settings: Mapping[str, Any], kind: torch.dtype, device: torch.device
    ) -> None:
        """Takes the weights of a model.

        Args:
            state: Tensors of a `BertModel` of transformers, by their names.
            settings: Its config.json.
            kind: Type to multiply matrices in.
            device: Where to.

        Raises:
            KeyError: If a tensor or a setting is missing.
        """
        self.kind, self.device = kind, device
        self.heads, self.epsilon = settings["num_attention_heads"], settings["layer_norm_eps"]

        def pair(name: str, kind: torch.dtype = torch.float32) -> Pair:
            return state[f"{name}.weight"].to(device, kind), state[f"{name}.bias"].to(device, kind)

        def layer(name: str) -> Layer:
            parts = [pair(f"{name}.attention.self.{part}", kind) for part in ("query", "key", "value")]
            return Layer(
                (torch.cat([weight for weight, _ in parts]), torch.cat([bias for _, bias in parts])),
                pair(f"{name}.attention.output.dense", kind),
                pair(f"{name}.attention.output.LayerNorm"),
                pair(f"{name}.intermediate.dense", kind),
                pair(f"{name}.output.dense", kind),
                pair(f"{name}.output.LayerNorm"),
            )

        tables = [state[f"embeddings.{one}_embeddings.weight"] for one in ("word", "position", "token_type")]
        self.words, positions, kinds = (table.to(device, torch.float32) for table in tables)
        self.positions = positions + kinds[0]
        self.norm = pair("embeddings.LayerNorm")
        self.layers = [layer(f"encoder.layer.{number}") for number in range(settings["num_hidden_layers"])]

    def _product(self, x: Tensor, pair: Pair, activation: str = "none") -> Tensor:
        """A layer's product of all tokens, `BLOCK` at once: with other numbers of rows a product rounds otherwise."""
        blocks = x.to(self.kind).split(BLOCK[self.device.type == "cpu"])
        # What PyTorch's compiler makes of a product and its activation; private, hence the other way below.
        fused = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
        if fused and self.device.type == "cpu" and self.kind == torch.bfloat16:
            way = "none" if activation == "gelu" else ""
            return torch.cat([fused(block, *pair, activation, [], way) for block in blocks])
        y = torch.cat([linear(block, *pair) for block in blocks])
        return gelu(y) if activation == "gelu" else y

    @torch.inference_mode()
    def encode(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        """Embeds texts; what one gets is the same, byte for byte, in any company.

        Args:
            tokens: Numbers of the tokens of each text, by length, from `batches`.

        Returns:
            float32 (n, width) unit vectors on the CPU.
        """
        # Not on CPUs, where several threads come through here: it is set for all of them.
        with nullcontext() if self.device.type == "cpu" else sdpa_kernel(ATTENTION):
            return self._encode(tokens)

    def _encode(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        block = BLOCK[self.device.type == "cpu"]
        flat = [token for text in tokens for token in text]
        places = [place for text in tokens for place in range(len(text))]
        words, positions = (torch.tensor(row + [0] * (-len(flat) % block)).to(self.device) for row in (flat, places))
        groups = [(length, len(list(texts))) for length, texts in groupby(map(len, tokens))]
        spans = [length * count for length, count in groups]
        x = layer_norm(self.words[words] + self.positions[positions], self.norm[0].shape, *self.norm, self.epsilon)
        for layer in self.layers:
            parts = self._product(x, layer.attention)[: len(flat)].split(spans)
            found = [self._attended(part, *group) for part, group in zip(parts, groups, strict=True)]
            y = torch.cat([*found, found[0].new_zeros(len(x) - len(flat), x.shape[1])])
            x = self._add(x, self._product(y, layer.out), layer.norm)
            y = self._product(x, layer.inner, "gelu")
            x = self._add(x, self._product(y, layer.outer), layer.last_norm)
        parts = x[: len(flat)].split(spans)
        sums = [part.view(count, length, -1).sum(1) for part, (length, count) in zip(parts, groups, strict=True)]
        return normalize(torch.cat(sums)).cpu()

    def _attended(self, x: Tensor, length: int, count: int) -> Tensor:
        """Attention within each of `count` texts of one length."""
        query, key, value = x.view(count, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        return scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(count * length, -1)

    def _add(self, x: Tensor, y: Tensor, norm: Pair) -> Tensor:
        return layer_norm(x.add_(y), norm[0].shape, *norm, self.epsilon)


def batches(tokens: Sequence[Sequence[int]], device: str = "cpu") -> Iterator[list[int]]:
    """Cuts rows, ordered by length, into batches of about `TOKENS` tokens.

    Args:
        tokens: Tokens of each row.
        device: Kind of device.
    """
    batch, count = [], 0
    for row in sorted(range(len(tokens)), key=lambda row: len(tokens[row])):
        batch.append(row)
        count += len(tokens[row])
        if count >= TOKENS[device == "cpu"]:
            yield batch
            batch, count = [], 0
    if batch:
        yield batch
