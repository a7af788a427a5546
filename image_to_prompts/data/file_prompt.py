"""The prompt that an image file carries: what the program that made the image wrote into it.

sd-parsers (https://github.com/d3x-at/sd-parsers, MIT) reads the text of AUTOMATIC1111, NovelAI and InvokeAI's first
versions. This module finds the places where such text lies (PNG chunks, EXIF, XMP and comments, the lowest bits of an
alpha channel), and reads ComfyUI's graphs, with or without a workflow beside them, what other programs write as JSON,
and DiffusionDB's plain prompts.
"""

import html
import json
import re
import warnings
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from . import images

LARGEST = 1_000_000  # characters of a text; graphs of ComfyUI have tens of thousands
MOST_PIXELS = 40_000_000  # of an image whose alpha channel is looked at
STEALTH = (b"stealth_pngcomp", b"stealth_pnginfo")  # how hidden text begins, packed by gzip and not
EXIF, USER_COMMENT = 0x8769, 0x9286
XP = (0x9C9B, 0x9C9C)  # Windows' title and comment, in UTF-16
SIDES = {"positive": ("positive", "text_embeds"), "negative": ("negative",)}  # inputs of samplers, by what they are for
TEXTS = re.compile("(text|string|prompt)(_?[a-z1-9])?|populated_text|clip_[gl]|t5xxl|value")
"""Inputs of ComfyUI's nodes that hold a text, or several to be put together; `text_0` repeats what a node showed."""
NOT_TEXT = ("model", "clip", "vae", "image", "pixels", "latent_image", "samples", "mask", "control_net")
SETTINGS = re.compile(r"(?:^|\n)Steps: \d+,[^\n]*CFG scale:[\s\S]*$|(?:^|\n)Steps: \d[^\n]*\s*$")  # AUTOMATIC1111's
NEGATIVE = re.compile(r"(?:^|\n)Negative prompt:")
AS_JSON = {
    "InvokeAI": ("positive_prompt", "positive_prompt", "negative_prompt", "model"),
    "SwarmUI": ("sui_image_params", "prompt", "negativeprompt", "model"),
    "Draw Things": ("uc", "c", "uc", "model"),
    "Fooocus": ("base_model", "prompt", "negative_prompt", "base_model"),
}
"""Programs that write JSON: a name that only theirs has, and its names of prompt, negative prompt and model."""


@dataclass(frozen=True)
class FilePrompt:
    """A prompt found in a file, and what else stands there, as text; what does not is empty."""

    prompt: str
    negative_prompt: str = ""
    seed: str = ""
    generator: str = ""
    model: str = ""


def read(path: Path) -> FilePrompt | None:
    """Looks for a prompt in an image file.

    Args:
        path: The file; it may lie in an archive, see `archives`.

    Returns:
        What was found; None where there is no prompt, or an empty one, or the file cannot be read.
    """
    try:
        with warnings.catch_warnings(action="ignore"), images.opened(path) as image:  # Pillow warns of odd EXIF
            return of_image(image)
    except Exception:  # whatever a hostile or damaged file makes Pillow raise: that it cannot be read is told elsewhere
        return None


def of_image(image: Image.Image) -> FilePrompt | None:
    """Looks for a prompt in an image that Pillow has opened, see `read`."""
    for texts in _places(image):
        texts = {name: text for name, text in texts.items() if isinstance(text, str) and len(text) <= LARGEST}
        for way in (_by_json, _by_sd_parsers, _by_comfyui, _plain):
            try:
                found = way(texts)
            except Exception:  # other people's text; what one way cannot read, another may
                continue
            if found and found.prompt.strip():
                return replace(found, **{name: _whole(text) for name, text in vars(found).items()})
    return None


