"""Prompts of a bank that an image's tower finds nearest, and what they say together: nothing has to be trained.

The competition's fourth team averaged the embeddings of the 60 prompts whose CLIP vectors are nearest to the image's,
without those that a second CLIP finds unlike it: .612 with 56 million prompts. How many are taken, how they are
weighed and how many the second tower keeps is fitted on images with known prompts, where there are any. So are the
shares of a text head, a ridge regression from the bank's vectors to its embeddings, applied to image vectors that are
shifted to where texts lie (as the seventh team did), and of the captions that these images have.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..encode import banks, embeddings, encoders, text_head, text_tower
from ..encode.encoders import Encoder
from ..models import backbones, metrics
from ..run.errors import UserError
from ..run.folders import BANK
from ..run.resume import fingerprint
from ..search.near_pairs import NEAR
from ..search.nearest import nearest
from .knn import asked_of

log = logging.getLogger(__name__)
MOST_PAIRS = 1000  # on which the settings are fitted
COUNTS = (10, 20, 40, 60, 100, 200)
TEMPERATURES = (np.inf, 0.2, 0.1, 0.05, 0.02, 0.01)  # of cosines' weights; at the first all weigh the same
SHARES = (1.0, 0.75, 0.5, 0.25)  # of the prompts that a second tower keeps
CAPTIONS = ("caption:", "interrogator")  # how encoders that say captions are called
LEAST_SHARE = 0.02  # in a prediction; what gets less is left out
LEAST = {"open_clip:ViT-H-14": 0.29}  # cosine that the fourth team asked of its second tower; of others: half are kept
MEANS = 20_000  # rows of the bank from which its mean is made


@dataclass(frozen=True)
class Known:
    """Images with known prompts.

    Attributes:
        names: n names.
        features: float32 (n, d) by the bank's tower.
        others: float32 (n, d) by the second tower; None without one.
        said: By array, float32 (n, 384): the embeddings of what captioners said.
        about: By the same arrays, how they were made.
        targets: float32 (n, 384).
    """

    names: pd.Series
    features: np.ndarray
    others: np.ndarray | None
    said: dict[str, np.ndarray]
    about: dict[str, dict[str, Any]]
    targets: np.ndarray


@dataclass(frozen=True)
class Settings:
    """How a prediction is made of the nearest prompts.

    Attributes:
        count: How many are taken.
        temperature: The smaller, the more the nearest weigh.
        keep: Share of them that the second tower keeps.
        least: Cosine below which it drops one; the best stays.
        weights: Of the mean of the prompts, the text head and each captioner in the prediction.
    """

    count: int = banks.KEPT
    temperature: float = np.inf
    keep: float = 1.0
    least: float = -1.0
    weights: tuple[float, ...] = (1.0,)


@dataclass(frozen=True)
class Second:
    """A second tower that judges what the first one has found.

    Attributes:
        encoder: Of images.
        texts: Of prompts.
    """

    encoder: Encoder
    texts: text_tower.TextTower

    def cosines(self, features: np.ndarray, texts: list[list[str]]) -> np.ndarray:
        """Float32 (n, m): cosine of each image's vector, float32 (n, d), with each of its m texts."""
        number = {text: place for place, text in enumerate(dict.fromkeys(text for row in texts for text in row))}
        vectors, images = self.texts.embed(list(number)), metrics.unit(features)
        return np.stack([vectors[[number[text] for text in row]] @ one for row, one in zip(texts, images, strict=True)])


def shares(cosines: np.ndarray, second: np.ndarray | None, how: Settings) -> np.ndarray:
    """What each prompt weighs, float32 (n, m), each row 1 in sum.

    Args:
        cosines: float32 (n, m), best first; NaN: not to be taken.
        second: float32 (n, m), the second tower's.
        how: The settings.
    """
    taken = np.isfinite(cosines) & (np.cumsum(np.isfinite(cosines), 1) <= how.count)
    if second is not None:
        judged = np.where(taken, second, -np.inf)
        order = np.argsort(np.argsort(-judged, axis=1, kind="stable"), axis=1, kind="stable")
        most = np.ceil(how.keep * taken.sum(1, keepdims=True))
        taken &= ((order < most) & (judged >= how.least)) | (order == 0)
    best = np.nanmax(np.where(taken, cosines, -np.inf), axis=1, keepdims=True)
    weights = np.where(taken, np.exp((np.nan_to_num(cosines) - best) / how.temperature), 0)
    return (weights / np.maximum(weights.sum(1, keepdims=True), 1e-12)).astype(np.float32)


