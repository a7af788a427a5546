"""The reference renderer: Stable Diffusion 2 (768 px, v-prediction) through diffusers, downsized to 512 px.

Memory-efficient attention is PyTorch's scaled_dot_product_attention, which diffusers uses by default. The VAE decodes
one image at a time: four at once need three times the memory and save a quarter of a percent (docs/log.md).
"""

import functools
import logging
from collections.abc import Callable, Iterator, Set
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from PIL import Image

from ..data.metadata import FAILED, NSFW
from ..models import fast_layers, layouts, weights
from ..run import devices
from ..run.errors import AGAIN, UserError, explained
from . import single_file
from .encode import Finished, finish
from .store import Row

log = logging.getLogger(__name__)
MODEL = "stable-diffusion-2"
RENDER_SIZE = 768
STEPS, FAST_STEPS, GUIDANCE = 50, 20, 9.0  # the competition's steps, --fast's, the reference's guidance
LARGEST_BATCH = 16
ENCODERS = 2  # threads that downsize and encode
PROBE = Row(0, "", "", 0, "")  # what any machine in order renders


OTHER_WEIGHTS = "attach or download the right weights, or take these with --any-model"


def check_model(pipeline: StableDiffusionPipeline) -> None:
    """Refuses any model that is not Stable Diffusion 2.0 at 768 px, which the competition used.

    2.1 has the same size, prediction type and tensors; its U-Net alone says `upcast_attention`
    (stabilityai/stable-diffusion-2-1, unet/config.json).

    Raises:
        UserError: Saying what was found.
    """
    if pipeline.unet.config.get("upcast_attention"):
        raise UserError(f"found Stable Diffusion 2.1, need 2.0; {OTHER_WEIGHTS}")
    prediction = pipeline.scheduler.config.get("prediction_type", "epsilon")
    size = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    if prediction != "v_prediction" or size != RENDER_SIZE:
        need = f"need the {RENDER_SIZE}-px v_prediction one (stable-diffusion-2, not -base)"
        raise UserError(f"found a {size}-px {prediction} model, {need}; {OTHER_WEIGHTS}")


def load(path: Path, fast: bool = False, any_model: bool = False, compiled: bool = False) -> StableDiffusionPipeline:
    """Loads and checks the pipeline, in float16 on a GPU, on this process's device.

    Args:
        path: Folder in diffusers' layout, or a single-file checkpoint (768-v-ema).
        fast: DPM-Solver++ (Lu et al. 2022, second-order multistep) instead of the reference's DDIM.
        any_model: Whether other models than the competition's are taken too.
        compiled: Whether U-Net and VAE are compiled (see `fast_layers.compiled`).

    Raises:
        UserError: If the weights are damaged or another model's.
    """
    diffusers_logging.disable_progress_bar()
    diffusers_logging.set_verbosity_error()  # else it lists every prompt of more than 77 tokens
    device = devices.local_device()
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    with layouts.reading(path, "a Stable Diffusion pipeline"):
        if path.is_file():
            pipeline = single_file.load(path, dtype, any_model)
        else:
            # Its feature extractor serves the safety checker, of which Stable Diffusion 2 has none.
            without = {} if (path / "feature_extractor").is_dir() else {"feature_extractor": None}
            kind = layouts.variant(path, dtype == torch.float16)
            pipeline = StableDiffusionPipeline.from_pretrained(
                path, torch_dtype=dtype, local_files_only=True, variant=kind, **without
            )
    if not any_model:
        check_model(pipeline)
    scheduler = DPMSolverMultistepScheduler if fast else DDIMScheduler
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    pipeline.vae.enable_slicing()
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(device)
    for part in (pipeline.unet, pipeline.vae):
        if compiled:  # without compilation this layout is slower (docs/log.md)
            fast_layers.compiled(part.to(memory_format=torch.channels_last))
    return pipeline


