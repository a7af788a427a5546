"""What the notebooks need: opening a run, stages on every GPU, and what the next session does."""

import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from . import pipeline
from .kaggle import mounts
from .profiles import DECIDING, StageConfig, default_config
from .run import progress
from .run.devices import cores
from .run.errors import UserError
from .run.folders import MANIFEST, Run, default_run, on_kaggle, open_run, profile_of
from .run.resume import is_finished

log = logging.getLogger(__name__)
PREFIX = "image-to-prompts: "  # of what a command says at its end
LAUNCH = (
    *("--multi_gpu", "--num_machines", "1", "--main_process_port", "0"),
    *("--mixed_precision", "no", "--dynamo_backend", "no"),  # a stage sets its own; without these two it would warn
)
FOLDS = 50  # of a set of pairs: 2 % of tens of thousands validate


def start(folder: str | Path | None = None, profile: str | None = None) -> tuple[Run, str]:
    """Opens a run: `folder` or the default one, with `profile` or the run's own; on Kaggle it logs what is attached.

    Returns:
        The run and its profile.
    """
    progress.show_log()
    if on_kaggle():
        log.info("%s", mounts.table())
    folder = Path(folder) if folder else default_run()
    profile = profile_of(folder, profile)
    return open_run(folder, profile), profile


def attached_pairs() -> list[Path]:
    """Where the public sets of pairs are attached, in the order of `pipeline.PAIRS`."""
    attached = {mount.name: mount for mount in mounts.find()}
    names = [one.rpartition("/")[2] for one in pipeline.PAIRS]
    return [attached[name] for name in names if name in attached]


def training_rows(run: Run, profile: str) -> dict[str, tuple[Path, ...]]:
    """What to train on: the rendered images, and the public sets of pairs (`pipeline.PAIRS`) that are attached.

    Every set is collected and deduplicated, against the rendered rows and the sets before it, too.

    Returns:
        `images` and `metadata` as `finetune` and `embed` take them.
    """
    sides = [run.rendered(side) for side in (run.train_images, run.test_images)]
    train, test = ([folder for folder in side if (folder / MANIFEST).is_file()] for side in sides)
    rows = {folder: folder / MANIFEST for folder in train}
    for mount in attached_pairs():
        collected, kept = (folder / f"{mount.name}.csv" for folder in (run.prompts.parent, run.metadata.parent))
        against = (*rows.values(), *(folder / MANIFEST for folder in test))
        said = {"name": mount.name, "input": (str(mount),), "out": collected}
        try:
            stage_run("generate")(default_config("generate", run, profile, source="pairs", **said))
            options = {"prompts": (collected,), "against": against, "out": kept, "folds": FOLDS}
            frame = stage_run("dedupe")(default_config("dedupe", run, profile, **options))
        except UserError as error:
            log.warning("%s: left out: %s", mount.name, error)
            continue
        log.info("%s: %d pairs to train on", mount.name, len(frame))
        rows[mount] = kept
    if not rows:
        return {"images": run.rendered(run.train_images)}
    return {"images": tuple(rows), "metadata": tuple(rows.values())}


def stage_run(stage: str) -> Callable[[Any], Any]:
    """The function `run` of a stage."""
    return pipeline.load(f"{stage}:run")


def run(config: StageConfig, processes: int | None = None) -> None:
    """Runs a stage, with one process a GPU where there are several; what it found lies in its files.

    A notebook cannot become several processes, so these are started as `accelerate launch` starts them.

    Args:
        config: The stage's settings.
        processes: How many processes; None: one a GPU.

    Raises:
        UserError: As the stage.
    """
    import torch
    from accelerate.utils.memory import clear_device_cache

    stage = _name(config)
    processes = processes or max(1, torch.cuda.device_count())
    if processes == 1:
        stage_run(stage)(config)
        return
    if hours := getattr(config, "max_hours", 0):  # of this session, in which the processes start late
        config = replace(config, max_hours=max(1e-6, hours - (time.monotonic() - progress.BEGUN) / 3600))  # type: ignore[call-arg]
    clear_device_cache(garbage_collection=True)  # a dry run leaves gigabytes on the first GPU, where a process starts
    words = [stage, *arguments(stage, config)]
    log.info("%d processes: image-to-prompts %s", processes, " ".join(words))
    argv = [sys.executable, "-m", "accelerate.commands.launch", *LAUNCH, "--num_processes", str(processes)]
    env = {"OMP_NUM_THREADS": str(max(1, cores() // processes)), **os.environ}
    said = ""
    with subprocess.Popen(
        [*argv, "-m", "image_to_prompts", *words], env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as started:
        for line in started.stdout or ():
            sys.stderr.write(line)
            said = line.removeprefix(PREFIX).strip() if line.startswith(PREFIX) else said
    if started.returncode:
        raise UserError(said or f"{stage}: one of {processes} processes failed; see above")


def arguments(stage: str, config: StageConfig) -> Iterator[str]:
    """The words of the command line that give the settings `config`."""
    chosen = {one: given for one in DECIDING if (given := getattr(config, one, ""))}
    default = default_config(stage, Run(config.run), config.profile, **chosen)
    yield from ("--run", str(config.run), "--profile", config.profile)
    for name, given in chosen.items():
        yield from (f"--{name}", given)
    for name in (one.name for one in fields(config) if one.name not in ("run", "profile")):
        value: Any = getattr(config, name)
        if value == getattr(default, name):
            continue
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            yield f"--{flag}" if value else f"--no-{flag}"
            continue
        yield f"--{flag}"
        yield from map(str, value if isinstance(value, tuple) else [value])


def outlook(config: StageConfig) -> str:
    """What the next session does, for the last cell of a stage's notebook."""
    stage = pipeline.stage(_name(config))
    out: Path = config.out  # type: ignore[attr-defined]
    if stage.name == "render":
        finished = not pipeline.load("render:left")(config)
    else:
        stamps = (out / f".{stage.name}.done", out.with_name(f".{out.stem}.done"))
        finished = any(is_finished(stamp) for stamp in stamps)
    if finished:
        following = [one.notebook for one in pipeline.STAGES if one.number == stage.number + 1]
        return f"All done. Next: {following[0]}"
    again = "run this notebook again"
    if on_kaggle():
        can = stage.name in pipeline.CONTINUED
        again = f"image-to-prompts kaggle push {stage.name} --continue" if can else "ask for less, or go on with these"
    return f"Stopped at the limit of this session. Next: {again}"


def _name(config: StageConfig) -> str:
    return type(config).__module__.rpartition(".")[2]
