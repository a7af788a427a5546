"""Stage 3, render: one image a prompt and seed, with Stable Diffusion 2 or with the embedded scene renderer.

    image-to-prompts render --metadata data_meta/x.csv --out images/x

A backend gets prompts and seeds, nothing else. Rows are taken in units, units in blocks, whose borders depend on the
whole list alone: so a row's picture does not depend on what was done before, on the shard or on the machine. Encoding
and writing go on while the next block is rendered.
"""

import logging
from collections.abc import Callable, Generator, Sequence, Set
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from .. import pipeline
from ..data import metadata
from ..data.metadata import FAILED
from ..profiles import StageConfig
from ..run.bounds import Amount, NotNegative, Positive
from ..run.devices import rank_and_processes
from ..run.engine import EngineConfig, over_blocks
from ..run.errors import UserError
from ..run.files import make_folder
from ..run.folders import MANIFEST, Run, attached_images
from ..run.progress import progress_to
from ..run.resume import alone, sweep
from . import store as stores
from .encode import Finished, run_ahead
from .limits import Limits
from .shards import TarStore
from .store import FolderStore, Row

log = logging.getLogger(__name__)


@dataclass
class Main:
    """What it renders."""

    metadata: Path = Path("data_meta/prompts.csv")
    """Metadata CSV: image_name, prompt and optional seed."""
    out: Path = Path("images/prompts")
    """Folder for the images and manifest.csv."""
    backend: Literal["scenes", "sd2"] = "scenes"
    """Renderer: emoji scenes, or Stable Diffusion 2 (sd2)."""
    seeds: Positive = 1
    """Images a prompt: the row's own seed, then others derived from it."""
    format: Literal["png", "jpg", "webp"] = "png"
    """File format; webp loses nothing and is a fifth smaller than png, jpg (quality 95) loses little."""
    per_tar: NotNegative = 0
    """Images a tar shard (webdataset layout); 0: loose files."""
    verify: bool = False
    """Only check --out against its manifest and list what is missing or damaged; without this flag it is repaired."""


@dataclass
class Diffusion:
    """Stable Diffusion 2 (sd2)."""

    weights: Path | None = None
    """Folder or single file of the Stable Diffusion 2 weights; left out: see `image-to-prompts weights`."""
    fast: bool = False
    """DPM-Solver++ in 20 steps instead of DDIM in 50."""
    steps: NotNegative = 0
    """Denoising steps; 0: 50, with --fast 20."""
    batch_size: NotNegative = 0
    """Images at once; 0: as many as fit into memory, at most 16."""
    any_model: bool = False
    """Take weights of another Stable Diffusion than 2.0 at 768 px, and render at their own size."""
    compile: bool = False
    """Compile U-Net and VAE with torch.compile first, on a GPU; pixels differ by rounding."""


@dataclass
class Scenes:
    """The embedded scenes."""

    family: Literal["twemoji", "openmoji"] = "twemoji"
    """Drawing family of the embedded scenes; openmoji is for testing only."""
    workers: NotNegative = 0
    """Processes that draw embedded scenes; 0: one a core."""


@dataclass
class Parts:
    """Part of a set, and where to stop."""

    shard: str = "1/1"
    """i/n: render the i-th of n parts only, for example on one of n machines."""
    max_hours: Amount = 0.0
    """Stop cleanly before this process has run for so many hours; 0: no limit."""
    max_gb: Amount = 0.0
    """Stop cleanly before the run's folder (or --out, if elsewhere) holds so many GB (10^9 bytes); 0: no limit."""
    adopt: tuple[Path, ...] | None = None
    """Folders in which an earlier run's images count as done; left out: Kaggle inputs of the same folder name."""


@dataclass
class Config(Main, Diffusion, Scenes, Parts, EngineConfig, StageConfig):
    """Renders one image a prompt: Stable Diffusion 2 at 768 px downsized to 512, or embedded scenes."""