def _whole(text: str) -> str:
    """Without halves of a letter that UTF-16 writes in two, such as an emoji: no file and no terminal takes them."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _places(image: Image.Image) -> Iterator[dict[Any, Any]]:
    """Texts by name, from each place of the image where they may lie."""
    yield {**image.info}
    for text in _comments(image):
        yield _named(text)
    if image.width * image.height > MOST_PIXELS:
        return
    if image.format == "PNG":
        image.load()  # text may stand behind the pixels
        yield {**image.info}
    if image.mode == "RGBA" and (hidden := _hidden(image)):
        yield _named(hidden)


def _named(text: str) -> dict[str, Any]:
    """A text without a name, under the names by which it would stand in a PNG."""
    label, _, rest = text.partition(":")
    if label.lower() in ("prompt", "workflow") and rest.lstrip().startswith("{"):  # as ComfyUI writes them into EXIF
        return {label.lower(): rest}
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):
        return {"parameters": text}
    if not isinstance(fields, dict):
        return {}
    if any(isinstance(value, dict) and "class_type" in value for value in fields.values()):  # a graph, as Civitai does
        return {"prompt": text}
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in fields.items()}
    return {**texts, "parameters": text}


def _comments(image: Image.Image) -> Iterator[str]:
    """The texts of EXIF and XMP, and a JPEG's comment."""
    exif = image.getexif()
    values = [exif.get_ifd(EXIF).get(USER_COMMENT), *(exif.get(name) for name in XP), *exif.values()]
    for value in [*values, image.info.get("comment"), _in_xmp(image.info.get("XML:com.adobe.xmp", ""))]:
        text = value if isinstance(value, str) else _decoded(value) if isinstance(value, bytes) else ""
        if 0 < len(text := text.strip("\0 ")) <= LARGEST:
            yield text


def _in_xmp(text: str) -> str:
    """The user comment in a PNG's XMP block, where Draw Things writes; "" if there is none."""
    for mark in ("<exif:UserComment>", "<rdf:li", ">"):
        text = text.partition(mark)[2]
    return html.unescape(text.partition("</rdf:li>")[0])


