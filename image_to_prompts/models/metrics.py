"""Scores and the baselines that stand beside them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

    from ..data.rows import Readable

PENALTIES = (0.1, 1.0, 10.0, 100.0, 1000.0)  # of the ridge regression, relative to the mean feature variance
NEIGHBOURS = (1, 3, 5, 10, 20, 50, 100)
RIDGE_BLOCK = 8192  # rows in double precision at once
ROWS = 64  # of `in_fixed_rows`


def unit(vectors: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1 (float32); zero rows stay zero."""
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return (vectors / np.maximum(norms, 1e-12)).astype(np.float32)


def mean_cosine(predicted: np.ndarray, targets: np.ndarray) -> float:
    """The competition's score: mean cosine of rows, both (n, 384)."""
    return float((unit(predicted) * unit(targets)).sum(1).mean())


def in_fixed_rows(work: Callable[[list[np.ndarray]], np.ndarray], arrays: list[np.ndarray]) -> np.ndarray:
    """Applies `work`, which maps rows of arrays to rows, to always as many rows: so no row depends on its company.

    A product of matrices rounds otherwise with other numbers of rows. By NumPy it may also round otherwise at another
    place among them (docs/log.md), so the products in `work` are best PyTorch's.
    """
    count = len(arrays[0])
    padded = [np.concatenate([array, np.zeros((-count % ROWS, array.shape[1]), array.dtype)]) for array in arrays]
    found = [work([array[start : start + ROWS] for array in padded]) for start in range(0, count, ROWS)]
    return np.concatenate(found)[:count]


def mapped(vectors: np.ndarray, weight: np.ndarray, bias: np.ndarray | float = 0.0) -> np.ndarray:
    """`vectors @ weight + bias`, float32 (n, d), of float32 (n, width), in fixed rows."""
    import torch

    matrix = torch.from_numpy(weight)
    return in_fixed_rows(lambda rows: (torch.from_numpy(rows[0]) @ matrix).numpy() + bias, [vectors])


def constant_score(mean: np.ndarray, targets: np.ndarray) -> float:
    """Score of predicting the mean training target (384,) for every row of `targets` (n, 384)."""
    return mean_cosine(np.broadcast_to(mean, targets.shape), targets)


def nearest_mean(features: np.ndarray, train_features: np.ndarray, train_targets: np.ndarray, k: int) -> np.ndarray:
    """kNN regression by cosine of features.

    Args:
        features: float32 (n, d).
        train_features: float32 (m, d).
        train_targets: float32 (m, 384).
        k: Neighbours to average.

    Returns:
        float32 (n, 384), the mean target of each row's k nearest training rows.
    """
    return train_targets[_nearest(features, train_features, k)].mean(1)


def _nearest(features: np.ndarray, train_features: np.ndarray, k: int) -> np.ndarray:
    """Rows of the k nearest training features, int64 (n, k), or fewer where there are fewer."""
    import faiss

    index = faiss.IndexFlatIP(train_features.shape[1])
    index.add(unit(train_features))
    return index.search(unit(features), min(k, len(train_features)))[1]


def best_k(features: np.ndarray, targets: np.ndarray, train_features: np.ndarray, train_targets: np.ndarray) -> int:
    """The k of `NEIGHBOURS` that scores best on validation rows."""
    rows = _nearest(features, train_features, max(NEIGHBOURS))
    scores = {k: mean_cosine(train_targets[rows[:, :k]].mean(1), targets) for k in NEIGHBOURS}
    return max(scores, key=scores.__getitem__)


