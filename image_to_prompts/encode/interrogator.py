"""CLIP Interrogator (pharmapsychotic, MIT), batched and offline: a BLIP caption, and terms that CLIP ranks.

Three modes, as in clip-interrogator 0.6.0. `fast`: the caption and the 32 highest-ranked terms of all lists. `classic`:
the caption, a medium, an artist, a site, a movement and three flavours. `best`: terms are added one by one as long as
the similarity grows; of this, the two others and the caption the most similar one.

The embeddings of the terms are kept beside the weights, by the hash of weights and terms, so that they go where the
weights go; in the folder of `text_cache` where nothing can be written there.
"""

import hashlib
import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..data import terms as term_lists
from ..data.rows import Fit
from ..models import backbones, layouts, text_cache, weights
from ..run.devices import process_state, type_of
from ..run.errors import UserError
from ..run.files import write_array
from ..run.progress import Estimate, progress_to

log = logging.getLogger(__name__)
MODES = ("fast", "classic", "best")
CAPTION_TOKENS, TERMS, FLAVOURS = 32, 32, 3  # clip-interrogator's limits: a caption, fast, classic
CANDIDATES, LEAST_STEPS, MOST_STEPS = 2048, 8, 32  # and of best
TEXTS = 512  # texts that CLIP embeds at once, and of a file of kept terms
TRIAL = 16  # texts by which the time of all is estimated