class StableDiffusionBackend:
    """The reference backend: batches on the GPU, encoding on threads beside it."""

    trial = 1
    ahead = 2

    def __init__(
        self,
        path: Path | None = None,
        fast: bool = False,
        steps: int = 0,
        batch_size: int = 0,
        suffix: str = "png",
        any_model: bool = False,
        compiled: bool = False,
    ) -> None:
        """Finds the weights and computes their digest; `start` loads them.

        Args:
            path: Folder or single file; left out: see `weights.locate`.
            fast: The fast preset.
            steps: Denoising steps; 0: the preset's.
            batch_size: Images at once; 0: as many as fit, at most 16.
            suffix: File format.
            any_model: See `load`.
            compiled: See `load`.

        Raises:
            UserError: If the weights are nowhere.
        """
        half = devices.local_device().type == "cuda"
        self.path = weights.locate(MODEL, path, half)
        self.fast, self.suffix, self.any_model, self.asked = fast, suffix, any_model, batch_size
        self.compiled = compiled
        self.steps = steps or (FAST_STEPS if fast else STEPS)
        self.block = batch_size or LARGEST_BATCH  # where Ray's actors draw, each finds out what fits
        self.settings = {
            "backend": "sd2",
            "model": self.path.name if any_model else MODEL,  # wherever its weights lie
            "model_sha256": layouts.digest(self.path, half),
            "scheduler": "DPM-Solver++" if fast else "DDIM",
            "steps": self.steps,
            "guidance": GUIDANCE,
        }

    def start(self) -> None:
        """Loads the pipeline and, if asked to, finds the batch size that fits, with one step, which needs as much."""
        self.pipeline = load(self.path, self.fast, self.any_model, self.compiled)
        self.limit = self.asked
        if not self.asked:
            self.limit = LARGEST_BATCH if self.pipeline.device.type == "cuda" else 1
            if self.limit > 1:
                self._within_memory([PROBE] * self.limit, steps=1)
                log.info("batches of %d fit into memory", self.limit)
            self.block = self.limit

    def draw(self, blocks: list[list[Row]], done: Set[str]) -> Iterator[Callable[[], Finished]]:
        """Yields what waits for each block's files; whole blocks are rendered, so that neighbours stay the same."""
        with ThreadPoolExecutor(ENCODERS, "encoder") as pool:
            for rows in blocks:
                encoded = [pool.submit(finish, *drawn, self.suffix) for drawn in self.render(rows)]
                yield functools.partial(_wait, rows, encoded)

    def render(self, rows: list[Row]) -> list[tuple[Image.Image | None, str]]:
        """Renders rows; a row that fails alone too becomes (None, "failed"), if it is the row's own fault.

        Raises:
            UserError: If memory does not suffice for one image, or if the machine fails, whatever the row.
        """
        try:
            return [*self._within_memory(rows, self.steps)]
        except Exception as error:
            if explained(error):
                raise
            log.warning("a batch failed (%s); its images are rendered one by one", error)
        pictures: list[tuple[Image.Image | None, str]] = []
        for row in rows:
            try:
                pictures += self._within_memory([row], self.steps)
            except Exception as error:
                if explained(error):
                    raise
                self._probe()
                log.warning("%s failed: %s", row.name, error)
                pictures.append((None, FAILED))
        return pictures

    def _probe(self) -> None:
        """Renders an empty prompt after a row has failed: a GPU that is lost would fail all rows from then on."""
        try:
            self._within_memory([PROBE], 1)
        except Exception as error:
            said = f"not even an empty prompt can be rendered: {error}; restart the machine: {AGAIN}"
            raise UserError(said) from error

    def _within_memory(self, rows: list[Row], steps: int) -> list[tuple[Image.Image, str]]:
        """Renders at most `self.limit` rows at once, fewer from then on if memory does not suffice."""

        def work(at_once: int) -> list[tuple[Image.Image, str]]:
            self.limit = at_once if self.compiled else self.limit  # to which a call is padded
            chunks = (rows[start : start + at_once] for start in range(0, len(rows), at_once))
            return [picture for chunk in chunks for picture in self.call(chunk, steps)]

        remedy = f"an image of {RENDER_SIZE} px is too large for this device"
        count = self.limit if self.compiled else len(rows)
        pictures, self.limit = devices.within_memory(work, self.limit, count, remedy=remedy)
        return pictures

    def call(self, rows: list[Row], steps: int) -> list[tuple[Image.Image, str]]:
        """One pipeline call; each row's noise comes from a generator of its own, on the CPU so that machines agree."""
        own = self.pipeline.unet.config.sample_size * self.pipeline.vae_scale_factor if self.any_model else RENDER_SIZE
        # Another batch size would be compiled for itself.
        every = [*rows, *([PROBE] * (self.limit - len(rows) if self.compiled else 0))]
        result = self.pipeline(
            prompt=[row.prompt for row in every],
            generator=[torch.Generator("cpu").manual_seed(row.seed) for row in every],
            num_inference_steps=steps,
            guidance_scale=GUIDANCE,
            height=own,
            width=own,
            output_type="pt",
        )
        # What diffusers does for "pil", but on the GPU: on the CPU it takes as long as a denoising step.
        pixels = (result.images.float() * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        blacked = result.nsfw_content_detected or [False] * len(every)
        drawn = [(Image.fromarray(one), NSFW if black else "") for one, black in zip(pixels, blacked, strict=True)]
        return drawn[: len(rows)]


def _wait(rows: list[Row], encoded: list[Future]) -> Finished:
    return rows, [future.result() for future in encoded]
