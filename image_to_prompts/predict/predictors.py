"""What predicts prompt embeddings from images: checkpoints, and whatever else looks at images with encoders."""

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np

from ..data.rows import Colours
from ..encode import encoders
from ..encode.encoders import Encoder
from ..models import backbones, checkpoints, doubt, freezing, metrics, text_encoder
from ..run import resume
from ..run.bounds import AtLeast, NotNegative, Positive
from ..run.devices import process_state
from ..run.engine import EngineConfig, over_blocks
from ..run.errors import UserError
from ..run.files import read_tensors
from ..run.folders import BANK, is_bank, is_embeddings, is_ensemble
from ..run.progress import Deadline

log = logging.getLogger(__name__)
BLOCK = 512  # images a file of half-done work
SAME = 0.99999  # cosine of two embeddings of one prompt


@dataclass
class Predictor:
    """Maps images to prompt embeddings.

    Attributes:
        mean: float32 (384,), the prediction for an image that cannot be read or is not reached in time.
        encoders: What looks at the images; none: the prediction is the mean.
        finish: Maps what each encoder gave, float32 (n, d), to float32 (n, 384).
        judge: Maps the same to strangeness, float32 (n,), see `doubt`; None where that is unknown.
        pull: How predictions for strange images are drawn to the mean, see `doubt.pulled`.
    """

    mean: np.ndarray
    encoders: list[Encoder] = field(default_factory=list)
    finish: Callable[[list[np.ndarray]], np.ndarray] = lambda arrays: arrays[0]
    judge: Callable[[list[np.ndarray]], np.ndarray] | None = None
    pull: tuple[float, float] = (1.0, 0.0)


class Seen(NamedTuple):
    """What a predictor saw in images.

    Attributes:
        vectors: float32 (n, 384), unit vectors, NaN for images that cannot be read.
        strangeness: float32 (n,), above 1 for images that are unlike those that it knows; NaN where that is unknown.
    """

    vectors: np.ndarray
    strangeness: np.ndarray


@dataclass
class Viewing:
    """How images are looked at."""

    views: Annotated[tuple[Literal["whole", "centre", "mirror"], ...], AtLeast(1)] = ("whole", "centre", "mirror")
    """What is shown of each image; the predictions of several are averaged, which takes as many times as long."""
    batch_size: Positive = 32
    """Images at once."""
    loader_workers: NotNegative = 0
    """Threads that decode images; 0: one a core."""


@dataclass(frozen=True)
class Looks:
    """Further ways in which checkpoints of `finetune` look at an image; what they say of all of them is averaged.

    Attributes:
        size: Side of a second input in px; 0: none.
        colours: Mean and deviation of the channels, 0 to 1, by which colours are normalised a second time; None: not.
    """

    size: int = 0
    colours: Colours | None = None

    def specs(self, spec: backbones.Spec) -> list[backbones.Spec]:
        """The same backbone as each further look needs it."""
        found = [backbones.resized(spec, self.size)] if self.size else []
        return [*found, *([replace(spec, mean=self.colours[0], std=self.colours[1])] if self.colours else [])]


ONCE = Looks()


@dataclass(frozen=True)
class Searching:
    """With what else a bank of prompts is searched.

    Attributes:
        pairs: Folders of embeddings of images with known prompts, on which its settings are fitted.
        second: A second tower that judges what is found, open_clip:<model>; "": none.
    """

    pairs: tuple[Path, ...] = ()
    second: str = ""


ALONE = Searching()


def load(folder: Path, looks: Looks = ONCE, searching: Searching = ALONE) -> Predictor:
    """What a folder predicts with: a bank of prompts, kNN over what `embed` wrote, or a checkpoint."""
    if is_bank(folder):
        from . import retrieval

        mean, seeing, found = retrieval.neighbours(folder, searching.pairs, searching.second)
        return Predictor(mean, seeing, found)
    if is_embeddings(folder):
        from . import knn

        mean, encoder, finish = knn.neighbours(folder)
        return Predictor(mean, [encoder], finish)
    return checkpoint(folder, looks)


def inputs(folder: Path, searching: Searching = ALONE) -> list[Path]:
    """The files on which its predictions depend; of a bank the one that has the digests of all."""
    if is_bank(folder):
        return [folder / BANK, *(file for pairs in searching.pairs for file in inputs(pairs))]
    if is_embeddings(folder):
        from ..encode import embeddings

        return embeddings.files(folder)
    return [folder / name for name in ("model.safetensors", "config.json", doubt.FILE)]


def checkpoint(folder: Path, looks: Looks = ONCE) -> Predictor:
    """A checkpoint of `finetune` or `ensemble`; see their `load` for what it raises."""
    from ..encode.backbone import BackboneEncoder

    if is_ensemble(folder):
        from ..models import ensemble

        blend = ensemble.load(folder)
        seen = blend.config["ensemble"]["encoders"].values()
        return Predictor(blend.mean, list(map(encoders.rebuild, seen)), partial(metrics.in_fixed_rows, blend))
    found, own = checkpoints.load(folder), doubt.load(folder)
    first = found.config.get("settings", {}).get("train_from", -1)
    stages = freezing.stages(found.model.backbone, first) if own else ()
    further = [(checkpoints.again(found, spec), spec) for spec in looks.specs(found.spec)]
    seen = [BackboneEncoder(found.model, found.spec, stages), *(BackboneEncoder(*one) for one in further)]
    predictor = Predictor(found.mean, seen, _vectors)
    if own:
        predictor.judge, predictor.pull = partial(_strangeness, own), (float(own.pull[0]), float(own.pull[1]))
    return predictor


