"""Images a second through `embed`'s encoders, beside earlier loops, on tiny models of the same classes.

python benchmarks/embed.py [--images 96] [--rounds 4]

The seed's way: clip-interrogator in fast mode, CLIP and ConvNeXt, each opening its images itself, one at a time. Ours:
each image read once for all three, batches of 16. The models are random and tiny (tests/tiny_models.py), so this times
what surrounds them: reading, resizing, captions token by token, ranking, texts cut to CLIP's length. Figures go to
benchmarks/embed.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from pathlib import Path

import numpy as np
from turns import Prepared, in_turns, lines, ratio

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
BATCH = 16


def prepare(folder: Path, count: int) -> None:
    """Saves the models and `count` pictures of 512 px."""
    from PIL import Image
    from tiny_models import save_blip, save_clip, save_convnext

    for name, save in {"blip": save_blip, "clip": save_clip, "convnext": save_convnext}.items():
        save(folder / name)
    rng = np.random.default_rng(0)
    (folder / "images").mkdir()
    for number in range(count):
        colours = Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8))
        colours.resize((512, 512), Image.Resampling.BICUBIC).save(folder / "images" / f"{number:04d}.png")


def seeds_way(folder: Path) -> Prepared:
    import open_clip
    import torch
    from clip_interrogator import Config, Interrogator
    from PIL import Image
    from sentence_transformers import SentenceTransformer
    from transformers import AutoImageProcessor, BlipForConditionalGeneration, BlipProcessor, ConvNextModel

    from image_to_prompts.models import text_encoder, weights

    config = Config(clip_model_name="ViT-B-32/openai", device="cpu", quiet=True, download_cache=False)
    config.cache_path = str(folder / "cache")
    config.caption_model = BlipForConditionalGeneration.from_pretrained(folder / "blip").eval()
    config.caption_processor = BlipProcessor.from_pretrained(folder / "blip")
    clip, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder / 'clip'}")
    config.clip_model, config.clip_preprocess = clip.eval(), preprocess
    interrogator = Interrogator(config)
    processor = AutoImageProcessor.from_pretrained(folder / "convnext")
    convnext = ConvNextModel.from_pretrained(folder / "convnext").eval()
    texts = SentenceTransformer(str(weights.locate(text_encoder.NAME)))
    files = sorted((folder / "images").glob("*.png"))

    def run() -> int:
        with torch.no_grad():
            for file in files:
                texts.encode(interrogator.interrogate_fast(Image.open(file).convert("RGB")), show_progress_bar=False)
            for file in files:
                clip.encode_image(preprocess(Image.open(file)).unsqueeze(0))
            for file in files:
                convnext(processor(Image.open(file), return_tensors="pt")["pixel_values"])
        return len(files)

    return run


def ours(folder: Path) -> Prepared:
    from image_to_prompts.data import images
    from image_to_prompts.encode import encoders
    from image_to_prompts.models import text_cache, text_encoder

    clip = f"open_clip:{folder / 'clip'}"
    settings = {"caption": str(folder / "blip"), "ranker": clip}
    names = (clip, f"transformers:{folder / 'convnext'}", "interrogator")
    built = [encoders.build(name, 32, **settings) for name in names]
    files = images.find(folder / "images")
    text_encoder.encode(["load the model"])

    def run() -> int:
        text_cache.path().unlink(missing_ok=True)  # texts are embedded in each round
        return len(encoders.encode(built, files, BATCH)[0].vectors)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=4)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, options.images)
        own_cache = {"IMAGE_TO_PROMPTS_CACHE": str(folder / "texts")}
        ways = {"one at a time": (seeds_way, (folder,), own_cache), "ours": (ours, (folder,), own_cache)}
        seconds, memory = in_turns(ways, options.rounds)
    print(f"{options.images} images through three encoders: seconds")
    print(lines(seconds, memory, "one at a time"))
    result = {"machine": platform.processor() or platform.machine(), "images": options.images, "seconds": seconds}
    result["times as fast"] = ratio(seconds, "one at a time", "ours")
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
