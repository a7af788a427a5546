"""The frozen part of a backbone: run once, it gives the baselines, the fitted head and, if wanted, cached features."""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..data.rows import ImageRows
from ..models import backbones, doubt, freezing, metrics
from ..run import resume
from ..run.devices import autocast, mixed_precision, process_state, type_of
from ..run.errors import UserError
from ..run.files import make_folder, read_tensors, write_tensors
from .dataset import Rows

if TYPE_CHECKING:
    import torch
    from torch import nn

log = logging.getLogger(__name__)
BLOCK, BATCH = 512, 32  # images a file, images at once
KNN_ROWS = 20_000  # a baseline needs no more training rows than this
TOLERANCE = 0.05  # relative; bf16 has three digits


@dataclass
class Baselines:
    """What needs no training: frozen features and the scores of two simple predictors.

    Attributes:
        features: float32 (m, width) of readable training rows.
        targets: float32 (m, 384) of the same rows.
        mean: float32 (384,), their mean as a unit vector.
        k: Neighbours of the kNN, chosen on the validation fold.
        scores: Validation scores `constant` and `knn`.
    """

    features: np.ndarray
    targets: np.ndarray
    mean: np.ndarray
    k: int
    scores: dict[str, float]


class CachedRows:
    """A dataset like `rows.ImageRows` whose items are what enters the trained part: (tensor, row).

    The tensors lie in files that are mapped into memory, so that a set may be larger than memory.
    """

    def __init__(self, files: list[Path], position: np.ndarray) -> None:
        """Takes the files of `features` and, for each row of the whole set, its position in them, or -1."""
        from safetensors.torch import load_file

        self.blocks = [load_file(file)["activations"] for file in files]
        self.starts = np.cumsum([0, *map(len, self.blocks)])
        self.position = position

    def __len__(self) -> int:
        return len(self.position)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
        position = self.position[row]
        block = np.searchsorted(self.starts, position, "right") - 1
        return self.blocks[block][position - self.starts[block]], row

    @staticmethod
    def collate(items: list[tuple[torch.Tensor, int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Batches items, as float32."""
        from torch.utils.data import default_collate

        activations, rows = default_collate(items)
        return activations.float(), rows


def features(
    model: nn.Module,
    images: ImageRows,
    only: np.ndarray,
    stages: Sequence[nn.Module],
    device: torch.device,
    work: Path,
    cache: bool,
    mixed: bool = True,
    workers: int = 0,
) -> tuple[np.ndarray, np.ndarray, CachedRows | None]:
    """Runs the pretrained backbone over images once; finished blocks of 512 images are kept for a resumed run.

    Args:
        model: From `checkpoints.build`, its last layers unfrozen.
        images: The images.
        only: Row numbers to run.
        stages: Whose statistics are wanted, see `doubt`.
        device: Where to compute.
        work: Folder for the results. Processes share the work.
        cache: Whether to keep what enters the trained part too.
        mixed: In the hardware's half precision.
        workers: Threads that decode images; 0: one a core.

    Returns:
        float32 (len(images), width), NaN in rows that are broken or not asked for; the statistics of the stages,
        float32 (len(only), d); and the cached activations of the readable rows, if asked for.

    Raises:
        UserError: If the cache does not fit on the disk, if the backbone's frozen part cannot be cached, if no image
            can be read, or if processes do not see each other's files.
    """
    import torch
    from safetensors.torch import load_file

    model.eval()
    folder = make_folder(work / "features")
    if cache:
        _announce(model, len(only), images.size, device, mixed, folder)

    tail, first = freezing.trained_tail(model.backbone) if cache else (None, None)

    def forward(batch: torch.Tensor) -> torch.Tensor:
        with doubt.looking(stages) as statistics:
            return torch.cat([model.features(batch).float(), *statistics], 1)

    def make(blocks: Iterable[range]) -> Iterator[dict[str, torch.Tensor]]:
        for rows in blocks:
            block = only[rows.start : rows.stop]
            with entering(first) as taken:
                part = metrics.extract(forward, images, BATCH, device, workers, block, mixed)
            stored = {"features": torch.from_numpy(part)}
            if cache:
                kind = _stored_type(mixed, device)
                stored["activations"] = torch.cat([one.to(kind) for one in taken]) if taken else torch.empty(0)
            if taken:
                _compare(tail, stored["activations"], part[:, : model.width], device)
            yield {name: tensor.contiguous() for name, tensor in stored.items()}

    files = resume.blocks(folder, len(only), BLOCK, make)
    parts = [load_file(file)["features"].numpy() for file in files]
    widest = max(part.shape[1] for part in parts)  # one column where no image of a block can be read
    both = np.concatenate([np.broadcast_to(part, (len(part), max(widest, model.width))) for part in parts])
    found = np.full((len(images), model.width), np.nan, np.float32)
    found[only] = both[:, : model.width]
    statistics = both[:, model.width :] if stages else np.empty((len(only), 0), np.float32)
    readable = only[np.isfinite(found[only, 0])]
    if not len(readable):
        raise UserError("no image can be read; check --images")
    if not cache:
        return found, statistics, None
    position = np.full(len(images), -1)
    position[readable] = np.arange(len(readable))
    return found, statistics, CachedRows(files, position)


def _stored_type(mixed: bool, device: torch.device) -> torch.dtype:
    """The type in which cached activations are kept: that of mixed precision, half the size of float32."""
    return type_of(mixed_precision(device) if mixed else "no")


def _announce(model: nn.Module, count: int, side: int, device: torch.device, mixed: bool, folder: Path) -> None:
    """Says how large the cache will be, found out with one image; raises UserError if there is less room."""
    import torch

    one = activations(model, torch.zeros(1, 3, side, side, dtype=torch.uint8, device=device))
    size = one.numel() * _stored_type(mixed, device).itemsize * count
    there = sum(file.stat().st_size for file in folder.glob("block-*.safetensors"))
    free = shutil.disk_usage(folder).free + there
    log.info("cached features of %d images: %.2f GB in %s (%.0f GB free)", count, size / 1e9, folder, free / 1e9)
    if size > free:
        need = f"cached features need {size / 1e9:.1f} GB, {free / 1e9:.1f} are free"
        raise UserError(f"{folder}: {need}; use --no-cache-features")


def over_cache(model: nn.Module) -> nn.Module:
    """What trains when the frozen part's output is cached: the trained layers and the head, shared with `model`."""
    from torch import nn

    return nn.Sequential(freezing.trained_tail(model.backbone)[0], model.head)


def activations(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """What enters the trained part of a model from `checkpoints.build` for uint8 images (n, 3, s, s), on the CPU."""
    import torch

    model.eval()
    _, first = freezing.trained_tail(model.backbone)
    with torch.no_grad(), autocast(images.device), entering(first) as taken:
        model.features(images)
    return taken[0]


@contextlib.contextmanager
def entering(module: nn.Module | None) -> Iterator[list[torch.Tensor]]:
    """Collects what enters a module, on the CPU, one tensor a forward pass; nothing without a module."""
    taken: list[torch.Tensor] = []
    hook = module and module.register_forward_pre_hook(lambda module, inputs: taken.append(inputs[0].cpu().clone()))
    try:
        yield taken
    finally:
        if hook:
            hook.remove()


def _compare(tail: nn.Module, activations: torch.Tensor, found: np.ndarray, device: torch.device) -> None:
    """Checks on a few images that the trained part over cached activations gives what the whole backbone gave."""
    import torch

    whole = found[np.isfinite(found[:, 0])][:8]
    try:
        with torch.inference_mode():
            again = tail(activations[:8].float().to(device)).cpu().numpy()
        same = again.shape == whole.shape and np.abs(again - whole).max() <= TOLERANCE * np.abs(whole).max()
    except RuntimeError:  # a vision transformer's class token, say, cannot be put before what is stored
        same = False
    if not same:
        raise UserError("this backbone's frozen part cannot be cached; add --no-cache-features")


def baselines(found: np.ndarray, rows: Rows) -> Baselines:
    """Scores what needs no training.

    Args:
        found: float32 (n, width) from `features`.
        rows: The rows, of which only those with features count.

    Raises:
        UserError: If no training or no validation image could be read.
    """
    train, valid = (side[np.isfinite(found[side, 0])] for side in (rows.train, rows.valid))
    if not len(train) or not len(valid):
        raise UserError(f"{len(train)} training and {len(valid)} validation images can be read; check --images")
    targets, truth = rows.targets[train], rows.targets[valid]
    mean = metrics.unit(targets.mean(0))
    k = metrics.best_k(found[valid], truth, found[train], targets)
    knn = metrics.nearest_mean(found[valid], found[train], targets, k)
    scores = {"constant": metrics.constant_score(mean, truth), "knn": metrics.mean_cosine(knn, truth)}
    return Baselines(found[train], targets, mean, k, scores)


def save(path: Path, base: Baselines) -> None:
    """Writes the kNN baseline's features (float16) and targets beside a checkpoint."""
    write_tensors(path, {"features": base.features.astype(np.float16), "targets": base.targets})


def pretrained_features(spec: backbones.Spec, files: list[Path]) -> np.ndarray:
    """Features of images by a backbone's pretrained weights: float32 (len(files), width), NaN where one is broken."""
    from ..models import checkpoints

    model = checkpoints.pretrained(spec)
    device = process_state().device
    model.to(device).eval()
    return metrics.extract(model.features, ImageRows(files, spec.image_size), BATCH, device)


def knn_score(folder: Path, spec: backbones.Spec, k: int, files: list[Path], targets: np.ndarray) -> float:
    """Score of the kNN baseline of a checkpoint folder on other images.

    Args:
        folder: Checkpoint with baselines.safetensors.
        spec: Its backbone, whose pretrained weights are loaded again.
        k: Neighbours.
        files: Images.
        targets: float32 (len(files), 384).
    """
    stored = read_tensors(folder / "baselines.safetensors", "train it again")
    found = pretrained_features(spec, files)
    readable = np.isfinite(found[:, 0])
    predicted = metrics.nearest_mean(found[readable], stored["features"].astype(np.float32), stored["targets"], k)
    return metrics.mean_cosine(predicted, targets[readable])
