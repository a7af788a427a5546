"""The interrogator of the embedded profile: ImageNet classes, and the words of the grammar that are nearest to them."""

from typing import Any

import timm
import torch
from timm.data import ImageNetInfo

from ..encode.backbone import BackboneEncoder
from ..models import backbones, text_encoder
from . import grammar

NETWORK, CLASSES = "timm:tf_efficientnet_lite2", 1000
NAMED, WORDS = 3, 5  # classes and words in a text


class ClassInterrogator:
    """Names the likeliest classes of an image, and the drawable words nearest to their mean embedding."""

    def __init__(self, image_size: int) -> None:
        """Loads the network and its classifier; raises as `backbones.load_pretrained`."""
        spec = backbones.describe(NETWORK, image_size)
        self.backbone = BackboneEncoder.pretrained(spec)
        network = timm.create_model(NETWORK.partition(":")[2], num_classes=CLASSES)
        backbones.load_pretrained(network, spec)
        self.classifier = network.classifier.requires_grad_(False)
        self.fits = self.backbone.fits
        self.about: dict[str, Any] = {"encoder": "classes", "image_size": image_size}
        self.names = [name.partition(",")[0] for name in ImageNetInfo().label_descriptions()]
        self.words = [*grammar.vocabulary(), *grammar.PLACES, *grammar.STYLES]
        likeness = text_encoder.encode(self.names) @ text_encoder.encode(self.words).T
        self.likeness = torch.from_numpy(likeness)

    def see(self, squares: list[torch.Tensor]) -> list[str]:
        """Maps uint8 (n, 3, size, size) to n texts."""
        # NumPy's threads and PyTorch's in turn would wait for each other: with 8 images a third of the time.
        likely = self.classifier(torch.from_numpy(self.backbone.see(squares))).softmax(1)
        classes = torch.argsort(likely, dim=1, descending=True, stable=True)[:, :NAMED].tolist()
        nearest = torch.argsort(likely @ self.likeness, dim=1, descending=True, stable=True)[:, :WORDS].tolist()
        return [
            ", ".join([*(self.names[name] for name in names), *(self.words[word] for word in words)])
            for names, words in zip(classes, nearest, strict=True)
        ]
