"""Images as the programs write them that make images: where each puts the prompt, in which encoding."""

import gzip
import html
import json
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

NEGATIVE, SEED, MODEL = "blurry, bad hands", 737547869, "dreamshaper_8"
EXIF, USER_COMMENT = 0x8769, 0x9286
UNICODE, ASCII = b"UNICODE\0", b"ASCII\0\0\0"


def picture(mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, len(mode)), np.uint8)
    return Image.fromarray(pixels, mode)


def png(path: Path, texts: dict[str, str], compressed: bool = False) -> Path:
    info = PngInfo()
    for name, text in texts.items():
        latin = all(ord(letter) < 256 for letter in text)
        add = info.add_text if latin else info.add_itxt
        add(name, text, zip=compressed)
    picture().save(path, "PNG", pnginfo=info)
    return path


def with_comment(path: Path, comment: bytes | str, fields: dict[int, str] | None = None) -> Path:
    """A JPEG or WebP with a user comment in EXIF, or in the first directory, where Fooocus puts it."""
    exif = Image.Exif()
    exif.update(fields or {})
    if isinstance(comment, bytes):
        exif.get_ifd(EXIF)[USER_COMMENT] = comment
    elif comment:
        exif[USER_COMMENT] = comment
    picture().save(path, exif=exif)
    return path


def automatic1111(prompt: str) -> str:
    settings = f"Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: {SEED}, Size: 64x48, Model hash: 1a2b, Model: {MODEL}"
    return f"{prompt}\nNegative prompt: {NEGATIVE}\n{settings}".strip()


def fooocus(prompt: str) -> str:
    settings = {"base_model": MODEL, "base_model_hash": "1a2b", "sampler": "dpmpp_2m", "scheduler": "karras"}
    settings |= {"guidance_scale": 4.0, "seed": str(SEED), "sharpness": 2.0, "steps": 30, "version": "Fooocus v2.5.5"}
    whole = {"full_prompt": [f"cinematic still {prompt}", prompt], "full_negative_prompt": [NEGATIVE, "anime"]}
    return json.dumps({"prompt": prompt, "negative_prompt": NEGATIVE, **whole, **settings})


def swarmui(prompt: str) -> str:
    settings = {"prompt": prompt, "negativeprompt": NEGATIVE, "model": MODEL, "seed": SEED, "steps": 20}
    return json.dumps({"sui_image_params": settings, "sui_extra_data": {"date": "2025-01-25"}})


def drawthings(prompt: str) -> str:
    """An XMP block, with a user comment in JSON."""
    said = json.dumps({"c": prompt, "uc": NEGATIVE, "seed": SEED, "model": MODEL, "steps": 20, "size": "64x48"})
    comment = f'<rdf:Alt>\n<rdf:li xml:lang="x-default">{html.escape(said)}</rdf:li>\n</rdf:Alt>'
    inner = f"<exif:UserComment>\n{comment}\n</exif:UserComment><xmp:CreatorTool>Draw Things</xmp:CreatorTool>"
    return (
        f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF><rdf:Description>{inner}</rdf:Description></rdf:RDF></x:xmpmeta>'
    )


def graph(prompt: str) -> dict:
    """ComfyUI's usual graph: two encoders, a combination before the sampler, a second sampler after it."""

    def sampler(latent: str) -> dict:
        inputs = {"seed": SEED, "steps": 20, "cfg": 7, "sampler_name": "euler", "model": ["4", 0]}
        return {
            "class_type": "KSampler",
            "inputs": {**inputs, "positive": ["9", 0], "negative": ["7", 0], **{"latent_image": [latent, 0]}},
        }

    def encoder(text: str) -> dict:
        return {"class_type": "CLIPTextEncode", "inputs": {"text": text, "clip": ["4", 1]}}

    return {
        "3": sampler("5"),
        "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": MODEL}},
        "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 48, "batch_size": 1}},
        "6": encoder(prompt),
        "7": encoder(NEGATIVE),
        "8": {"class_type": "VAEDecode", "inputs": {"samples": ["10", 0], "vae": ["4", 2]}},
        "9": {"class_type": "ConditioningSetTimestepRange", "inputs": {"conditioning": ["6", 0], "start": 0.0}},
        "10": sampler("3"),
    }


def flux_graph(prompt: str) -> dict:
    """A graph of newer samplers: a guider with one side, a text in a node of its own."""
    return {
        "1": {"class_type": "UNETLoader", "inputs": {"unet_name": MODEL}},
        "2": {"class_type": "PrimitiveString", "inputs": {"value": prompt}},
        "3": {"class_type": "CLIPTextEncode", "inputs": {"text": ["2", 0], "clip": ["9", 0]}},
        "4": {"class_type": "FluxGuidance", "inputs": {"conditioning": ["3", 0], "guidance": 3.5}},
        "5": {"class_type": "BasicGuider", "inputs": {"model": ["1", 0], "conditioning": ["4", 0]}},
        "6": {"class_type": "RandomNoise", "inputs": {"noise_seed": SEED}},
        "7": {"class_type": "SamplerCustomAdvanced", "inputs": {"noise": ["6", 0], "guider": ["5", 0]}},
        "9": {"class_type": "DualCLIPLoader", "inputs": {"clip_name1": "clip_l"}},
    }


def novelai(prompt: str) -> dict[str, str]:
    settings = {
        "steps": 28,
        "sampler": "k_euler",
        "seed": SEED,
        "strength": 0.7,
        "noise": 0.2,
        "scale": 11,
        "uc": NEGATIVE,
    }
    source = f"{MODEL} F64BA557"
    return {
        "Title": "AI generated image",
        "Description": prompt,
        "Software": "NovelAI",
        "Source": source,
        "Comment": json.dumps(settings),
    }


