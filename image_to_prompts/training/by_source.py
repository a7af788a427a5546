"""What the validating fold says about a checkpoint: by source, with intervals and baselines, and how far it carries.

The competition's 3rd team saw its local score fall while its leaderboard score rose when it added another kind of
prompts. So a source's score stands beside what is reached without that source, and a classifier tells how far the
validating images are from those that matter.
"""

from pathlib import Path

import numpy as np
import pandas as pd

from ..data import images, metadata, pictures
from ..models import checkpoints, metrics
from ..run.errors import UserError
from ..run.files import read_tensors, write_tensors
from ..run.resume import check_whole
from .dataset import Rows
from .frozen_features import Baselines, pretrained_features

PARTS = 5  # in which clusters are held out


def write(folder: Path, rows: Rows, predicted: np.ndarray) -> None:
    """Writes the validating fold's predictions: validation.csv (image_name, prompt, source, cosine) and their vectors.

    Args:
        folder: The checkpoint's.
        rows: The rows.
        predicted: float32 (len(rows.valid), 384), NaN where an image cannot be read.
    """
    readable = np.isfinite(predicted[:, 0])
    valid, predicted = rows.valid[readable], predicted[readable]
    known = [name for name in ("image_name", "prompt") if name in rows.frame]  # prompts may not come with embeddings
    frame = rows.frame[known].iloc[valid].reset_index(drop=True)
    frame["source"] = rows.sources.to_numpy()[valid]
    cosines = (metrics.unit(predicted) * rows.targets[valid]).sum(1)
    write_tensors(
        folder / "validation.safetensors", {"predicted": predicted.astype(np.float32), "targets": rows.targets[valid]}
    )
    metadata.write_table(folder / "validation.csv", frame.assign(cosine=np.round(cosines.astype(float), 4)))


def is_there(folder: Path) -> bool:
    """Whether a checkpoint has what `write` wrote."""
    return (folder / "validation.safetensors").is_file()


def read(folder: Path) -> tuple[pd.DataFrame, np.ndarray, np.ndarray]:
    """What `write` wrote: the rows, float32 (n, 384) predictions and float32 (n, 384) targets.

    Raises:
        UserError: If the checkpoint has none, or they are damaged.
    """
    if not is_there(folder):
        raise UserError(f"{folder}: no validation.safetensors; train it with finetune, or give infer --blend")
    check_whole(folder, "validation.csv", "validation.safetensors")
    stored = read_tensors(folder / "validation.safetensors", "train it again", ["predicted", "targets"])
    return metadata.read_table(folder / "validation.csv", ("image_name",)), stored["predicted"], stored["targets"]


def by_source(folder: Path, rows: Rows, features: np.ndarray, base: Baselines, clusters: np.ndarray) -> pd.DataFrame:
    """Scores of each source and of all.

    What a model scores on sources and on clusters of prompts that it has not seen is told by ridge regressions on the
    frozen features, each fitted without them: training a model for each would take hours.

    Args:
        folder: Checkpoint with the predictions that `write` wrote.
        rows: The rows it was trained with.
        features: float32 (n, width) of all rows, from `frozen_features.features`.
        base: The baselines.
        clusters: int (n,), the cluster of each row's prompt, see `clusters.of`.

    Returns:
        source, rows, cosine, low, high (95 % interval of the cosine), constant, knn, ridge (the fitted head on frozen
        features), left_out (the same fitted without this source) and clusters_out (the same fitted without a fifth of
        the clusters, those of the row among them); NaN where nothing is left to fit on.
    """
    frame, predicted, truth = read(folder)
    valid = pd.Index(rows.frame["image_name"]).get_indexer(frame["image_name"])
    train = rows.train[np.isfinite(features[rows.train, 0])]
    sources = rows.sources.to_numpy()
    knn = metrics.nearest_mean(features[valid], base.features, base.targets, base.k)
    guesses = {"cosine": predicted, "constant": np.broadcast_to(base.mean, truth.shape), "knn": knn}
    guesses["ridge"] = _ridge(features, rows.targets, train, valid)
    cosines = {name: (metrics.unit(guess) * truth).sum(1) for name, guess in guesses.items()}
    for column, parts in {"left_out": sources, "clusters_out": clusters % PARTS}.items():
        cosines[column] = np.full(len(valid), np.nan)
        for part in set(parts[valid]):
            others, mine = train[parts[train] != part], parts[valid] == part
            if len(others):
                guess = _ridge(features, rows.targets, others, valid[mine])
                cosines[column][mine] = (metrics.unit(guess) * truth[mine]).sum(1)
    table, names = [], sorted(set(sources[valid]))
    for name, mine in [*((name, sources[valid] == name) for name in names), ("all", np.ones(len(valid), bool))]:
        low, high = metrics.bootstrap(cosines["cosine"][mine])
        means = {column: values[mine].mean() for column, values in cosines.items()}
        table.append({"source": name, "rows": int(mine.sum()), **means, "low": low, "high": high})
    columns = ["source", "rows", "cosine", "low", "high", "constant", "knn", "ridge", "left_out", "clusters_out"]
    return pd.DataFrame(table)[columns]


def _ridge(features: np.ndarray, targets: np.ndarray, train: np.ndarray, valid: np.ndarray) -> np.ndarray:
    weight, bias = metrics.ridge(features[train], targets[train])
    return features[valid] @ weight + bias


def domain_gap(folder: Path, image_folders: tuple[Path, ...], targets: list[Path]) -> tuple[float, pd.DataFrame]:
    """How far the images that a checkpoint validated on are from other images, by the frozen backbone's features.

    Args:
        folder: The checkpoint.
        image_folders: Where its training images lie.
        targets: The images that matter in the end, for example the competition's.

    Returns:
        See `metrics.domain_gap`; and image_name, source, likeness of the validating images.

    Raises:
        UserError: If the checkpoint has no validation, or its images are not there.
    """
    frame, _, _ = read(folder)
    found = [images.join(frame["image_name"], images.find(one), one) for one in image_folders]
    places = pd.Series([next(filter(None, some), None) for some in zip(*found, strict=True)], dtype=object).dropna()
    # Left out: rows of a name that two sets share, for those have other names than their files.
    frame, own = frame.loc[places.index].reset_index(drop=True), places.tolist()
    if not own:
        raise UserError(f"{folder}: no image of it in {', '.join(map(str, image_folders))}; give its image folders")
    spec = checkpoints.load(folder).spec
    features = [pretrained_features(spec, files) for files in (own, targets)]
    readable = [np.isfinite(part[:, 0]) for part in features]
    area, likeness = metrics.domain_gap(*(part[good] for part, good in zip(features, readable, strict=True)))
    return area, frame.loc[readable[0], ["image_name", "source"]].assign(likeness=likeness)


def gallery(folder: Path, rows: Rows, count: int = 6) -> None:
    """Draws the best and the worst validating images of a checkpoint into its best_and_worst.png."""
    frame, _, _ = read(folder)
    paths = dict(zip(rows.frame["image_name"], rows.paths, strict=True))
    frame["cosine"] = frame["cosine"].astype(float)
    frame = frame.sort_values("cosine", ascending=False, kind="stable")
    ends = pd.concat([frame.head(count), frame.iloc[count:].tail(count)])
    tiles = [
        pictures.tile(paths[name], f"{cosine:.2f} · {prompt}")
        for name, cosine, prompt in zip(ends["image_name"], ends["cosine"], ends["prompt"], strict=True)
    ]
    pictures.save(pictures.grid(tiles, count).quantize(96), folder / "best_and_worst.png")
