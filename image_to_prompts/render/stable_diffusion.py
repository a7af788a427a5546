"""The reference renderer: Stable Diffusion 2 (768 px, v-prediction) through diffusers, downsized to 512 px."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from .. import weights
from ..errors import UserError

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

RENDER_SIZE, SIZE = 768, 512
STEPS, GUIDANCE = 50, 9.0  # the competition's steps, the reference's guidance
NSFW = "nsfw_blacked"


def check_model(pipeline: StableDiffusionPipeline) -> None:
    """Refuses any model that is not the 768-px v-prediction one, which the competition used.

    Raises:
        UserError: Saying what was found.
    """
    prediction = pipeline.scheduler.config.get("prediction_type", "epsilon")
    size = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    if prediction != "v_prediction" or size != RENDER_SIZE:
        raise UserError(
            f"found a {size}-px {prediction} model, need the {RENDER_SIZE}-px v_prediction one "
            "(stable-diffusion-2, not -base); attach or download the right weights"
        )


def load(path: Path | None = None) -> StableDiffusionPipeline:
    """Loads and checks the pipeline, with the reference's DDIM scheduler, on this process's device.

    Raises:
        UserError: If the weights are nowhere, or are another model's.
    """
    folder = weights.locate("stable-diffusion-2", path)
    import torch
    from accelerate import PartialState
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    device = PartialState().device
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    try:
        pipeline = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=dtype, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: not a Stable Diffusion pipeline: {str(error).splitlines()[0]}") from error
    check_model(pipeline)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


class StableDiffusionBackend:
    """The reference backend of the stage."""

    def __init__(self, path: Path | None = None, steps: int = STEPS, batch_size: int = 4) -> None:
        self.pipeline = load(path)
        self.steps = steps
        self.batch_size = batch_size

    def __call__(self, prompts: list[str], seeds: list[int]) -> list[tuple[Image.Image, str]]:
        """Renders a batch; each row's noise comes from a generator of its own, on the CPU so that machines agree."""
        import torch

        result = self.pipeline(
            prompt=prompts,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
            num_inference_steps=self.steps,
            guidance_scale=GUIDANCE,
            height=RENDER_SIZE,
            width=RENDER_SIZE,
        )
        blacked = result.nsfw_content_detected or [False] * len(prompts)
        return [
            (image.resize((SIZE, SIZE), Image.Resampling.LANCZOS), NSFW if black else "")
            for image, black in zip(result.images, blacked, strict=True)
        ]
