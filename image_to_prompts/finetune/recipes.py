"""Recipes of `finetune`: one row per tower, each value with its source; `finetune --recipe NAME`, values as flags.

Nothing here was measured by this project but `embedded`. Sources are write-ups of the competition (Kaggle discussions,
numbers in brackets) and papers. Tried by others and left out: 8-bit optimisers (no one reports a gain), the angle as
loss (33rd alone), batch norm in the head (1st, +.006 with a head of 16,000 numbers), flips (they hurt 3rd).
"""

from dataclasses import asdict, dataclass, replace

from ..models import backbones, freezing
from ..run.errors import UserError

T4 = 65e12  # float16 operations a second at its peak (NVIDIA's data sheet)
REACHED = 0.3  # share of the peak; an assumption
EMA = 0.9998  # 3rd [410686]
CLIP_BATCH = 160  # 4th [410798]


@dataclass(frozen=True)
class Recipe:
    """How a tower is tuned; the names are those of the flags.

    Attributes:
        about: Who did it so, and what they reached with it.
    """

    about: str
    backbone: str
    image_size: int
    train_from: int = -1
    learning_rate: float = 5e-5
    layer_decay: float = 1.0
    lowest_rate: float = 0.0
    ema: float = 0.0
    warm_up: int = 0
    cycles: int = 1
    batch_size: int = 32
    micro_batch: int = 4
    epochs: int = 4
    augment: bool = False
    cache_features: bool = False

    def flags(self) -> dict[str, object]:
        """What it sets of `finetune`'s settings."""
        return {name: value for name, value in asdict(self).items() if name != "about"}


# 3rd [410686]: a probe first (here the head always starts as a ridge regression), EMA, layer-wise decay of .4 for
# ViT-B and .6 for ViT-L "so that the first layers get about 1e-6", which a floor of 1e-6 makes true for both; a higher
# peak rate than without them; weak augmentation +.007. Peak, batch and epochs: 4th [410798], 4e-5 to 5e-5, 160, 3 to 4.
_CLIP = Recipe(
    "",
    "",
    224,
    train_from=0,
    learning_rate=1e-4,
    lowest_rate=1e-6,
    ema=EMA,
    warm_up=500,
    batch_size=CLIP_BATCH,
    micro_batch=16,  # of this and the others as many as 15 GB hold, by what an H200 needed (benchmarks/gpu_h200.json)
    augment=True,
)
RECIPES = {
    "reference": Recipe(
        "the reference of the competition's bronze medal: last quarter, two cosine cycles",
        "open_clip:convnext_xxlarge",
        512,
        cycles=2,
        epochs=25,
    ),
    "vit-b": replace(
        _CLIP,
        about="as the third team tuned it, LAION-2B's weights; it reached .614 alone",
        backbone="open_clip:ViT-B-16",
        layer_decay=0.4,
    ),
    "vit-l-336": replace(
        _CLIP,
        about="as the third team tuned it, OpenAI's weights; it reached .634 alone",
        backbone="open_clip:ViT-L-14-336-quickgelu",
        image_size=336,
        layer_decay=0.6,
        micro_batch=8,
    ),
    "vit-h": replace(
        _CLIP,
        about="as the fourth team tuned it, from block 14 on; it is in their blend, .641",
        backbone="open_clip:ViT-H-14",
        train_from=15,  # the stem is group 0, block 14 group 15
        learning_rate=5e-5,
        layer_decay=0.6,
        micro_batch=8,
    ),
    "convnext-xxl": replace(
        _CLIP,
        about="the second and seventh team tuned this tower; their values are not published, these are guesses",
        backbone="open_clip:convnext_xxlarge",
        image_size=384,
        train_from=-1,
        learning_rate=5e-5,
        layer_decay=0.9,
        micro_batch=4,
    ),
    "eva02-l-336": replace(
        _CLIP,
        about="tuned as vit-l-336; the tower is in the blends of the first three teams",
        backbone="open_clip:EVA02-L-14-336",
        image_size=336,
        layer_decay=0.6,
        micro_batch=4,
    ),
    "embedded": Recipe(
        "the stand-in on emoji scenes, measured in docs/log.md",
        "timm:tf_efficientnet_lite2",
        224,
        train_from=12,  # of 22; with its rate measured in docs/log.md, "Two recipes at a small size"
        learning_rate=2e-3,
        warm_up=60,
        micro_batch=0,
        cache_features=True,
    ),
}
OF_PROFILE = {"embedded": "embedded", "full": "reference"}
LIST = "list"


def flags(name: str, profile: str, backbone: str = "") -> dict[str, object]:
    """The settings of a recipe; "" and `list`: those of the profile's own.

    Args:
        name: The recipe.
        profile: `embedded` or `full`.
        backbone: Another backbone than the recipe's: its last quarter trains, for a group's number holds for one tower.

    Raises:
        UserError: If there is no such recipe.
    """
    name = OF_PROFILE[profile] if name in ("", LIST) else name
    if name not in RECIPES:
        raise UserError(f"--recipe {name}: choose one of {', '.join(RECIPES)}, or {LIST}")
    row = RECIPES[name]
    other = row.train_from > 0 and backbone not in ("", row.backbone)
    return (replace(row, train_from=-1) if other else row).flags()


def table() -> str:
    """The recipes as text, with what follows from their towers: arithmetic, of which nothing was measured on a GPU.

    `GB` are the weights, their gradients, the optimizer's two moments and the moving average, without the activations
    that a batch needs (`--dry-run` measures those). Images an hour: floating-point operations of a training step on one
    image, counted on the model, at an assumed share of a T4's peak.
    """
    head = ("recipe", "tower", "px", "epochs", "batch", "rate", "trains", "GFLOP", "GB", "images/h, 2 T4")
    rows: list[tuple[str, ...]] = [head]
    for name, one in RECIPES.items():
        trained, every, operations = cost(one)
        copies = 4 + (one.ema > 0)  # weights, gradients, two moments
        size = (4 * copies * trained + 2 * (every - trained)) / 1e9
        rate = 2 * T4 * REACHED * 3600 / operations
        said = (
            f"{trained / 1e6:.0f} of {every / 1e6:.0f} M",
            f"{operations / 1e9:,.0f}",
            f"{size:.1f}",
            f"{rate:,.0f}",
        )
        rows.append(
            (name, one.backbone, *map(str, (one.image_size, one.epochs, one.batch_size, one.learning_rate)), *said)
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return "\n".join([*lines, "", *(f"{name}: {one.about}" for name, one in RECIPES.items())])


def cost(recipe: Recipe) -> tuple[int, int, float]:
    """Parameters that train, all of them, and the floating-point operations of a training step on one image."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        tower = backbones.build(backbones.describe(recipe.backbone, recipe.image_size))
        pixels = torch.zeros(1, 3, recipe.image_size, recipe.image_size)
    freezing.unfreeze(tower, recipe.train_from)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        tower.eval()(pixels)
    found = {name.partition(".")[2]: sum(some.values()) for name, some in counter.get_flop_counts().items()}
    inner = {name for name in found if name and not any(other.startswith(f"{name}.") for other in found)}
    modules = dict(tower.named_modules())
    back = sum(found[one] for one in inner if any(p.requires_grad for p in modules[one].parameters()))
    sizes = [(p.numel(), p.requires_grad) for p in tower.parameters()]
    # A step back takes two products where the way forward takes one; its own counter forgets groups of convolutions.
    operations = counter.get_total_flops() + 2 * back
    return sum(n for n, trains in sizes if trains), sum(n for n, _ in sizes), operations