def ridge(
    features: np.ndarray,
    targets: np.ndarray,
    asked: tuple[np.ndarray, np.ndarray] | None = None,
    before: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Ridge regression of targets on features; the penalty is chosen on a tenth of the rows, or on others.

    Args:
        features: float32 (n, d).
        targets: float32 (n, 384).
        asked: Features and targets of other rows, on which to choose the penalty.
        before: float32 (n, 384), a prediction for the rows, to which that of the regression is added; not with `asked`.

    Returns:
        Weight float64 (d, 384) and bias float64 (384,).
    """
    truth, targets = targets, targets if before is None else targets - before
    centre, middle = features.mean(0, dtype=np.float64), targets.mean(0, dtype=np.float64)
    held_out = np.arange(len(features)) % 10 == 0

    def products(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        gram, cross = np.zeros((len(centre), len(centre))), np.zeros((len(centre), targets.shape[1]))
        for block in np.array_split(rows, len(rows) // RIDGE_BLOCK + 1):
            inner = features[block] - centre
            gram += inner.T @ inner
            cross += inner.T @ (targets[block] - middle)
        return gram, cross

    def solve(gram: np.ndarray, cross: np.ndarray, penalty: float) -> np.ndarray:
        added = penalty * np.trace(gram) / len(gram) + 1e-9
        return np.linalg.solve(gram + added * np.eye(len(gram)), cross)

    inside, outside = products(np.flatnonzero(~held_out)), products(np.flatnonzero(held_out))

    def held_out_score(penalty: float) -> float:
        weight = solve(*inside, penalty)
        found = wanted[0] @ weight + (middle - centre @ weight)
        return mean_cosine(found if before is None else found + before[held_out], wanted[1])

    wanted = asked or (features[held_out], truth[held_out])
    gram, cross = (one + other for one, other in zip(inside, outside, strict=True))
    weight = solve(gram, cross, max(PENALTIES, key=held_out_score))
    return weight, middle - centre @ weight


def blend(predictions: Sequence[np.ndarray], weights: Sequence[float] | np.ndarray) -> np.ndarray:
    """Weighted sum of several models' predictions, each (n, 384), scaled to length 1 before and after."""
    weighted = [weight * unit(vectors) for weight, vectors in zip(weights, predictions, strict=True)]
    return unit(sum(weighted[1:], weighted[0]))


def fit_weights(predictions: Sequence[np.ndarray], targets: np.ndarray) -> np.ndarray:
    """Weights, none negative and 1 in sum, of a blend that no single model surpasses on the given rows.

    Found by L-BFGS-B from equal weights; should a single model be better, it gets all the weight.

    Args:
        predictions: Each model's, float32 (n, 384), of rows that none of them trained on.
        targets: float32 (n, 384).

    Returns:
        float64 (len(predictions),).
    """
    from scipy.optimize import minimize

    units = np.stack([unit(vectors) for vectors in predictions]).astype(np.float64)
    with_targets = (units * unit(targets)).sum(-1)  # (models, n)
    with_each_other = np.einsum("ind,jnd->ijn", units, units)

    def loss(weights: np.ndarray) -> float:
        lengths = np.sqrt(np.einsum("i,j,ijn->n", weights, weights, with_each_other))
        return -float((weights @ with_targets / np.maximum(lengths, 1e-12)).mean())

    found = minimize(loss, np.full(len(units), 0.5), bounds=[(0, 1)] * len(units)).x  # their size plays no role
    return min([found / found.sum(), *np.eye(len(units))], key=loss)


def bootstrap(cosines: np.ndarray, draws: int = 2000) -> tuple[float, float]:
    """95 % interval of a mean by the percentile bootstrap (Efron & Tibshirani 1993).

    Args:
        cosines: (n,) values.
        draws: Resamples; their seed is fixed.
    """
    rng = np.random.default_rng(0)
    means = [cosines[rng.integers(0, len(cosines), len(cosines))].mean() for _ in range(draws)]
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)


def domain_gap(features: np.ndarray, other: np.ndarray) -> tuple[float, np.ndarray]:
    """How well a classifier tells two sets of images apart by their features: adversarial validation.

    Args:
        features: float32 (n, d), of the validation images.
        other: float32 (m, d), of the images that matter in the end.

    Returns:
        Area under the ROC curve in five-fold cross-validation, .5 where nothing tells them apart, 1 where everything
        does; and float64 (n,), how much each validation image looks like one of the others, 0 to 1.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    is_other = np.arange(len(features) + len(other)) >= len(features)
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, class_weight="balanced", max_iter=500))
    folds = StratifiedKFold(min(5, len(features), len(other)), shuffle=True, random_state=0)
    likeness = cross_val_predict(
        classifier, np.concatenate([features, other]), is_other, cv=folds, method="predict_proba"
    )[:, 1]
    return float(roc_auc_score(is_other, likeness)), likeness[: len(features)]


def extract(
    forward: Callable[[torch.Tensor], torch.Tensor],
    images: Readable,
    batch_size: int,
    device: torch.device,
    workers: int = 0,
    only: np.ndarray | None = None,
    mixed: bool = True,
) -> np.ndarray:
    """Applies a model to every image of a dataset, without gradients.

    Args:
        forward: Maps uint8 images (n, 3, s, s) to (n, d), for example a model in eval mode or its `features`.
        images: The images.
        batch_size: Images at once.
        device: Where to compute.
        workers: Threads that decode images; 0: one a core.
        only: Row numbers to compute, each once; all if left out.
        mixed: In the hardware's half precision, where it has one.

    Returns:
        float32 (n, d) of the rows asked for, in their order; NaN where one is broken. d is 1 if none can be read.
    """
    import torch

    from ..data.rows import load
    from ..run.devices import autocast
    from ..run.progress import progress

    wanted = np.arange(len(images)) if only is None else only
    batches = [wanted[start : start + batch_size].tolist() for start in range(0, len(wanted), batch_size)]
    values, where = [], []
    with torch.inference_mode(), autocast(device) if mixed else contextlib.nullcontext():
        for batch, positions in progress(load(images, batches, workers), "images", len(batches)):
            if len(positions):
                values.append(forward(batch.to(device)).float().cpu().numpy())
                where.append(positions.numpy())
    result = np.full((len(wanted), values[0].shape[1] if values else 1), np.nan, np.float32)
    if values:
        order = np.argsort(wanted)
        result[order[np.searchsorted(wanted[order], np.concatenate(where))]] = np.concatenate(values)
    return result
