"""Stable Diffusion 2 from a single-file checkpoint (768-v-ema.safetensors or .ckpt), without the hub.

diffusers converts such a file but wants the model's settings and tokenizer from a repository, and the one that it
knows has left the hub. The settings are few, so they are here; so is the tokenizer, in `models/clip_tokenizer.py`.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..models import clip_tokenizer
from ..run.errors import UserError

if TYPE_CHECKING:
    import torch
    from diffusers import StableDiffusionPipeline

# The sizes of stable-diffusion-2: Stability-AI/stablediffusion, configs/stable-diffusion/v2-inference-v.yaml, in
# diffusers' terms. Whatever stays out has the class's default.
SETTINGS: dict[str, dict[str, Any]] = {
    "unet": {
        "_class_name": "UNet2DConditionModel",
        "sample_size": 96,
        "layers_per_block": 2,
        "attention_head_dim": [5, 10, 20, 20],
        "cross_attention_dim": 1024,
        "use_linear_projection": True,
    },
    "vae": {
        "_class_name": "AutoencoderKL",
        "sample_size": 768,
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2,
    },
    "text_encoder": {
        "model_type": "clip_text_model",
        "architectures": ["CLIPTextModel"],
        "hidden_act": "gelu",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 23,  # of 24: the reference takes the last but one layer's output
        "projection_dim": 512,
        "vocab_size": 49408,
    },
}
SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "prediction_type": "v_prediction",
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def load(path: Path, dtype: torch.dtype, any_model: bool = False) -> StableDiffusionPipeline:
    """Loads a single-file checkpoint.

    Args:
        path: `.safetensors`, or `.ckpt`, which is read without unpickling code.
        dtype: Of the weights in memory.
        any_model: Whether the name need not be that of 2.0's.

    Raises:
        UserError: If the name does not say that it is the 768-px model: the 512-px one has the very same tensors.
    """
    if not any_model and ("768" not in path.name or "2-1" in path.name):  # 2.1's is v2-1_768-ema-pruned
        raise UserError(
            f"{path}: the tensors do not tell the 768-px v_prediction model 2.0 from the 512-px one and 2.1; if it is "
            "the former, give it its name, 768-v-ema; otherwise take it with --any-model"
        )
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        components = {
            part: ["diffusers", values["_class_name"]] for part, values in SETTINGS.items() if part != "text_encoder"
        }
        components |= {
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
        }
        components |= {"scheduler": ["diffusers", "DDIMScheduler"]}
        index = {"_class_name": "StableDiffusionPipeline", **components, "requires_safety_checker": False}
        (folder / "model_index.json").write_text(json.dumps(index))
        for part, values in SETTINGS.items():
            (folder / part).mkdir()
            (folder / part / "config.json").write_text(json.dumps(values))
        return StableDiffusionPipeline.from_single_file(
            str(path),
            config=str(folder),
            tokenizer=clip_tokenizer.load(),
            scheduler=DDIMScheduler(**SCHEDULER),
            safety_checker=None,
            feature_extractor=None,
            torch_dtype=dtype,
            local_files_only=True,
        )
