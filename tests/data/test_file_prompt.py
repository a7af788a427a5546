"""The prompt that is in an image file, as eight programs write it, and what other files do to the reader."""

import csv
import json
import time
import tracemalloc
import zlib

import numpy as np
import pytest
import written_images as written
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from image_to_prompts.data import file_prompt
from image_to_prompts.data.file_prompt import FilePrompt

PROMPTS = (
    "a castle on a hill, (masterpiece:1.2), <lora:detail:0.8>, 8k",
    "ein Fuchs im Schnee, Öl auf Leinwand – 狐, {red|blue} eyes",
    'two lines\nof "one" prompt: 16:9, by artist\\(name\\)',
)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_every_program_in_every_format(prompt, tmp_path):
    plain = "\n" not in prompt and "[" not in prompt  # which InvokeAI's first versions could not hold
    for file, generator in written.write_all(tmp_path, prompt).items():
        if file.stem == "invokeai-1" and not (plain and '"' not in prompt):
            continue
        found = file_prompt.read(file)
        assert found and found.prompt == prompt, file
        assert (found.generator, found.seed) == (generator, str(written.SEED)), file
        assert found.negative_prompt == ("" if file.stem in ("diffusiondb", "comfy-flux") else written.NEGATIVE), file
        assert found.model == ("" if file.stem in ("diffusiondb", "invokeai-1") else written.MODEL), file


def test_no_prompt_is_none(tmp_path):
    written.png(tmp_path / "empty.png", {"parameters": written.automatic1111("")})
    written.png(tmp_path / "blank.png", {"prompt": "  \n"})
    written.png(tmp_path / "graph.png", {"prompt": json.dumps(written.graph(""))})
    written.png(tmp_path / "gimp.png", {"Comment": "Created with GIMP", "Description": "my holidays"})
    written.with_comment(tmp_path / "camera.jpg", written.ASCII + b"Hello", {0x010E: "OLYMPUS DIGITAL CAMERA"})
    written.picture().save(tmp_path / "comment.jpg", comment=b"a photograph of my dog")
    written.picture("RGBA").save(tmp_path / "plain.png")
    (tmp_path / "text.png").write_text("a castle")
    assert {file.name: file_prompt.read(file) for file in tmp_path.iterdir() if file_prompt.read(file)} == {}
    assert file_prompt.read(tmp_path / "missing.png") is None


def test_two_images_one_after_the_other_are_not_mixed_up(tmp_path):
    files = [
        written.with_comment(
            tmp_path / f"{number}.jpg", written.ASCII + written.automatic1111(f"fox {number}").encode()
        )
        for number in range(20)
    ]
    assert [file_prompt.read(file).prompt for file in files] == [f"fox {number}" for number in range(20)]


def test_a_prompt_that_speaks_of_its_settings(tmp_path):
    prompt = "a sign that says Negative prompt: Steps: 20, in the fog"
    assert (
        file_prompt.read(written.png(tmp_path / "a.png", {"parameters": written.automatic1111(prompt)})).prompt
        == prompt
    )
    two = written.automatic1111("a fox") + "\nTemplate: a __animal__\nNegative Template: none"
    assert file_prompt.read(written.png(tmp_path / "b.png", {"parameters": two})).prompt == "a fox"
    alone = file_prompt.read(written.png(tmp_path / "c.png", {"parameters": "a fox\nNegative prompt: hands"}))
    assert alone == FilePrompt("a fox", "hands")


def test_a_plain_prompt_in_a_comment(tmp_path):
    text = json.dumps({"prompt": "a fox", "negative_prompt": "hands", "seed": 5})
    found = file_prompt.read(written.with_comment(tmp_path / "a.jpg", written.ASCII + text.encode()))
    assert found == FilePrompt("a fox", "hands", "5")
    settings = "a fox: red\nNegative prompt: hands\nSteps: 20, Sampler: Euler, CFG scale: 7, Seed: 5"
    found = file_prompt.read(written.with_comment(tmp_path / "b.jpg", written.ASCII + f"Prompt: {settings}".encode()))
    assert (found.prompt, found.negative_prompt, found.seed) == ("Prompt: a fox: red", "hands", "5")


