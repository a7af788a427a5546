"""What maps texts to the vectors of images: the text tower of an open_clip model, or its stand-in.

The image tower is an encoder of the same name (see `encoders`); the cosine of both says how well a text fits an image.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import open_clip
import torch
from accelerate import init_empty_weights
from torch import nn

from .. import pipeline
from ..models import backbones, layouts
from ..run.devices import autocast, local_device, mixed_precision, type_of, within_memory
from ..run.errors import UserError
from . import banks

AT_ONCE, AT_ONCE_ON_CPU = 512, 32  # texts, always as many: what a text gets does not depend on its company


class TextTower(Protocol):
    """Maps texts to vectors.

    Attributes:
        digest: Tells its weights from others.
    """

    digest: str

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors of texts, float32 (n, d)."""


def build(name: str) -> TextTower:
    """The text tower of a model that has one.

    Args:
        name: open_clip:<model or folder>, or dual:<folder> in the embedded profile.

    Raises:
        UserError: If the model has none, or the weights are nowhere or damaged.
    """
    library, _, model = name.partition(":")
    return pipeline.embedded("dual")(Path(model)) if library == "dual" else ClipTexts(name, _weights(name))


def digest(name: str) -> str:
    """What `TextTower.digest` would be, without loading a CLIP; raises as `build`."""
    return build(name).digest if name.startswith("dual:") else layouts.digest(_weights(name))


def open_bank(folder: Path) -> banks.Bank:
    """Opens a bank whose tower's weights are those here; raises UserError if they are not, or as `banks.open_bank`."""
    bank = banks.open_bank(folder)
    if (found := digest(bank.tower)) != bank.weights:
        said = f"{folder}: made with other weights of {bank.tower} ({bank.weights[:12]}, here {found[:12]})"
        raise UserError(f"{said}; get those, or make the bank again")
    return bank


def _weights(name: str) -> Path:
    if not name.startswith("open_clip:"):
        raise UserError(f"{name}: no text tower; a bank of prompts takes one encoder, open_clip:<model>")
    return backbones.locate(name)


def towers(name: str, file: Path) -> tuple[nn.Module, Any]:
    """Both towers of an open_clip model, and its tokenizer.

    Args:
        name: open_clip:<model or folder>.
        file: Its weights, from `weights.locate`.

    Raises:
        UserError: If they are damaged or another model's.
    """
    model = name.partition(":")[2]
    config, _ = backbones.clip_config(model)
    own_text = config.pop("custom_text", False) or "hf_model_name" in config["text_cfg"]
    kind = open_clip.CoCa if "multimodal_cfg" in config else open_clip.CustomTextCLIP if own_text else open_clip.CLIP
    with layouts.reading(file, "open_clip weights"):
        with init_empty_weights():  # open_clip.create_model would fill it with random numbers first
            clip = kind(**config)
        backbones.fill(clip, backbones.read_state(file), file)
        return clip, open_clip.get_tokenizer(f"local-dir:{model}" if Path(model).is_dir() else model)


class ClipTexts:
    """The text tower of an open_clip model, its matrices in the hardware's half precision."""

    def __init__(self, name: str, file: Path) -> None:
        """Loads it; arguments as `towers`."""
        clip, self.tokenize = towers(name, file)
        for part in ("visual", "text_decoder"):  # which texts alone do not need
            with contextlib.suppress(AttributeError):
                delattr(clip, part)
        self.device, self.digest = local_device(), layouts.digest(file)
        kind = type_of(mixed_precision(self.device))
        if kind != torch.float32:
            open_clip.model.convert_weights_to_lp(clip, kind)
        self.clip = clip.requires_grad_(False).to(self.device).eval()
        self.limit = AT_ONCE_ON_CPU if self.device.type == "cpu" else AT_ONCE

    @torch.inference_mode()
    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors of texts, float32 (n, d); longer ones are cut at the model's 77 tokens."""
        found, self.limit = within_memory(partial(self._embed, texts), self.limit, self.limit)
        return found

    def _embed(self, texts: Sequence[str], count: int) -> np.ndarray:
        parts = []
        for start in range(0, len(texts), count):
            some = list(texts[start : start + count])
            tokens = self.tokenize(some + [""] * (count - len(some)))
            with autocast(self.device):
                vectors = self.clip.encode_text(tokens.to(self.device)).float()
            parts.append(nn.functional.normalize(vectors, dim=-1)[: len(some)].cpu().numpy())
        return np.concatenate(parts)
