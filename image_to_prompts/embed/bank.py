"""`embed --texts`: a bank of prompts for `infer --bank` and `describe --bank`; see `encode.banks` for the files.

    image-to-prompts embed --texts A.csv B.csv --encoders open_clip:ViT-L-14 --out banks/x [--dimensions 192]

What is finished stays when the process is killed: blocks of 4,096 prompts, and whole shards.
"""

import logging
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..data import metadata
from ..encode import banks, text_tower
from ..models import text_encoder
from ..profiles import KERNEL_LIMITS
from ..run import resume
from ..run.devices import process_state
from ..run.engine import over_blocks
from ..run.errors import UserError
from ..run.files import make_folder, read_tensors, sha256, write_array, write_json
from ..run.folders import BANK, on_kaggle, read_json
from ..run.progress import Deadline, Estimate, progress_to
from ..run.resume import Stamp

if TYPE_CHECKING:
    from . import Config

log = logging.getLogger(__name__)
BLOCK = 4096  # prompts a file of half-done work
SHARD, MOST_SHARDS = 1_000_000, 16  # prompts a shard; a Kaggle dataset may have 50 files at its top
SAMPLE, ASKED = 20_000, 500  # prompts of which a projection is made, and on which its loss is measured
TRIAL = 64  # prompts by which the time of all is estimated
README = """# A bank of {rows:,} prompts

Made by `image-to-prompts embed --texts` of {sources}. Each prompt has a vector of {width} float16 numbers by the text
tower of {tower} (SHA-256 of the weights: `{weights}`) and its all-MiniLM-L6-v2 embedding.
`image-to-prompts infer --bank FOLDER` predicts with it.
"""