def test_half_an_emoji_is_replaced(tmp_path):
    cut = written.graph("a fox \ud83e in snow")
    assert file_prompt.read(written.png(tmp_path / "a.png", {"prompt": json.dumps(cut)})).prompt == "a fox � in snow"
    whole = written.graph("a \U0001f98a in snow")
    found = file_prompt.read(written.png(tmp_path / "b.png", {"prompt": json.dumps(whole)}))
    assert found.prompt == "a \U0001f98a in snow"


@pytest.mark.parametrize(
    ("node", "prompt"),
    [
        ({"string_a": "a fox in snow", "string_b": ["5", 0], "delimiter": ", "}, "a fox in snow, 8k"),
        ({"string_a": "a fox,", "string_b": "in snow", "delimiter": " "}, "a fox, in snow"),
        ({"separator": "", "text1": ["5", 0], "text2": "a fox"}, "8k, a fox"),
        ({"text_a": "a fox", "text_b": "", "text_c": ["5", 0]}, "a fox, 8k"),
        ({"text": ["5", 0], "text_0": "what it showed"}, "8k"),
        ({"wildcard_text": "a __animal__", "populated_text": "a fox", "seed": 1}, "a fox"),
        ({"text_positive": "a fox", "text_negative": "hands", "style": "base"}, "a fox"),
        ({"clip_l": "fox", "t5xxl": "a fox in snow", "clip": ["4", 1]}, "fox, a fox in snow"),
        ({"clip_g": "a fox", "clip_l": "a fox", "t5xxl": "a fox", "clip": ["4", 1]}, "a fox"),
    ],
)
def test_graphs_that_put_texts_together(node, prompt):
    nodes = {
        "1": {"class_type": "KSampler", "inputs": {"positive": ["2", 0], "negative": ["3", 0], "seed": 5}},
        "2": {"class_type": "CLIPTextEncode", "inputs": {"text": ["4", 0]}},
        "3": {"class_type": "ConditioningZeroOut", "inputs": {"conditioning": ["2", 0]}},
        "4": {"class_type": "AnyText", "inputs": node},
        "5": {"class_type": "PrimitiveString", "inputs": {"value": "8k"}},
    }
    image = Image.new("RGB", (1, 1))
    image.info = {"prompt": json.dumps(nodes)}
    found = file_prompt.of_image(image)
    assert (found.prompt, found.negative_prompt) == (prompt, "")


def test_text_behind_the_pixels(tmp_path):
    file = written.png(tmp_path / "a.png", {})
    chunk = b"tEXtprompt\0a fox"
    text = (len(chunk) - 4).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
    file.write_bytes(file.read_bytes()[:-12] + text + file.read_bytes()[-12:])
    assert file_prompt.read(file).prompt == "a fox"


def test_files_that_others_wrote(shared_data):
    keys = {"real_metadata": ("key.csv", "file", ""), "diffusiondb_sample": ("prompts.csv", "image", "images")}
    for folder, (key, name, inner) in keys.items():
        with (shared_data / folder / key).open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        assert rows
        for row in rows:
            found = file_prompt.read(shared_data / folder / inner / row[name])
            assert (found.prompt if found else "") == row["prompt"].strip(), row[name]


def timed(file, memory=False):
    """What is read of a file, in little memory and in time: what grows with the square of a text takes minutes."""
    begun = time.process_time()
    found = file_prompt.read(file)
    assert time.process_time() - begun < 120, file.name
    if memory:
        tracemalloc.start()
        file_prompt.read(file)
        assert tracemalloc.get_traced_memory()[1] < 200e6, file.name
        tracemalloc.stop()
    return found


def chain(count, ring=False):
    """A graph in which one conditioning leads to the next, `count` times, and a sampler for each of them."""
    nodes = {str(i): {"class_type": "Pass", "inputs": {"conditioning": [str(i + 1), 0]}} for i in range(count)}
    nodes |= {f"s{i}": {"class_type": "KSampler", "inputs": {"positive": [str(i), 0], "cfg": 1}} for i in range(count)}
    nodes[str(count)] = {"class_type": "CLIPTextEncode", "inputs": {"text": ["0", 0] if ring else "a fox"}}
    return nodes


