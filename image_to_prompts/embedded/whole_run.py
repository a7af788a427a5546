"""The whole chain in one go on the embedded profile, with a report and an honest score: what `make run` calls.

generate, dedupe, hold two folds out, render both sides, finetune, embed, ensemble, a bank of prompts, infer on the
held-out images with both models and the bank, score beside the constant, kNN and ceiling; the same on the held-out
prompts drawn with OpenMoji, which no model was trained on.
"""

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from .. import dedupe, infer, pipeline, profiles, render
from ..data import metadata, pictures
from ..encode import embeddings
from ..models import checkpoints, metrics, text_encoder
from ..run.errors import UserError
from ..run.files import write_json
from ..run.folders import MANIFEST, open_run, profile_of
from ..run.resume import Stamp
from ..training import frozen_features
from .ceiling import ceiling_score, skill

TEST_FOLDS = (1, 2)
SHOWN_STRIPS = 6
FEATURES = "timm-tf_efficientnet_lite2"  # array of `embed` on which the dual encoder stands
SEED = 1  # of the bank's new prompts


@dataclass
class Config:
    """Runs the whole chain on the embedded profile and reports; does only what is not done yet."""

    run: Path | None = None
    """Folder for everything; left out: runs/default, with --quick runs/quick."""
    quick: bool = False
    """A few hundred prompts and two epochs, to see it work."""
    count: int | None = None
    """How many prompts to write; left out: 3,800, with --quick 450."""
    epochs: int | None = None
    """Passes over the training rows; left out: the profile's, with --quick 2."""
    quiet: bool = False
    """No progress bars."""


class Chain:
    """The stages in one run's folder, and the seconds and rows of each, which a second run shows again."""

    def __init__(self, config: Config, folder: Path) -> None:
        self.config, self.run, self.path = config, open_run(folder, "embedded"), folder / "timings.json"
        Stamp(folder / ".timings.done", "run", {}).claim([self.path])
        self.table: dict[str, dict[str, float]] = json.loads(self.path.read_text()) if self.path.is_file() else {}

    def __call__(self, stage: str, which: str = "", rows: Callable[[Any], int] = len, **flags: Any) -> Any:
        """Runs a stage with some flags; its time counts only if it renewed its stamp, that is, if it did anything."""
        pipeline.announce(stage)
        config = profiles.default_config(stage, self.run, "embedded", quiet=self.config.quiet, **flags)
        stamp = config.out.with_name(f".{config.out.stem}.done")
        if not config.out.suffix:  # a folder
            stamp = config.out / (MANIFEST if stage == "render" else f".{stage}.done")
        before, begun = _changed(stamp), time.perf_counter()
        result = pipeline.load(f"{stage}:run")(config)
        if _changed(stamp) != before:
            self.note(f"{stage} {which}".strip(), begun, int(rows(result)))
        return result

    def note(self, name: str, begun: float, rows: int) -> None:
        """Keeps the seconds since `begun`."""
        self.table[name] = {"seconds": round(time.perf_counter() - begun, 1), "rows": rows}
        write_json(self.path, self.table)


def _changed(path: Path) -> int:
    return path.stat().st_mtime_ns if path.is_file() else 0


def score_line(scores: dict[str, float]) -> str:
    """`score ... constant ... knn ... ceiling ... skill ...`."""
    named = " ".join(f"{name} {scores[name]:.4f}" for name in ("score", "constant", "knn", "ceiling"))
    return f"{named} skill {scores['skill']:.2f}"


