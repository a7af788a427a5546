"""The interrogator of the embedded profile: ImageNet classes, and the words of the grammar that are nearest to them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .. import backbones, text_encoder

if TYPE_CHECKING:
    import torch

NETWORK, CLASSES = "timm:tf_efficientnet_lite2", 1000
NAMED, WORDS = 3, 5  # classes and words in a text


class ClassInterrogator:
    """Names the likeliest classes of an image, and the drawable words nearest to their mean embedding."""

    def __init__(self, image_size: int) -> None:
        """Loads the network and its classifier; raises as `backbones.load_pretrained`."""
        import timm
        from timm.data import ImageNetInfo

        from ..generate import grammar
        from .backbone import BackboneEncoder

        spec = backbones.describe(NETWORK, image_size)
        self.backbone = BackboneEncoder.pretrained(spec)
        network = timm.create_model(NETWORK.partition(":")[2], num_classes=CLASSES)
        backbones.load_pretrained(network, spec)
        self.weight, self.bias = (
            part.detach().numpy() for part in (network.classifier.weight, network.classifier.bias)
        )
        self.fits = self.backbone.fits
        self.about: dict[str, Any] = {"encoder": "classes", "image_size": image_size}
        self.names = [name.partition(",")[0] for name in ImageNetInfo().label_descriptions()]
        self.words = [*grammar.vocabulary(), *grammar.PLACES, *grammar.STYLES]
        self.likeness = text_encoder.encode(self.names) @ text_encoder.encode(self.words).T

    def see(self, squares: list[torch.Tensor]) -> list[str]:
        """Maps uint8 (n, 3, size, size) to n texts."""
        from scipy.special import softmax

        likely = softmax(self.backbone.see(squares) @ self.weight.T + self.bias, axis=1)
        classes = np.argsort(-likely, axis=1, kind="stable")[:, :NAMED]
        nearest = np.argsort(-(likely @ self.likeness), axis=1, kind="stable")[:, :WORDS]
        return [
            ", ".join([*(self.names[name] for name in names), *(self.words[word] for word in words)])
            for names, words in zip(classes, nearest, strict=True)
        ]
