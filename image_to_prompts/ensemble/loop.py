"""The training loop of `ensemble`: all rows in memory as tensors, in the hardware's half precision."""

import copy
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn

from ..models import metrics
from ..models.ensemble import half_precision, predict
from ..run.devices import mixed_precision, process_state
from ..run.progress import Deadline, progress_to
from ..training import state as state_file
from ..training.dataset import Rows
from ..training.epochs import batches, has_stalled, learning_rate_factor

# float16, which GPUs without bf16 have, would lose the small gradients of a mean over a batch; the network is small.
WEIGHT_DECAY = 1e-4
WARM_UP = 50  # steps


class Trainer:
    """Steps of AdamW on a network, with its weights in bf16 within a step where the hardware has that.

    Casting float32 weights and activations back and forth, as autocast does, would take a fifth of a step on two
    cores, and an optimiser that makes several passes over the parameters another fifth (docs/log.md).

    Attributes:
        network: The network, whose weights stay float32.
        optimizer: Its optimiser.
    """

    def __init__(self, network: nn.Module, learning_rate: float) -> None:
        """Takes a network on its device."""
        self.network, self._device = network, next(network.parameters()).device
        fused = self._device.type in ("cpu", "cuda")
        self.optimizer = torch.optim.AdamW(network.parameters(), learning_rate, weight_decay=WEIGHT_DECAY, fused=fused)
        self._within = network
        if mixed_precision(self._device) == "bf16":
            self._within = copy.deepcopy(network)
            for parameter in self._within.parameters():
                parameter.data = parameter.data.bfloat16()

    def epoch(
        self, tensors: list[torch.Tensor], targets: torch.Tensor, order: list[np.ndarray], rates: list[float]
    ) -> float:
        """Trains on batches of row numbers, each with its learning rate.

        Args:
            tensors: float32 (n, d), one an embedding, NaN in rows where one is missing.
            targets: float32 (n, 384).
            order: Row numbers of each batch.
            rates: Learning rate of each batch.

        Returns:
            Mean loss, 1 - cosine.
        """
        own, within = list(self.network.parameters()), list(self._within.parameters())
        self._within.train()
        losses = []
        for batch, rate in zip(order, rates, strict=True):
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            if within[0] is not own[0]:
                with torch.no_grad():
                    for one, other in zip(own, within, strict=True):
                        other.copy_(one)
            index = torch.from_numpy(batch).to(self._device)
            with half_precision(self._device):
                predicted = self._within([tensor[index] for tensor in tensors])
            loss = 1 - nn.functional.cosine_similarity(predicted.float(), targets[index]).mean()
            loss.backward()
            if within[0] is not own[0]:
                for one, other in zip(own, within, strict=True):
                    one.grad, other.grad = other.grad.float(), None
            self.optimizer.step()
            self.optimizer.zero_grad()
            losses.append(loss.detach())
        return torch.stack(losses).mean().item()


def fit(
    make: Callable[[], nn.Module],
    arrays: list[np.ndarray],
    rows: Rows,
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    patience: int = 0,
    seed: int = 0,
    max_hours: float = 0.0,
    save_minutes: float = 10.0,
    state: Path | None = None,
) -> tuple[nn.Module, pd.DataFrame, bool]:
    """Trains a network, and keeps what it was after the epoch that validated best.

    Args:
        make: Builds the network.
        arrays: float32 (n, d), one an embedding, NaN in rows where one is missing.
        rows: Targets and split.
        epochs, batch_size, learning_rate, patience, seed, max_hours, save_minutes: See `ensemble.Config`.
        state: File to save to and go on from.

    Returns:
        The network in eval mode; epoch, loss, cosine (validation), one row an epoch and one for before (epoch 0);
        whether it was trained to the end, not stopped by `max_hours`.
    """
    device = process_state().device
    torch.manual_seed(seed)
    network = make().to(device)
    tensors = [torch.from_numpy(array).to(device) for array in arrays]
    targets = torch.from_numpy(rows.targets).to(device)
    trainer = Trainer(network, learning_rate)
    valid, truth = [array[rows.valid] for array in arrays], rows.targets[rows.valid]
    history: list[dict[str, float]] = []
    best: dict[str, torch.Tensor] = {}

    def finish_epoch(loss: float) -> None:
        nonlocal best
        network.eval()
        cosine = metrics.mean_cosine(predict(network, valid, batch_size), truth)
        history.append({"epoch": len(history), "loss": loss, "cosine": cosine})
        if cosine >= max(entry["cosine"] for entry in history):
            best = {name: value.clone() for name, value in network.state_dict().items()}

    stored = state_file.read(state, device) if state else None
    if stored:
        network.load_state_dict(stored["network"])
        trainer.optimizer.load_state_dict(stored["optimizer"])
        history, best = stored["history"], stored["best"]
    else:
        finish_epoch(math.nan)  # before the first step
    saved, deadline, over = time.monotonic(), Deadline(max_hours), False
    with progress_to(epochs, "epochs", len(history) - 1) as advance:
        while len(history) <= epochs and not over and not has_stalled(history, patience):
            torch.manual_seed(1000 * seed + len(history))
            order = batches(rows.train, seed, len(history), batch_size)
            begun = (len(history) - 1) * len(order)
            factors = [
                min(1, (begun + step + 1) / WARM_UP)
                * learning_rate_factor((begun + step) / (epochs * len(order)), cycles=1)
                for step in range(len(order))
            ]
            finish_epoch(trainer.epoch(tensors, targets, order, [learning_rate * f for f in factors]))
            over = deadline.passed()
            if state and (over or time.monotonic() - saved > save_minutes * 60):
                saved = time.monotonic()
                content = {"network": network.state_dict(), "optimizer": trainer.optimizer.state_dict()}
                state_file.save(state, {**content, "history": history, "best": best})
            advance(1)
    network.load_state_dict(best)
    return network.eval(), pd.DataFrame(history), not over or len(history) > epochs