class Retrieval:
    """A bank, and how its prompts are put together; see this module's text."""

    def __init__(self, folder: Path, pairs: Sequence[Path] = (), second: str = "") -> None:
        """Opens a bank and fits the settings.

        Args:
            folder: The bank.
            pairs: Folders of embeddings (see `embed`), of which those by the bank's tower are taken.
            second: A second tower, open_clip:<model>; "": none.

        Raises:
            UserError: If the bank is damaged or was made with other weights, or weights are nowhere.
        """
        self.bank = text_tower.open_bank(folder)
        self.second = Second(encoders.build(second, 0), text_tower.build(second)) if second else None
        self.how = Settings()
        if second:
            self.how = Settings(least=LEAST[second]) if second in LEAST else Settings(keep=0.5)
        self.mean = metrics.unit(
            self.bank.targets[text_head.spaced(self.bank.targets, MEANS)].astype(np.float32).mean(0)
        )
        self.head: text_head.Head | None = None
        self.captioners: dict[str, Encoder] = {}
        self.known = _known(pairs, self.bank.tower, second)
        if self.known is None:
            said = (
                "%s: no images with known prompts and vectors of %s: the mean of the %d nearest prompts, no text head"
            )
            log.warning(said, folder, self.bank.tower, self.how.count)
        else:
            self.known = self._fit(self.known)

    def _fit(self, known: Known) -> Known:
        """Fits settings and text head on known pairs; returns them without the captions that nobody here can say."""
        part = text_head.spaced(known.names, MOST_PAIRS)
        queries, truth = self.bank.queries(known.features[part]), known.targets[part]
        given = None if known.others is None else known.others[part]
        cosines, found, second = self._candidates(queries, given, truth)
        score = {}
        kept = SHARES if self.second else (1.0,)
        for count, temperature, keep in product(COUNTS, TEMPERATURES, kept):
            how = Settings(count, temperature, keep)
            score[how] = metrics.mean_cosine(_mean(shares(cosines, second, how), found), truth)
        how = max(score, key=score.__getitem__)
        retrieved = metrics.unit(_mean(shares(cosines, second, how), found))
        self.head = text_head.fit(self.bank, queries, truth)
        parts = {"prompts": retrieved, "text head": self.head(queries)}
        parts |= {name: vectors[part] for name, vectors in known.said.items()}
        fitted = metrics.fit_weights(list(parts.values()), truth)
        fitted[fitted < LEAST_SHARE] = 0
        weights = dict(zip(parts, (fitted / fitted.sum()).tolist(), strict=True))
        self.captioners = {}
        for name in (one for one in known.said if weights[one]):  # none is loaded for nothing
            try:
                self.captioners[name] = encoders.rebuild(known.about[name])
            except UserError as error:
                log.warning("captions %s: skipped: %s", name, error)
                return self._fit(replace(known, said={n: said for n, said in known.said.items() if n != name}))
        used = [name for name in parts if name not in known.said or weights[name]]
        self.how = replace(how, weights=tuple(weights[name] for name in used))
        alone = ", ".join(
            f"{name} {metrics.mean_cosine(one, truth):.4f} ({weights[name]:.2f})" for name, one in parts.items()
        )
        together = metrics.mean_cosine(metrics.blend([parts[name] for name in used], self.how.weights), truth)
        log.info(
            "%s, fitted on %d images: %d prompts, temperature %g; alone and (share): %s; together %.4f",
            *(self.bank.folder, len(part), how.count, how.temperature, alone, together),
        )
        return known

    def _candidates(
        self, queries: np.ndarray, others: np.ndarray | None, truth: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Cosines and targets of the nearest, the second tower's cosines; what is near to the truth is NaN."""
        most = self.how.count if truth is None else 2 * max(COUNTS)
        rows, cosines = nearest(queries, self.bank.vectors, most)
        found = self.bank.targets[rows.ravel()].astype(np.float32).reshape(*rows.shape, -1)
        if truth is not None:
            cosines[np.einsum("nmd,nd->nm", found, truth) >= NEAR] = np.nan
        second = None
        if self.second and others is not None:
            texts = [[self.bank.texts[row].as_py() for row in some] for some in rows.tolist()]
            second = self.second.cosines(others, texts)
        return cosines, found, second

    def __call__(self, arrays: list[np.ndarray], truth: np.ndarray | None = None) -> np.ndarray:
        """Maps what the encoders gave, float32 (n, d) each, to predictions, float32 (n, 384).

        Args:
            arrays: Of the tower, if there is one of the second tower, and of `captioners`.
            truth: float32 (n, 384) of known prompts: those near to them in the bank are not taken.
        """
        queries = self.bank.queries(arrays[0])
        cosines, found, second = self._candidates(queries, arrays[1] if self.second else None, truth)
        parts = [_mean(shares(cosines, second, self.how), found)]
        if self.head:
            parts += [self.head(queries), *arrays[2 if self.second else 1 :]]
        return metrics.blend(parts, self.how.weights)

    @property
    def encoders(self) -> list[Encoder]:
        """What gives the arrays of a call."""
        second = [self.second.encoder] if self.second else []
        return [encoders.build(self.bank.tower, 0), *second, *self.captioners.values()]


def _mean(weights: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Weighted means, float32 (n, 384), a row at a time: so none depends on its company."""
    return np.stack([row @ targets for row, targets in zip(weights, found, strict=True)])


def _known(pairs: Sequence[Path], tower: str, second: str) -> Known | None:
    """The images of the first folder of embeddings that has vectors by both towers; None if none has."""
    for folder in pairs:
        about = {name: embeddings.about(folder, name) for name in embeddings.arrays(folder)}
        of = {one.get("encoder") or one.get("backbone", {}).get("name"): name for name, one in about.items()}
        if tower in of and (not second or second in of):
            size = about[of[tower]].get("backbone", {}).get("image_size")
            if size and size != (own := backbones.describe(tower).image_size):
                log.warning("%s: not used for the bank: embed its images with --image-size %d", folder, own)
                continue
            captions = [n for n, one in about.items() if str(one.get("encoder")).startswith(CAPTIONS)]
            table = embeddings.load(folder, [of[tower], *([of[second]] if second else []), *captions])
            there = np.all([np.isfinite(array[:, 0]) for array in table.arrays.values()], axis=0)
            arrays = {name: array[there] for name, array in table.arrays.items()}
            others, said = arrays[of[second]] if second else None, {name: arrays[name] for name in captions}
            names, targets = table.frame["image_name"][there], table.targets[there]
            return Known(names, arrays[of[tower]], others, said, about, targets)
    return None


@lru_cache(maxsize=1)
def _kept(contents: str, folder: Path, pairs: tuple[Path, ...], second: str) -> Retrieval:
    return Retrieval(folder, pairs, second)


def _fitted(folder: Path, pairs: Sequence[Path], second: str) -> Retrieval:
    """The last one again, which the blend's weights and the predictions need both, while its files are the same."""
    inputs = [folder / BANK, *(file for one in pairs for file in embeddings.files(one))]
    return _kept(fingerprint({}, inputs), folder, tuple(pairs), second)


def neighbours(
    folder: Path, pairs: Sequence[Path] = (), second: str = ""
) -> tuple[np.ndarray, list[Encoder], Callable[[list[np.ndarray]], np.ndarray]]:
    """`mean`, `encoders` and `finish` of a `predictors.Predictor`; arguments and errors as of `Retrieval`."""
    made = _fitted(folder, pairs, second)
    return made.mean, made.encoders, made


def validation(folder: Path, asked: pd.DataFrame, pairs: Sequence[Path], second: str = "") -> pd.DataFrame:
    """What a bank says of images that are among the known pairs, without prompts near to theirs.

    Args:
        folder, pairs, second: As of `Retrieval`.
        asked: float32 (n, 384), the prompts' embeddings by the images' names.

    Returns:
        float32 (m, 384) by name, of the images that have vectors.
    """
    made = _fitted(folder, pairs, second)
    if made.known is None:
        return pd.DataFrame(index=[])
    known = made.known
    mine = asked_of(known.names, known.targets, asked)
    if not mine.any():
        return pd.DataFrame(index=[])
    arrays = [known.features, *([] if known.others is None else [known.others])]
    arrays += [known.said[name] for name in made.captioners]
    return pd.DataFrame(made([array[mine] for array in arrays], known.targets[mine]), known.names[mine])
