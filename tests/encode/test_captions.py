"""Captions: what the model's own code says, the same in any company; a server is asked politely and its end is told."""

import numpy as np
import pytest
import tiny_models
from caption_stub import Stub
from PIL import Image

from image_to_prompts.data import images
from image_to_prompts.encode import embeddings, encoders
from image_to_prompts.models import metrics, text_encoder
from image_to_prompts.run.errors import UserError


@pytest.fixture
def pictures(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "pictures").mkdir()
    for number in range(5):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(tmp_path / "pictures" / f"{number}.png")
    return images.find(tmp_path / "pictures")


def test_captions_are_those_of_the_model(tiny_encoders, pictures):
    from transformers import BlipForConditionalGeneration, BlipProcessor

    (found,) = encoders.encode([encoders.build(f"caption:{tiny_encoders['blip']}", 0)], pictures)
    model = BlipForConditionalGeneration.from_pretrained(tiny_encoders["blip"]).eval()
    processor = BlipProcessor.from_pretrained(tiny_encoders["blip"])
    for path, said in zip(pictures, found.texts, strict=True):
        tokens = model.generate(**processor(images=Image.open(path), return_tensors="pt"), max_new_tokens=60)
        assert said == processor.decode(tokens[0], skip_special_tokens=True).strip()
    assert np.allclose(found.vectors, text_encoder.encode(found.texts), atol=1e-6)


@pytest.mark.parametrize(("kind", "task"), [("git", None), ("blip2", None), ("florence2", "<DETAILED_CAPTION>")])
def test_other_models_say_what_their_own_code_does(kind, task, tmp_path, pictures):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = tiny_models.save_captioner(kind, tmp_path / kind)
    (found,) = encoders.encode([encoders.build(f"caption:{folder}", 0)], pictures)
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    expected = []
    for path in pictures:
        given = processor(images=Image.open(path), return_tensors="pt", **({"text": task} if task else {}))
        tokens = model.generate(**given, max_new_tokens=60, do_sample=False)
        expected.append(" ".join(processor.batch_decode(tokens, skip_special_tokens=True)[0].split()))
    assert found.texts == expected and len(set(expected)) > 1


def test_several_captions_are_drawn_alike_in_any_company(tiny_encoders, pictures):
    build = encoders.build(f"caption:{tiny_encoders['blip']}", 0, samples=3)
    (found,) = encoders.encode([build], pictures)
    lines = [text.split("\n") for text in found.texts]
    assert {len(some) for some in lines} == {3} and any(len(set(some)) > 1 for some in lines)
    (alone,) = encoders.encode([encoders.rebuild(build.about)], pictures[3:4])
    assert alone.texts == found.texts[3:4]
    expected = [metrics.unit(text_encoder.encode(some).mean(0)) for some in lines]
    assert np.allclose(found.vectors, expected, atol=1e-6)


def test_a_server_captions_images(caption_server, small_run, tmp_path, command):
    words = ["embed", "--run", small_run.folder, "--images", small_run.images, "--out", tmp_path / "e", "--samples", 2]
    code, _, err = command(*words, "--encoders", f"caption:{caption_server}#moondream")
    assert code == 0 and "captions by moondream" in err, err
    (name,) = embeddings.arrays(tmp_path / "e")
    vectors, names, about = embeddings.read(tmp_path / "e", name)
    first = names.set_index("image_name")["text"]
    for image, text in list(first.items())[:5]:
        with Image.open(small_run.images / image) as opened:
            middle = np.asarray(opened.convert("RGB").resize((512, 512)))[256, 256, 0]
        one, two = text.split("\n")
        assert one == f"brightness {one.split()[1]} seed 0" and two.endswith("seed 1")
        assert abs(int(one.split()[1]) - int(middle)) < 80
    assert len(vectors) == len(names) and about["settings"] == {"samples": 2}
    assert encoders.build(f"caption:{caption_server}", 0).about["encoder"].endswith("#llava"), "whatever is there later"
    asked = Stub.asked[0]
    assert asked["model"] == "moondream" and {one["temperature"] for one in Stub.asked} == {0.0, 1.0}


def test_what_is_wrong_with_a_server_is_said_at_once(caption_server, small_run, tmp_path, refused):
    words = ["embed", "--run", small_run.folder, "--images", small_run.images, "--out", tmp_path / "e", "--encoders"]
    refused([*words, f"caption:{caption_server}#gpt"], "has no model 'gpt'", "llava, moondream")
    refused([*words, "caption:http://127.0.0.1:9/v1"], "http://127.0.0.1:9/v1/models", "is the server still there?")
    refused([*words, f"caption:{caption_server}/other"], "names no model", "#<model>")
    refused([*words, "caption:http://127.0.0.1:port/v1"], "http://127.0.0.1:port/v1/models", "port")
    Stub.models = None  # an Ollama without any
    refused([*words, f"caption:{caption_server}"], "names no model")
    Stub.models = [{"id": "llava"}]
    Stub.says = ""
    refused([*words, f"caption:{caption_server}"], "answered without a text")
    Stub.broken = True
    refused([*words, f"caption:{caption_server}"], "chat/completions", "500", "out of memory")


def test_a_folder_of_another_model_is_refused(tiny_encoders):
    with pytest.raises(UserError, match="image-to-text model"):
        encoders.build(f"caption:{tiny_encoders['convnext']}", 0)
