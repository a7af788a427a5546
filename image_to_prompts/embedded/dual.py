"""A dual encoder in the place of CLIP: two linear maps that put scenes and prompts into one space.

One maps frozen features of an image, the other all-MiniLM-L6-v2's embedding of a text, such that the two of a pair
are near: regularised canonical correlation analysis (Vinod 1976), in closed form and in seconds.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file

from ..encode import embeddings
from ..encode.backbone import BackboneEncoder
from ..models import backbones, layouts, metrics, text_encoder
from ..run.errors import UserError
from ..run.files import write_json, write_tensors

DIMENSIONS = 128
PENALTY = 0.3  # added to both covariances, relative to their mean variance


def fit(features: np.ndarray, targets: np.ndarray) -> dict[str, np.ndarray]:
    """The two maps.

    Args:
        features: float32 (n, d) of images.
        targets: float32 (n, 384) of their prompts.

    Returns:
        `image` (d, 128), `image_mean` (d,), `text` (384, 128) and `text_mean` (384,), all float32.
    """
    means = features.mean(0), targets.mean(0)
    image, text = (side.astype(np.float64) - mean for side, mean in zip((features, targets), means, strict=True))
    whiteners = [_whitener(side.T @ side / len(side)) for side in (image, text)]
    left, strength, right = np.linalg.svd(whiteners[0] @ (image.T @ text / len(image)) @ whiteners[1])
    scale = np.sqrt(strength[:DIMENSIONS])  # directions count as much as they agree
    maps = whiteners[0] @ left[:, :DIMENSIONS] * scale, whiteners[1] @ right[:DIMENSIONS].T * scale
    found = {"image": maps[0], "image_mean": means[0], "text": maps[1], "text_mean": means[1]}
    return {name: np.ascontiguousarray(value, np.float32) for name, value in found.items()}


def _whitener(covariance: np.ndarray) -> np.ndarray:
    """The inverse square root of a covariance with the penalty added."""
    values, vectors = np.linalg.eigh(covariance)
    return vectors / np.sqrt(values + PENALTY * values.mean()) @ vectors.T


def save(folder: Path, maps: dict[str, np.ndarray], backbone: dict[str, Any]) -> None:
    """Writes what `fit` gave, and the backbone (a `backbones.Spec` as dict) whose features it was fitted on."""
    write_json(folder / "dual.json", backbone)
    write_tensors(folder / "dual.safetensors", maps)


def make(folder: Path, known: embeddings.Table, name: str, validates: np.ndarray, pairs: Path) -> "Dual":
    """Fits a dual encoder on the rows that do not validate, and writes what it says of those that do.

    Args:
        folder: The dual encoder to write.
        known: Embeddings of images with known prompts.
        name: The array of it to fit on.
        validates: bool (n,).
        pairs: Folder of embeddings to write an array to, called as `folder` is.
    """
    features, frame = known.arrays[name], known.frame[validates]
    save(folder, fit(features[~validates], known.targets[~validates]), known.about[name]["backbone"])
    encoder = Dual(folder)
    embeddings.write(pairs, folder.name, encoder.images(features[validates]), frame[["image_name"]], encoder.about)
    embeddings.write(pairs, embeddings.PROMPTS, known.targets[validates], frame, {"encoder": text_encoder.NAME})
    return encoder


class Dual:
    """Both sides: an encoder of images (`encoders.Encoder`) and a `text_tower.TextTower`."""

    def __init__(self, folder: Path) -> None:
        """Loads the maps and the backbone; raises UserError if they are not there."""
        file = folder / "dual.safetensors"
        if not file.is_file():
            raise UserError(f"{folder}: no dual encoder there; `image-to-prompts run` fits one")
        with layouts.reading(file, "a dual encoder"):
            self.maps = load_file(file)
            self.spec = backbones.Spec(**json.loads((folder / "dual.json").read_text(encoding="utf-8")))
        self.digest = layouts.file_digest(file)
        self.backbone = BackboneEncoder.pretrained(self.spec)
        self.fits = self.backbone.fits
        self.about: dict[str, Any] = {"encoder": f"dual:{folder}", "image_size": self.spec.image_size}

    def see(self, squares: list[torch.Tensor]) -> np.ndarray:
        """Maps uint8 (n, 3, size, size) to float32 (n, 128)."""
        return self.images(self.backbone.see(squares))

    def images(self, features: np.ndarray) -> np.ndarray:
        """Maps the backbone's features, float32 (n, d), to float32 (n, 128)."""
        return metrics.mapped(features - self.maps["image_mean"], self.maps["image"])

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors of texts, float32 (n, 128)."""
        found = text_encoder.encode(texts, fast=True)
        return metrics.unit(metrics.mapped(found - self.maps["text_mean"], self.maps["text"]))
