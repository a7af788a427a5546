"""A tiny Stable Diffusion 2 in the layout of the original single-file checkpoints, beside the same one as a folder."""

import re
from pathlib import Path

from image_to_prompts.render import single_file

TINY = {
    "unet": {
        **single_file.SETTINGS["unet"],
        "block_out_channels": [8, 16],
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "layers_per_block": 2,
        "norm_num_groups": 4,
        "attention_head_dim": [2, 4],
        "cross_attention_dim": 16,
    },
    "vae": {**single_file.SETTINGS["vae"], "block_out_channels": [4, 4, 8, 8], "norm_num_groups": 2},
    "text_encoder": {
        **single_file.SETTINGS["text_encoder"],
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
    },
}
RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
TEXT = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}


def unet_name(name: str, levels: int = 2, layers: int = 2) -> str:
    """Name of a U-Net tensor in the original layout (CompVis/stable-diffusion, openaimodel.py)."""
    for ours, theirs in {
        "conv_in.": "input_blocks.0.0.", "time_embedding.linear_1.": "time_embed.0.",
        "time_embedding.linear_2.": "time_embed.2.", "conv_norm_out.": "out.0.", "conv_out.": "out.2.",
    }.items():  # fmt: skip
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    if match := re.match(r"mid_block\.(resnets|attentions)\.(\d)\.(.*)", name):
        kind, number, rest = match.groups()
        place = 1 if kind == "attentions" else 2 * int(number)
        return f"middle_block.{place}.{resnet(rest) if kind == 'resnets' else rest}"
    side, level, kind, number, rest = re.match(r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.*)", name).groups()
    per_level = layers + 1
    if side == "down":
        block = 1 + int(level) * per_level + (layers if kind == "downsamplers" else int(number))
        if kind == "downsamplers":
            return f"input_blocks.{block}.0.op.{rest.removeprefix('conv.')}"
        return f"input_blocks.{block}.{'0.' + resnet(rest) if kind == 'resnets' else '1.' + rest}"
    has_attention = TINY["unet"]["up_block_types"][int(level)].startswith("Cross")
    block = int(level) * per_level + (layers if kind == "upsamplers" else int(number))
    if kind == "upsamplers":
        return f"output_blocks.{block}.{2 if has_attention else 1}.{rest}"
    return f"output_blocks.{block}.{'0.' + resnet(rest) if kind == 'resnets' else '1.' + rest}"


def resnet(rest: str) -> str:
    part, _, end = rest.partition(".")
    return f"{RESNET[part]}.{end}"


def vae_name(name: str) -> str:
    """Name of a VAE tensor in the original layout."""
    name = re.sub(r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"up.{3 - int(m[1])}.block.{m[2]}", name)
    name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{3 - int(m[1])}.upsample", name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    attention = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
    for ours, theirs in attention.items():
        name = name.replace(f"mid_block.attentions.0.{ours}.", f"mid.attn_1.{theirs}.")
    return name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")


def text_tensors(state: dict) -> dict:
    """The text encoder in open_clip's layout."""
    import torch

    state = {name.removeprefix("text_model."): tensor for name, tensor in state.items()}
    result = {
        "positional_embedding": state["embeddings.position_embedding.weight"],
        "token_embedding.weight": state["embeddings.token_embedding.weight"],
        "ln_final.weight": state["final_layer_norm.weight"],
        "ln_final.bias": state["final_layer_norm.bias"],
    }
    for name, tensor in state.items():
        match = re.match(r"encoder\.layers\.(\d+)\.(.*)\.(weight|bias)", name)
        if not match or "self_attn.k" in name or "self_attn.v" in name:
            continue
        layer, part, kind = match.groups()
        block = f"transformer.resblocks.{layer}"
        if part == "self_attn.q_proj":
            parts = [state[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            result[f"{block}.attn.in_proj_{kind}"] = torch.cat(parts)
        elif part == "self_attn.out_proj":
            result[f"{block}.attn.out_proj.{kind}"] = tensor
        else:
            result[f"{block}.{TEXT[part]}.{kind}"] = tensor
    return result


def save_single_file(file: Path, folder: Path) -> None:
    """Saves one random model twice: as `file`, in the original layout, and as `folder`, in diffusers'."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from safetensors.torch import save_file
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    unet, vae = (
        kind(**{key: value for key, value in TINY[part].items() if key[0] != "_"})
        for kind, part in ((UNet2DConditionModel, "unet"), (AutoencoderKL, "vae"))
    )
    text = CLIPTextModel(CLIPTextConfig(**TINY["text_encoder"]))
    folder.mkdir()
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=single_file.tokenizer(folder),
        unet=unet,
        scheduler=DDIMScheduler(**single_file.SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    tensors = {f"model.diffusion_model.{unet_name(name)}": tensor for name, tensor in unet.state_dict().items()}
    for name, tensor in vae.state_dict().items():
        is_projection = "mid_block.attentions" in name and name.endswith("weight") and tensor.ndim == 2
        tensors[f"first_stage_model.{vae_name(name)}"] = tensor[:, :, None, None] if is_projection else tensor
    tensors |= {f"cond_stage_model.model.{n}": tensor for n, tensor in text_tensors(text.state_dict()).items()}
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    if file.suffix == ".ckpt":
        torch.save({"state_dict": tensors, "global_step": 1}, file)
    else:
        save_file(tensors, file)