class Interrogator:
    """Says what is to be seen on images."""

    def __init__(
        self,
        captioner: nn.Module,
        processor: Any,
        clip: nn.Module,
        tokenize: Callable[[list[str]], torch.Tensor],
        spec: backbones.Spec,
        terms: dict[str, list[str]],
        mode: str = "fast",
        digest: str = "",
        home: Path | None = None,
        about: dict[str, Any] | None = None,
    ) -> None:
        """Takes the models, and embeds the terms unless that has been done before.

        Args:
            captioner: A `BlipForConditionalGeneration`.
            processor: Its processor.
            clip: An open_clip model, both towers.
            tokenize: Maps n texts to int64 (n, 77).
            spec: The image tower's input.
            terms: From `terms.read`.
            mode: One of `MODES`.
            digest: Tells the CLIP weights from others; "": the terms' embeddings are not kept.
            home: Folder to keep them in, that of the weights.
            about: See `encoders.Encoder`.
        """
        self.device = process_state().device
        # float16 on a GPU, as in clip-interrogator: bf16 cannot tell the similarities of most terms apart.
        precision = "fp16" if self.device.type == "cuda" else "no"
        self.type = type_of(precision)
        self.captioner = captioner.to(self.device, self.type).eval()
        self.clip = clip.to(self.device, self.type).eval()
        self.processor, self.tokenize, self.mode, self.about = processor, tokenize, mode, about or {}
        pixels = processor.image_processor
        side = pixels.size["height"]
        self.fits: tuple[Fit, ...] = (Fit(side, squash=True), Fit(spec.image_size))
        self.scales = [self._scale(pixels.image_mean, pixels.image_std), self._scale(spec.mean, spec.std)]
        self.labels = [label for kind in term_lists.KINDS for label in terms[kind]]
        places = [*([home / "terms"] if home else []), text_cache.path().with_name("terms")] if digest else []
        kept = self._embedded(self.labels, f"{digest} {precision}", places)
        self.features = torch.from_numpy(kept).to(self.device, self.type)
        starts = np.cumsum([0, *(len(terms[kind]) for kind in term_lists.KINDS)])
        self.ranges = {
            kind: slice(start, end)
            for kind, start, end in zip(term_lists.KINDS, starts[:-1], starts[1:], strict=True)
            if end > start
        }

    def _scale(self, mean: Sequence[float], std: Sequence[float]) -> tuple[torch.Tensor, torch.Tensor]:
        return tuple(255 * torch.tensor(part, device=self.device).view(1, 3, 1, 1) for part in (mean, std))

    def _pixels(self, squares: list[torch.Tensor], number: int) -> torch.Tensor:
        mean, std = self.scales[number]
        return ((squares[number].to(self.device).float() - mean) / std).to(self.type)

    def embed_texts(self, texts: list[str]) -> torch.Tensor:
        """Unit vectors of texts: (n, d)."""
        parts = []
        for start in range(0, len(texts), TEXTS):
            found = self.clip.encode_text(self.tokenize(texts[start : start + TEXTS]).to(self.device))
            parts.append(found / found.norm(dim=-1, keepdim=True))
        return torch.cat(parts)

    def _embedded(self, labels: list[str], key: str, places: list[Path]) -> np.ndarray:
        """Embeddings of terms, rounded to float16 as clip-interrogator keeps them, block by block from the disk."""
        blocks = [labels[start : start + TEXTS] for start in range(0, len(labels), TEXTS)]
        names = [hashlib.sha256("\n".join([key, *block]).encode()).hexdigest()[:32] + ".npy" for block in blocks]
        found = [next((p / name for p in places if (p / name).is_file()), None) for name in names]
        left = sum(len(block) for block, file in zip(blocks, found, strict=True) if not file)
        parts = []
        with torch.inference_mode(), progress_to(len(labels), "embed terms", len(labels) - left) as advance:
            if left:
                begun = time.perf_counter()
                trial = self.embed_texts(labels[:TRIAL])
                took = (time.perf_counter() - begun) / len(trial)
                estimate = Estimate("terms to embed", len(labels), left, took, 2 * trial.shape[1])
                log.info("%s, kept in %s", estimate, places[0] if places else "memory alone")
            for block, name, file in zip(blocks, names, found, strict=True):
                if file:
                    parts.append(np.load(file))
                    continue
                parts.append(self.embed_texts(block).half().cpu().numpy())
                _keep(parts[-1], name, places)
                advance(len(block))
        return np.concatenate(parts)

    def see(self, squares: list[torch.Tensor]) -> list[str]:
        """Describes images: uint8 (n, 3, 384, 384) for BLIP and (n, 3, 224, 224) for CLIP to n texts."""
        captions = self.captions(squares)
        images = self.clip.encode_image(self._pixels(squares, 1))
        images = images / images.norm(dim=-1, keepdim=True)
        if self.mode == "best":
            return [self._best(image, caption) for image, caption in zip(images, captions, strict=True)]
        return (self._classic if self.mode == "classic" else self._fast)(images, captions)

    def captions(self, squares: list[torch.Tensor]) -> list[str]:
        """BLIP's caption of each image; arguments as `see`."""
        tokens = self.captioner.generate(pixel_values=self._pixels(squares, 0), max_new_tokens=CAPTION_TOKENS)
        return [text.strip() for text in self.processor.batch_decode(tokens, skip_special_tokens=True)]

    def _ranked(self, images: torch.Tensor, kind: str | None, count: int) -> list[list[str]]:
        """The terms of a kind (None: of all) that are most similar to each image, best first."""
        part = self.ranges.get(kind) if kind else slice(0, len(self.labels))
        if part is None:  # the list is empty
            return [[] for _ in images]
        similarity = (images @ self.features[part].T).float()
        best = similarity.topk(min(count, similarity.shape[1]), dim=-1).indices.tolist()
        return [[self.labels[part.start + label] for label in row] for row in best]

    def _fast(self, images: torch.Tensor, captions: list[str]) -> list[str]:
        tops = self._ranked(images, None, TERMS)
        return [self._cut([caption, *top]) for caption, top in zip(captions, tops, strict=True)]

    def _classic(self, images: torch.Tensor, captions: list[str], flavours: int = FLAVOURS) -> list[str]:
        columns = [self._ranked(images, kind, 1) for kind in ("mediums", "artists", "trendings", "movements")]
        columns.append(self._ranked(images, "flavors", flavours))
        found = []
        for caption, (medium, artist, *others) in zip(captions, zip(*columns, strict=True), strict=True):
            medium = [] if medium and caption.startswith(medium[0]) else medium
            head = " ".join([", ".join([caption, *medium]), *artist])
            found.append(self._cut([*head.split(", "), *(term for column in others for term in column)]))
        return found

    def _cut(self, parts: list[str]) -> str:
        """As many parts as CLIP's 77 tokens hold, the first one always."""
        whole = parts[0]
        for part in parts[1:]:
            if self._is_full(whole + part):
                break
            whole = f"{whole}, {part}"
        return whole

    def _is_full(self, text: str) -> bool:
        return bool(self.tokenize([text])[0, -1])

    def _best(self, image: torch.Tensor, caption: str) -> str:
        chained = self._chain(image, caption)
        one = image[None]
        candidates = [caption, *self._classic(one, [caption], TERMS), *self._fast(one, [caption]), chained]
        return candidates[int((self.embed_texts(candidates) @ image).argmax())]

    def _chain(self, image: torch.Tensor, caption: str) -> str:
        """Adds to a caption, one by one, the term that makes it most similar to the image."""
        left = list(dict.fromkeys(self._ranked(image[None], None, CANDIDATES)[0]))
        now = best = caption
        now_similarity = best_similarity = float(self.embed_texts([caption])[0] @ image)
        for step in range(MOST_STEPS):
            if not left:
                break
            similarities = self.embed_texts([f"{now}, {term}" for term in left]) @ image
            chosen = int(similarities.argmax())
            similarity = float(similarities[chosen])
            if similarity <= now_similarity and step >= LEAST_STEPS:
                break
            now, now_similarity = f"{now}, {left.pop(chosen)}", similarity
            if similarity > best_similarity:
                best, best_similarity = now, similarity
            if self._is_full(now):
                break
        return best


