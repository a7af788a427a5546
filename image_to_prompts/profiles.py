"""What every stage's settings share, and the defaults that depend on the profile and the run's folder."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from . import pipeline
from .models import weights
from .run.bounds import check
from .run.folders import Run, on_kaggle, profile_called


@dataclass
class StageConfig:
    """Flags that every stage has."""

    run: Path = Path("runs/default")
    """Folder in which every other path has its default."""
    profile: str = "embedded"
    """`embedded` (stand-ins, any machine) or `full` (the real models; weights, and a GPU or patience)."""
    weights_dir: Path | None = None
    """Folder of weights, looked into before all other places; left out: see `image-to-prompts weights`."""
    quiet: bool = False
    """No progress bars."""

    def __post_init__(self) -> None:
        """Takes an old name of the profile for the new one, and `weights_dir` for this process's folder of weights.

        Raises:
            UserError: Where a field is below its bound, or the folder is not there.
        """
        self.profile = profile_called(self.profile)
        check(self)
        weights.use(self.weights_dir)

    def settings(self, *without: str) -> dict[str, Any]:
        """The fields on which a stage's outputs depend: all but those named, the shared ones, and who does the work."""
        shared = {"run", "profile", "weights_dir", "quiet", "engine", "address", "actors"}
        return {k: v for k, v in asdict(self).items() if k not in {*without, *shared}}


@dataclass
class Models:
    """The models of CLIP Interrogator."""

    caption: str = weights.CAPTION
    """Its BLIP model: blip-large, or a folder. In its place any image-to-text model of transformers (folder or
    owner/name), or a server that speaks OpenAI's protocol: http://127.0.0.1:11434/v1, to which the images go."""
    ranker: str = weights.RANKER
    """Its CLIP model: open_clip:<model>, or a folder with open_clip_config.json."""


# Only what differs from the dataclasses' own defaults, which are the embedded profile's.
PROFILE_DEFAULTS: dict[str, dict[str, dict[str, Any]]] = {
    "embedded": {"dedupe": {"folds": 16}},
    "full": {
        "generate": {"source": "magicprompt", "count": 100_000},
        "render": {"backend": "sd2", "per_tar": 1000},
        "embed": {
            "encoders": ("open_clip:ViT-B-32-quickgelu", "transformers:facebook/convnext-tiny-224", "interrogator")
        },
        "ensemble": {"epochs": 40, "patience": 10},
        "infer": {"views": ("whole",), "fallback": True},
        "describe": {"views": ("whole",)},
    },
}


DECIDING = ("recipe", "backbone")  # settings of `finetune` on which its other defaults depend

# A kernel may run 12 hours and leave 20 GB, of which 19.5 in practice.
KERNEL_LIMITS = {"max_hours": 11.0, "max_gb": 19.0}
SUBMISSION_HOURS = 8.5  # of the 9 that the competition's own runs have


def place_defaults(stage: str, run: Run) -> dict[str, Any]:
    """What depends on the place: paths in the run's folder, such that each stage reads what its predecessor wrote."""
    limits = KERNEL_LIMITS if on_kaggle() else {}
    hours = {name: value for name, value in limits.items() if name == "max_hours"}
    images = run.rendered(run.filled(run.images, run.train_images))  # the whole chain holds test images out
    defaults: dict[str, dict[str, Any]] = {
        "generate": {"out": run.prompts, **hours},
        "dedupe": {"prompts": (run.have(run.prompts),), "out": run.metadata},
        "render": {"metadata": run.have(run.metadata), "out": run.images, **limits},
        "finetune": {"images": images, "out": run.checkpoint, **hours},
        "embed": {"images": images, "out": run.embeddings, **hours},
        "ensemble": {"embeddings": run.have(run.embeddings), "out": run.ensemble, **hours},
        "infer": {
            "images": run.filled(run.images, run.test_images),
            "out": run.submission,
            **({"max_hours": SUBMISSION_HOURS} if on_kaggle() else {}),
        },
        "describe": {},
    }
    return defaults[stage]


def config_class(stage: str) -> type[StageConfig]:
    """The `Config` dataclass of a stage's module."""
    return pipeline.load(f"{stage}:Config")


def default_config(stage: str, run: Run, profile: str, **overrides: Any) -> Any:
    """A stage's settings for a profile and a run's folder.

    Args:
        stage: Name of the stage.
        run: The run's folder.
        profile: `embedded` or `full`.
        **overrides: Fields to set otherwise.

    Returns:
        The stage's `Config`.
    """
    profile = profile_called(profile)
    values: dict[str, Any] = {"run": run.folder, "profile": profile}
    if stage == "finetune":
        recipe, backbone = (overrides.get(one, "") for one in DECIDING)
        values |= pipeline.load("finetune.recipes:flags")(recipe, profile, backbone)
    values |= PROFILE_DEFAULTS[profile].get(stage, {}) | place_defaults(stage, run) | overrides
    return replace(config_class(stage)(), **values)