def _decoded(value: bytes) -> str:
    """The text of a user comment, whose first eight bytes may name its encoding, or of any other field."""
    name, rest = value[:8], value[8:]
    if name in (b"ASCII\0\0\0", bytes(8)):
        return rest.decode("utf-8", "replace")
    if name != b"UNICODE\0":
        rest = value
    if rest[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return rest.decode("utf-16", "replace")
    high, low = rest[::2].count(0), rest[1::2].count(0)  # which half of each pair is the empty one of Latin letters
    if name == b"UNICODE\0" or max(high, low) > len(rest) / 8:
        return rest.decode("utf-16-be" if high >= low else "utf-16-le", "replace")
    return rest.decode("utf-8", "replace")


def _hidden(image: Image.Image) -> str:
    """Text in the lowest bits of the alpha channel, column by column ("stealth pnginfo"); "" if there is none."""
    bits = (np.asarray(image.getchannel("A")).T & 1).reshape(-1)
    start = np.packbits(bits[: 8 * 19]).tobytes()
    if start[:15] not in STEALTH:
        return ""
    size = min(int.from_bytes(start[15:19], "big"), 8 * LARGEST)
    data = np.packbits(bits[8 * 19 : 8 * 19 + size]).tobytes()
    return (zlib.decompressobj(31).decompress(data, LARGEST) if start[:15] == STEALTH[0] else data).decode()


def _by_json(texts: dict[str, str]) -> FilePrompt | None:
    """Reads what the programs of `AS_JSON` write."""
    said = json.loads(texts.get("invokeai_metadata") or texts["parameters"])
    for generator, (mark, prompt, negative, model) in AS_JSON.items():
        if mark in said:
            said = said | said.get("sui_image_params", {})
            name = said.get(model)
            name = name.get("name") or name.get("model_name") if isinstance(name, dict) else name
            values = (said.get(prompt), said.get(negative), said.get("seed"), generator, name)
            return FilePrompt(*("" if value is None else str(value).strip() for value in values))
    return None


def _by_sd_parsers(texts: dict[str, str]) -> FilePrompt | None:
    """Reads the text of AUTOMATIC1111, NovelAI and InvokeAI's first versions.

    Its own reading of files is not used: it keeps the text of an image by its `id`, which Python gives to another one,
    decodes JPEG comments as UTF-16 alone, and takes gigabytes for a large alpha channel.
    """
    from sd_parsers.parsers import AUTOMATIC1111Parser, InvokeAIParser, NovelAIParser

    for name in texts.keys() & {"Dream", "Source"}:  # its patterns take quadratic time where blanks follow each other
        texts = {**texts, name: " ".join(texts[name].split())}
    for parser in (AUTOMATIC1111Parser(), InvokeAIParser(), NovelAIParser()):
        try:
            found = parser.parse(dict(texts))
        except Exception:  # its own error for a text of another program, any other for what it did not expect
            continue
        seed = next((sampler.parameters["seed"] for sampler in found.samplers if "seed" in sampler.parameters), "")
        model = next((model.name for model in found.models if model.name), "")
        sides = found.full_prompt.strip(), found.full_negative_prompt.strip()
        if isinstance(parser, AUTOMATIC1111Parser):  # which takes "Negative prompt:" in the middle of a line for an end
            sides = _sides(texts["parameters"])
        return FilePrompt(*sides, str(seed), found.generator.value, str(model))
    return None


def _by_comfyui(texts: dict[str, str]) -> FilePrompt | None:
    """Reads ComfyUI's graph: the texts from which a sampler's `positive` and `negative` come."""
    graph = json.loads(texts["prompt"])
    whole = {str(name): node for name, node in graph.items() if isinstance(node, dict)}
    used = {name: node for name, node in whole.items() if node.get("class_type") != "ConditioningZeroOut"}
    nodes = {name: node["inputs"] for name, node in used.items() if isinstance(node.get("inputs"), dict)}
    found = {side: _joined(_texts_of(nodes, side)) for side in SIDES}
    seeds = _values(nodes, ("seed", "noise_seed"), int)
    models = _values(nodes, ("ckpt_name", "unet_name"), str)
    return FilePrompt(found["positive"], found["negative"], next(seeds, ""), "ComfyUI", next(models, ""))


def _values(nodes: dict[str, dict[str, Any]], names: tuple[str, ...], kind: type) -> Iterator[str]:
    return (str(node[name]) for node in nodes.values() for name in names if type(node.get(name)) is kind)


def _texts_of(nodes: dict[str, dict[str, Any]], side: str) -> Iterator[str]:
    """Texts of one side of a graph; each node is looked at once, so that circles end."""
    starts = [node.get(name) for node in nodes.values() for name in SIDES[side]]
    if side == "positive":  # guiders of newer samplers have one side alone
        starts += [node["conditioning"] for node in nodes.values() if node.keys() == {"model", "conditioning"}]
    own = (side, f"{side}_prompt", f"text_{side}")
    left: list[Any] = [one for one in reversed(starts) if isinstance(one, list)]  # links, and texts at their ends
    seen = set[str]()
    while left:
        one = left.pop()
        if isinstance(one, str):
            yield one.strip()
            continue
        name = str(one[0]) if one else ""  # a link is a node's name and the number of one of its outputs
        if name in seen or name not in nodes:
            continue
        seen.add(name)
        node = {key: value for key, value in nodes[name].items() if isinstance(value, str | list)}
        said = [value for key, value in node.items() if key in own]
        said = said or [value for key, value in node.items() if TEXTS.fullmatch(key)]
        links = [value for key, value in node.items() if key not in NOT_TEXT and isinstance(value, list)]
        left += reversed(said or links)


def _joined(texts: Iterable[str]) -> str:
    """Texts as one, each once."""
    several = [*dict.fromkeys(filter(None, texts))]
    return several[0] if len(several) == 1 else ", ".join(filter(None, (text.strip(" ,") for text in several)))


def _plain(texts: dict[str, str]) -> FilePrompt | None:
    """A prompt as it is: DiffusionDB's `prompt` and `seed`, or `parameters` without any settings behind the prompt."""
    if "prompt" in texts and not texts["prompt"].lstrip().startswith(("{", "[")):
        return FilePrompt(texts["prompt"].strip(), texts.get("negative_prompt", ""), texts.get("seed", ""))
    text = texts.get("parameters", "")
    if text.lstrip().startswith("{"):
        return None
    return FilePrompt(*_sides(text)) if SETTINGS.search(text) or NEGATIVE.search(text) else None


def _sides(text: str) -> tuple[str, str]:
    """Prompt and negative prompt of AUTOMATIC1111's text."""
    prompt, *negative = NEGATIVE.split(SETTINGS.sub("", text), maxsplit=1)
    return prompt.strip(), "".join(negative).strip()


def beside(file: Path) -> FilePrompt | None:
    """The text that lies beside an image, in a .txt of the same stem."""
    try:
        text = file.with_suffix(".txt").read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return FilePrompt(text) if text else None