def invokeai(prompt: str) -> dict[str, dict[str, str]]:
    """The ways in which InvokeAI's versions wrote it; of Flux's images without a scheduler."""
    settings = {"seed": SEED, "steps": 30, "cfg_scale": 7.5, "sampler": "k_lms"}
    both = f"{prompt} [{NEGATIVE}]"
    new = {
        "scheduler": "euler",
        "seed": SEED,
        "positive_prompt": prompt,
        "negative_prompt": NEGATIVE,
        "model": {"model_name": MODEL},
    }
    flux = {"generation_mode": "flux_txt2img", "positive_prompt": prompt, "negative_prompt": NEGATIVE, "seed": SEED}
    flux |= {"steps": 30, "model": {"key": "1a2b", "name": MODEL, "base": "flux", "type": "main"}}
    old = {"model_weights": MODEL, "image": {"prompt": [{"prompt": both, "weight": 1.0}], **settings}}
    return {
        "invokeai": {"invokeai_metadata": json.dumps(new)},
        "invokeai-flux": {"invokeai_metadata": json.dumps(flux)},
        "invokeai-2": {"sd-metadata": json.dumps(old)},
        "invokeai-1": {"Dream": f'"{both}" -s 30 -S {SEED} -W 64 -H 48 -C 7.5 -A k_lms'},
    }


def hidden(path: Path, text: str, packed: bool = True) -> Path:
    """Text in the lowest bits of the alpha channel, as "stealth pnginfo" writes it."""
    data = gzip.compress(text.encode()) if packed else text.encode()
    content = (b"stealth_pngcomp" if packed else b"stealth_pnginfo") + (8 * len(data)).to_bytes(4, "big") + data
    bits = np.unpackbits(np.frombuffer(content, np.uint8))
    side = int(np.ceil(np.sqrt(len(bits)))) + 8
    pixels = np.full((side, side + 3, 4), 254, np.uint8)
    alpha = pixels[..., 3].T.reshape(-1).copy()
    alpha[: len(bits)] |= bits
    pixels[..., 3] = alpha.reshape(side + 3, side).T
    Image.fromarray(pixels, "RGBA").save(path, "PNG")
    return path


def write_all(folder: Path, prompt: str) -> dict[Path, str]:
    """An image by each program in each of its formats, some in sub-folders.

    Returns:
        The generator's name by file; "" where it is not recorded.
    """
    (folder / "a" / "b").mkdir(parents=True, exist_ok=True)
    webui, fields, nodes = automatic1111(prompt), novelai(prompt), json.dumps(graph(prompt))
    found = {
        png(folder / "a1111.png", {"parameters": webui}): "AUTOMATIC1111",
        png(folder / "a" / "a1111-packed.png", {"parameters": webui}, compressed=True): "AUTOMATIC1111",
        png(folder / "fooocus.png", {"parameters": fooocus(prompt), "fooocus_scheme": "fooocus"}): "Fooocus",
        png(folder / "comfy.png", {"prompt": nodes, "workflow": json.dumps({"links": [], "nodes": []})}): "ComfyUI",
        png(folder / "comfy-alone.png", {"prompt": nodes}): "ComfyUI",
        png(folder / "a" / "comfy-flux.png", {"prompt": json.dumps(flux_graph(prompt))}): "ComfyUI",
        png(folder / "swarmui.png", {"parameters": swarmui(prompt)}): "SwarmUI",
        png(folder / "drawthings.png", {"XML:com.adobe.xmp": drawthings(prompt)}): "Draw Things",
        png(folder / "novelai.png", fields): "NovelAI",
        png(folder / "diffusiondb.png", {"prompt": prompt, "seed": str(SEED)}): "",
        hidden(folder / "novelai-hidden.png", json.dumps(fields)): "NovelAI",
        hidden(folder / "a1111-hidden.png", webui): "AUTOMATIC1111",
        hidden(folder / "a" / "b" / "a1111-hidden-plain.png", webui, packed=False): "AUTOMATIC1111",
    }
    for name, texts in invokeai(prompt).items():
        found[png(folder / f"{name}.png", texts)] = "InvokeAI"
    encodings = {"utf16be": UNICODE + webui.encode("utf-16-be"), "utf16le": UNICODE + webui.encode("utf-16-le")}
    encodings |= {"utf8": ASCII + webui.encode(), "none": bytes(8) + webui.encode()}
    for suffix in ("jpg", "webp"):
        for name, comment in encodings.items():
            found[with_comment(folder / "a" / "b" / f"a1111-{name}.{suffix}", comment)] = "AUTOMATIC1111"
        text = UNICODE + fooocus(prompt).encode("utf-16-be")
        found[with_comment(folder / f"fooocus-unicode.{suffix}", text)] = "Fooocus"
        found[with_comment(folder / f"fooocus.{suffix}", fooocus(prompt), {0x0131: "Fooocus v2.5.5"})] = "Fooocus"
        found[with_comment(folder / f"swarmui.{suffix}", ASCII + swarmui(prompt).encode())] = "SwarmUI"
        civitai = {**graph(prompt), "extra": {"airs": []}, "extraMetadata": "{}"}
        found[with_comment(folder / f"civitai.{suffix}", UNICODE + json.dumps(civitai).encode("utf-16-be"))] = "ComfyUI"
        both = json.dumps({"prompt": graph(prompt), "workflow": {"nodes": []}})
        found[with_comment(folder / f"comfy-comment.{suffix}", ASCII + both.encode())] = "ComfyUI"
        found[with_comment(folder / f"comfy.{suffix}", "", {0x0110: f"prompt:{nodes}", 0x010F: "workflow:{}"})] = (
            "ComfyUI"
        )
    return found
