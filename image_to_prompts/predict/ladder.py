"""Ways to predict, best first, of which a submission takes the first that works.

A submission kernel so scores on its first push, before anything is trained.
"""

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pandas as pd

from ..data import metadata
from ..encode import embeddings, encoders
from ..models import metrics, text_encoder, weights
from ..run.engine import EngineConfig
from ..run.errors import UserError
from ..run.files import make_folder
from ..run.folders import Run, kaggle_inputs
from ..run.progress import Deadline
from . import forecast, predictors
from .predictors import Predictor, Seen, Viewing, predict_resumed, start

log = logging.getLogger(__name__)
MOST_PROMPTS = 20_000  # the mean of more is the same to three digits


@dataclass(frozen=True)
class Rung:
    """One way to predict.

    Attributes:
        what: What it is, for the log.
        load: By name, what gives its predictors; of those with one name finished blocks are shared between rungs.
        weights: Their weights in the blend.
        inputs: Files on whose contents the predictions depend.
    """

    what: str
    load: dict[str, Callable[[], Predictor]]
    weights: list[float]
    inputs: list[Path]


def interrogator(caption: str, ranker: str) -> Predictor:
    """CLIP Interrogator's text, as it is; raises as `encoders.build`."""
    encoder = encoders.build("interrogator", 0, caption=caption, ranker=ranker)
    return Predictor(metrics.unit(text_encoder.encode(["a picture"])[0]), [encoder])


def prompt_mean(csvs: list[Path]) -> Predictor:
    """The mean embedding of the prompts of CSVs.

    Raises:
        UserError: If there is none.
    """
    found = [pd.Series(dtype=str)]
    for path in csvs:
        try:
            found.append(pd.read_csv(path, usecols=["prompt"], dtype=str, keep_default_na=False)["prompt"])
        except (OSError, ValueError) as error:  # other people's files; the rest serve as well
            log.warning("%s: skipped: %s", path, error)
    prompts = pd.concat(found)
    prompts = prompts[prompts.str.strip().fillna("") != ""].drop_duplicates()
    prompts = prompts.iloc[:: -(-len(prompts) // MOST_PROMPTS) or 1].tolist()
    if not prompts:
        raise UserError(f"no prompts in {', '.join(map(str, csvs))}; attach metadata, embeddings or a checkpoint")
    log.info("mean embedding of %d prompts of %s", len(prompts), ", ".join(map(str, csvs)))
    return Predictor(metrics.unit(text_encoder.encode(prompts).mean(0)))


def ladder(run: Run, caption: str, ranker: str) -> list[Rung]:
    """What else can predict, best first: kNN, CLIP Interrogator, the mean of what prompts there are.

    Looked for among the attached Kaggle inputs, in the run and where weights are; nothing is downloaded.

    Args:
        run: The run.
        caption, ranker: CLIP Interrogator's models.
    """
    rungs = []
    for folder in run.stored_embeddings():
        way: Callable[[], Predictor] = partial(predictors.load, folder)
        rungs.append(Rung(f"kNN over {folder}", {str(folder): way}, [1.0], embeddings.files(folder)))
    if all(found := weights.interrogator_at_hand(caption, ranker)):
        files = [path for path in found if path and path.is_file()]
        said = partial(interrogator, caption, ranker)
        own = "" if (caption, ranker) == (weights.CAPTION, weights.RANKER) else f" {caption} {ranker}"
        what = f"captions by {caption}" if weights.captions_alone(caption) else f"CLIP Interrogator{own}"
        rungs.append(Rung(what, {f"interrogator{own}": said}, [1.0], files))
    csvs = [path for path in [*kaggle_inputs("*.csv"), run.metadata] if metadata.has_prompts(path)]
    if csvs:
        what = f"the mean embedding of the prompts in {len(csvs)} CSV files"
        rungs.append(Rung(what, {"mean": partial(prompt_mean, csvs)}, [1.0], csvs))
    return rungs


def climb(
    rungs: list[Rung], files: list[Path], viewing: Viewing, engine: EngineConfig, work: Path, hours: float, strict: bool
) -> tuple[Rung, list[Seen], list[Predictor], list[int]]:
    """Predicts with the first rung that works.

    Args:
        rungs: Ways to predict, best first.
        files: Image files.
        viewing, engine: How to look at them, and who does the work.
        work: Folder for finished blocks.
        hours: After so many hours of this process the rest is not predicted; 0: never.
        strict: Whether a failure ends it, instead of leading to the next rung.

    Returns:
        The rung; what each of its predictors saw, NaN in the rows of images that cannot be read or were not reached;
        the predictors, without what they look with; how many images each of them reached.
    """
    deadline = Deadline(hours)
    for place, rung in enumerate(rungs):
        found, used, reached = [], [], []
        try:
            for name, load in rung.load.items():
                predictor = load()
                forecast.tell(name, predictor, len(files), viewing, deadline)
                begin = partial(start, load if engine.engine == "ray" else predictor, viewing)
                blocks = make_folder(work / hashlib.sha256(f"seen {name}".encode()).hexdigest()[:16])
                seen, count = predict_resumed(begin, files, engine, blocks, deadline)
                found.append(seen)
                reached.append(count)
                used.append(replace(predictor, encoders=[]))
                del predictor, begin  # before the next one is loaded
        except Exception as error:
            if strict or rung is rungs[-1]:
                raise
            said = " ".join(str(error).split()) or type(error).__name__
            log.warning("%s: failed (%s); next: %s", rung.what, said, rungs[place + 1].what)
            continue
        return rung, found, used, reached
    raise UserError("nothing to predict from; run finetune first, or attach a checkpoint, embeddings or prompts")