def run(config: "Config") -> dict[str, tuple[int, int]]:
    """Makes a bank; called by `embed.run` with the lock on the output.

    Returns:
        Its rows and width, by the tower's name.

    Raises:
        UserError: On bad CSVs or weights, where the encoder has no text tower, or if the bank has no room.
    """
    if len(config.encoders) != 1:
        raise UserError(f"--texts takes one encoder, the tower of the bank, not {len(config.encoders)}")
    (tower,) = config.encoders
    weights = text_tower.digest(tower)
    settings = {"tower": tower, "weights": weights, "dimensions": config.dimensions, "targets": text_encoder.NAME}
    stamp = Stamp(config.out / ".embed.done", "embed", settings, config.texts)
    if stamp.is_current():
        log.info("%s is up to date", config.out)
        return _shape(config.out)
    frames = (metadata.read_prompts(path)["prompt"] for path in config.texts)
    prompts = list(dict.fromkeys(prompt for frame in frames for prompt in frame))
    rows = max(SHARD, -(-len(prompts) // MOST_SHARDS))
    shards = [prompts[start : start + rows] for start in range(0, len(prompts), rows)]
    names = [*([banks.PROJECTION] if config.dimensions else []), "README.md", BANK]
    outputs = [config.out / name for n in range(len(shards)) for name in banks.files(n)]
    stamp.claim([*outputs, *(config.out / name for name in names)])
    work, deadline = stamp.work_folder(), Deadline(config.max_hours)
    width = _check_room(config, prompts, _tower(tower))
    projection = _projection(config.dimensions, prompts, _tower(tower), work) if config.dimensions else None
    digests: dict[str, str] = {}
    finished: list[int] = []
    with progress_to(len(prompts), "embed prompts") as advance:
        for number, shard in enumerate(shards):
            known = _shard(config, projection, shard, work / str(number), number, deadline.passed, advance)
            if not known:
                break
            digests |= known
            finished.append(len(shard))
    done = sum(finished)
    if not done:
        said = f"--max-hours {config.max_hours:g}: not enough for {len(shards[0]):,} prompts"
        raise UserError(f"{said}; what is done stays, and run the same command again to continue")
    if process_state().is_main_process:
        sources = [path.name for path in config.texts]
        about = {"tower": tower, "weights": weights, "projected": projection is not None, "width": width}
        about |= {"shards": finished, "sources": sources, "sha256": digests}
        if projection is not None:
            write_array(config.out / banks.PROJECTION, projection)
        said = README.format(rows=done, sources=", ".join(sources), width=width, tower=tower, weights=weights)
        banks.write_about(config.out, about, said)
        if done == len(prompts):
            stamp.write([*outputs, *(config.out / name for name in names)])
        else:
            said = "stopped by --max-hours %g: a bank of %d of %d prompts; run the same command again to continue"
            log.warning(said, config.max_hours, done, len(prompts))
        log.info("%s: %d prompts, %d numbers each", config.out, done, width)
    process_state().wait_for_everyone()
    return _shape(config.out)


def _shape(folder: Path) -> dict[str, tuple[int, int]]:
    about = read_json(folder / BANK)
    return {about["tower"]: (sum(about["shards"]), about["width"])}


@lru_cache(maxsize=1)
def _tower(name: str) -> text_tower.TextTower:
    return text_tower.build(name)


def _check_room(config: "Config", prompts: Sequence[str], tower: text_tower.TextTower) -> int:
    """Says how long it will take and how large it becomes; raises UserError if there is no room for it.

    Returns:
        Numbers a prompt.
    """
    begun = time.perf_counter()
    trial = prompts[:: -(-len(prompts) // TRIAL)]
    width = tower.embed(trial).shape[1]
    if config.dimensions > width:
        raise UserError(f"--dimensions {config.dimensions}: the tower gives {width} numbers; give fewer")
    seconds, kept = (time.perf_counter() - begun) / len(trial), config.dimensions or width
    size = 2 * (kept + text_encoder.DIMENSION) + sum(map(len, trial)) / len(trial)
    log.info("%s", Estimate("prompts", len(prompts), len(prompts), seconds, size))
    there = sum(file.stat().st_size for file in config.out.glob("*-????.*"))  # of a run that was stopped
    room = (shutil.disk_usage(config.out).free + there) / 1e9
    room = min(room, KERNEL_LIMITS["max_gb"]) if on_kaggle() else room
    if (needed := len(prompts) * size / 1e9) > room:
        said = f"{config.out}: {len(prompts):,} prompts need {needed:.1f} GB, there are {room:.1f} GB"
        raise UserError(f"{said}; give fewer, or fewer numbers of each: --dimensions 192")
    return kept


def _projection(dimensions: int, prompts: Sequence[str], tower: text_tower.TextTower, work: Path) -> np.ndarray:
    """The projection, float32 (width, dimensions); says what it costs."""
    file = work / banks.PROJECTION
    if not resume.is_sealed(file):
        vectors = tower.embed(prompts[:: -(-len(prompts) // SAMPLE)])
        found = banks.principal(vectors, dimensions)
        share = banks.kept_share(vectors, found, vectors[:: -(-len(vectors) // ASKED)])
        said = "%d of %d numbers: %.0f %% of the %d nearest of %d prompts stay among them"
        log.info(said, dimensions, vectors.shape[1], 100 * share, banks.KEPT, len(vectors))
        if not process_state().is_main_process:
            return found
        write_array(file, found)
        resume.seal(file)
    return np.load(file)


def _shard(
    config: "Config",
    projection: np.ndarray | None,
    texts: list[str],
    work: Path,
    number: int,
    over: Callable[[], bool],
    advance: Callable[[int], object],
) -> dict[str, str]:
    """Makes a shard, unless that was done before; returns its files' SHA-256, nothing if the time was over first."""
    record, left = work.with_suffix(".json"), len(texts)
    known = read_json(record)
    if known and all((config.out / name).is_file() and sha256(config.out / name) == known[name] for name in known):
        advance(left)
        return known
    start = partial(_start, config.encoders[0], projection)

    def make(blocks: Iterable[range]) -> Iterator[dict[str, np.ndarray]]:
        nonlocal left
        for found in over_blocks(config, start, (texts[rows.start : rows.stop] for rows in blocks)):
            advance(len(found[0]))
            left -= len(found[0])
            yield {"vectors": found[0], "targets": found[1]}

    blocks = resume.blocks(make_folder(work), len(texts), BLOCK, make, over)
    if len(blocks) * BLOCK < len(texts):
        return {}
    advance(left)  # blocks of an earlier run, or of other processes
    if process_state().is_main_process:
        found = [read_tensors(block) for block in blocks]
        vectors, targets = (np.concatenate([block[name] for block in found]) for name in ("vectors", "targets"))
        banks.write_shard(config.out, number, vectors, targets, texts)
        write_json(record, {name: sha256(config.out / name) for name in banks.files(number)})
        shutil.rmtree(work)
    process_state().wait_for_everyone()
    return read_json(record)


def _start(name: str, projection: np.ndarray | None) -> Callable[[list[str]], tuple[np.ndarray, np.ndarray]]:
    """What embeds a block of prompts, twice."""
    tower = _tower(name)

    def work(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        vectors = tower.embed(texts)
        vectors = vectors if projection is None else banks.projected(vectors, projection)
        return vectors.astype(np.float16), text_encoder.encode_once(texts).astype(np.float16)

    return work
