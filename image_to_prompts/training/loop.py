"""The training loop of `finetune`: optimizer steps of any batch size, and a saved state from which it continues.

What a step does depends on its epoch and number alone: its rows, its random numbers, its learning rate. So a run that
was killed needs no more than the weights, the optimizer and where it stood.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..data.rows import load, pinned
from ..models import freezing
from ..run.devices import rank_and_processes, within_memory
from ..run.errors import UserError
from ..run.progress import Deadline, progress_to
from . import state as state_file
from .epochs import average_decay, batches, learning_rate_factor, one_of_each
from .schedule import Schedule

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from torch import nn

    from ..data.rows import ImageRows
    from .dataset import Rows
    from .frozen_features import CachedRows

log = logging.getLogger(__name__)
WEIGHT_DECAY, CLIP_NORM = 1e-4, 1.0  # the reference's
NAMED = 5  # images of a bad batch that an error names


@dataclass
class Standing:
    """Where a training stands.

    Attributes:
        epoch: The epoch under way, from 1.
        step: Optimizer steps done in it.
        loss: Sum of 1 - cosine over the rows seen in it.
        rows: How many these are.
        history: One dict a finished epoch, as `finetune.run` returns them.
    """

    epoch: int = 1
    step: int = 0
    loss: float = 0.0
    rows: int = 0
    history: list[dict[str, float]] = field(default_factory=list)


@dataclass
class Begun:
    """A step whose results are still to be read.

    Attributes:
        number: Which step of the epoch, from 1.
        rows: int64 (n,), row numbers of this process's images.
        over: Whether this process is over its time.
        told: Numbers on the CPU: 1 - cosine of each image, the gradients' norm, and of several processes the sum of
            1 - cosine, the rows, and how many of them are over their time.
        there: What to wait for before `told` is read, on a GPU.
    """

    number: int
    rows: torch.Tensor
    over: bool
    told: torch.Tensor
    there: torch.cuda.Event | None


class Trainer:
    """Trains a model step by step."""

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        trained: nn.Module,
        source: ImageRows | CachedRows,
        rows: Rows,
        schedule: Schedule,
        state: Path,
    ) -> None:
        """Takes what `finetune.run` has made ready.

        Args:
            accelerator: Device, precision and processes.
            model: From `checkpoints.build`, partly frozen, on the device.
            trained: What maps items of `source` to predictions; shares its parameters with `model`.
            source: Images or cached features, by row number.
            rows: Rows, targets and weights.
            schedule: How to train.
            state: File to go on from, and to save to.
        """
        import torch

        self.accelerator, self.model, self.trained = accelerator, model, trained
        self.source, self.rows, self.schedule, self.state = source, rows, schedule, state
        self.rank, self.processes = rank_and_processes()
        self.targets, self.weights = torch.from_numpy(rows.targets), torch.from_numpy(rows.weights)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            self._groups(),
            schedule.learning_rate,
            weight_decay=WEIGHT_DECAY,
            fused=accelerator.device.type in ("cpu", "cuda"),  # a quarter of the time (docs/log.md)
        )
        self.wrapped, self.optimizer = accelerator.prepare(trained, optimizer)
        self.averages = [p.detach().clone() for p in self.parameters] if schedule.ema else []
        self.standing = Standing()
        self.begun: Begun | None = None
        self.steps = len(self._planned(1))  # of an epoch
        self.micro = schedule.micro_batch or schedule.batch_size
        self.deadline = Deadline(schedule.max_hours)
        self._load()
        self.saved = time.monotonic()

    def _planned(self, epoch: int) -> list[np.ndarray]:
        """The rows of an epoch's steps."""
        rows, schedule = self.rows.train, self.schedule
        if schedule.one_seed:
            rows = one_of_each(rows, self.rows.frame["prompt"].to_numpy()[rows], schedule.seed, epoch)
        return batches(rows, schedule.seed, epoch, schedule.batch_size)

    def _groups(self) -> list[dict[str, Any]]:
        """The parameters in groups of one learning rate each: its share of the peak is `share`."""
        schedule = self.schedule
        if schedule.layer_decay == 1:
            return [{"params": self.parameters, "share": 1.0}]
        shares = freezing.rates(self.model.backbone, schedule.layer_decay)
        least, by_share = schedule.lowest_rate / schedule.learning_rate, defaultdict(list)
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                by_share[max(least, shares.get(name.removeprefix("backbone."), 1.0))].append(parameter)
        return [{"params": some, "share": share} for share, some in sorted(by_share.items())]

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Within it the model has the moving average of its weights, if one is kept."""
        own = [p.data for p in self.parameters] if self.averages else []
        try:
            for parameter, average in zip(self.parameters, self.averages, strict=False):
                parameter.data = average
            yield
        finally:
            for parameter, data in zip(self.parameters, own, strict=False):
                parameter.data = data

    def epoch(self) -> float | None:
        """Continues the epoch under way to its end.

        Returns:
            Its mean loss, 1 - cosine; None if --max-hours ended it before, with a saved state.

        Raises:
            UserError: If the loss or the gradients are not finite, no image can be read, or memory does not suffice.
        """
        standing = self.standing
        planned = self._planned(standing.epoch)
        freezing.set_training(self.trained, True)
        if hasattr(self.source, "epoch"):
            self.source.epoch = standing.epoch
        shares = [batch[self.rank :: self.processes].tolist() for batch in planned[standing.step :]]
        loader, over = load(self.source, shares, self.schedule.loader_workers), False
        with progress_to(len(planned), f"epoch {standing.epoch}/{self.schedule.epochs}", standing.step) as advance:
            for (images, rows), batch in zip(loader, planned[standing.step :], strict=True):
                # A step is read when the next one has begun, so that a GPU never waits for this process.
                begun = self.begin(images, rows, len(batch), standing.step / len(planned))
                standing.step += 1
                over = self._read_last()
                self.begun = begun
                advance(1)
                if over:
                    break
                if time.monotonic() - self.saved > self.schedule.save_minutes * 60:
                    self.save()
        if self._read_last() or over:
            self.save()
            return None
        if not standing.rows:
            raise UserError("no readable training image; check --images")
        return standing.loss / standing.rows

    def finish_epoch(self, entry: dict[str, float]) -> None:
        """Notes a finished epoch, and saves."""
        history = [*self.standing.history, entry]
        self.standing = Standing(epoch=int(entry["epoch"]) + 1, history=history)
        self.save()

    def save(self) -> None:
        """Writes the state, in the main process."""
        self._read_last()
        self.saved = time.monotonic()
        if not self.accelerator.is_main_process:
            return
        kept = {name for name, p in self.model.named_parameters() if p.requires_grad}
        kept |= {name for name, _ in self.model.named_buffers()}
        scaler = self.accelerator.scaler
        state = {
            "model": {name: tensor for name, tensor in self.model.state_dict().items() if name in kept},
            "optimizer": self.optimizer.state_dict(),
            "scaler": scaler.state_dict() if scaler else None,
            "averages": self.averages,
            "standing": asdict(self.standing),
            "micro": self.micro,
        }
        state_file.save(self.state, state)

    def _load(self) -> None:
        state = state_file.read(self.state, "cpu")
        if state is None:
            return
        self.model.load_state_dict(state["model"], strict=False)
        self.optimizer.load_state_dict(state["optimizer"])
        for average, kept in zip(self.averages, state.get("averages", ()), strict=True):
            average.copy_(kept)
        if self.accelerator.scaler and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.standing, self.micro = Standing(**state["standing"]), self.schedule.micro_batch or state["micro"]
        log.info("continuing at epoch %d, step %d", self.standing.epoch, self.standing.step)

    def begin(self, images: torch.Tensor, rows: torch.Tensor, planned: int, done: float) -> Begun:
        """One optimizer step, which a GPU may still be computing on return.

        Args:
            images: uint8 (n, 3, s, s) or cached features, this process's readable share of a batch.
            rows: int64 (n,), their row numbers.
            planned: Rows of the whole batch, over all processes.
            done: How much of the epoch was done before, 0..1.

        Returns:
            What `read` reads.
        """
        import torch
        from torch.optim.swa_utils import get_ema_multi_avg_fn

        standing, schedule = self.standing, self.schedule
        factor = learning_rate_factor((standing.epoch - 1 + done) / schedule.epochs, schedule.cycles)
        before = (standing.epoch - 1) * self.steps + standing.step
        if schedule.warm_up:
            factor *= min(1.0, (before + 1) / schedule.warm_up)
        for group in self.optimizer.param_groups:
            group["lr"] = schedule.learning_rate * factor * group.get("share", 1.0)
        seed = np.random.SeedSequence((schedule.seed, standing.epoch, standing.step, self.rank))
        torch.manual_seed(int(seed.generate_state(1)[0]))
        losses = self._within_memory(images, rows, planned) if len(rows) else self.no_gradients()
        norm, scaler = self.accelerator.clip_grad_norm_(self.parameters, CLIP_NORM), self.accelerator.scaler
        size = losses.new_zeros(1) if norm is None else norm.to(losses)[None]
        over = self.deadline.passed(2)  # the next step begins before this one is read
        told = torch.cat([losses, size, self._summed(losses, over)]).to("cpu", non_blocking=losses.is_cuda)
        there = torch.cuda.current_stream().record_event() if losses.is_cuda else None
        self.optimizer.step()
        if scaler and scaler.get_scale() < 1:  # halved at each step that was left out
            self._stop(standing.step + 1, rows, "the gradients are not finite, however small the loss is made")
        self.optimizer.zero_grad(set_to_none=True)
        if self.averages:
            get_ema_multi_avg_fn(average_decay(schedule.ema, before))(
                self.averages, [p.detach() for p in self.parameters], 1
            )
        return Begun(standing.step + 1, rows, over, told, there)

    def read(self, begun: Begun) -> tuple[float, int, bool]:
        """Waits for a step's results.

        Returns:
            The sum of 1 - cosine and the number of rows over all processes, and whether any is over its time.

        Raises:
            UserError: If the loss or the gradients are not finite; the weights are spoiled, the saved state is not.
        """
        if begun.there is not None:
            begun.there.synchronize()
        told, count = begun.told.tolist(), len(begun.rows)
        losses, size, summed = told[:count], told[count], told[count + 1 :]
        if not np.isfinite(losses).all():
            self._stop(begun.number, begun.rows[~np.isfinite(losses)], "the loss is not a number")
        if not self.accelerator.scaler and not math.isfinite(size):
            self._stop(begun.number, begun.rows, f"the gradients' norm is {size}")
        loss, rows, over = summed or (sum(losses), count, begun.over)
        return loss, int(rows), bool(over)

    def _read_last(self) -> bool:
        """Counts the step that was begun last, unless that was done; returns whether a process is over its time."""
        if self.begun is None:
            return False
        begun, self.begun = self.begun, None
        loss, rows, over = self.read(begun)
        self.standing.loss += loss
        self.standing.rows += rows
        return over

    def _within_memory(self, images: torch.Tensor, rows: torch.Tensor, planned: int) -> torch.Tensor:
        """Gradients of a share, in as few passes as memory allows; returns the losses."""
        import torch

        def work(at_once: int) -> torch.Tensor:
            self.optimizer.zero_grad(set_to_none=True)
            pieces = -(-len(rows) // at_once)
            split = zip(images.tensor_split(pieces), rows.tensor_split(pieces), strict=True)
            return torch.cat([self.gradients(*piece, planned, i + 1 == pieces) for i, piece in enumerate(split)])

        alone = self.processes == 1
        losses, self.micro = within_memory(work, self.micro, len(rows), alone, "lower --micro-batch")
        return losses

    def no_gradients(self) -> torch.Tensor:
        """A gradient of 0 for a share none of whose images can be read: other processes wait for one."""
        import torch

        side = getattr(self.source, "size", 1)
        blank = torch.zeros(1, 3, side, side, dtype=torch.uint8, device=self.accelerator.device)
        self.accelerator.backward(0 * self.wrapped(blank).float().sum())
        return torch.zeros(0, device=self.accelerator.device)

    def gradients(self, images: torch.Tensor, rows: torch.Tensor, planned: int, last: bool) -> torch.Tensor:
        """Adds a piece's part of the gradient of the batch's mean loss; processes meet at the last piece.

        Returns:
            1 - cosine of each image, float32 (n,) on the device.
        """
        from torch.nn.functional import cosine_similarity

        device = self.accelerator.device
        targets, weights = (pinned(part[rows]).to(device, non_blocking=True) for part in (self.targets, self.weights))
        with contextlib.nullcontext() if last else self.accelerator.no_sync(self.wrapped):
            predicted = self.wrapped(images.to(device, non_blocking=True)).float()
            losses = 1 - cosine_similarity(predicted, targets)
            # Gradients are averaged over processes, hence the factor.
            self.accelerator.backward((losses * weights).sum() * (self.processes / planned))
        return losses.detach()

    def _stop(self, step: int, rows: torch.Tensor, what: str) -> None:
        names = self.rows.frame["image_name"].iloc[rows.tolist()]
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        raise UserError(
            f"epoch {self.standing.epoch}, step {step}: {what} (images {', '.join(names[:NAMED])}"
            f"{more}); lower --learning-rate; the best checkpoint so far is kept in {self.state.parent}"
        )

    def _summed(self, losses: torch.Tensor, over: bool) -> torch.Tensor:
        """Of several processes: sum and number of a step's losses, how many are over their time; float64 (3,)."""
        import torch

        if self.processes == 1:
            return losses.new_empty(0)
        # Made on the device: numbers that are moved there are waited for.
        own = torch.zeros(3, dtype=torch.float64, device=losses.device)
        own[0] += losses.sum(dtype=own.dtype)
        own[1] += len(losses)
        own[2] += over
        return self.accelerator.reduce(own)
