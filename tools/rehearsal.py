"""Every model at its full size, random, in each layout that the hub has of it: found and loaded from every place?

    python tools/rehearsal.py /folder/with/20/GB [MODEL ...] [--out docs/rehearsal.md]

Each loading is a process of its own. Peak memory is what cannot be given back (RssAnon), and the weights that still lie
in their file, mapped. File lists: tests/data/hub_lists.json. The single file's keys: tests/single_file_layout.py.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PLACES = ("weights folder", "hub cache", "Kaggle mount")
SCALE = 0.02  # deviation of the random weights
COLUMNS = ("model", "layout", "place", "by", "GB in use", "peak GB", "peak / weights", "seconds")


def write(path: Path, tensors: dict[str, Any]) -> None:
    """Writes tensors in the format that the suffix says."""
    import torch
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file(tensors, path, {"format": "pt"})
    else:
        torch.save({"state_dict": tensors} if path.suffix == ".ckpt" else tensors, path)


def random_of(module: Any, half: bool = False) -> dict[str, Any]:
    """Random tensors of a module's shapes."""
    import torch

    made = {}
    for name, tensor in module.state_dict().items():
        kind = torch.float16 if half and tensor.is_floating_point() else tensor.dtype
        made[name] = torch.randn(tensor.shape).mul_(SCALE).to(kind) if tensor.is_floating_point() else tensor.clone()
    return made


def on_meta(make: Callable[[], Any]) -> Any:
    """A module without memory; its whole numbers (positions) are real."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        return make()


def stable_diffusion(folder: Path, layout: str) -> None:
    """`StableDiffusionPipeline`'s folder, or the original single file."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from image_to_prompts.models import clip_tokenizer
    from image_to_prompts.render.single_file import SETTINGS

    if layout.startswith("768"):
        sys.path.insert(0, str(ROOT / "tests"))
        import single_file_layout as original

        original.save(folder / layout, unet_width=320, vae_width=128, context=1024)
        return
    shutil.copytree(SETTINGS, folder, dirs_exist_ok=True)
    clip_tokenizer.load().save_pretrained(folder / "tokenizer")
    parts = {
        "unet": (
            lambda: UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder / "unet")),
            "diffusion_pytorch_model",
        ),
        "vae": (
            lambda: AutoencoderKL.from_config(AutoencoderKL.load_config(folder / "vae")),
            "diffusion_pytorch_model",
        ),
        "text_encoder": (
            lambda: CLIPTextModel(CLIPTextConfig.from_pretrained(folder / "text_encoder")),
            "pytorch_model" if layout.endswith("bin") else "model",
        ),
    }
    halves = {"float16 safetensors": (True,), "whole repository": (False, True)}.get(layout, (False,))
    for part, (make, stem) in parts.items():
        for half in halves:
            end = "bin" if layout.endswith("bin") else "safetensors"
            write(folder / part / f"{stem}{'.fp16' * half}.{end}", random_of(on_meta(make), half))
    if layout == "whole repository":
        for file in list(folder.glob("*/*.safetensors")):
            shutil.copy(file, file.with_suffix(".bin"))
        (folder / "768-v-ema.ckpt").write_bytes(b"never read")


def open_clip_of(name: str) -> Callable[[Path, str], None]:
    """Both towers of an open_clip model, and its settings."""

    def make(folder: Path, layout: str) -> None:
        import open_clip

        config = open_clip.get_model_config(name)
        write(folder / layout, random_of(on_meta(lambda: open_clip.CLIP(**config))))
        preprocess = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}
        settings = {"model_cfg": config, "preprocess_cfg": preprocess}
        (folder / "open_clip_config.json").write_text(json.dumps(settings))

    return make


