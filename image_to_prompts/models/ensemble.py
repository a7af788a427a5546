"""A checkpoint of `ensemble`: a transformer, ridge regression and kNN over an image's embeddings, and their blend."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..run.devices import mixed_precision
from ..run.errors import UserError
from ..run.files import write_json, write_tensors, write_text
from . import checkpoints, metrics

if TYPE_CHECKING:
    import torch
    from torch import nn

AT_ONCE = 1024  # rows
PAIRS = ("scale", "ridge", "known")  # of arrays, in a checkpoint


@dataclass
class Ensemble:
    """What an ensemble checkpoint predicts with.

    Attributes:
        network: A `Fusion`, in eval mode.
        config: All of config.json; `config["ensemble"]["blend"]` has the weight of each member.
        mean: float32 (384,), the mean target of the training rows, as a unit vector.
        scale: Mean and deviation of each number of the embeddings, float32 (d,) both.
        ridge: Weight (d, 384) and bias (384,) over all embeddings, standardised.
        known: float32 (m, d) embeddings and (m, 384) targets that kNN looks among.
    """

    network: nn.Module
    config: dict[str, Any]
    mean: np.ndarray
    scale: tuple[np.ndarray, np.ndarray]
    ridge: tuple[np.ndarray, np.ndarray]
    known: tuple[np.ndarray, np.ndarray]

    def members(self, arrays: list[np.ndarray]) -> dict[str, np.ndarray]:
        """What each member predicts: float32 (n, 384) by name.

        Args:
            arrays: float32 (n, d), one an embedding, NaN in the rows where one is missing.
        """
        import torch

        joined = stacked(arrays, self.scale)
        # By PyTorch: in OpenBLAS's product for AVX2 a row's last digit depends on its place among the others.
        weight, bias = map(torch.from_numpy, self.ridge)
        return {
            "attention": predict(self.network, arrays),
            "ridge": torch.addmm(bias, torch.from_numpy(joined), weight).numpy(),
            "knn": metrics.nearest_mean(joined, *self.known, self.config["ensemble"]["knn_k"]),
        }

    def __call__(self, arrays: list[np.ndarray]) -> np.ndarray:
        """The blend of the members' predictions, float32 (n, 384)."""
        found, weights = self.members(arrays), self.config["ensemble"]["blend"]
        return metrics.blend(list(found.values()), [weights[name] for name in found])


def stacked(arrays: list[np.ndarray], scale: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Embeddings side by side, standardised, float32 (n, d); 0, the mean, where one is missing."""
    mean, std = scale
    return np.nan_to_num((np.concatenate(arrays, 1) - mean) / std).astype(np.float32)


def scale_of(arrays: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation of each number of the embeddings: two float32 (d,)."""
    means, deviations = [], []
    for array in arrays:
        for start in range(0, array.shape[1], 64):  # in double precision, but never all of it
            part = array[:, start : start + 64].astype(np.float64)
            means.append(np.nanmean(part, 0))
            deviations.append(np.maximum(np.nanstd(part, 0), 1e-6))
    return np.concatenate(means).astype(np.float32), np.concatenate(deviations).astype(np.float32)


@contextlib.contextmanager
def half_precision(device: torch.device) -> Iterator[None]:
    """bf16 where the hardware has it, else float32; attention among a few embeddings needs no flash kernel."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    half = torch.autocast(device.type, torch.bfloat16, enabled=mixed_precision(device) == "bf16")
    with half, sdpa_kernel(SDPBackend.MATH):
        yield


def predict(network: nn.Module, arrays: list[np.ndarray], batch_size: int = AT_ONCE) -> np.ndarray:
    """Predictions for embeddings, float32 (n, 384).

    Args:
        network: In eval mode.
        arrays: float32 (n, d), one an embedding.
        batch_size: Rows at once.
    """
    import torch

    device = next(network.parameters()).device
    found = []
    with torch.inference_mode(), half_precision(device):
        for start in range(0, len(arrays[0]), batch_size):
            part = [torch.from_numpy(array[start : start + batch_size]).to(device) for array in arrays]
            found.append(network(part).float().cpu().numpy())
    return np.concatenate(found)


def save(folder: Path, ensemble: Ensemble) -> None:
    """Writes a checkpoint; config.json comes last, so that a folder with one is complete."""
    state = {f"network.{name}": value.cpu().numpy() for name, value in ensemble.network.state_dict().items()}
    state["mean_target"] = ensemble.mean
    for name in PAIRS:
        state |= {f"{name}.{number}": part for number, part in enumerate(getattr(ensemble, name))}
    state["known.0"] = ensemble.known[0].astype(np.float16)
    write_tensors(folder / "model.safetensors", {name: np.ascontiguousarray(value) for name, value in state.items()})
    write_text(folder / "README.md", checkpoints.card(ensemble.config))
    write_json(folder / "config.json", ensemble.config)


def load(folder: Path) -> Ensemble:
    """Loads a checkpoint folder that `ensemble` wrote.

    Raises:
        UserError: If a file is missing or damaged, or the weights have another shape than config.json says.
    """
    from .networks import Fusion

    config, state = checkpoints.read(folder)
    try:
        network = Fusion(config["ensemble"]["widths"]).eval()
        own = {name.removeprefix("network."): value for name, value in state.items() if name.startswith("network.")}
        network.load_state_dict(own)
        pairs = {name: tuple(state[f"{name}.{number}"].float().numpy() for number in range(2)) for name in PAIRS}
        return Ensemble(network, config, state["mean_target"].numpy(), **pairs)
    except (KeyError, TypeError, RuntimeError) as error:
        said = " ".join(str(error).splitlines()[:2])
        raise UserError(f"{folder}: not an ensemble checkpoint: {said}; run ensemble again") from error
