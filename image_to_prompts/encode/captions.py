"""Captions of images: by any image-to-text model of transformers, or by a server that speaks OpenAI's protocol.

caption:<folder or owner/name>        BLIP, BLIP-2, GIT, Florence-2 and whatever else transformers loads for this task
caption:http://127.0.0.1:11434/v1     Ollama, vLLM, LM Studio, ...; `#<model>` behind it names one of several

Images go to the address that is given and nowhere else. Several captions of an image are drawn with a seed each.
"""

import base64
import http.client
import io
import json
import logging
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..data.rows import Fit
from ..models import backbones, layouts, weights
from ..run.devices import mixed_precision, process_state, type_of
from ..run.errors import UserError

log = logging.getLogger(__name__)
TOKENS = 60  # of a caption
TASKS = {"florence2": "<DETAILED_CAPTION>"}  # what a model must be told, by its type; others are told nothing
ASKED = "Describe this image as a short prompt for Stable Diffusion. Answer with the prompt alone."
SIDE, AT_ONCE, PATIENCE = 512, 4, 120  # of an image that is sent, in px; requests at once; seconds for an answer


def build(name: str, samples: int) -> "Captioner | Endpoint":
    """What captions images.

    Args:
        name: A folder, owner/name on the hub, or an address.
        samples: Captions an image; the first is the likeliest.

    Raises:
        UserError: If the weights are nowhere or of another kind of model, or no server answers.
    """
    return Endpoint(name, samples) if weights.is_address(name) else Captioner(name, samples)


class Captioner:
    """A model of transformers, in half precision on a GPU."""

    def __init__(self, name: str, samples: int) -> None:
        """Loads it; arguments and errors as of `build`."""
        from transformers import AutoModelForImageTextToText, AutoProcessor

        folder = backbones.locate(f"transformers:{name}")
        with layouts.reading(folder, "an image-to-text model of transformers"):
            kind = layouts.variant(folder)
            model = AutoModelForImageTextToText.from_pretrained(folder, variant=kind, **layouts.FROM_FOLDER)
            self.processor = AutoProcessor.from_pretrained(folder, **layouts.FROM_FOLDER)
        self.device = process_state().device
        self.type = type_of(mixed_precision(self.device)) if self.device.type == "cuda" else torch.float32
        self.model, self.samples = model.to(self.device, self.type).eval(), samples
        self.task = TASKS.get(model.config.model_type)
        pixels = self.processor.image_processor
        size, crop = dict(pixels.size), getattr(pixels, "do_center_crop", False)
        self.fits: tuple[Fit, ...] = (Fit(size.get("height") or size["shortest_edge"], squash=not crop),)
        self.about: dict[str, Any] = {"encoder": f"caption:{name}", "image_size": 0, "settings": {"samples": samples}}

    def see(self, squares: list[torch.Tensor]) -> list[str]:
        """Captions images, uint8 (n, 3, size, size); several of one stand in lines."""
        found = [[text] for text in self._said(squares[0], do_sample=False)]
        for number in range(1, self.samples):
            for place, texts in enumerate(found):  # one by one: what is drawn must not depend on others
                torch.manual_seed(number)
                texts += self._said(squares[0][place : place + 1], do_sample=True)
        return ["\n".join(texts) for texts in found]

    def _said(self, images: torch.Tensor, do_sample: bool) -> list[str]:
        text = {"text": [self.task] * len(images)} if self.task else {}
        given = self.processor(images=list(images), return_tensors="pt", **text).to(self.device)
        given = {key: value.to(self.type) if value.is_floating_point() else value for key, value in given.items()}
        tokens = self.model.generate(**given, max_new_tokens=TOKENS, do_sample=do_sample)
        said = self.processor.batch_decode(tokens, skip_special_tokens=True)
        return [" ".join(text.split()) for text in said]


class Endpoint:
    """A server at an address such as http://127.0.0.1:11434/v1."""

    def __init__(self, address: str, samples: int) -> None:
        """Asks which models there are; arguments and errors as of `build`."""
        self.address, _, self.model = address.partition("#")
        self.samples = samples
        self.fits: tuple[Fit, ...] = (Fit(SIDE),)
        known = [str(one.get("id")) for one in self._answer("models").get("data") or []]
        if self.model and known and self.model not in known:
            raise UserError(f"{self.address}: has no model {self.model!r}; it has {', '.join(known)}")
        self.model = self.model or next(iter(known), "")
        if not self.model:
            raise UserError(f"{self.address}: names no model; write {self.address}#<model>")
        self.about: dict[str, Any] = {
            "encoder": f"caption:{self.address}#{self.model}",  # the server's list may change
            "image_size": 0,
            "settings": {"samples": samples},
        }
        log.info("captions by %s at %s", self.model, self.address)

    def see(self, squares: list[torch.Tensor]) -> list[str]:
        """Captions images, uint8 (n, 3, size, size); several of one stand in lines."""
        jobs = [(place, number) for place in range(len(squares[0])) for number in range(self.samples)]
        images = [self._encoded(image.permute(1, 2, 0).numpy()) for image in squares[0]]
        with ThreadPoolExecutor(AT_ONCE) as threads:
            said = list(threads.map(lambda job: self._said(images[job[0]], job[1]), jobs))
        return ["\n".join(said[start : start + self.samples]) for start in range(0, len(said), self.samples)]

    def _encoded(self, image: np.ndarray) -> str:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "PNG")
        return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"

    def _said(self, image: str, number: int) -> str:
        content: Sequence[dict[str, Any]] = (
            {"type": "text", "text": ASKED},
            {"type": "image_url", "image_url": {"url": image}},
        )
        asked = {"model": self.model, "messages": [{"role": "user", "content": content}], "max_tokens": TOKENS}
        answer = self._answer("chat/completions", {**asked, "seed": number, "temperature": float(number > 0)})
        try:
            text = " ".join(str(answer["choices"][0]["message"]["content"] or "").split())
        except (KeyError, IndexError, TypeError):
            text = ""
        if not text:
            raise UserError(f"{self.address}: answered without a text: {str(answer)[:100]}")
        return text

    def _answer(self, what: str, asked: dict[str, Any] | None = None) -> dict[str, Any]:
        data = None if asked is None else json.dumps(asked).encode()
        request = urllib.request.Request(
            f"{self.address.rstrip('/')}/{what}", data, {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
                return dict(json.loads(answer.read()))
        except (OSError, ValueError, TypeError, http.client.HTTPException) as error:
            said = error.read().decode(errors="replace")[:100] if isinstance(error, urllib.error.HTTPError) else ""
            raise UserError(
                f"{self.address}/{what}: {error} {said}".strip() + "; is the server still there?"
            ) from error