def _keep(vectors: np.ndarray, name: str, places: list[Path]) -> None:
    """Writes vectors to the first place where that is possible."""
    for place in places:
        try:
            write_array(place / name, vectors)
            return
        except (OSError, UserError) as error:
            log.info("%s: terms cannot be kept here: %s", place, error)


def captioner(folder: Path) -> tuple[nn.Module, Any]:
    """A BLIP model and its processor; raises UserError if the folder holds another one or damaged files."""
    from transformers import BlipForConditionalGeneration, BlipProcessor

    with layouts.reading(folder, "a BLIP captioning model"):
        kind = layouts.variant(folder)
        model = BlipForConditionalGeneration.from_pretrained(folder, variant=kind, **layouts.FROM_FOLDER)
        return model, BlipProcessor.from_pretrained(folder, **layouts.FROM_FOLDER)


def load(
    caption: str = weights.CAPTION,
    ranker: str = weights.RANKER,
    mode: str = "fast",
    terms: str = "",
    artists: bool = True,
) -> Interrogator:
    """Loads an interrogator.

    Args:
        caption: Name in `weights.WEIGHTS` of a BLIP model, or a folder of one.
        ranker: open_clip:<model>, or a folder with open_clip_config.json; with both towers.
        mode: One of `MODES`.
        terms: Folder of own term lists; see `terms.read`.
        artists: Whether names of artists are used.

    Raises:
        UserError: If the mode is unknown, or weights or terms are nowhere or damaged.
    """
    if mode not in MODES:
        raise UserError(f"--mode {mode}: must be one of {', '.join(MODES)}")
    lists = term_lists.read(Path(terms) if terms else None, artists)
    asked = weights.interrogator(caption, ranker)
    name = asked[1][0]
    folder, file = weights.all_of(*(partial(weights.locate, *one) for one in asked))
    from .text_tower import towers  # after what may end in a line about missing weights: open_clip is slow to import

    spec = backbones.describe(name)
    settings = {"caption": caption, "ranker": ranker, "mode": mode, "terms": terms, "artists": artists}
    return Interrogator(
        *captioner(folder),
        *towers(name, file),
        spec,
        lists,
        mode,
        layouts.digest(file),
        file.parent,
        {"encoder": "interrogator", "image_size": 0, "settings": settings},
    )
