"""Every stage, killed with SIGKILL at several moments and started again, ends with the files of an undisturbed run."""

import contextlib
import importlib
import itertools
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from image_to_prompts import metadata

CHANGES = (1, 2, 4, 8, 3, 16)  # kill when the run's folders have changed this often
STAGES = {
    "generate": {"count": 3000, "batch_size": 16},
    "magicprompt": {"source": "magicprompt", "count": 48, "batch_size": 4},
    "collect": {"source": "table"},
    "dedupe": {},
    "render": {"workers": 2},
    "render-sd2": {"backend": "sd2", "steps": 2, "batch_size": 2},
    "finetune": {"epochs": 3, "image_size": 64, "learning_rate": 2e-4},
    "finetune-uncached": {"epochs": 3, "image_size": 64, "cache_features": False, "precision": "fp32"},
    "embed": {"image_size": 64, "encoders": ("timm:tf_efficientnet_lite0", "classes")},
    "ensemble": {"epochs": 3, "save_minutes": 0},
    "infer": {"batch_size": 4},
    "describe": {"batch_size": 4, "views": ("whole",)},
}

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(
    ["torch", "transformers", "sentence_transformers", "diffusers", "timm", "faiss", "accelerate", "pandas"]
)


def work(stage: str, run: Path, values: dict) -> None:
    """One run of a stage in a process of its own, with one thread so that floating point is reproducible."""
    import torch

    from image_to_prompts import describer, embed, predictors, profiles, text_cache, text_encoder, workspace
    from image_to_prompts.render.scenes import SceneBackend
    from image_to_prompts.sources import readers

    torch.set_num_threads(1)
    text_encoder.BLOCK, predictors.BLOCK, embed.BLOCK, SceneBackend.block, readers.BLOCK = 16, 8, 8, 4, 8
    describer.BLOCK = 8
    os.environ[text_cache.FOLDER] = str(cache_of(run))
    stages = {
        "generate": "generate",
        "magicprompt": "generate",
        "collect": "generate",
        "render-sd2": "render",
        "finetune-uncached": "finetune",
    }
    name = stages.get(stage, stage)
    if stage == "describe":
        values = {**values, "out": run / "prompts.csv"}
    config = profiles.default_config(name, workspace.open_run(run, "embedded"), "embedded", **values)
    importlib.import_module(type(config).__module__).run(config)


def cache_of(run: Path) -> Path:
    """Each run has a cache of texts of its own."""
    return run.with_name(f"{run.name}-cache")


def start(stage, run, values):
    process = context.Process(target=work, args=(stage, run, values))
    process.start()
    return process


def listing(folder: Path) -> list[tuple[str, int]]:
    """Names and sizes; a file that is renamed or deleted while its folder is being listed is left out."""
    found = []
    for path in sorted(folder.rglob("*")):
        with contextlib.suppress(FileNotFoundError):
            found.append((str(path), path.stat().st_size))
    return found


def kill_after(process, folder: Path, changes: int) -> bool:
    """Kills a process once its folder, or its cache of texts, has changed so often; False if it ended before."""
    before, seen = None, -1
    while process.is_alive():
        now = listing(folder) + listing(cache_of(folder))
        if now != before:
            before, seen = now, seen + 1
        if seen >= changes:
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            return True
        time.sleep(0.002)
    process.join()
    return False


def kill_often(stage: str, values: dict, folder: Path, kills: int, attempt: Callable[..., bool]) -> Path:
    """Kills runs and starts them again; one that gets through is compared with the undisturbed one and begun anew.

    Args:
        stage: Of `STAGES`.
        values: Its settings.
        folder: Holds `whole`, an undisturbed run.
        kills: How many at least.
        attempt: Gets a process and its folder; returns whether it has killed the process.

    Returns:
        The last folder, whose run got through after the last kill.
    """
    expected, killed, rounds = contents(folder / "whole"), 0, 0
    while True:
        torn = folder / f"torn{rounds}"
        process = start(stage, torn, values)
        if killed < kills and attempt(process, torn):
            killed += 1
            continue
        process.join()
        assert process.exitcode == 0
        assert contents(torn) == expected
        if killed >= kills:
            return torn
        rounds += 1
        assert rounds < 20, f"{killed} of {kills} kills hit"


