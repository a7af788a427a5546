"""Stage 2, dedupe: drops every prompt whose embedding is within a cosine of one that is kept.

    image-to-prompts dedupe --prompts A.csv B.csv --out data_meta/x.csv --threshold 0.8

The law: going through the rows in order of preference, a row is kept exactly if no earlier kept row has a cosine of at
least the threshold with it. The kept rows get a `group` (their leader at cosine 0.7) and a `fold` (a hash of the
group), so that near-identical prompts never stand on both sides of a split.

result.py      what is kept and removed, and why, at any threshold
pictures.py    pictures and tables to judge a threshold by, and the fate of one prompt
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pandas as pd

from ..data import metadata
from ..models import text_encoder
from ..profiles import StageConfig
from ..run.bounds import AtLeast
from ..run.engine import EngineConfig
from ..run.errors import UserError
from ..run.files import let_go
from ..run.resume import Stamp, alone, writing
from ..search.groups import leaders, with_groups
from . import pictures
from .result import BLOCK, Result, Search, dedupe

__all__ = ["Config", "Result", "dedupe", "hold_out", "read", "removed_path", "run"]
log = logging.getLogger(__name__)
IN_MEMORY = 500_000  # rows whose vectors are in memory, 0.8 GB; of more they lie in a file, and decided blocks, too
FATES = 1000  # rows of which float32's verdict is computed where the vectors are not float32's


@dataclass
class Main:
    """What it compares, and what counts as a copy."""

    prompts: tuple[Path, ...] = ()
    """CSVs with a `prompt` column (and optional `image_name`, `seed`, `source`, ...); earlier files win."""
    against: tuple[Path, ...] = ()
    """CSVs whose prompts are compared with, but not written."""
    out: Path = Path("data_meta/prompts.csv")
    """Metadata CSV to write; what was dropped goes to <name>.removed.csv beside it."""
    threshold: float = 0.8
    """Cosine from which a prompt counts as a copy of an earlier one."""
    prefer: tuple[str, ...] = ()
    """Sources whose rows win over those of later and unnamed ones; left out: the first row wins."""
    folds: Annotated[int, AtLeast(2)] = 5
    """Number of folds."""


@dataclass
class Speed:
    """How it compares."""

    search: Literal["auto", "exact", "faiss"] = "auto"
    """exact, faiss (approximate; for many millions of rows), or auto."""
    fast: bool = False
    """Embed in half precision, and in float32 only removed prompts and those that removed them: for sets of which few
    rows will be trained on, since training embeds in float32."""


@dataclass
class Config(Main, Speed, EngineConfig, StageConfig):
    """Drops prompts that are nearly the same as an earlier one."""


def hold_out(frame: pd.DataFrame, folds: Sequence[int], train: Path, test: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Writes the rows of some folds to one metadata CSV and all others to another.

    Args:
        frame: Rows with `fold`, as `run` returns them.
        folds: Folds to hold out; with none, no test file is written.
        train: CSV for the rest.
        test: CSV for the rows held out.

    Returns:
        The rest and the rows held out.

    Raises:
        UserError: If a side that is wanted would be empty.
    """
    held_out = frame["fold"].isin(list(folds))
    if held_out.all() or (len(folds) and not held_out.any()):
        raise UserError(f"{train}: folds {list(folds)} hold {held_out.sum()} of {len(frame)} rows; use more prompts")
    sides = {train: frame[~held_out], **({test: frame[held_out]} if len(folds) else {})}
    with writing(train.with_name(f".{train.stem}.done"), "hold_out", list(sides)):
        for path, side in sides.items():
            metadata.write_table(path, side)
    return frame[~held_out], frame[held_out]


def removed_path(out: Path) -> Path:
    """`<name>.removed.csv` beside `<name>.csv`."""
    return out.with_name(f"{out.stem}.removed.csv")


def picture_path(out: Path) -> Path:
    """`<name>.png` beside `<name>.csv`: by which to judge the threshold."""
    return out.with_suffix(".png")


def read(config: Config) -> tuple[pd.DataFrame, int]:
    """Reads a stage's inputs in order of preference.

    Returns:
        Rows as `dedupe` takes them, and how many first ones are against-rows.

    Raises:
        UserError: On bad input files or settings.
    """
    if not config.prompts:
        raise UserError("dedupe: no input; give --prompts A.csv [B.csv ...]")
    if not 0 < config.threshold <= 1:
        raise UserError(f"--threshold {config.threshold}: must lie above 0 and at most 1")
    if config.out.suffix != ".csv":
        raise UserError(f"--out {config.out}: must end with .csv")
    columns = ["image_name", "prompt", "seed", "source", "_file", "_row"]
    against = [_read(path)[columns].assign(_position=-1) for path in config.against]
    own = pd.concat([_read(path) for path in config.prompts], ignore_index=True).fillna("")
    unknown = set(config.prefer) - set(own["source"])
    if unknown:
        known = ", ".join(sorted(set(own["source"])))
        raise UserError(f"--prefer {sorted(unknown)[0]}: no row has this source (sources: {known}); correct the name")
    own["_position"] = range(len(own))
    rank = own["source"].map({name: number for number, name in enumerate(config.prefer)}).fillna(len(config.prefer))
    own = own.iloc[np.argsort(rank.to_numpy(), kind="stable")]
    fixed = sum(map(len, against))
    return pd.concat([own.iloc[:0], *against, own], ignore_index=True), fixed