def blip(folder: Path, layout: str) -> None:
    """BLIP-large (Salesforce/blip-image-captioning-large, config.json) and its processor."""
    import transformers
    from transformers import BlipConfig, BlipForConditionalGeneration

    from image_to_prompts.models import weights

    tower = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
    text = {"encoder_hidden_size": 1024, "vocab_size": 30524, "num_attention_heads": 12, "is_decoder": True}
    config = BlipConfig(vision_config={**tower, "image_size": 384}, text_config=text)
    config.architectures = ["BlipForConditionalGeneration"]
    tokens = (weights.locate("all-MiniLM-L6-v2") / "vocab.txt").read_text(encoding="utf-8").split("\n")[:30522]
    numbers = {token: number for number, token in enumerate([*tokens, "[DEC]", "[ENC]"])}
    size = {"height": 384, "width": 384}
    tokenizer, pixels = transformers.BertTokenizerFast(vocab=numbers), transformers.BlipImageProcessor(size=size)
    transformers.BlipProcessor(pixels, tokenizer).save_pretrained(folder)
    config.save_pretrained(folder)
    write(folder / layout, random_of(on_meta(lambda: BlipForConditionalGeneration(config))))


def magicprompt(folder: Path, layout: str) -> None:
    """GPT-2 with the masks that files of its time still hold."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, GPT2TokenizerFast

    from image_to_prompts.models import clip_tokenizer

    config = GPT2Config()
    tensors = random_of(on_meta(lambda: GPT2LMHeadModel(config)))
    tensors.pop("lm_head.weight", None)
    tensors |= {f"transformer.h.{n}.attn.bias": torch.ones(1, 1, 1024, 1024, dtype=torch.bool) for n in range(12)}
    config.save_pretrained(folder)
    vocabulary = clip_tokenizer.load().get_vocab()
    GPT2TokenizerFast(vocab=vocabulary, merges=[], unk_token="<|endoftext|>").save_pretrained(folder)
    write(folder / layout, tensors)


def convnext(folder: Path, layout: str) -> None:
    """ConvNeXt-Tiny with its classifier."""
    from transformers import ConvNextConfig, ConvNextForImageClassification, ConvNextImageProcessor

    config = ConvNextConfig(num_labels=1000)
    ConvNextImageProcessor(size={"shortest_edge": 224}, crop_pct=0.875).save_pretrained(folder)
    config.save_pretrained(folder)
    write(folder / layout, random_of(on_meta(lambda: ConvNextForImageClassification(config))))


BANK_TOWERS = ("open_clip:ViT-L-14", "open_clip:ViT-bigG-14")
CLIP_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
MODELS: dict[str, tuple[Callable[[Path, str], None], tuple[str, ...], str]] = {
    "magicprompt": (magicprompt, ("model.safetensors", "pytorch_model.bin"), "generate"),
    "transformers:facebook/convnext-tiny-224": (convnext, ("pytorch_model.bin",), "embed"),
    "open_clip:ViT-B-32-quickgelu": (open_clip_of("ViT-B-32-quickgelu"), CLIP_FILES, "embed"),
    "blip-large": (blip, ("model.safetensors", "pytorch_model.bin"), "describe, embed, infer"),
    "open_clip:ViT-H-14": (open_clip_of("ViT-H-14"), CLIP_FILES, "describe, embed, infer"),
    **{name: (open_clip_of(name.partition(":")[2]), CLIP_FILES, "embed --texts, infer --bank") for name in BANK_TOWERS},
    "open_clip:convnext_xxlarge": (open_clip_of("convnext_xxlarge"), CLIP_FILES, "finetune, embed"),
    "stable-diffusion-2": (
        stable_diffusion,
        (
            *("safetensors", "PyTorch .bin", "float16 safetensors", "whole repository"),
            *("768-v-ema.safetensors", "768-v-ema.ckpt"),
        ),
        "render",
    ),
}


def load(name: str) -> list[Any]:
    """The networks of a model, loaded by the code of the stages that use it."""
    from image_to_prompts.encode import encoders
    from image_to_prompts.models import weights

    if name == "magicprompt":
        from image_to_prompts.generate import magicprompt

        return [magicprompt.load()[0]]
    if name == "stable-diffusion-2":
        from image_to_prompts.render.stable_diffusion import StableDiffusionBackend

        backend = StableDiffusionBackend(batch_size=1)
        backend.start()
        return [backend.pipeline.unet, backend.pipeline.vae, backend.pipeline.text_encoder]
    if name in (weights.CAPTION, weights.RANKER):
        from image_to_prompts.encode import interrogator, text_tower

        found = weights.locate(name)
        return [interrogator.captioner(found)[0] if name == weights.CAPTION else text_tower.towers(name, found)[0]]
    built: Any = encoders.build(name, 512 if "xxlarge" in name else 224)
    if name in BANK_TOWERS:
        from image_to_prompts.encode import text_tower

        texts: Any = text_tower.build(name)
        return [built.model, texts.clip]
    return [built.model]


def child(name: str) -> None:
    """Loads a model and prints what it took."""
    import diffusers  # noqa: F401
    import open_clip  # noqa: F401
    import transformers  # noqa: F401

    from image_to_prompts.encode import encoders, interrogator  # noqa: F401

    stop, peak = threading.Event(), [0]

    def watch() -> None:
        while not stop.is_set():
            peak[0] = max(peak[0], anonymous())
            time.sleep(0.002)

    before = anonymous()
    threading.Thread(target=watch, daemon=True).start()
    begun = time.perf_counter()
    found = load(name)
    seconds = time.perf_counter() - begun
    stop.set()
    now = anonymous()
    tensors = {id(t): t.nbytes for net in found for t in (*net.parameters(), *net.buffers())}
    size = sum(tensors.values())
    mapped = max(0, size - (now - before))
    print(json.dumps({"size": size, "peak": max(peak[0], now) - before + mapped, "seconds": seconds}))


def anonymous() -> int:
    """Bytes of this process that cannot be given back."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) * 1024


