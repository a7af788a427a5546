"""The chain, one row per stage: command line, notebooks, kernels, the docs' table of stages and tests follow it."""

import importlib
import logging
from dataclasses import dataclass
from typing import Any

log = logging.getLogger(__name__)
COMPETITION = "stable-diffusion-image-to-prompts"
DIFFUSION = ("stabilityai/stable-diffusion-v2/pytorch/1/1",)
CONTINUED = ("render", "finetune")  # stages that go on from session to session
IMAGES = "image-to-prompts-images"  # with -1, -2, ... behind it, the datasets that sessions of render publish
# Kaggle datasets of others, images of Stable Diffusion 2 with their prompts, which `generate --source pairs` reads.
PAIRS = (
    "motono0223/gustavosta-stable-diffusion-prompts-sd2",
    "motono0223/gustavosta-stable-diffusion-prompts-sd2-v2",
    "xiaozhouwang/sd2gpt2",
    "xiaozhouwang/sd2hardcode",
    "rturley/stable-diffusion-100k-custom-prompts-and-images",
    "jeinsong/chatgpt-images-w-prompts",
    "jeinsong/sd2-images-211238",
)


@dataclass(frozen=True)
class Kernel:
    """What a stage's Kaggle kernel asks for.

    Attributes:
        gpu: Whether it needs one.
        internet: Whether weights may come from the hub.
        after: Stages whose kernels' output it reads.
        also: Stages whose kernels' output it reads if it is there.
        datasets: Ours that it reads if they are there: `weights`, `metadata`, `embeddings`.
        images: Whether it reads the images that sessions of render have published.
        pairs: Whether it reads `PAIRS`.
        models: Kaggle models, `owner/model/framework/variation/version`.
        competition: Whether it reads the competition's files; without internet it submits.
        bank: Whether it reads the output of `BANK` if it is there.
    """

    gpu: bool
    internet: bool = True
    after: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()
    images: bool = False
    pairs: bool = False
    models: tuple[str, ...] = ()
    competition: bool = False
    bank: bool = False


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

    @property
    def slug(self) -> str:
        """What its kernel and the kernel's folder are called."""
        return self.notebook.replace("_", "-")


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
        Kernel(gpu=True, after=("dedupe",), images=True, models=DIFFUSION),
    ),
    Stage(
        4,
        "finetune",
        "04_finetune_convnext",
        "ConvNeXt-XXLarge, last quarter of its layers unfrozen, linear head to 384",
        "images/<name>",
        "checkpoints/convnext/",
        Kernel(gpu=True, also=("render",), images=True, pairs=True),
    ),
    Stage(
        5,
        "embed",
        "05_embed_images",
        "CLIP ViT-B/32, ConvNeXt-Tiny and CLIP-Interrogator embeddings, and the prompts' own",
        "images/<name>",
        "embeddings/*.npy, *.names.csv",
        Kernel(gpu=True, also=("render",), images=True, pairs=True),
    ),
    Stage(
        6,
        "ensemble",
        "06_train_ensemble",
        "transformer encoder that fuses the embeddings of an image",
        "embeddings/",
        "checkpoints/ensemble/",
        Kernel(gpu=True, after=("embed",), also=("render",), images=True, pairs=True),
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
            also=("finetune", "ensemble"),
            datasets=("weights", "metadata", "embeddings"),
            competition=True,
            bank=True,
        ),
    ),
    Stage(
        8,
        "describe",
        "08_edit_prompts",
        "writes an editable prompt for any image",
        "any images, checkpoints/",
        "prompts.csv, prompts.jsonl or a .txt beside each image",
        Kernel(
            gpu=True,
            also=("dedupe", "render", "finetune", "ensemble"),
            datasets=("weights", "metadata"),
            images=True,
            models=DIFFUSION,
            competition=True,
            bank=True,
        ),
    ),
)
# Outside the chain: benchmarks/gpu.py, and a bank of prompts.
BENCHMARK = Kernel(gpu=True, models=DIFFUSION)
BANK = Kernel(gpu=True, datasets=("metadata",))
BANK_SLUG = "image-to-prompts-bank"
# The stand-ins of the embedded profile. Only this table names them, so that no stage depends on them.
EMBEDDED = {
    "prompt": "embedded.grammar:prompt",
    "words": "embedded.grammar:words",
    "scenes": "embedded.scenes:SceneBackend",
    "picture": "embedded.scenes:picture",
    "undrawn": "embedded.grammar:undrawn",
    "classes": "embedded.classes:ClassInterrogator",
    "dual": "embedded.dual:Dual",
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
