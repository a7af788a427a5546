"""Stable Diffusion 2's original single-file layout, from its own key list, at tiny widths.

Names and shapes follow the network that wrote 768-v-ema.ckpt (Stability-AI/stablediffusion: openaimodel.py, model.py of
the autoencoder, open_clip's text tower; configs/stable-diffusion/v2-inference-v.yaml), not our settings or diffusers.
"""

import re

WIDTH, MULTIPLES = 32, (1, 2, 4, 4)  # 320 in the original, and 128 in its autoencoder
CONTEXT, TEXT_LAYERS = 32, 24  # 1024
NARROW = {
    "unet": {"block_out_channels": [32, 64, 128, 128], "attention_head_dim": [1, 2, 4, 4], "cross_attention_dim": 32},
    "vae": {"block_out_channels": [32, 64, 128, 128]},
    "text_encoder": {"hidden_size": 32, "intermediate_size": 128, "num_attention_heads": 2},
}
"""What a test may set: widths, nothing that says how many layers there are."""
Shapes = dict[str, tuple[int, ...]]


def layer(name: str, *shape: int, bias: bool = True) -> Shapes:
    return {f"{name}.weight": shape, **({f"{name}.bias": shape[:1]} if bias else {})}


def resnet(name: str, before: int, after: int) -> Shapes:
    found = layer(f"{name}.in_layers.0", before) | layer(f"{name}.in_layers.2", after, before, 3, 3)
    found |= layer(f"{name}.emb_layers.1", after, 4 * WIDTH) | layer(f"{name}.out_layers.0", after)
    found |= layer(f"{name}.out_layers.3", after, after, 3, 3)
    return found | (layer(f"{name}.skip_connection", after, before, 1, 1) if before != after else {})


def transformer(name: str, width: int) -> Shapes:
    found = layer(f"{name}.norm", width) | layer(f"{name}.proj_in", width, width)
    block = f"{name}.transformer_blocks.0"
    for attention, source in (("attn1", width), ("attn2", CONTEXT)):
        found |= layer(f"{block}.{attention}.to_q", width, width, bias=False)
        for part in ("to_k", "to_v"):
            found |= layer(f"{block}.{attention}.{part}", width, source, bias=False)
        found |= layer(f"{block}.{attention}.to_out.0", width, width)
    found |= layer(f"{block}.ff.net.0.proj", 8 * width, width) | layer(f"{block}.ff.net.2", width, 4 * width)
    for number in (1, 2, 3):
        found |= layer(f"{block}.norm{number}", width)
    return found | layer(f"{name}.proj_out", width, width)


def unet() -> Shapes:
    """686 tensors."""
    found = layer("time_embed.0", 4 * WIDTH, WIDTH) | layer("time_embed.2", 4 * WIDTH, 4 * WIDTH)
    found |= layer("input_blocks.0.0", WIDTH, 4, 3, 3)
    kept, width, number = [WIDTH], WIDTH, 1
    for level, multiple in enumerate(MULTIPLES):
        for _ in range(2):
            found |= resnet(f"input_blocks.{number}.0", width, multiple * WIDTH)
            width = multiple * WIDTH
            found |= transformer(f"input_blocks.{number}.1", width) if level < 3 else {}
            kept.append(width)
            number += 1
        if level < 3:
            found |= layer(f"input_blocks.{number}.0.op", width, width, 3, 3)
            kept.append(width)
            number += 1
    found |= resnet("middle_block.0", width, width) | transformer("middle_block.1", width)
    found |= resnet("middle_block.2", width, width)
    for number in range(12):
        level = 3 - number // 3
        found |= resnet(f"output_blocks.{number}.0", width + kept.pop(), MULTIPLES[level] * WIDTH)
        width = MULTIPLES[level] * WIDTH
        found |= transformer(f"output_blocks.{number}.1", width) if level < 3 else {}
        if number % 3 == 2 and level:
            found |= layer(f"output_blocks.{number}.{2 if level < 3 else 1}.conv", width, width, 3, 3)
    return found | layer("out.0", WIDTH) | layer("out.2", 4, WIDTH, 3, 3)


def vae_resnet(name: str, before: int, after: int) -> Shapes:
    found = layer(f"{name}.norm1", before) | layer(f"{name}.conv1", after, before, 3, 3)
    found |= layer(f"{name}.norm2", after) | layer(f"{name}.conv2", after, after, 3, 3)
    return found | (layer(f"{name}.nin_shortcut", after, before, 1, 1) if before != after else {})


