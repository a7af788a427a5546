"""The chain, one row a stage: the command line, notebooks, kernels, README table and tests follow this file."""

import importlib
import logging
from dataclasses import dataclass
from typing import Any

log = logging.getLogger(__name__)
COMPETITION = "stable-diffusion-image-to-prompts"
DIFFUSION = ("stabilityai/stable-diffusion-v2/pytorch/1/1",)


@dataclass(frozen=True)
class Kernel:
    """What a stage's Kaggle kernel asks for.

    Attributes:
        gpu: Whether it needs one.
        internet: Whether weights may come from the hub.
        after: Stages whose kernels' output it reads.
        datasets: Ours that it reads if they are there: `weights`, `metadata`, `embeddings`.
        models: Kaggle models, `owner/model/framework/variation/version`.
        competition: Whether it reads the competition's files and submits.
    """

    gpu: bool
    internet: bool = True
    after: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    competition: bool = False


@dataclass(frozen=True)
class Stage:
    """One link of the chain.

    Attributes:
        number: Position, and the prefix of the notebook and the kernel.
        name: Subcommand.
        notebook: Stem of the notebook and of its text source.
        does: What it does, in a few words.
        reads: What it reads, relative to the run's folder.
        writes: What it writes, relative to the run's folder.
        kernel: What its Kaggle kernel asks for.
    """

    number: int
    name: str
    notebook: str
    does: str
    reads: str
    writes: str
    kernel: Kernel


STAGES = (
    Stage(
        1,
        "generate",
        "01_generate_prompts",
        "writes new prompts with MagicPrompt, or collects them from a public source",
        "a language model or source files",
        "prompts/*.csv",
        Kernel(gpu=True),
    ),
    Stage(
        2,
        "dedupe",
        "02_dedupe_prompts",
        "drops every prompt within cosine 0.8 of one that is kept",
        "prompts/*.csv, other metadata CSVs",
        "data_meta/<name>.csv, <name>.removed.csv, <name>.png",
        Kernel(gpu=False, after=("generate",)),
    ),
    Stage(
        3,
        "render",
        "03_render_images",
        "Stable Diffusion 2 at 768 px, downsized to 512",
        "data_meta/<name>.csv",
        "images/<name>/*.png or *.tar, manifest.csv",
        Kernel(gpu=True, after=("dedupe",), models=DIFFUSION),
    ),
    Stage(
        4,
        "finetune",
        "04_finetune_convnext",
        "ConvNeXt-XXLarge, last quarter of its layers unfrozen, linear head to 384",
        "images/<name>",
        "checkpoints/convnext/",
        Kernel(gpu=True, after=("render",)),
    ),
    Stage(
        5,
        "embed",
        "05_embed_images",
        "CLIP ViT-B/32, ConvNeXt-Tiny and CLIP-Interrogator embeddings, and the prompts' own",
        "images/<name>",
        "embeddings/*.npy, *.names.csv",
        Kernel(gpu=True, after=("render",)),
    ),
    Stage(
        6,
        "ensemble",
        "06_train_ensemble",
        "transformer encoder that fuses the embeddings of an image",
        "embeddings/",
        "checkpoints/ensemble/",
        Kernel(gpu=True, after=("render", "embed")),
    ),
    Stage(
        7,
        "infer",
        "07_infer_submission",
        "predicts 384 numbers an image, blends models, finds the nearest known prompt",
        "any image folder, checkpoints/",
        "submission/submission.csv, submission.prompts.csv",
        Kernel(
            gpu=True,
            internet=False,
            after=("finetune", "ensemble"),
            datasets=("weights", "metadata", "embeddings"),
            competition=True,
        ),
    ),
    Stage(
        8,
        "describe",
        "08_edit_prompts",
        "says the prompt of any image in words that can be edited",
        "any images, checkpoints/",
        "prompts.csv, prompts.jsonl or a .txt beside each image",
        Kernel(gpu=True, after=("dedupe", "render", "finetune", "ensemble"), datasets=("weights", "metadata")),
    ),
)
BENCHMARK = Kernel(gpu=True, models=DIFFUSION)  # outside the chain: benchmarks/gpu.py
# The stand-ins of the embedded profile. Only this table names them, so that no stage depends on them.
EMBEDDED = {
    "prompt": "embedded.grammar:prompt",
    "words": "embedded.grammar:words",
    "scenes": "embedded.scenes:SceneBackend",
    "picture": "embedded.scenes:picture",
    "undrawn": "embedded.grammar:undrawn",
    "classes": "embedded.classes:ClassInterrogator",
}


def load(place: str) -> Any:
    """Imports what lies at `module:name` below this package."""
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(f"{__package__}.{module}"), name)


def embedded(name: str) -> Any:
    """Imports a stand-in of the table above."""
    return load(EMBEDDED[name])


def announce(name: str) -> None:
    """Logs which stage begins."""
    about = stage(name)
    log.info("%d %s: %s", about.number, about.name, about.does)


def stage(name: str) -> Stage:
    """Returns the stage called `name`; raises KeyError if there is none."""
    return {s.name: s for s in STAGES}[name]