def run(config: Config) -> str:
    """Runs the chain.

    Returns:
        What to print: a table of steps, the OpenMoji line and, last, the score line.

    Raises:
        UserError: As the stages do, or if the run's folder belongs to another profile.
    """
    folder = config.run or Path("runs/quick" if config.quick else "runs/default")
    if profile_of(folder, None if (folder / "run.json").is_file() else "embedded") != "embedded":
        raise UserError(f"{folder} holds a run of another profile; choose another --run folder")
    chain = Chain(config, folder)
    of = chain.run
    chain("generate", count=config.count or (450 if config.quick else 3800))
    kept = chain("dedupe")
    _, test = dedupe.hold_out(kept, TEST_FOLDS, of.train_metadata, of.test_metadata)
    openmoji = of.images.with_name("test-openmoji")
    chain("render", "train", metadata=of.train_metadata, out=of.train_images)
    chain("render", "test", metadata=of.test_metadata, out=of.test_images)
    chain("render", "test-openmoji", metadata=of.test_metadata, out=openmoji, family="openmoji")

    few: dict[str, Any] = {"epochs": 2} if config.quick else {}
    train, epochs = len(kept) - len(test), {"epochs": config.epochs} if config.epochs else few
    chain("finetune", rows=lambda history: history["epoch"].max() * train, images=(of.train_images,), **epochs)
    chain("embed", rows=lambda _: train, images=(of.train_images,))
    chain("ensemble", rows=lambda _: train, **few)

    models = (of.checkpoint, of.ensemble)
    pairs = _bank(chain, 1500 if config.quick else 9000)
    every: dict[str, Any] = {"checkpoint": models, "key": of.test_metadata, "bank": (of.train_metadata, of.bank)}
    every["pairs"] = (pairs,)
    outs = {"test": of.submission, "test-openmoji": of.submission.with_name("openmoji.csv")}
    folders = {"test": of.test_images, "test-openmoji": openmoji}
    found = {
        name: chain("infer", name, rows=lambda one: len(one.files), images=folders[name], out=out, **every)
        for name, out in outs.items()
    }
    inputs = [*(one / "model.safetensors" for one in models), of.test_metadata, of.submission, of.train_metadata]
    stamp, begun = Stamp(of.report / ".report.done", "run", {}, inputs), time.perf_counter()
    if not stamp.is_current():
        _evaluate(chain, found, test, stamp)
        chain.note("evaluate and report", begun, len(test))

    scores = json.loads((of.report / "scores.json").read_text())
    width = max(map(len, chain.table))
    lines = [f"{'stage':{width}}  seconds   rows"]
    lines += [f"{name:{width}}  {t['seconds']:7.1f}  {t['rows']:5d}" for name, t in chain.table.items()]
    lines += [f"pictures in {of.report}, submission in {of.submission}"]
    alone = ", ".join(f"{name} {score:.4f}" for name, score in scores["test"]["alone"].items())
    lines += [f"alone: {alone}; blended {scores['test']['score']:.4f}"]
    lines += [f"OpenMoji, never trained on: {score_line(scores['test-openmoji'])}", score_line(scores["test"])]
    return "\n".join(lines)


def _bank(chain: Chain, count: int) -> Path:
    """Makes a bank of the training prompts and of new ones, none near a held-out one, for a dual encoder.

    The encoder is fitted on the training rows that do not validate.

    Args:
        chain: The run.
        count: New prompts.

    Returns:
        A folder of embeddings: the dual encoder's of the validating images.
    """
    from ..search.near_pairs import NEAR, near
    from . import dual

    of, begun = chain.run, time.perf_counter()
    pairs, folder, new = of.bank.with_name("pairs"), of.checkpoints / "dual", of.bank.with_name("new.csv")
    all_new = of.prompts.with_name("bank.csv")
    chain("generate", "bank", count=count, seed=SEED, out=all_new)
    inputs = [*embeddings.files(of.embeddings), of.test_metadata, all_new]
    stamp = Stamp(of.bank.with_name(".pairs.done"), "run", {}, inputs)
    if not stamp.is_current():
        outputs = [folder / name for name in ("dual.json", "dual.safetensors")]
        outputs += [pairs / f"{name}{end}" for name in ("dual", embeddings.PROMPTS) for end in embeddings.ENDS]
        stamp.claim([*outputs, new])
        table = embeddings.load(of.embeddings, [FEATURES])
        dual.make(folder, table, FEATURES, (table.frame["fold"] == 0).to_numpy(), pairs)
        written = metadata.read_prompts(all_new)
        held_out = text_encoder.encode(metadata.read_prompts(of.test_metadata)["prompt"].tolist())
        far = ~near(text_encoder.encode(written["prompt"].tolist(), fast=True), held_out, NEAR)
        metadata.write_table(new, written[far])
        stamp.write([*outputs, new])
        chain.note("dual encoder", begun, len(table.frame))
    tower = f"dual:{folder}"
    chain(
        "embed",
        "bank",
        rows=lambda found: found[tower][0],
        texts=(of.train_metadata, new),
        encoders=(tower,),
        out=of.bank,
    )
    return pairs


