"""The whole chain in one go on the embedded profile, with a report and an honest score: what `make run` calls.

generate, dedupe, hold two folds out, render both sides, finetune, embed, ensemble, infer on the held-out images with
both models, score beside the constant, kNN and ceiling; the same on the held-out prompts drawn by a second hand
(OpenMoji) never trained on.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from .. import dedupe, embed, ensemble, finetune, generate, infer, profiles, render
from ..data import metadata, pictures
from ..models import checkpoints, metrics, text_encoder
from ..pipeline import announce
from ..run.errors import UserError
from ..run.files import write_json
from ..run.folders import Run, open_run, profile_of
from ..run.resume import Stamp
from ..training import frozen_features
from .ceiling import ceiling_score, skill

log = logging.getLogger(__name__)
TEST_FOLDS = (1, 2)
SHOWN_STRIPS = 6


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


class Clock:
    """Seconds and rows of each step, kept in a log so that a second run can show them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.table: dict[str, dict[str, float]] = json.loads(path.read_text()) if path.is_file() else {}

    def __call__(self, name: str, stamp: Path, step: Callable[[], Any], rows: Callable[[Any], int]) -> Any:
        """Runs `step`; notes its time only if it renewed its stamp, that is, if it did anything."""
        before = stamp.stat().st_mtime_ns if stamp.is_file() else None
        start = time.perf_counter()
        result = step()
        if not stamp.is_file() or stamp.stat().st_mtime_ns != before:
            self.table[name] = {"seconds": round(time.perf_counter() - start, 1), "rows": int(rows(result))}
            write_json(self.path, self.table)
        return result


def score_line(scores: dict[str, float]) -> str:
    """`score ... constant ... knn ... ceiling ... skill ...`."""
    return (
        f"score {scores['score']:.4f} constant {scores['constant']:.4f} knn {scores['knn']:.4f} "
        f"ceiling {scores['ceiling']:.4f} skill {scores['skill']:.2f}"
    )


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
    count = config.count or (450 if config.quick else 3800)
    run_ = open_run(folder, "embedded")
    Stamp(folder / ".timings.done", "run", {}).claim([folder / "timings.json"])
    clock = Clock(folder / "timings.json")

    def settings(stage: str, **overrides: Any) -> Any:
        announce(stage)
        return profiles.default_config(stage, run_, "embedded", quiet=config.quiet, **overrides)

    generated = folder / "prompts" / ".generated.done"
    clock("generate", generated, lambda: generate.run(settings("generate", count=count)), len)
    kept = clock("dedupe", run_.metadata.with_name(".prompts.done"), lambda: dedupe.run(settings("dedupe")), len)
    train_csv, test_csv = run_.train_metadata, run_.test_metadata
    _, test = dedupe.hold_out(kept, TEST_FOLDS, train_csv, test_csv)
    images = {
        "train": run_.train_images,
        "test": run_.test_images,
        "test-openmoji": run_.images.with_name("test-openmoji"),
    }
    for name, out in images.items():
        family = "openmoji" if name.endswith("openmoji") else "twemoji"
        csv = train_csv if name == "train" else test_csv
        stage = settings("render", metadata=csv, out=out, family=family)
        clock(f"render {name}", out / "manifest.csv", lambda stage=stage: render.run(stage), len)

    epochs = config.epochs or (2 if config.quick else None)
    stage = settings("finetune", images=(images["train"],))
    stage.epochs = epochs or stage.epochs
    done = run_.checkpoint / ".finetune.done"
    train_rows = len(kept) - len(test)
    clock("finetune", done, lambda: finetune.run(stage), lambda history: history["epoch"].max() * train_rows)

    stage = settings("embed", images=(images["train"],))
    clock("embed", run_.embeddings / ".embed.done", lambda stage=stage: embed.run(stage), lambda found: train_rows)
    stage = settings("ensemble", **({"epochs": 2} if config.quick else {}))
    clock("ensemble", run_.ensemble / ".ensemble.done", lambda stage=stage: ensemble.run(stage), lambda _: train_rows)

    checkpoints = (run_.checkpoint, run_.ensemble)
    predictions = {}
    for name in ("test", "test-openmoji"):
        out = run_.submission if name == "test" else run_.submission.with_name("openmoji.csv")
        stage = settings("infer", images=images[name], checkpoint=checkpoints, out=out, key=test_csv, bank=train_csv)
        stamp = out.with_name(f".{out.stem}.done")
        step = clock(f"infer {name}", stamp, lambda stage=stage: infer.run(stage), lambda found: len(found.files))
        predictions[name] = step

    inputs = [*(folder / "model.safetensors" for folder in checkpoints), test_csv, run_.submission, train_csv]
    stamp = Stamp(run_.report / ".report.done", "run", {}, inputs)
    if not stamp.is_current():
        step = lambda: _evaluate(run_, predictions, images, test, stamp, settings)  # noqa: E731
        clock("evaluate and report", stamp.path, step, lambda _: len(test))
    scores = json.loads((run_.report / "scores.json").read_text())
    width = max(map(len, clock.table))
    lines = [f"{'stage':{width}}  seconds   rows"]
    lines += [f"{name:{width}}  {t['seconds']:7.1f}  {t['rows']:5d}" for name, t in clock.table.items()]
    lines += [f"pictures in {run_.report}, submission in {run_.submission}"]
    alone = ", ".join(f"{name} {score:.4f}" for name, score in scores["test"]["alone"].items())
    lines += [f"alone: {alone}; blended {scores['test']['score']:.4f}"]
    lines += [f"OpenMoji, never trained on: {score_line(scores['test-openmoji'])}", score_line(scores["test"])]
    return "\n".join(lines)