def placed(files: Path, name: str, place: str, root: Path) -> dict[str, str]:
    """Puts links to a model's files where a place has them; returns the environment in which they are looked for."""
    from image_to_prompts.models import weights

    empty = root / "empty"
    target = {
        "weights folder": root / "home" / weights.own_folder(name),
        "hub cache": root / "hub" / f"models--{weights.named(name).hub[0].replace('/', '--')}" / "snapshots" / "1a2b3c",
        "Kaggle mount": root / "input" / "datasets" / "somebody" / "weights" / weights.own_folder(name),
    }[place]
    shutil.copytree(files, target, copy_function=os.symlink if place == "hub cache" else os.link)
    return {
        "IMAGE_TO_PROMPTS_WEIGHTS": str(root / "home" if place == "weights folder" else empty),
        "HF_HUB_CACHE": str(root / "hub" if place == "hub cache" else empty),
        "IMAGE_TO_PROMPTS_KAGGLE_INPUT": str(root / "input" if place == "Kaggle mount" else empty),
        "HF_HUB_OFFLINE": "1",
    }


def rehearse(root: Path, name: str, layout: str) -> list[tuple[str, ...]]:
    """Loads one layout of a model from every place; returns rows of the table."""
    make, _, stages = MODELS[name]
    files, rows = root / "files", []
    files.mkdir(parents=True)
    make(files, layout)
    for place in PLACES:
        env = os.environ | placed(files, name, place, root)
        argv = [sys.executable, __file__, str(root), "--child", name]
        done = subprocess.run(argv, env=env, capture_output=True, text=True, check=False)
        if done.returncode:
            said = (done.stderr.strip().splitlines() or ["killed"])[-1]
            rows.append((name, layout, place, stages, f"FAILED: {said}", "", "", ""))
        else:
            found = json.loads(done.stdout.splitlines()[-1])
            size, peak = found["size"] / 1e9, found["peak"] / 1e9
            figures = (f"{size:.2f}", f"{peak:.2f}", f"{peak / size:.2f}", f"{found['seconds']:.1f}")
            rows.append((name, layout, place, stages, *figures))
        print(*rows[-1], sep=" | ", flush=True)
        for folder in ("home", "hub", "input"):
            shutil.rmtree(root / folder, ignore_errors=True)
    shutil.rmtree(files)
    return rows


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("root", type=Path)
    parser.add_argument("models", nargs="*")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child)
        return
    chosen = [(name, layout) for name in options.models or MODELS for layout in MODELS[name][1]]
    rows = [row for name, layout in chosen for row in rehearse(options.root, name, layout)]
    if options.out:
        table = markdown(COLUMNS, rows)
        text = options.out.read_text(encoding="utf-8")
        head = text.partition("<!-- table -->")[0]
        options.out.write_text(f"{head}<!-- table -->\n{table}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
