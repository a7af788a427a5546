"""The ways to an image's prompt, in their order: its file, the checkpoints, CLIP Interrogator, a guess."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..data import file_prompt, images
from ..encode import encoders
from ..models import metrics, text_encoder, weights
from ..predict import predictors
from ..run.errors import UserError
from ..run.folders import BANK, Run, is_bank, read_json
from .files import Description

if TYPE_CHECKING:
    from ..search import nearest
    from . import Config, phrases

log = logging.getLogger(__name__)
BLOCK = 64  # images described together
KNOWN = 20_000  # known prompts from which it is learned what people write
CLASSES = 3  # ImageNet's classes in a guess


def from_files(files: Iterable[Path]) -> dict[Path, Description]:
    """The prompts that stand in image files, of those that have one."""
    found = {file: file_prompt.read(file) for file in files}
    return {file: Description(file, source="file", **vars(one)) for file, one in found.items() if one}


def sources(config: "Config") -> tuple[list[Path], list[Path]]:
    """The checkpoints and banks, none if there is none, and the CSVs of known prompts; none where a bank has them.

    Raises:
        UserError: If one that was given is not there, or there is a checkpoint but no known prompts.
    """
    run = Run(config.run)
    try:
        # A tower that has seen the world speaks for itself; a stand-in needs a checkpoint that finds images strange.
        alone = config.bank and not any(
            str(read_json(one / BANK).get("tower")).startswith("dual:") for one in config.bank
        )
        folders = list(config.checkpoint) or ([] if alone else run.newest_checkpoints())
    except UserError:
        folders = run.banks()
    folders += config.bank
    known = [run.have(path) for path in (run.train_metadata, run.metadata)]
    csvs = list(config.prompts) or [path for path in known if path.is_file()][:1]
    for path in csvs:
        if not path.is_file():
            raise UserError(f"{path}: no such file; correct --prompts")
    for folder in folders:
        if not (is_bank(folder) or (folder / "model.safetensors").is_file()):
            raise UserError(f"{folder}: neither a checkpoint nor a bank; correct --checkpoint or --bank")
    if any(map(is_bank, folders)) and not config.prompts:
        return folders, []
    if folders and not csvs:
        raise UserError(f"no known prompts: {known[0]} is not there; run dedupe first or give --prompts CSV")
    return folders, csvs


class Describer:
    """Models, known prompts and vocabulary, each loaded when an image first needs it."""

    def __init__(self, config: "Config") -> None:
        """Takes the settings; `config.paths` and the outputs play no role.

        Raises:
            UserError: See `sources`.
        """
        self.config = config
        self.folders, self.csvs = sources(config)

    def describe(self, files: Sequence[Path]) -> list[Description]:
        """Describes images; one that cannot be read gets an error instead of a prompt."""
        said = {} if self.config.ignore_file else from_files(files)
        rest = [file for file in files if file not in said]
        said |= zip(rest, self.predict(rest), strict=True)
        return [said[file] for file in files]

    def predict(self, files: Sequence[Path]) -> list[Description]:
        """Describes images by what they show, see `describe`."""
        blocks = (list(files[start : start + BLOCK]) for start in range(0, len(files), BLOCK))
        return [one for block in blocks for one in self._predict(block)]

    def _predict(self, files: list[Path]) -> list[Description]:
        found = self._by_checkpoints(files) if self.folders else {file: Description(file, "") for file in files}
        left = [file for file, one in found.items() if not one.prompt and not one.error]
        if left:
            encoder, source = self._speaker
            (seen,) = encoders.viewer([encoder], self.config.batch_size, self.config.loader_workers)(left, "whole")
            for file, text in zip(left, seen.texts or [""] * len(left), strict=True):
                if not text:
                    found[file] = Description(file, "", error=images.why_broken(file))
                    continue
                text = ", ".join(text.split(", ")[:CLASSES]) if source == "guess" else text
                found[file] = replace(found[file], prompt=text, source=source)
        return [found[file] for file in files]

    def _by_checkpoints(self, files: list[Path]) -> dict[Path, Description]:
        """What the checkpoints say of images; of strange ones, that they are strange."""
        from . import compose

        seen = [predictors.predict(predictor, files, self.config) for predictor in self._predictors]
        vectors, strange = metrics.blend([one.vectors for one in seen], self._weights), predictors.strangeness(seen)
        found = {f: Description(f, "", familiar=False, vector=v) for f, v in zip(files, vectors, strict=True)}
        known = np.flatnonzero(np.isfinite(vectors[:, 0]) & ~(strange > 1))
        nearest = self.index.search(vectors[known], max(compose.NEIGHBOURS, self.config.top))
        prompts = [[prompt for prompt, _ in some] for some in nearest]
        source = "bank" if all(map(is_bank, self.folders)) else "checkpoint"
        said = compose.compose(vectors[known], prompts, *self._words, self.config.most_words) if len(known) else []
        cosines = (text_encoder.encode_once([first for first, *_ in said]) * vectors[known]).sum(1)
        cosines = cosines.astype(float).round(4).tolist()
        for row, (prompt, *others), cosine, some in zip(known.tolist(), said, cosines, nearest, strict=True):
            file, near = files[row], tuple((text, round(value, 4)) for text, value in some)
            familiar = None if np.isnan(strange[row]) else True
            found[file] = Description(file, prompt, source, familiar, cosine, near, tuple(others), vector=vectors[row])
        for row in np.flatnonzero(~np.isfinite(vectors[:, 0])).tolist():
            found[files[row]] = Description(files[row], "", error=images.why_broken(files[row]))
        return found

    @cached_property
    def _predictors(self) -> list[predictors.Predictor]:
        return [predictors.load(folder, searching=self.searching) for folder in self.folders]

    @cached_property
    def _weights(self) -> list[float]:
        return predictors.blend_weights(self.folders, (), self.searching)

    @cached_property
    def searching(self) -> predictors.Searching:
        """Where the settings of banks come from."""
        needed = any(map(is_bank, self.folders))  # on Kaggle the search goes through all that is attached
        return predictors.Searching(tuple(Run(self.config.run).stored_embeddings()) if needed else ())

    @cached_property
    def index(self) -> "nearest.Index":
        """The known prompts."""
        from ..search.nearest import Index, open_index

        if not self.csvs:
            from ..encode import banks

            bank = banks.open_bank(next(filter(is_bank, self.folders)))
            return Index(bank.texts, bank.targets)
        return open_index(self.csvs)

    @cached_property
    def _words(self) -> "tuple[phrases.Vocabulary, phrases.Trigrams]":
        """Phrases of lists and known prompts, and how usual they are."""
        from . import phrases

        known = self.index.some(KNOWN)
        return phrases.vocabulary(self.config.vocabulary, self.config.artists, known), phrases.Trigrams(known)

    @cached_property
    def _speaker(self) -> tuple[encoders.Encoder, str]:
        """What says something without a checkpoint: a captioner, CLIP Interrogator if it is there, or ImageNet classes.

        Raises:
            UserError: If weights that the user named are nowhere or damaged.
        """
        caption, ranker = self.config.caption, self.config.ranker
        default = (caption, ranker) == (weights.CAPTION, weights.RANKER)
        if default and not all(weights.interrogator_at_hand(caption, ranker)):  # nobody asked for a download
            return encoders.build("classes", 224), "guess"
        source = "caption" if weights.captions_alone(caption) else "interrogator"
        chosen = {"caption": caption, "ranker": ranker, "artists": self.config.artists}
        return encoders.build("interrogator", 0, **chosen), source