def expand(frame: pd.DataFrame, seeds: int, suffix: str, path: Path) -> tuple[pd.DataFrame, list[Row]]:
    """One row an image: every prompt with its own seed and, named `<stem>-<k>`, with seeds derived from it.

    Args:
        frame: Metadata.
        seeds: Images a prompt.
        suffix: Suffix of the image files, without the dot.
        path: Where the metadata came from, for error messages.

    Returns:
        The frame that the manifest starts from, and the rows in order.

    Raises:
        UserError: If two images would have one file.
    """
    keep = [c for c in frame.columns if c not in stores.OUTCOME]
    parts = [frame[keep]]
    for k in range(1, seeds):
        stems = map(metadata.stem, frame["image_name"])
        names = [f"{stem}-{k}{name[len(stem) :]}" for stem, name in zip(stems, frame["image_name"], strict=True)]
        derived = [metadata.row_seed(f"{seed} {k}") for seed in frame["seed"]]
        parts.append(frame[keep].assign(image_name=names, seed=derived))
    whole = pd.concat(parts).sort_index(kind="stable").reset_index(drop=True)
    files = [f"{metadata.stem(name)}.{suffix}" for name in whole["image_name"]]
    twice = pd.Series(files).duplicated()
    if twice.any():
        row = int(twice.argmax())
        file, name = files[row], whole["image_name"][row]
        raise UserError(f"{path}: row {row // seeds + 1}: {file} would be written twice; rename {name!r}")
    columns = (whole["image_name"], whole["prompt"], whole["seed"], files)
    return whole, [Row(i, *values) for i, values in enumerate(zip(*columns, strict=True))]


def part_of(shard: str) -> tuple[int, int]:
    """This process's part, from 0, and the number of parts: `--shard i/n` times the processes of `accelerate launch`.

    Raises:
        UserError: If `shard` is not i/n with 1 <= i <= n.
    """
    i, _, n = shard.partition("/")
    if not (i.isdecimal() and n.isdecimal() and 1 <= int(i) <= int(n)):
        raise UserError(f"--shard {shard!r}: write i/n with i from 1 to n, for example 1/8 to 8/8")
    rank, processes = rank_and_processes()
    return (int(i) - 1) * processes + rank, int(n) * processes


def run(config: Config) -> pd.DataFrame:
    """Runs the stage; with `accelerate launch` each process renders its share.

    Returns:
        The manifest as written to `<out>/manifest.csv`, one row per finished image: the metadata's columns, backend,
        model, model_sha256, scheduler, steps, guidance, file, sha256, flag (blank, near_uniform, nsfw_blacked,
        nothing_known, failed, or ""). After a stop by --max-hours or --max-gb it holds the rows done so far.
        With `verify` set: the rows of the manifest that are missing or damaged.

    Raises:
        UserError: On bad metadata, settings or weights, or if images of other settings are in `out`.
    """
    if config.verify:
        run_ = Run(config.run)
        return verify(run_.filled(run_.images, run_.train_images) if config.out == run_.images else config.out)
    return _run(config)


def verify(out: Path) -> pd.DataFrame:
    """Compares a folder with its manifest.

    Returns:
        `image_name,file` of what is missing or damaged.

    Raises:
        UserError: If there is no manifest or, naming the number, if anything is missing or damaged.
    """
    if not (out / MANIFEST).is_file():
        raise UserError(f"{out}: no {MANIFEST}; run render first")
    manifest = metadata.read_table(out / MANIFEST, ("image_name", "file", "sha256", "flag"))
    store = FolderStore(out, {}, "none")
    bad = manifest[[not store.is_intact(record) for record in manifest.to_dict("records")]]
    for file in bad["file"]:
        log.warning("%s: missing or damaged", out / file)
    if len(bad):
        said = f"{len(bad)} of {len(manifest)} images are missing or damaged, first {bad['file'].iloc[0]}"
        raise UserError(f"{out}: {said}; the same command without --verify renders them again")
    log.info("%s: all %d images are as the manifest says", out, len(manifest))
    return bad[["image_name", "file"]]


def left(config: Config) -> int:
    """How many images are not rendered yet, neither here nor in what is adopted; by the manifests alone."""
    frame, _ = expand(metadata.read(config.metadata), config.seeds, config.format, config.metadata)
    folders = [config.out, *_adopted(config)]
    there = {record["image_name"] for folder in folders for record in stores.read_manifest(folder)}
    return int((~frame["image_name"].isin(there)).sum())


def _adopted(config: Config) -> Sequence[Path]:
    """Folders whose images count as done."""
    return attached_images(config.out.name) if config.adopt is None else config.adopt


