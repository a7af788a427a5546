"""Stable Diffusion 2 from a single-file checkpoint (768-v-ema.safetensors or .ckpt), without the hub.

diffusers converts such a file but wants the model's settings and tokenizer from a repository, and the one that it
knows has left the hub. So the settings lie here, in diffusers' own layout: stable_diffusion_2/, with the sizes of
Stability-AI/stablediffusion, configs/stable-diffusion/v2-inference-v.yaml. Of 24 layers of the text encoder it has 23,
since the reference takes the last but one layer's output. The tokenizer is that of `models/clip_tokenizer.py`.
"""

from pathlib import Path

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from ..models import clip_tokenizer
from ..run.errors import UserError

SETTINGS = Path(__file__).parent / "stable_diffusion_2"


def load(path: Path, dtype: torch.dtype, any_model: bool = False) -> StableDiffusionPipeline:
    """Loads a single-file checkpoint.

    Args:
        path: `.safetensors`, or `.ckpt`, which is read without unpickling code.
        dtype: Of the weights in memory.
        any_model: Whether 2.1 will do, too, whose settings are those of 2.0.

    Raises:
        UserError: If the name does not say that it is the 768-px model: the 512-px one has the very same tensors.
    """
    said = "its tensors do not tell the 768-px model 2.0 from the 512-px one and 2.1"
    if "768" not in path.name:
        remedy = "if it is the first, name it 768-v-ema; of another model give a folder of diffusers"
        raise UserError(f"{path}: {said}; {remedy}")
    if not any_model and "2-1" in path.name:  # 2.1's is v2-1_768-ema-pruned
        raise UserError(f"{path}: {said}; take 2.1 with --any-model")
    return StableDiffusionPipeline.from_single_file(
        str(path),
        config=str(SETTINGS),
        tokenizer=clip_tokenizer.load(),
        scheduler=DDIMScheduler.from_pretrained(SETTINGS, subfolder="scheduler", local_files_only=True),
        safety_checker=None,
        feature_extractor=None,
        torch_dtype=dtype,
        local_files_only=True,
    )