def _read(path: Path) -> pd.DataFrame:
    frame = metadata.with_keys(metadata.read_prompts(path), path)
    if "source" not in frame:
        frame = frame.assign(source=path.stem)
    return frame.assign(_file=str(path), _row=range(1, len(frame) + 1))


def run(config: Config) -> pd.DataFrame:
    """Runs the stage.

    Returns:
        The kept rows, as written to `config.out`.

    Raises:
        UserError: On bad input files or settings.
    """
    frame, fixed = read(config)
    with alone(config.out):
        return _run(config, frame, fixed)


def _run(config: Config, frame: pd.DataFrame, fixed: int) -> pd.DataFrame:
    inputs = [*config.prompts, *config.against]
    stamp = Stamp(config.out.with_name(f".{config.out.stem}.done"), "dedupe", config.settings("out"), inputs)
    if stamp.is_current():
        log.info("%s is up to date", config.out)
        return metadata.read(config.out)
    outputs = [config.out, removed_path(config.out), picture_path(config.out)]
    stamp.claim(outputs)

    many = len(frame) > IN_MEMORY

    def encode(texts: list[str]) -> np.ndarray:
        if not many:
            return text_encoder.encode(texts, config.fast, config)
        return text_encoder.encode_to(stamp.work_folder() / "vectors.npy", texts, config.fast, config)

    search: Search | None = None
    if config.engine == "ray" and config.search != "faiss":
        search = _on_cluster(config, stamp.work_folder())
    elif many:
        search = partial(leaders, engine=config.search, folder=stamp.work_folder())
    result = dedupe(
        frame,
        encode,
        config.threshold,
        fixed=fixed,
        engine=config.search,
        search=search,
    )
    if config.fast:
        result = _as_float32(result)
    if not len(result.kept_rows):
        raise UserError(f"{config.prompts[0]}: every row resembles one of --against; give new rows")
    kept = with_groups(result.kept, result.groups(), config.folds)
    _check_names(frame.iloc[result.kept_rows])
    metadata.write_table(removed_path(config.out), result.removed)
    metadata.write_table(config.out, kept)
    pictures.save(result, picture_path(config.out))
    stamp.write(outputs)
    counts = ", ".join(f"{count} {name}" for name, count in result.counts.items())
    log.info("%s; largest group %.1f %%", counts, 100 * kept["group"].value_counts(normalize=True).max())
    return kept


def _check_names(kept: pd.DataFrame) -> None:
    """Raises UserError if two rows that stay, of whichever files, have one image_name."""
    for _, row in kept[kept["image_name"].duplicated()].head(1).iterrows():
        first = kept[kept["image_name"] == row["image_name"]].iloc[0]
        name, other = row["image_name"], f"{first['_file']}, row {first['_row']}"
        raise UserError(f"{row['_file']}: row {row['_row']}: image_name {name!r} stands in {other}, too; rename one")


def _on_cluster(config: Config, folder: Path) -> Search:
    """What compares vectors on the cluster."""
    from ..search import on_cluster

    def search(vectors: np.ndarray, threshold: float, fixed: int) -> tuple[np.ndarray, np.ndarray, str]:
        found = on_cluster.leaders(vectors, threshold, fixed, config, folder)
        return *found, f"exact, {len(vectors)} texts, on Ray"

    return search


def _as_float32(result: Result) -> Result:
    """The same with float32's cosines; estimates, for the log, how many fates float32 would change."""
    prompts = result.frame["prompt"].to_numpy()[result.first]

    def cosine(one: np.ndarray, other: np.ndarray) -> np.ndarray:
        return np.einsum("ij,ij->i", *(text_encoder.encode(prompts[texts].tolist()) for texts in (one, other)))

    texts = np.arange(len(result.leader))
    judged = texts[max(1, result.fixed_texts) :]  # those that an earlier one may drop
    sample = np.sort(np.random.default_rng(0).choice(judged, min(FATES, len(judged)), replace=False))
    kept = texts[result.leader == texts]
    nearest, highest = np.zeros(len(sample), np.int64), np.full(len(sample), -1, np.float32)
    for start in range(0, len(kept), BLOCK):
        some = kept[start : start + BLOCK]
        cosines = np.where(some < sample[:, None], result.vectors[sample] @ result.vectors[some].T, -1)
        let_go(result.vectors)
        higher = cosines.max(1, initial=-1) > highest
        nearest[higher], highest[higher] = some[cosines[higher].argmax(1)], cosines[higher].max(1)
    changed = (cosine(sample, nearest) >= np.float32(result.threshold)) != (highest >= np.float32(result.threshold))
    share = 100 * changed.mean() if len(sample) else 0.0
    log.info("half precision: float32 would change %.2f %% of the fates (%d sampled)", share, len(sample))
    gone, cosines = texts[result.leader != texts], result.cosine.copy()
    for start in range(0, len(gone), BLOCK):
        some = gone[start : start + BLOCK]
        cosines[some] = cosine(some, result.leader[some])
    return replace(result, cosine=cosines)