def _evaluate(chain: Chain, predictions: dict[str, infer.Prediction], test: pd.DataFrame, stamp: Stamp) -> None:
    """Scores both drawing families, renders the nearest prompts again and draws the report."""
    of, found = chain.run, predictions["test"]
    checkpoint = checkpoints.load(of.checkpoint)
    rows = test.set_index("image_name").loc[[file.name for file in found.files]]
    prompts, targets = rows["prompt"].tolist(), text_encoder.encode(rows["prompt"].tolist())
    ceiling = ceiling_score(prompts, targets)
    scores: dict[str, dict[str, Any]] = {}
    for name, one in predictions.items():
        knn = frozen_features.knn_score(
            of.checkpoint, checkpoint.spec, checkpoint.config["metrics"]["knn_k"], one.files, targets
        )
        scores[name] = {"score": one.score, "constant": one.constant, "knn": knn, "ceiling": ceiling}
        scores[name]["alone"] = {Path(folder).name: score for folder, score in one.alone.items()}
        scores[name]["skill"] = skill(one.score or 0, one.constant or 0, ceiling)
    folder, predicted = of.report, of.metadata.with_name("predicted.csv")
    copies = {
        "history": of.checkpoint / "history.png",
        "ensemble": of.ensemble / "history.png",
        "threshold": dedupe.picture_path(of.metadata),
    }
    drawn = [folder / f"{name}.png" for name in ("strips", "gallery", "cosines", *copies)]
    strip_files = [folder / "strips" / f"{file.stem}.png" for file in found.files]
    outputs = [folder / "scores.json", predicted, *drawn, *strip_files]
    stamp.claim(outputs)
    write_json(folder / "scores.json", scores)

    nearest = pd.DataFrame(found.prompts)["prompt"].tolist()
    cosines = (metrics.unit(text_encoder.encode(nearest)) * targets).sum(1)
    metadata.write_table(predicted, rows.assign(prompt=nearest).reset_index()[["image_name", "prompt", "seed"]])
    again = of.folder / "images" / "predicted"
    pipeline.announce("render")
    quiet = chain.config.quiet
    render.run(profiles.default_config("render", of, "embedded", quiet=quiet, metadata=predicted, out=again))
    strips = [
        pictures.strip(file, prompt, cosine, near, again / file.name)
        for file, prompt, cosine, near in zip(found.files, prompts, cosines, nearest, strict=True)
    ]
    for file, picture in zip(strip_files, strips, strict=True):
        pictures.save(picture, file)
    chosen = np.argsort(-cosines)[np.linspace(0, len(cosines) - 1, min(SHOWN_STRIPS, len(cosines))).astype(int)]
    pictures.save(pictures.grid([strips[i] for i in chosen], 2), folder / "strips.png")
    manifest = metadata.read_table(of.test_images / MANIFEST, ("file", "prompt"))
    pictures.save(pictures.gallery(manifest, of.test_images), folder / "gallery.png")
    pictures.histogram((found.vectors * targets).sum(1), targets @ checkpoint.mean, folder / "cosines.png")
    for name, copied in copies.items():
        shutil.copyfile(copied, folder / f"{name}.png")
    stamp.write(outputs)
