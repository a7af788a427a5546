"""What each option of finetune brings on the embedded profile: one option changed at a time, three seeds each.

python benchmarks/ablation.py [--run runs/default] [--seeds 3] [--only NAME...]      after `make run`

Appends to benchmarks/ablation.json and prints a table: mean cosine on the validating fold (best epoch), on held-out
scenes of groups never seen, and on the same scenes drawn by the second hand (OpenMoji). An option that is already
measured is not run again; those that are gone since (git log) keep their figures in the file, and those of before the
peak rate of 4e-3 say "at 5e-4". All else is as `BASE`, with which the file's figures were measured. Frozen features are
computed once per image size and shared.
"""

from __future__ import annotations

import argparse
import functools
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from image_to_prompts import finetune, profiles, render
from image_to_prompts.data import metadata
from image_to_prompts.data.rows import ImageRows
from image_to_prompts.models import checkpoints, metrics, text_encoder
from image_to_prompts.run import progress
from image_to_prompts.run.files import make_folder, write_json
from image_to_prompts.run.folders import Run
from image_to_prompts.training import frozen_features

# Two recipes and what tells one from the other, for a run of many scenes (`image-to-prompts run --count 18000`), small
# images, so that a whole tower can train, and 3,000 steps. Peaks are to each other as in the recipes (1 to 2), so are
# the floor and the peak; the moving average reaches over a sixth of the training, as .9998 does over 30,000 steps.
_SMALL = {"image_size": 128, "epochs": 7, "learning_rate": 5e-4, "warm_up": 0}
_REFERENCE = {**_SMALL, "cycles": 2}
_AVERAGE = {"ema": 0.998}
_DECAY = {"layer_decay": 0.4, "lowest_rate": 1e-5}
_PEAK = {"warm_up": 500, "learning_rate": 1e-3}
_AUGMENTED = {"augment": True, "cache_features": False}
_WHOLE = {"train_from": 0, "cache_features": False}
BASE = {"train_from": -1, "learning_rate": 4e-3}  # of `embedded` before it trained a larger part
VARIANTS: dict[str, dict[str, Any]] = {
    "baseline": {},
    "batch 64": {"batch_size": 64},
    "6 epochs": {"epochs": 6},
    "augmentation": _AUGMENTED,
    "rate 5e-4": {"learning_rate": 5e-4, "warm_up": 0},
    "rate 2e-3": {"learning_rate": 2e-3, "warm_up": 0},
    "rate 2e-3, warm-up 60": {"learning_rate": 2e-3},
    "rate 4e-3": {"warm_up": 0},
    "rate 8e-3, warm-up 60": {"learning_rate": 8e-3},
    "256 px": {"image_size": 256},
    "288 px": {"image_size": 288},
    "two images a prompt": {"rendered": "both"},
    "two stages": {"first": {"rendered": "second"}},
    "reference": _REFERENCE,
    "reference, one cycle": _SMALL,
    "one cycle, average": {**_SMALL, **_AVERAGE},
    "one cycle, average .9998": {**_SMALL, "ema": 0.9998},
    "one cycle, decay": {**_SMALL, **_DECAY},
    "one cycle, warm-up to twice the peak": {**_SMALL, **_PEAK},
    "one cycle, augmentation": {**_SMALL, **_AUGMENTED},
    "one cycle, whole tower": {**_SMALL, **_WHOLE},
    "vit-b": {**_SMALL, **_AVERAGE, **_DECAY, **_PEAK, **_AUGMENTED, **_WHOLE},
}


@functools.cache
def _encoded(prompts: tuple[str, ...]) -> np.ndarray:
    return _encode(prompts)


_encode, text_encoder.encode = text_encoder.encode, lambda prompts, work=None: _encoded(tuple(prompts))


def pictures(run: Run, which: str, folder: Path) -> dict[str, Any]:
    """Settings that train on the run's pictures, on each prompt's second picture, or on both."""
    if which == "own":
        return {"images": (run.train_images,)}
    out = make_folder(folder / "two")
    manifest = render.run(
        profiles.default_config("render", run, "embedded", metadata=run.train_metadata, out=out, seeds=2)
    )
    if which == "second":
        manifest = manifest[manifest["image_name"].str.contains("-1.", regex=False)]
    metadata.write_table(folder / f"{which}.csv", manifest)
    return {"images": (out,), "metadata": (folder / f"{which}.csv",)}


def train(run: Run, seed: int, overrides: dict[str, Any], features: Path, out: Path) -> float:
    """Trains into `out`, with frozen features shared in `features`; returns the best validation score."""
    overrides = BASE | overrides
    which = overrides.pop("rendered", "own")
    original = frozen_features.features

    def shared(model, images, only, stages, device, work, cache, *rest, **named):
        name = f"{which}-{images.size}-{cache}-{overrides['train_from']}-{'init' not in overrides}"
        return original(model, images, only, stages, device, make_folder(features / name), cache, *rest, **named)

    frozen_features.features = shared
    try:
        values = {"out": out, "seed": seed, **pictures(run, which, features), **overrides}
        return float(finetune.run(profiles.default_config("finetune", run, "embedded", **values))["cosine"].max())
    finally:
        frozen_features.features = original


def measure(run: Run, seed: int, overrides: dict[str, Any], features: Path) -> dict[str, float]:
    """Trains once, in one stage or two, and scores on the run's held-out scenes."""
    overrides = dict(overrides)
    with tempfile.TemporaryDirectory() as name:
        folder, start = Path(name), time.perf_counter()
        if first := overrides.pop("first", None):
            train(run, seed, first, features, folder / "first")
            overrides["init"] = folder / "first"
        found = {"validation": train(run, seed, overrides, features, folder / "c")}
        found["seconds"] = time.perf_counter() - start
        checkpoint = checkpoints.load(folder / "c")
    size = checkpoint.spec.image_size
    for name in ("test", "test-openmoji"):
        manifest = metadata.read_table(run.test_images.with_name(name) / "manifest.csv", ("file", "prompt"))
        images = ImageRows([run.test_images.with_name(name) / file for file in manifest["file"]], size)
        predicted = metrics.extract(checkpoint.model, images, 32, torch.device("cpu"))
        found[name] = metrics.mean_cosine(predicted, text_encoder.encode(manifest["prompt"].tolist()))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/default"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--only", nargs="*", default=list(VARIANTS))
    parser.add_argument("--features", type=Path, default=Path(tempfile.gettempdir()) / "ablation-features")
    options = parser.parse_args()
    progress.set_quiet(True)
    results = json.loads(options.out.read_text()) if options.out.is_file() else {}
    for seed in range(options.seeds):
        for name in options.only:
            done = results.setdefault(name, {})
            if str(seed) not in done:
                done[str(seed)] = measure(Run(options.run), seed, VARIANTS[name], options.features)
                write_json(options.out, results)
                print(name, seed, {key: round(value, 4) for key, value in done[str(seed)].items()}, flush=True)
    table = []
    for name, seeds in results.items():
        row: dict[str, str] = {"option": name, "seeds": str(len(seeds))}
        for key in ("validation", "test", "test-openmoji"):
            values = np.array([seed[key] for seed in seeds.values()])
            row[key] = f"{values.mean():.4f} ± {values.std(ddof=1) if len(values) > 1 else 0:.4f}"
        table.append(row)
    print(pd.DataFrame(table).to_string(index=False))


if __name__ == "__main__":
    main()
