"""Rows to train on: metadata, images and targets, split by fold."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pandas as pd

from ..data import file_prompt, images, metadata
from ..data.metadata import BLANK, FAILED, NSFW
from ..models import metrics
from ..run.errors import UserError
from ..run.folders import MANIFEST
from ..search.groups import FLOOR, leaders, with_groups

log = logging.getLogger(__name__)
USELESS = (BLANK, NSFW, FAILED)

ONE_SIDED = 0.8  # share of one source among the validating rows from which on it is warned of


@dataclass
class Rows:
    """Rows to train on and to validate with.

    Attributes:
        frame: image_name, prompt, fold and the rest of the metadata.
        paths: Image file of each row.
        targets: float32 (n, 384) prompt embeddings.
        train: Row numbers that train.
        valid: Row numbers that validate.
        left_out: Number of validation rows dropped because a training prompt is within cosine 0.8.
        weights: float32 (n,), how much each row counts in training.
    """

    frame: pd.DataFrame
    paths: list[Path]
    targets: np.ndarray
    train: np.ndarray
    valid: np.ndarray
    left_out: int
    weights: np.ndarray

    @property
    def sources(self) -> pd.Series:
        """Where each row comes from: the column `source`, "" where there is none."""
        return self.frame["source"].fillna("") if "source" in self.frame else pd.Series("", self.frame.index)


def tables(csvs: tuple[Path, ...], folders: tuple[Path, ...]) -> tuple[Path, ...]:
    """`csvs`; where there are none the manifest of each folder of rendered images, or a folder of images with texts.

    Raises:
        UserError: If there is neither.
    """
    if csvs or not folders:
        return csvs
    found = []
    for folder in folders:
        if not (folder / MANIFEST).is_file() and next(folder.rglob("*.txt"), None) is None:
            said = f"no {MANIFEST} and no .txt beside the images; run render first, or give --metadata beside --images"
            raise UserError(f"{folder}: {said}")
        found.append(folder / MANIFEST if (folder / MANIFEST).is_file() else folder)
    return tuple(found)


def read(table: Path, called: Mapping[str, str] = MappingProxyType({})) -> pd.DataFrame:
    """The rows of a metadata CSV, or of a folder of images with a .txt beside each; see `metadata.read`."""
    return _texts_beside(table) if table.is_dir() else metadata.read(table, unique=False, called=called)


def _texts_beside(folder: Path) -> pd.DataFrame:
    """The rows of a folder of images with a .txt of the same stem beside each."""
    files = images.find(folder)
    texts = [file_prompt.beside(file) for file in files]
    rows = [(file.relative_to(folder).as_posix(), text.prompt) for file, text in zip(files, texts, strict=True) if text]
    if not rows:
        raise UserError(f"{folder}: no image has a .txt of its name beside it; give --metadata")
    if len(rows) < len(files):
        log.warning("%s: %d images have no .txt beside them and were left out", folder, len(files) - len(rows))
    return metadata.with_keys(pd.DataFrame(rows, columns=["image_name", "prompt"]), folder)


def split(
    frame: pd.DataFrame,
    targets: np.ndarray,
    fold: int = 0,
    leave_out: str = "",
    source_weights: Mapping[str, float] | None = None,
) -> Rows:
    """Splits rows by fold.

    Args:
        frame: From `load_metadata`. Where a row has no `fold`, all rows are grouped and folded anew.
        targets: float32 (n, 384), the embeddings of their prompts.
        fold: Fold that validates.
        leave_out: Source whose rows do not train; those of the validating fold validate alone.
        source_weights: How much the rows of a source count in training; 1 where nothing is said.

    Raises:
        UserError: If a side of the split is empty, or a source does not occur.
    """
    paths = frame["path"].tolist() if "path" in frame else []
    frame = frame.drop(columns="path", errors="ignore")
    if "fold" not in frame or frame["fold"].isna().any():
        frame = with_groups(frame, leaders(targets, FLOOR)[0], folds=8)
    rows = Rows(frame, paths, targets, np.empty(0, int), np.empty(0, int), 0, np.ones(len(frame), np.float32))
    sources, weights = rows.sources, source_weights or {}
    unknown = {*weights, *([leave_out] if leave_out else [])} - set(sources)
    if unknown:
        known = ", ".join(sorted(set(sources))) or "none"
        raise UserError(f"no row of source {sorted(unknown)[0]!r} (sources: {known}); correct the name")
    held_out = sources.eq(leave_out).to_numpy() if leave_out else np.zeros(len(frame), bool)
    valid = np.flatnonzero((frame["fold"] == fold) & (held_out if leave_out else True))
    rows.train = np.flatnonzero((frame["fold"] != fold) & ~held_out)
    if not len(valid) or not len(rows.train):
        raise UserError(f"fold {fold} holds {len(valid)} of {len(frame)} rows; choose another --fold or add prompts")
    too_near = near_training(targets[valid], targets[rows.train])
    rows.valid, rows.left_out = valid[~too_near], int(too_near.sum())
    rows.weights = sources.map(weights).fillna(1.0).to_numpy(np.float32)
    if "group" in frame:
        log.info("the largest group has %.1f %% of the rows", 100 * frame["group"].value_counts(normalize=True).max())
    if sources.nunique() > 1:
        log.info("training: %s; validation: %s", *(_shares(sources.iloc[side]) for side in (rows.train, rows.valid)))
    if len(shares := sources.iloc[rows.valid].value_counts(normalize=True)) > 1 and shares.iloc[0] > ONE_SIDED:
        said = "%.0f %% of the rows that validate are of %s: their mean says little of other prompts; see sources.csv"
        log.warning(said, 100 * shares.iloc[0], shares.index[0])
    return rows


def _paths(given: Path | str | Sequence[Path | str]) -> tuple[Path, ...]:
    """One path or several, as text or not."""
    try:
        return tuple(map(Path, [given] if isinstance(given, str | Path) else given))
    except TypeError:
        raise UserError(f"{given!r}: give paths of CSVs, and of folders of images") from None


def load_metadata(
    csvs: Path | str | Sequence[Path | str],
    folders: Path | str | Sequence[Path | str] = (),
    called: Mapping[str, str] = MappingProxyType({}),
) -> pd.DataFrame:
    """Loads any mix of metadata CSVs, the reference's own files included, as one table.

    A row whose image_name stood before, in its file or in an earlier one, is left out and counted in the log, and so
    are rows without an image. Equal prompts stay, for an image each; `dedupe` knows which prompts are alike. Another
    image with another prompt that has the name of one in an earlier folder is called `<file>/<name>`.

    Args:
        csvs: Metadata CSV or CSVs, or folders of images with a .txt beside each; a file's name is the `source` of rows
            that have none.
        folders: Folders of images or archives, one a CSV or one for all; none: no images are looked for.
        called: What the CSVs call `image_name` and `prompt`, where that is something else.

    Returns:
        The rows, with `source`, and with `path` where images were looked for.

    Raises:
        UserError: If there is no CSV, folders and CSVs do not match, or no row of a CSV has an image.
    """
    csvs, folders = _paths(csvs), _paths(folders)
    if not csvs or len(folders) not in (0, 1, len(csvs)):
        raise UserError(f"--metadata has {len(csvs)} files, --images {len(folders)} folders; give one folder a file")
    frames = []
    for number, csv in enumerate(csvs):
        frame = read(csv, called)
        own = frame["source"] if "source" in frame else pd.Series("", frame.index)
        frame = frame.assign(source=own.replace("", csv.stem), _row=range(1, len(frame) + 1))
        twice = frame["image_name"].duplicated()
        if twice.any():
            first = frame["image_name"][twice.to_numpy().argmax()]
            log.warning("%s: %d rows repeat an image_name (%s, ...) and were left out", csv, twice.sum(), first)
        frame = frame[~twice].reset_index(drop=True)
        if folders:
            frame = _with_images(frame, csv, folders[number if len(folders) > 1 else 0])
        frames.append(frame.assign(_file=csv.name))
    frame = _told_apart(pd.concat(frames, ignore_index=True))
    again = frame["image_name"].duplicated()
    for name, count in frame.loc[again, "_file"].value_counts().items():
        log.warning("%s: %d rows stand in an earlier file and were left out", name, count)
    frame = frame[~again].reset_index(drop=True).drop(columns=["_file", "_row"])
    log.info("%d rows of %d prompts, %s", len(frame), frame["prompt"].nunique(), _shares(frame["source"]))
    return frame


def _told_apart(frame: pd.DataFrame) -> pd.DataFrame:
    """Gives images that have the name of one in another folder, but another prompt, a name of their own."""
    if "path" not in frame:
        return frame
    first = frame.drop_duplicates("image_name").set_index("image_name").loc[frame["image_name"]]
    other = (first["path"].to_numpy() != frame["path"].to_numpy()) & (first["prompt"].to_numpy() != frame["prompt"])
    longer = [f"{Path(file).stem}/{name}" for file, name in zip(frame["_file"], frame["image_name"], strict=True)]
    return frame.assign(image_name=frame["image_name"].where(~other, longer))


def _shares(names: pd.Series) -> str:
    return ", ".join(f"{name} {100 * share:.1f} %" for name, share in names.value_counts(normalize=True).items())


def _with_images(frame: pd.DataFrame, csv: Path, folder: Path) -> pd.DataFrame:
    """The rows of a CSV with the `path` of their images; those whose image is missing or shows nothing are left out."""
    manifest = folder / MANIFEST
    if manifest.is_file():
        flags = metadata.read_table(manifest, ("image_name", "flag")).set_index("image_name")["flag"]
        useless = frame["image_name"].map(flags).isin(USELESS)
        if useless.any():
            log.warning("%s: %d rows left out: blank, blacked or failed images", csv, useless.sum())
        frame = frame[~useless].reset_index(drop=True)
    frame = frame.assign(path=images.join(frame["image_name"], images.find(folder), folder))
    missing = frame["path"].isna()
    if missing.any():
        row = int(missing.to_numpy().argmax())
        counts = f"{missing.sum()} of {len(frame)} rows have none"
        said = f"{csv}: row {frame['_row'][row]}: no image of {frame['image_name'][row]} in {folder} ({counts}"
        if missing.all():
            raise UserError(f"{said}); run render first or correct --images")
        log.warning("%s and were left out)", said)
    return frame[~missing].reset_index(drop=True)


def near_training(targets: np.ndarray, train_targets: np.ndarray) -> np.ndarray:
    """Which rows of `targets` (n, 384) reach cosine 0.8 with a row of `train_targets` (m, 384): bool (n,)."""
    from ..search.near_pairs import NEAR, near

    return near(metrics.unit(targets), metrics.unit(train_targets), NEAR)


def parse_weights(words: tuple[str, ...]) -> dict[str, float]:
    """SOURCE=WEIGHT words as a dict.

    Raises:
        UserError: If a word has another form or a weight is negative.
    """
    found = {}
    for word in words:
        source, _, weight = word.rpartition("=")
        try:
            found[source] = float(weight)
        except ValueError:
            raise UserError(f"--source-weights {word}: write SOURCE=WEIGHT, for example coco=2") from None
        if not found[source] >= 0:
            raise UserError(f"--source-weights {word}: must not be negative")
    return found


def thinned(rows: np.ndarray, most: int) -> np.ndarray:
    """Every n-th of some row numbers, so that at most so many are left."""
    return rows[:: -(-len(rows) // most) or 1]
