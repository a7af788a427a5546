"""How `finetune` trains: the flags that the training loop has to know."""

from dataclasses import dataclass
from typing import Literal

from ..run.bounds import Amount, NotNegative, Positive


@dataclass
class Steps:
    """How it trains."""

    epochs: Positive = 4
    """Passes over the training rows."""
    batch_size: Positive = 32
    """Images an optimizer step, over all processes."""
    learning_rate: float = 2e-3
    """Peak learning rate of AdamW."""
    cycles: Positive = 1
    """Cosine cycles of the learning rate over all epochs (warm restarts)."""
    warm_up: NotNegative = 60
    """Steps in which the learning rate rises to its peak."""
    layer_decay: float = 1.0
    """Learning rate of a group of layers, as a share of that of the group behind it; 1: all the same."""
    lowest_rate: Amount = 0.0
    """No group's peak learning rate is lower."""
    ema: float = 0.0
    """Share of the past in the moving average of the weights, which is what validates and is kept; less in the first
    steps, (1 + n) / (10 + n) after n. 0: no average."""
    one_seed: bool = False
    """Of several images of a prompt each epoch takes one, drawn anew."""
    train_from: int = -1
    """First group of layers that trains, from 0; -1: the last quarter."""
    seed: int = 0
    """Seed of the shuffling."""


@dataclass
class Limits:
    """Memory and time."""

    micro_batch: NotNegative = 0
    """Images at once and process; 0: as many as the batch has. One process halves it when memory runs out, several stop
    and say so."""
    grad_checkpointing: bool = False
    """Compute activations twice to keep fewer of them."""
    compile: bool = False
    """Compile the backbone's layers with torch.compile first, on a GPU; results differ by rounding."""
    cache_features: bool = True
    """Run the frozen part once and keep its output on disk (35 KB an image for EfficientNet-Lite2 at 224 px)."""
    precision: Literal["auto", "fp32"] = "auto"
    """auto: bf16 or fp16 where the hardware has it."""
    loader_workers: NotNegative = 0
    """Threads that decode images; 0: one a core."""
    max_hours: Amount = 0.0
    """Save and stop before the process is this old; 0: never."""
    save_minutes: Amount = 10.0
    """Save the state at least so often."""


@dataclass
class Schedule(Steps, Limits):
    """All that the loop has to know."""