def _vectors(arrays: list[np.ndarray]) -> np.ndarray:
    """The mean of the unit vectors of all looks."""
    return metrics.blend([one[:, : text_encoder.DIMENSION] for one in arrays], [1 / len(arrays)] * len(arrays))


def _strangeness(own: doubt.Doubt, arrays: list[np.ndarray]) -> np.ndarray:
    return own.strangeness(arrays[0][:, text_encoder.DIMENSION :])


def knows(folders: Iterable[Path]) -> str:
    """What the checkpoint that judges images has seen, in words; "" if none of them can."""
    folder = next((one for one in folders if (one / doubt.FILE).is_file()), None)
    if folder is None:
        return ""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    sources = config.get("sources")
    if config.get("profile") == "embedded" and sources in (None, ["grammar"]):
        return "it has only seen emoji scenes"
    return f"it has seen {config.get('rows', {}).get('train', 'other')} images of {', '.join(sources or ['its set'])}"


def trained_on(folders: list[Path], targets: np.ndarray) -> int:
    """How many of float32 (n, 384) embeddings of prompts are among those that checkpoints say they were trained on."""
    from ..models import ensemble
    from ..search.near_pairs import near

    found = np.zeros(len(targets), bool)
    for folder in folders:
        if is_ensemble(folder):
            found |= near(targets, ensemble.load(folder).known[1], SAME)
        elif (folder / "baselines.safetensors").is_file():
            known = read_tensors(folder / "baselines.safetensors", "train it again")["targets"]
            found |= near(targets, known, SAME)
    return int(found.sum())


def predict(predictor: Predictor, files: list[Path], viewing: Viewing) -> Seen:
    """Predicts for image files, in the hardware's half precision."""
    return start(predictor, viewing)(files)


def strangeness(seen: Sequence[Seen]) -> np.ndarray:
    """Float32 (n,): how strange images are to those of several predictors that can tell; NaN where none can."""
    return np.fmax.reduce([one.strangeness for one in seen])


def start(load: Predictor | Callable[[], Predictor], viewing: Viewing) -> Callable[[list[Path]], Seen]:
    """What predicts for some images; a GPU's memory that did not suffice is remembered between them."""
    predictor = load if isinstance(load, Predictor) else load()
    if not predictor.encoders:
        return lambda files: Seen(np.tile(predictor.mean, (len(files), 1)), np.full(len(files), np.nan, np.float32))
    show = encoders.viewer(predictor.encoders, viewing.batch_size, viewing.loader_workers)
    return lambda files: _predict_block(predictor, show, files, viewing.views)


def _predict_block(
    predictor: Predictor, show: Callable[..., list[encoders.Encoded]], files: list[Path], views: tuple[str, ...]
) -> Seen:
    """The mean over the views of unit vectors; how strange an image is, its first view says."""
    seen: list[np.ndarray] = []
    strange = np.full(len(files), np.nan, np.float32)
    for view in views:
        found = show(files, view)
        readable = np.isfinite(found[0].vectors[:, 0])
        vectors = np.full((len(files), text_encoder.DIMENSION), np.nan, np.float32)
        if readable.any():
            arrays = [one.vectors[readable] for one in found]
            vectors[readable] = predictor.finish(arrays)
            if predictor.judge and not seen:
                strange[readable] = predictor.judge(arrays)
        seen.append(vectors)
    return Seen(metrics.blend(seen, [1 / len(seen)] * len(seen)), strange)


def predict_resumed(
    start: Callable[[], Callable[[list[Path]], Seen]],
    files: list[Path],
    engine: EngineConfig,
    work: Path,
    deadline: Deadline,
) -> tuple[Seen, int]:
    """Predicts as `predict`, in blocks of 512 images that a later run finds in `work`, until the deadline.

    Returns:
        As `predict`, NaN also for images that were not reached; and how many were.
    """

    def make(blocks: Iterable[range]) -> Iterator[dict[str, np.ndarray]]:
        for seen in over_blocks(engine, start, (files[rows.start : rows.stop] for rows in blocks)):
            yield seen._asdict()

    found = [Seen(**read_tensors(file)) for file in resume.blocks(work, len(files), BLOCK, make, deadline.passed)]
    reached = sum(len(one.vectors) for one in found)
    left = np.full((len(files) - reached, text_encoder.DIMENSION), np.nan, np.float32)
    both = zip(*found, Seen(left, left[:, 0]), strict=True)
    process_state().wait_for_everyone()  # nobody removes the blocks before all processes have read them
    return Seen(*map(np.concatenate, both)), reached


def blend_weights(folders: list[Path], given: tuple[float, ...] = (), searching: Searching = ALONE) -> list[float]:
    """The weights of predictors in a blend.

    Args:
        folders: Checkpoints, folders of embeddings, and banks.
        searching: How these are searched.
        given: Weights; none: fitted on the images that all checkpoints kept for validation, where the blend is at least
            as good as the best of them. Where there are fewer than 20 such images, all weights are the same.

    Raises:
        UserError: If the number of weights is not that of the folders, one is negative, or all are 0.
    """
    if not given and len(folders) > 1:
        from . import blend

        return blend.fitted(folders, searching.pairs, searching.second)
    weights = list(given) or [1.0] * len(folders)
    if len(weights) != len(folders):
        raise UserError(f"--blend has {len(weights)} numbers for {len(folders)} checkpoints; give one each")
    if min(weights) < 0 or not sum(weights) > 0:
        raise UserError(f"--blend {' '.join(map(str, weights))}: must not be negative, nor all 0")
    return weights