def vae() -> Shapes:
    """248 tensors."""
    found, width, top = layer("encoder.conv_in", WIDTH, 3, 3, 3), WIDTH, MULTIPLES[-1] * WIDTH
    for level, multiple in enumerate(MULTIPLES):
        for block in range(2):
            found |= vae_resnet(f"encoder.down.{level}.block.{block}", width, multiple * WIDTH)
            width = multiple * WIDTH
        found |= layer(f"encoder.down.{level}.downsample.conv", width, width, 3, 3) if level < 3 else {}
    found |= layer("decoder.conv_in", top, 4, 3, 3)
    for side in ("encoder", "decoder"):
        found |= vae_resnet(f"{side}.mid.block_1", top, top) | vae_resnet(f"{side}.mid.block_2", top, top)
        found |= layer(f"{side}.mid.attn_1.norm", top)
        for part in ("q", "k", "v", "proj_out"):
            found |= layer(f"{side}.mid.attn_1.{part}", top, top, 1, 1)
    for level in (3, 2, 1, 0):
        for block in range(3):
            found |= vae_resnet(f"decoder.up.{level}.block.{block}", width, MULTIPLES[level] * WIDTH)
            width = MULTIPLES[level] * WIDTH
        found |= layer(f"decoder.up.{level}.upsample.conv", width, width, 3, 3) if level else {}
    found |= layer("encoder.norm_out", top) | layer("encoder.conv_out", 8, top, 3, 3)
    found |= layer("decoder.norm_out", WIDTH) | layer("decoder.conv_out", 3, WIDTH, 3, 3)
    return found | layer("quant_conv", 8, 8, 1, 1) | layer("post_quant_conv", 4, 4, 1, 1)


def text() -> Shapes:
    """The text tower with all of its 24 layers, of which Stable Diffusion uses 23."""
    found = {"positional_embedding": (77, CONTEXT), "text_projection": (CONTEXT, CONTEXT), "logit_scale": ()}
    found |= layer("token_embedding", 49408, CONTEXT, bias=False) | layer("ln_final", CONTEXT)
    for number in range(TEXT_LAYERS):
        block = f"transformer.resblocks.{number}"
        found |= {f"{block}.attn.in_proj_weight": (3 * CONTEXT, CONTEXT), f"{block}.attn.in_proj_bias": (3 * CONTEXT,)}
        found |= layer(f"{block}.ln_1", CONTEXT) | layer(f"{block}.attn.out_proj", CONTEXT, CONTEXT)
        found |= layer(f"{block}.ln_2", CONTEXT) | layer(f"{block}.mlp.c_fc", 4 * CONTEXT, CONTEXT)
        found |= layer(f"{block}.mlp.c_proj", CONTEXT, 4 * CONTEXT)
    return found


SCHEDULE = (
    *("betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"),
    *("log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod"),
    *("posterior_variance", "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2"),
)


def save(file, unet_width: int = 32, vae_width: int = 32, context: int = 32) -> dict:
    """Writes random weights in the original layout; returns them by name. The original's widths are 320, 128, 1024."""
    import torch

    global WIDTH, CONTEXT
    before = WIDTH, CONTEXT
    WIDTH, CONTEXT = unet_width, context
    shapes = {f"model.diffusion_model.{name}": shape for name, shape in unet().items()}
    WIDTH = vae_width
    shapes |= {f"first_stage_model.{name}": shape for name, shape in vae().items()}
    shapes |= {f"cond_stage_model.model.{name}": shape for name, shape in text().items()}
    shapes |= dict.fromkeys(SCHEDULE, (1000,))
    WIDTH, CONTEXT = before
    generator = torch.Generator().manual_seed(0)
    tensors = {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    if file.suffix == ".ckpt":
        torch.save({"state_dict": tensors, "global_step": 140000}, file)
    else:
        from safetensors.torch import save_file

        save_file(tensors, file)
    return tensors


RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
OUTER = {
    "conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0", "conv_out": "out.2",
}  # fmt: skip


def unet_name(name: str) -> str:
    """The original name of a tensor of diffusers' U-Net."""
    stem, _, kind = name.rpartition(".")
    if stem in OUTER:
        return f"{OUTER[stem]}.{kind}"

    def inner(group: str, rest: str) -> str:
        part, _, end = rest.partition(".")
        return f"0.{RESNET[part]}.{end}" if group == "resnets" else f"1.{rest}"

    if match := re.match(r"mid_block\.(resnets|attentions)\.(\d)\.(.*)", name):
        group, number, rest = match.groups()
        place = "1" if group == "attentions" else str(2 * int(number))
        return f"middle_block.{place}.{inner(group, rest)[2:]}"
    side, level, group, number, rest = re.match(r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.*)", name).groups()
    if group == "downsamplers":
        return f"input_blocks.{3 * int(level) + 3}.0.op.{kind}"
    if group == "upsamplers":
        return f"output_blocks.{3 * int(level) + 2}.{1 if level == '0' else 2}.{rest}"
    block = 3 * int(level) + int(number) + (side == "down")
    return f"{'input' if side == 'down' else 'output'}_blocks.{block}.{inner(group, rest)}"


def vae_name(name: str) -> str:
    """The original name of a tensor of diffusers' autoencoder."""
    name = re.sub(r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"up.{3 - int(m[1])}.block.{m[2]}", name)
    name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{3 - int(m[1])}.upsample", name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    attention = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
    for ours, theirs in attention.items():
        name = name.replace(f"mid_block.attentions.0.{ours}.", f"mid.attn_1.{theirs}.")
    return name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
