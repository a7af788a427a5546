"""Tiny random models of the reference's classes, for tests and benchmarks."""

from pathlib import Path


def save_tokenizer(folder: Path) -> None:
    """A byte-level BPE tokenizer trained on a few prompts, in GPT-2's and CLIP's file format."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(["a cat in a forest, oil painting, highly detailed", "two robots, 4k, v1.5"], trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.model.save(str(folder))


def save_diffusion(folder: Path, prediction_type: str, sample_size: int, **unet_settings: object) -> Path:
    """StableDiffusionPipeline with random weights: CLIP text model, UNet, VAE with factor 8, DDIM scheduler."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    save_tokenizer(folder / "raw")
    tokenizer = CLIPTokenizer(
        str(folder / "raw" / "vocab.json"), str(folder / "raw" / "merges.txt"), unk_token="<|endoftext|>"
    )
    tokenizer.model_max_length = 77
    torch.manual_seed(0)
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer) + 2,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=77,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=sample_size,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        **unet_settings,
    )
    vae = AutoencoderKL(
        block_out_channels=(4, 4, 4, 4),
        norm_num_groups=2,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        mid_block_add_attention=False,
        sample_size=sample_size * 8,
    )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(prediction_type=prediction_type, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


def save_blip(folder: Path) -> Path:
    """BlipForConditionalGeneration with random weights, and its processor, for images of 32 px."""
    import torch
    from transformers import (
        BertTokenizerFast,
        BlipConfig,
        BlipForConditionalGeneration,
        BlipImageProcessor,
        BlipProcessor,
    )

    folder.mkdir(parents=True, exist_ok=True)
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "[DEC]",
        *["a", "cat", "dog", "house", "red", "blue", "on", "in", "the", "of", "two"],
    ]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    tokenizer = BertTokenizerFast(str(folder / "vocab.txt"))
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    special = {"bos_token_id": 5, "pad_token_id": 0, "eos_token_id": 3, "sep_token_id": 3}
    torch.manual_seed(1)
    config = BlipConfig(
        text_config={**size, **special, "vocab_size": len(words), "encoder_hidden_size": 16, "projection_dim": 16},
        vision_config={**size, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    model = BlipForConditionalGeneration(config).eval()
    with torch.no_grad():  # larger weights, so that images tell captions apart
        for parameter in model.parameters():
            parameter.mul_(8)
    model.save_pretrained(folder)
    mean, std = [0.481, 0.458, 0.408], [0.269, 0.261, 0.276]
    pixels = BlipImageProcessor(size={"height": 32, "width": 32}, image_mean=mean, image_std=std)
    BlipProcessor(pixels, tokenizer).save_pretrained(folder)
    return folder


def save_captioner(kind: str, folder: Path) -> Path:
    """GIT, BLIP-2 or Florence-2 with random weights, and its processor, for images of 32 px."""
    import torch
    import transformers

    save_tokenizer(folder / "raw")
    end, small = "<|endoftext|>", {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    files = [str(folder / "raw" / name) for name in ("vocab.json", "merges.txt")]
    words = transformers.GPT2TokenizerFast(
        *files, unk_token=end, bos_token=end, eos_token=end, pad_token=end, extra_special_tokens={"image_token": "<i>"}
    )
    numbers = {"vocab_size": len(words), "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    vision = {**small, "hidden_size": 16, "image_size": 32, "patch_size": 8}
    square = {"height": 32, "width": 32}
    torch.manual_seed(2)
    if kind == "git":
        config = transformers.GitConfig(vision_config=vision, hidden_size=16, **small, **numbers)
        model = transformers.GitForCausalLM(config)
        pixels = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=square)
        processor = transformers.GitProcessor(pixels, words)
    elif kind == "blip2":
        asks = {"vocab_size": 9, "hidden_size": 16, "encoder_hidden_size": 16, "cross_attention_frequency": 1, **small}
        says = {"model_type": "opt", "hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 32, **numbers}
        says |= {"num_hidden_layers": 1, "num_attention_heads": 2}
        parts = {"vision_config": vision, "qformer_config": asks, "text_config": says}
        config = transformers.Blip2Config(**parts, num_query_tokens=4, image_token_index=words.image_token_id)
        model = transformers.Blip2ForConditionalGeneration(config)
        pixels = transformers.BlipImageProcessor(size=square)
        processor = transformers.Blip2Processor(pixels, words, num_query_tokens=4)
    else:
        sees = {"embed_dim": [8, 8], "depths": [1, 1], "patch_size": [7, 3], "patch_stride": [4, 2]}
        sees |= {"num_heads": [1, 1], "num_groups": [1, 1], "patch_padding": [3, 1], "patch_prenorm": [False, True]}
        says = {"model_type": "bart", "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, **numbers}
        says |= {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in _LAYER.items()}
        says |= {"decoder_start_token_id": 0, "forced_eos_token_id": 0}
        parts = {"vision_config": {**sees, "window_size": 4, "projection_dim": 16}, "text_config": says}
        config = transformers.Florence2Config(**parts, image_token_id=words.image_token_id)
        model = transformers.Florence2ForConditionalGeneration(config)
        pixels = transformers.CLIPImageProcessor(size=square, do_center_crop=False, image_seq_length=17)
        processor = transformers.Florence2Processor(pixels, words)
    with torch.no_grad():  # larger weights, so that images tell captions apart
        for parameter in (one for one in model.parameters() if one.ndim > 1):
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


_LAYER = {"attention_heads": 2, "ffn_dim": 32}


def save_clip(folder: Path) -> Path:
    """An open_clip model, both towers, with random weights, for images of 32 px."""
    import json

    import open_clip
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    torch.manual_seed(2)
    model = open_clip.CLIP(config["embed_dim"], config["vision_cfg"], config["text_cfg"])
    save_file(
        {name: value.contiguous() for name, value in model.state_dict().items()}, folder / "open_clip_model.safetensors"
    )
    preprocess = {"mean": [0.481, 0.458, 0.408], "std": [0.269, 0.261, 0.276]}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    return folder


def save_convnext(folder: Path) -> Path:
    """ConvNextModel with random weights, and its processor, for images of 32 px of which 7/8 are seen."""
    import torch
    from transformers import ConvNextConfig, ConvNextImageProcessor, ConvNextModel

    torch.manual_seed(3)
    model = ConvNextModel(ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 2, 1], num_stages=4, patch_size=4))
    model.save_pretrained(folder)
    ConvNextImageProcessor(size={"shortest_edge": 32}, crop_pct=0.875).save_pretrained(folder)
    return folder