def contents(folder: Path) -> dict[str, bytes]:
    """All finished files but the stamps and the log of seconds."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".log"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if not path.name.startswith(".")}


def few_words(folder: Path) -> Path:
    """A vocabulary that is embedded in no time."""
    folder.mkdir()
    for kind in ("subjects", "mediums", "movements", "flavors", "artists"):
        (folder / f"{kind}.txt").write_text(f"a piece of {kind}\na cat with {kind}\n")
    return folder


def leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.rglob(".*") if path.is_dir() or path.suffix == ".part"]


@pytest.mark.slow
@pytest.mark.parametrize("stage", list(STAGES))
def test_killed_and_started_again(stage, small_run, small_checkpoint, small_embeddings, tiny_gpt2, tiny_sd2, tmp_path):
    values = dict(STAGES[stage])
    few = tmp_path / "few.csv"
    metadata.write_table(few, metadata.read(small_run.metadata).head(10))
    values |= {
        "magicprompt": {"weights": tiny_gpt2},
        "collect": {"input": (str(small_run.prompts),)},
        "dedupe": {"prompts": (small_run.prompts,)},
        "render": {"metadata": small_run.metadata},
        "render-sd2": {"metadata": few, "weights": tiny_sd2},
        "finetune": {"metadata": (small_run.metadata,), "images": (small_run.images,)},
        "finetune-uncached": {"metadata": (small_run.metadata,), "images": (small_run.images,)},
        "embed": {"images": (small_run.images,)},
        "ensemble": {"embeddings": small_embeddings},
        "infer": {"images": small_run.images, "checkpoint": (small_checkpoint,)},
        "describe": {
            "paths": (small_run.images,),
            "checkpoint": (small_checkpoint,),
            "prompts": (small_run.metadata,),
            "vocabulary": few_words(tmp_path / "words"),
        },
    }.get(stage, {})

    whole = start(stage, tmp_path / "whole", values)
    whole.join()
    assert whole.exitcode == 0
    assert len(contents(tmp_path / "whole")) > 1  # run.json and what the stage makes

    changes = itertools.cycle(CHANGES)
    torn = kill_often(stage, values, tmp_path, 5, lambda process, run: kill_after(process, run, next(changes)))
    stamps = [path.stat().st_mtime_ns for path in torn.rglob(".*.done")]
    again = start(stage, torn, values)
    again.join()
    assert [path.stat().st_mtime_ns for path in torn.rglob(".*.done")] == stamps
    # Half-written files of killed processes may stay, but nothing takes them for images or tables.
    assert all(path.name.startswith(".") for path in leftovers(torn))


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "kills"), [("render", 24), ("render-sd2", 8)])
def test_shards_killed_at_random_moments(stage, kills, small_run, tiny_sd2, tmp_path):
    """Kills by the clock and at changes of the folder; a run that gets through is compared and begun anew."""
    rng = random.Random(stage)
    csv = tmp_path / "rows.csv"
    metadata.write_table(csv, metadata.read(small_run.metadata).head(40 if stage == "render" else 12))
    values = {"metadata": csv, "per_tar": 7, "seeds": 2} | STAGES[stage]
    if stage == "render-sd2":
        values |= {"weights": tiny_sd2, "per_tar": 5}
    begun = time.monotonic()
    whole = start(stage, tmp_path / "whole", values)
    whole.join()
    seconds = time.monotonic() - begun
    expected = contents(tmp_path / "whole")
    assert whole.exitcode == 0 and sum(name.endswith(".tar") for name in expected) >= 5

    def attempt(process, torn: Path) -> bool:
        if rng.random() < 0.5:
            return kill_after(process, torn, rng.randint(1, 12))
        process.join(rng.uniform(0.3, 1) * seconds)
        hit = process.is_alive()
        process.kill()
        process.join()
        return hit

    kill_often(stage, values, tmp_path, kills, attempt)