def _backend(config: Config) -> Any:
    if config.backend == "scenes":
        return pipeline.embedded("scenes")(config.family, config.format, config.workers)
    from .stable_diffusion import StableDiffusionBackend

    return StableDiffusionBackend(
        config.weights,
        config.fast,
        config.steps,
        config.batch_size,
        config.format,
        config.any_model,
        config.compile,
    )


def _drawn(
    config: Config, backend: Any, blocks: list[list[Row]], there: Set[str]
) -> Generator[Callable[[], Finished], None, None]:
    """What waits for each block's files; Ray's actors have a backend each."""
    if config.engine == "local":
        yield from backend.draw(blocks, there)
        return
    for finished in over_blocks(config, partial(_start, config), blocks):
        yield partial(_given, finished)


def _given(finished: Finished) -> Finished:
    return finished


def _start(config: Config) -> Callable[[list[Row]], Finished]:
    """What draws a block in one of Ray's actors."""
    backend = _backend(config)
    backend.start()
    return lambda rows: next(backend.draw([rows], set()))()


def _store(config: Config, settings: dict[str, Any], rows: list[Row], journal: str) -> FolderStore:
    if not config.per_tar:
        return FolderStore(config.out, settings, journal)
    for row in rows:
        if {".", "/"} & set(metadata.stem(row.file)):
            said = "a tar shard ends names at the first dot and has no folders; rename it, or leave --per-tar out"
            raise UserError(f"{config.metadata}: image name {row.name!r}: {said}")
    return TarStore(config.out, settings, journal, config.per_tar, len(rows))


def _run(config: Config) -> pd.DataFrame:
    if config.metadata.resolve() == (config.out / MANIFEST).resolve():
        raise UserError(f"{config.metadata}: is read here; choose another --out, or copy it and give the copy")
    part, parts = part_of(config.shard)
    frame, rows = expand(metadata.read(config.metadata), config.seeds, config.format, config.metadata)
    backend = _backend(config)
    store = _store(config, backend.settings, rows, f"{part}-of-{parts}")
    make_folder(config.out)
    units = [rows[start : start + store.unit] for start in range(0, len(rows), store.unit)][part::parts]
    if parts > 1:
        log.info("part %d of %d: %d of %d images", part + 1, parts, sum(map(len, units)), len(rows))
    with alone(config.out / f"part-{part}-of-{parts}"):
        return _render(config, frame, units, backend, store)


def _render(
    config: Config, frame: pd.DataFrame, units: list[list[Row]], backend: Any, store: FolderStore
) -> pd.DataFrame:
    """Renders this process's part of the rows."""
    mine = [row for unit in units for row in unit]
    adopted = store.adopt(_adopted(config), mine)
    store.scan(mine)
    there = adopted | store.records.keys()
    inside = config.run if config.out.resolve().is_relative_to(config.run.resolve()) else config.out
    limits = Limits(inside, config.max_hours, config.max_gb, len(mine), len(there))

    blocks = []
    if len(there) < len(mine):
        if config.engine == "local":
            backend.start()
        blocks = [unit[i : i + backend.block] for unit in units for i in range(0, len(unit), backend.block)]
        blocks = [block for block in blocks if any(row.name not in there for row in block)]
    with progress_to(len(mine), "render", len(there)) as advance:

        def keep(finished: Finished) -> None:
            new = [(row, *result) for row, result in zip(*finished, strict=True) if row.name not in there]
            for row, data, flag in new:
                store.add(row, data, flag)
            limits.block(len(new), sum(len(data or b"") for _, data, _ in new))
            advance(len(new))
            if limits.blocks == backend.trial:
                log.info("%s", limits.estimate())

        try:
            # Closed at once, so that the drawing processes end before the program when it is stopped.
            with closing(_drawn(config, backend, blocks, there)) as drawn:
                run_ahead(limits.watch(drawn, backend.ahead), keep, backend.ahead)
        finally:
            store.close()
            sweep(config.out / row.file for row in mine)
            manifest = stores.write_manifest(store, frame, {row.name for row in mine} - adopted)
    failed = int((manifest["flag"] == FAILED).sum())
    log.info("%s: %d images, %d by an earlier run, %d failed", config.out, len(manifest), len(there), failed)
    if limits.stopped:
        left = len(mine) - len(there) - limits.images
        log.warning("stopped by %s, %d images are left; run the same command again to continue", limits.stopped, left)
    return manifest