def _evaluate(
    run_: Run,
    predictions: dict[str, infer.Prediction],
    images: dict[str, Path],
    test: pd.DataFrame,
    stamp: Stamp,
    settings: Callable[..., Any],
) -> None:
    """Scores both drawing families, renders the nearest prompts again and draws the report."""
    checkpoint = checkpoints.load(run_.checkpoint)
    truth = dict(zip(test["image_name"], test["prompt"], strict=True))
    prompts = [truth[file.name] for file in predictions["test"].files]
    targets = text_encoder.encode(prompts)
    ceiling = ceiling_score(prompts, targets)
    scores = {}
    for name, found in predictions.items():
        knn = frozen_features.knn_score(
            run_.checkpoint, checkpoint.spec, checkpoint.config["metrics"]["knn_k"], found.files, targets
        )
        scores[name] = {"score": found.score, "constant": found.constant, "knn": knn, "ceiling": ceiling}
        scores[name]["alone"] = {Path(folder).name: score for folder, score in found.alone.items()}
        scores[name]["skill"] = skill(found.score, found.constant, ceiling)
    folder, found = run_.report, predictions["test"]
    names = ("strips", "gallery", "cosines", "history", "ensemble", "threshold")
    predicted_csv = run_.metadata.with_name("predicted.csv")
    strip_files = [folder / "strips" / f"{file.stem}.png" for file in found.files]
    outputs = [folder / "scores.json", *(folder / f"{name}.png" for name in names), *strip_files, predicted_csv]
    stamp.claim(outputs)
    write_json(folder / "scores.json", scores)

    nearest = found.prompts["prompt"].tolist()
    cosines = (metrics.unit(text_encoder.encode(nearest)) * targets).sum(1)
    names = [file.name for file in found.files]
    seeds = test.set_index("image_name")["seed"].loc[names].tolist()
    metadata.write_table(predicted_csv, pd.DataFrame({"image_name": names, "prompt": nearest, "seed": seeds}))
    again = run_.folder / "images" / "predicted"
    render.run(settings("render", metadata=predicted_csv, out=again))

    strips = [
        pictures.strip(file, prompt, cosine, near, again / file.name)
        for file, prompt, cosine, near in zip(found.files, prompts, cosines, nearest, strict=True)
    ]
    for file, picture in zip(strip_files, strips, strict=True):
        pictures.save(picture, file)
    order = np.argsort(-cosines)
    chosen = order[np.linspace(0, len(order) - 1, min(SHOWN_STRIPS, len(order))).astype(int)]
    pictures.save(pictures.grid([strips[i] for i in chosen], 2), folder / "strips.png")
    manifest = metadata.read_table(images["test"] / "manifest.csv", ("file", "prompt"))
    pictures.save(pictures.gallery(manifest, images["test"]), folder / "gallery.png")
    own = (found.vectors * targets).sum(1)
    pictures.histogram(own, targets @ checkpoint.mean, folder / "cosines.png")
    shutil.copyfile(run_.checkpoint / "history.png", folder / "history.png")
    shutil.copyfile(run_.ensemble / "history.png", folder / "ensemble.png")
    shutil.copyfile(dedupe.picture_path(run_.metadata), folder / "threshold.png")
    stamp.write(outputs)