def test_hostile_files(tmp_path):
    deep = written.png(tmp_path / "deep.png", {"prompt": json.dumps(chain(5_000))})
    assert timed(deep, memory=True).prompt == "a fox"
    assert timed(written.png(tmp_path / "ring.png", {"prompt": json.dumps(chain(5_000, ring=True))})) is None
    for name, text in {
        "long": json.dumps({str(i): {"inputs": {"text": "x" * 90}} for i in range(100_000)}),
        "many": json.dumps({str(i): {"inputs": {"text": "x" * 90}} for i in range(8_000)}),
        "nested": "[" * 950_000,
        "nested-objects": '{"a":' * 180_000,
        "blanks": '"a fox"' + " " * 950_000,
        "commas": "a, " * 300_000 + "\nSteps: 20, Sampler: x",
        "lines": "Negative prompt:\n" * 55_000 + "Steps: 1, CFG scale: 3",
        "steps": "\nSteps: 1," * 95_000,
    }.items():
        assert len(text) > 8e5
        for key in ("prompt", "parameters", "Dream", "sd-metadata", "invokeai_metadata", "Source", "Comment"):
            fields = {key: text} if key != "Source" else {**written.novelai("a fox"), "Source": text}
            timed(written.png(tmp_path / f"{name}-{key}.png", fields), memory=name == "many")
        timed(written.with_comment(tmp_path / f"{name}.webp", written.UNICODE + text.encode("utf-16-be")))


def test_bombs(tmp_path):
    bomb = b"zTXtparameters\0\0" + zlib.compress(b"a" * 300_000_000)
    for position, chunk in (("zTXt", bomb), ("iTXt", b"iTXtprompt\0\1\0\0\0" + zlib.compress(b"a" * 300_000_000))):
        file = written.png(tmp_path / f"{position}.png", {})
        data, head = file.read_bytes(), 8 + 25
        text = (len(chunk) - 4).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
        file.write_bytes(data[:head] + text + data[head:])
        assert timed(file, memory=True) is None
    file = written.hidden(tmp_path / "hidden.png", "a" * 100_000_000)
    assert timed(file, memory=True) is None
    Image.new("RGBA", (6000, 6000)).save(tmp_path / "large.png", compress_level=1)
    assert timed(tmp_path / "large.png", memory=True) is None


@pytest.fixture(scope="module")
def every_file(tmp_path_factory):
    return sorted(written.write_all(tmp_path_factory.mktemp("written"), PROMPTS[0]))


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_damaged_bytes_never_raise(every_file, data):
    file = data.draw(st.sampled_from(every_file))
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    damaged = every_file[0].with_name(f"damaged{file.suffix}")
    damaged.write_bytes(content[: data.draw(st.integers(len(content) // 2, len(content)))])
    file_prompt.read(damaged)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.sampled_from([["1", 0], ["2", 0], "positive"]),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["inputs", "positive", "text", "1", "2"]), inner)
    ),
    max_leaves=20,
)


@given(JSON)
@settings(max_examples=300)
def test_any_graph_is_read_or_refused(value):
    image = Image.new("RGB", (1, 1))
    image.info = {"prompt": json.dumps(value)}
    found = file_prompt.of_image(image)
    assert found is None or found.prompt.strip()


TEXT = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=60).map(str.strip).filter(bool)


@given(TEXT, TEXT)
@settings(max_examples=200)
def test_automatic1111_exactly(prompt, negative):
    if any(text.startswith(("Negative prompt:", "Steps: ")) for text in (prompt, negative)):
        return
    image = Image.new("RGB", (1, 1))
    image.info = {
        "parameters": f"{prompt}\nNegative prompt: {negative}\nSteps: 20, Sampler: Euler, CFG scale: 7, Seed: 5"
    }
    found = file_prompt.of_image(image)
    assert (found.prompt, found.negative_prompt, found.seed) == (prompt, negative, "5")


def test_a_hidden_text_needs_its_mark():
    pixels = np.full((64, 64, 4), 255, np.uint8)
    image = Image.fromarray(pixels, "RGBA")
    image.format = "WEBP"
    assert file_prompt.of_image(image) is None
