"""Stage 3, render: one image a prompt, with Stable Diffusion 2 or with the embedded scene renderer.

    image-to-prompts render --metadata data_meta/x.csv --out images/x

A backend gets prompts and seeds, nothing else. Rows are rendered in fixed blocks, so that a row's picture does not
depend on what was done before; every finished image stands in a journal, from which a killed run goes on.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import pandas as pd
from PIL import Image

from .. import metadata
from ..errors import UserError
from ..files import Stamp, append_line, atomic_path, make_folder, read_journal, sha256
from ..profiles import StageConfig
from ..progress import progress

log = logging.getLogger(__name__)
Backend = Callable[[list[str], list[int]], list[tuple[Image.Image, str]]]
SCENE_BLOCK = 32


@dataclass
class Config(StageConfig):
    """Renders one image a prompt: Stable Diffusion 2 at 768 px downsized to 512, or embedded scenes."""

    metadata: Path = Path("data_meta/prompts.csv")
    """Metadata CSV: image_name, prompt and optional seed."""
    out: Path = Path("images/prompts")
    """Folder for the images and manifest.csv."""
    backend: Literal["scenes", "sd2"] = "scenes"
    """Who draws."""
    family: Literal["twemoji", "openmoji"] = "twemoji"
    """Drawing family of the embedded scenes; openmoji is for testing only."""
    weights: Path | None = None
    """Folder of the Stable Diffusion 2 weights; left out: Kaggle input, then hub."""
    steps: int = 50
    """Denoising steps (sd2)."""
    batch_size: int = 4
    """Images that Stable Diffusion renders at once."""
    workers: int = 0
    """Processes that draw embedded scenes; 0: one a core."""


def save_png(image: Image.Image, path: Path) -> str:
    """Writes a PNG atomically and returns its SHA-256."""
    with atomic_path(path) as part:
        image.save(part, "PNG", compress_level=1)
        return sha256(part)


def render_block(backend: Backend, rows: list[tuple[str, str, int]], out: Path, done: set[str]) -> list[dict]:
    """Renders a block of (image_name, prompt, seed) rows and saves those not done yet.

    Returns:
        One journal record a saved image: image_name, sha256, flag.
    """
    results = backend([prompt for _, prompt, _ in rows], [seed for _, _, seed in rows])
    return [
        {"image_name": name, "sha256": save_png(image, out / metadata.image_file(name)), "flag": flag}
        for (name, _, _), (image, flag) in zip(rows, results, strict=True)
        if name not in done
    ]


_worker_backend: Backend | None = None


def _start_worker(family: str, parent: int) -> None:
    from .scenes import SceneBackend

    def leave_with_parent() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    global _worker_backend
    _worker_backend = SceneBackend(family)
    threading.Thread(target=leave_with_parent, daemon=True).start()


def _work(rows: list[tuple[str, str, int]], out: Path) -> list[dict]:
    return render_block(_worker_backend, rows, out, set())


def _draw_scenes(config: Config, blocks: list[list[tuple[str, str, int]]], done: set[str]) -> Iterator[list[dict]]:
    """Draws with one process a core; a row needs no neighbours, so finished rows leave their blocks."""
    todo = [[row for row in block if row[0] not in done] for block in blocks]
    workers = min(config.workers or len(os.sched_getaffinity(0)), len(todo))
    if workers == 1:
        from .scenes import SceneBackend

        backend = SceneBackend(config.family)
        for rows in todo:
            yield render_block(backend, rows, config.out, set())
        return
    context = get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start_worker, (config.family, os.getpid())) as pool:
        for future in as_completed([pool.submit(_work, rows, config.out) for rows in todo]):
            yield future.result()


def _draw_diffusion(config: Config, blocks: list[list[tuple[str, str, int]]], done: set[str]) -> Iterator[list[dict]]:
    from .stable_diffusion import StableDiffusionBackend

    backend = StableDiffusionBackend(config.weights, config.steps, config.batch_size)
    for rows in blocks:
        yield render_block(backend, rows, config.out, done)


def run(config: Config) -> pd.DataFrame:
    """Runs the stage; with `accelerate launch` each process renders its share of the blocks.

    Returns:
        The manifest, as written to `<out>/manifest.csv`: image_name, prompt, seed, file, sha256, backend, flag.

    Raises:
        UserError: On bad metadata, settings or weights.
    """
    if config.batch_size < 1 or config.steps < 1 or config.workers < 0:
        raise UserError("--batch-size and --steps must be at least 1, --workers at least 0")
    frame = metadata.read(config.metadata)
    files = frame["image_name"].map(metadata.image_file)
    if files.duplicated().any():
        row = int(files.duplicated().argmax()) + 1
        raise UserError(f"{config.metadata}: row {row}: image file {files[row - 1]} would be written twice; rename it")
    manifest_path = make_folder(config.out) / "manifest.csv"
    settings = config.settings("out", "metadata", "workers", "batch_size")
    stamp = Stamp(config.out / ".render.done", settings, [config.metadata])
    if stamp.is_current():
        log.info("%s is up to date", config.out)
        return metadata.read_table(manifest_path, ("image_name",))

    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    work = stamp.work_folder("render")
    records = {r["image_name"]: r for journal in work.glob("*.jsonl") for r in read_journal(journal)}
    records = {name: r for name, r in records.items() if (config.out / metadata.image_file(name)).is_file()}
    done = set(records)
    rows = list(zip(frame["image_name"], frame["prompt"], frame["seed"], strict=True))
    size = SCENE_BLOCK if config.backend == "scenes" else config.batch_size
    blocks = [rows[start : start + size] for start in range(0, len(rows), size)][rank::processes]
    blocks = [block for block in blocks if any(row[0] not in done for row in block)]
    draw = _draw_scenes if config.backend == "scenes" else _draw_diffusion
    journal = work / f"{rank}-of-{processes}.jsonl"
    for finished in progress(draw(config, blocks, done) if blocks else [], "render", len(blocks)):
        for record in finished:
            append_line(journal, record)
            records[record["image_name"]] = record
    if processes > 1:
        from accelerate import PartialState

        PartialState().wait_for_everyone()
        records = {r["image_name"]: r for path in work.glob("*.jsonl") for r in read_journal(path)}

    manifest = frame[["image_name", "prompt", "seed"]].assign(
        file=files,
        sha256=[records[name]["sha256"] for name in frame["image_name"]],
        backend=config.backend,
        flag=[records[name]["flag"] for name in frame["image_name"]],
    )
    if rank == 0:
        metadata.write_table(manifest_path, manifest)
        stamp.write([manifest_path, *(config.out / file for file in files)])
        shutil.rmtree(work)
    log.info("%s: %d images, %d of them by an earlier run", config.out, len(manifest), len(done))
    return manifest
