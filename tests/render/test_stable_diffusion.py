"""Stable Diffusion 2 on tiny random models of its own classes: presets, memory, failures, weights of every kind."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from single_file_layout import NARROW, save, unet_name, vae_name
from tiny_models import save_diffusion

from image_to_prompts import render
from image_to_prompts.data import metadata
from image_to_prompts.data.metadata import NSFW
from image_to_prompts.models import fast_layers, layouts, weights
from image_to_prompts.render import single_file, stable_diffusion
from image_to_prompts.render.stable_diffusion import StableDiffusionBackend
from image_to_prompts.render.store import Row
from image_to_prompts.run import folders
from image_to_prompts.run.errors import UserError


def rows_of(prompts, seeds):
    return [
        Row(i, f"{i}.png", prompt, seed, f"{i}.png")
        for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
    ]


def pixels(image):
    return np.asarray(image, np.int16)


def started(path, **values):
    backend = StableDiffusionBackend(path, **{"steps": 2, "batch_size": 2, **values})
    backend.start()
    return backend


def test_rows_have_their_own_noise(tiny_sd2):
    backend = started(tiny_sd2)
    assert backend.pipeline.scheduler.config.prediction_type == "v_prediction"
    rows = rows_of(["a cat", "a dog"], [5, 6])
    together = [image for image, _ in backend.render(rows)]
    apart = [backend.render([row])[0][0] for row in rows]
    assert together[0].size == (768, 768)
    for a, b in zip(together, apart, strict=True):
        assert np.abs(pixels(a) - pixels(b)).max() <= 1
    other = backend.render(rows_of(["a cat"], [7]))[0][0]
    assert (pixels(other) != pixels(together[0])).any()


@pytest.mark.parametrize(
    ("fast", "steps", "scheduler"), [(False, 50, "DDIMScheduler"), (True, 20, "DPMSolverMultistepScheduler")]
)
def test_presets(tiny_sd2, monkeypatch, fast, steps, scheduler):
    backend = StableDiffusionBackend(tiny_sd2, fast=fast, batch_size=1)
    backend.start()
    config = backend.pipeline.scheduler.config
    assert type(backend.pipeline.scheduler).__name__ == scheduler and config.prediction_type == "v_prediction"
    if fast:
        assert (config.algorithm_type, config.solver_order) == ("dpmsolver++", 2)
    assert backend.pipeline.vae.use_slicing
    assert backend.settings["steps"] == steps and backend.settings["guidance"] == 9.0
    seen = {}

    def record(**arguments):
        seen.update(arguments)
        image = torch.zeros(1, 3, arguments["height"], arguments["width"])
        return type("Result", (), {"images": image, "nsfw_content_detected": [True]})

    monkeypatch.setattr(backend, "pipeline", record)
    assert backend.render(rows_of(["a cat"], [1]))[0][1] == "nsfw_blacked"
    assert (seen["height"], seen["width"], seen["num_inference_steps"], seen["guidance_scale"]) == (768, 768, steps, 9)


def test_both_presets_draw_and_the_manifest_tells_them_apart(tiny_sd2, tmp_path):
    csv = tmp_path / "m.csv"
    metadata.write_table(csv, pd.DataFrame({"image_name": ["a.png", "b.png", "c.png"], "prompt": ["x", "y", "z"]}))
    manifests = {}
    for fast in (False, True):
        values = {"backend": "sd2", "weights": tiny_sd2, "batch_size": 2, "steps": 3, "fast": fast}
        manifests[fast] = render.run(render.Config(metadata=csv, out=tmp_path / str(fast), **values))
        with Image.open(tmp_path / str(fast) / "a.png") as image:
            assert image.size == (512, 512)
    assert manifests[False]["scheduler"].eq("DDIM").all() and manifests[True]["scheduler"].eq("DPM-Solver++").all()
    assert manifests[False]["model_sha256"].tolist() == [layouts.digest(tiny_sd2)] * 3
    assert (manifests[False]["sha256"] != manifests[True]["sha256"]).all()
    with pytest.raises(UserError, match="was rendered with scheduler DDIM, not DPM"):
        render.run(render.Config(metadata=csv, out=tmp_path / "False", **{**values, "fast": True}))


def test_memory_efficient_attention_is_the_default():
    import torch
    from diffusers import UNet2DConditionModel
    from diffusers.models.attention_processor import AttnProcessor2_0

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(single_file.SETTINGS / "unet"))
    kinds = {type(processor) for processor in unet.attn_processors.values()}
    assert kinds == {AttnProcessor2_0} and len(unet.attn_processors) == 32
    # 865.9M parameters: the published size of Stable Diffusion 2's U-Net.
    assert sum(p.numel() for p in unet.parameters()) == 865_910_724


def out_of_memory(backend, monkeypatch, fits):
    """Lets every call with more than `fits` images fail as CUDA does."""
    import torch

    call, tried = backend.call, []

    def limited(rows, steps):
        tried.append((len(rows), steps))
        if len(rows) > fits:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return call(rows, steps)

    monkeypatch.setattr(backend, "call", limited)
    return tried


def test_out_of_memory_halves_the_batch_and_keeps_the_pictures(tiny_sd2, monkeypatch):
    backend = started(tiny_sd2, batch_size=6)
    rows = rows_of(list("abcdef"), range(6))
    whole = backend.render(rows)
    tried = out_of_memory(backend, monkeypatch, fits=2)
    assert [n for _, n in zip(backend.render(rows), range(6), strict=True)] == list(range(6))
    assert [size for size, _ in tried] == [6, 3, 1, 1, 1, 1, 1, 1] and backend.limit == 1
    again = backend.render(rows)
    for (a, _), (b, _) in zip(whole, again, strict=True):
        assert np.abs(pixels(a) - pixels(b)).max() <= 1
    out_of_memory(backend, monkeypatch, fits=0)
    with pytest.raises(UserError, match=r"does not suffice for one image: .* 768 px is too large"):
        backend.render(rows[:1])


@pytest.mark.parametrize(("device", "expected"), [("cpu", []), ("cuda", [16, 8, 4, 4, 4, 4])])
def test_the_batch_is_sized_to_memory_with_one_step(tiny_sd2, monkeypatch, device, expected):
    nothing = SimpleNamespace(device=SimpleNamespace(type=device))
    monkeypatch.setattr(stable_diffusion, "load", lambda *_: nothing)
    monkeypatch.setattr(StableDiffusionBackend, "call", lambda self, rows, steps: [(None, "")] * len(rows))
    backend = StableDiffusionBackend(tiny_sd2)
    tried = out_of_memory(backend, monkeypatch, fits=4)
    backend.start()
    assert tried == [(size, 1) for size in expected] and backend.block == (4 if expected else 1)


def test_unet_and_vae_are_compiled_when_asked_to(tiny_sd2, small_run, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(fast_layers, "compiled", lambda part: compiled.append(type(part).__name__))
    metadata.write_table(tmp_path / "m.csv", metadata.with_keys(pd.DataFrame({"prompt": ["a fox"]}), tmp_path))
    values = {"backend": "sd2", "weights": tiny_sd2, "steps": 1, "batch_size": 1, "metadata": tmp_path / "m.csv"}
    plain = render.run(render.Config(out=tmp_path / "a", **values))
    assert not compiled
    render.run(render.Config(out=tmp_path / "b", **values, compile=True))
    assert compiled == ["UNet2DConditionModel", "AutoencoderKL"]
    backend = started(tiny_sd2, compiled=True)
    asked, real = [], backend.pipeline
    backend.pipeline = lambda prompt, **how: asked.append(prompt) or real(prompt, **how)
    backend.pipeline.unet, backend.pipeline.device = real.unet, real.device
    assert len(backend.render(rows_of(["a fox"], [1]))) == 1 and asked == [["a fox", ""]]  # one batch size alone
    one, other = (Image.open(tmp_path / name / plain["file"][0]) for name in "ab")
    assert np.abs(pixels(one) - pixels(other)).mean() < 0.1
    render.run(render.Config(out=tmp_path / "a", **values, compile=True))  # the same images, by rounding: none anew
    assert len(compiled) == 4


def test_a_compiled_batch_is_halved_too(tiny_sd2, monkeypatch):
    monkeypatch.setattr(fast_layers, "compiled", lambda part: None)
    backend, tried = started(tiny_sd2, batch_size=6, compiled=True), []
    real = backend.pipeline

    def limited(prompt, **how):
        tried.append(len(prompt))
        if len(prompt) > 3:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return real(prompt, **how)

    limited.unet, limited.device = real.unet, real.device
    backend.pipeline = limited
    assert len(backend.render(rows_of(["a", "b"], range(2)))) == 2 and tried == [6, 3]


def test_one_bad_row_is_flagged(tiny_sd2, monkeypatch, tmp_path, caplog):
    call = StableDiffusionBackend.call

    def failing(self, rows, steps):
        if any("poison" in row.prompt for row in rows):
            raise ValueError("no such token")
        return call(self, rows, steps)

    monkeypatch.setattr(StableDiffusionBackend, "call", failing)
    csv = tmp_path / "m.csv"
    metadata.write_table(csv, pd.DataFrame({"image_name": list("abcd"), "prompt": ["x", "poison", "y", "z"]}))
    values = {"backend": "sd2", "weights": tiny_sd2, "batch_size": 2, "steps": 2}
    for per_tar in (0, 3):
        manifest = render.run(render.Config(metadata=csv, out=tmp_path / str(per_tar), per_tar=per_tar, **values))
        assert manifest["flag"].eq("failed").tolist() == [False, True, False, False]
        assert manifest["file"].ne("").tolist() == [True, False, True, True]
        assert "b failed: no such token" in caplog.text
        again = render.run(render.Config(metadata=csv, out=tmp_path / str(per_tar), per_tar=per_tar, **values))
        assert again["flag"].tolist() == manifest["flag"].tolist()


@pytest.mark.parametrize("per_tar", [0, 5])
@pytest.mark.parametrize("said", ["CUDA error: unspecified launch failure", "could not create a primitive"])
def test_a_machine_that_fails_leaves_no_row_failed(said, per_tar, tiny_sd2, monkeypatch, tmp_path):
    """A GPU that is lost fails every row from then on; memory that is short is told at once."""
    call, calls = StableDiffusionBackend.call, []

    def failing(self, rows, steps):
        calls.append(rows)
        if len(calls) > 3:
            raise RuntimeError(said)
        return call(self, rows, steps)

    csv = tmp_path / "m.csv"
    prompts = [f"a picture of {number} foxes" for number in range(12)]
    metadata.write_table(csv, metadata.with_keys(pd.DataFrame({"prompt": prompts}), tmp_path))
    values = {"metadata": csv, "backend": "sd2", "weights": tiny_sd2, "batch_size": 1, "steps": 1, "per_tar": per_tar}
    render.run(render.Config(out=tmp_path / "whole", **values))
    with monkeypatch.context() as patch, pytest.raises((UserError, RuntimeError), match=said):
        patch.setattr(StableDiffusionBackend, "call", failing)
        render.run(render.Config(out=tmp_path / "torn", **values))
    assert len(calls) == (4 if "primitive" in said else 6)  # the batch, its row alone, an empty prompt
    render.run(render.Config(out=tmp_path / "torn", **values))
    assert (tmp_path / "torn" / "manifest.csv").read_bytes() == (tmp_path / "whole" / "manifest.csv").read_bytes()


def test_a_wrong_or_missing_model_is_refused(refused, tiny_sd2_base, small_run, tmp_path):
    words = ["render", "--run", tmp_path, "--backend", "sd2", "--metadata", small_run.metadata]
    refused([*words, "--weights", tiny_sd2_base], "found a 512-px epsilon model", "768-px v_prediction")
    refused([*words, "--weights", tmp_path], "not the weights of stable-diffusion-2: model_index.json is not in it")
    refused(words, "stable-diffusion-2 (5.2 GB: model_index.json", weights.home(), "weights get stable-diffusion-2")
    refused([*words, "--batch-size", "-1"], "--batch-size -1")


@pytest.mark.parametrize("part", ["unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"])
def test_one_torn_file_is_named(refused, tiny_sd2, small_run, tmp_path, part):
    folder = tmp_path / "sd2"
    shutil.copytree(tiny_sd2, folder)
    file = folder / f"{part}.safetensors"
    words = ["render", "--run", tmp_path / "run", "--backend", "sd2", "--metadata", small_run.metadata]
    file.write_bytes(file.read_bytes()[:-50])
    refused([*words, "--weights", folder], file, "damaged", "download it again")
    file.unlink()
    refused([*words, "--weights", folder], folder, f"{part.partition('/')[0]}/*.safetensors or *.bin is not in it")


def test_half_precision_files_alone_suffice(tiny_sd2, tmp_path):
    import torch

    pipeline = stable_diffusion.load(tiny_sd2)
    pipeline.to(torch.float16).save_pretrained(tmp_path / "sd2", variant="fp16")
    assert list((tmp_path / "sd2" / "unet").glob("*.fp16.safetensors"))
    image, flag = started(tmp_path / "sd2").render(rows_of(["a cat"], [1]))[0]
    assert image.size == (768, 768) and flag == ""


@pytest.mark.parametrize("layout", ["models/owner/stable-diffusion-v2/pytorch/1/1", "datasets/me/stable-diffusion-2"])
def test_attached_kaggle_weights_are_found(tiny_sd2, tmp_path, monkeypatch, layout):
    monkeypatch.setattr(folders, "KAGGLE_INPUT", tmp_path)
    shutil.copytree(tiny_sd2, tmp_path / layout)
    assert weights.locate("stable-diffusion-2") == tmp_path / layout


@pytest.fixture
def narrow(tmp_path_factory, monkeypatch):
    """Our settings with the widths of the tests' files, and nothing else changed."""
    folder = shutil.copytree(single_file.SETTINGS, tmp_path_factory.mktemp("narrow") / "settings")
    for part, widths in NARROW.items():
        config = folder / part / "config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), **widths}))
    monkeypatch.setattr(single_file, "SETTINGS", folder)


@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
def test_every_tensor_of_an_original_file_finds_its_place(tmp_path, narrow, suffix):
    import torch

    file = tmp_path / f"768-v-ema.{suffix}"
    original = save(file)
    pipeline = stable_diffusion.load(file)
    found = {f"model.diffusion_model.{unet_name(n)}": tensor for n, tensor in pipeline.unet.state_dict().items()}
    found |= {f"first_stage_model.{vae_name(n)}": tensor for n, tensor in pipeline.vae.state_dict().items()}
    expected = {n: t for n, t in original.items() if n.startswith(("model.", "first_stage_model."))}
    assert found.keys() == expected.keys() and len(found) == 686 + 248
    for name, tensor in found.items():
        assert torch.equal(tensor.reshape(expected[name].shape), expected[name]), name
    text = pipeline.text_encoder.state_dict()
    layers = {int(name.split("layers.")[1].split(".")[0]) for name in text if "layers." in name}
    assert layers == set(range(23))
    words = original["cond_stage_model.model.token_embedding.weight"]
    assert any(torch.equal(tensor, words) for name, tensor in text.items() if "token_embedding" in name)
    last = original["cond_stage_model.model.transformer.resblocks.22.mlp.c_fc.weight"]
    assert any(torch.equal(tensor, last) for name, tensor in text.items() if "layers.22.mlp.fc1" in name)
    if suffix == "ckpt":
        image, flag = started(file, steps=1, batch_size=1).render(rows_of(["a cat, oil painting"], [1]))[0]
        assert image.size == (768, 768) and flag == ""


def test_single_files_that_cannot_be_used_are_refused(tmp_path, refused, small_run, narrow):
    file = tmp_path / "768-v-ema.safetensors"
    save(file)
    words = ["render", "--run", tmp_path / "run", "--backend", "sd2", "--metadata", small_run.metadata, "--weights"]
    shutil.copy(file, tmp_path / "512-base-ema.safetensors")
    for more in ([], ["--any-model"]):
        refused([*words, tmp_path / "512-base-ema.safetensors", *more], "768-v-ema", "folder of diffusers")
    shutil.copy(file, tmp_path / "v2-1_768-ema-pruned.safetensors")
    refused([*words, tmp_path / "v2-1_768-ema-pruned.safetensors"], "2.1", "--any-model")
    file.write_bytes(file.read_bytes()[:-50])
    refused([*words, file], file, "damaged", "download it again")


def test_another_version_is_refused_unless_asked_for(tmp_path, refused, small_run, command):
    """2.1 has the size, the scheduler and the tensors of 2.0; its U-Net's settings alone tell it."""
    folder = save_diffusion(tmp_path / "sd21", "v_prediction", 96, upcast_attention=True)
    words = ["render", "--run", tmp_path / "run", "--backend", "sd2", "--metadata", small_run.metadata, "--steps", 1]
    refused([*words, "--weights", folder], "Stable Diffusion 2.1", "--any-model")
    metadata.write_table(tmp_path / "m.csv", metadata.read(small_run.metadata).head(1))
    words[words.index(small_run.metadata)] = tmp_path / "m.csv"
    code, _, err = command(*words, "--weights", folder, "--any-model", "--out", tmp_path / "out")
    assert code == 0, err
    assert metadata.read_table(tmp_path / "out" / "manifest.csv", ("file",))["file"].ne("").all()


def test_what_no_picture_needs_may_be_missing(tmp_path, tiny_sd2):
    """The hub's model_index.json names a feature extractor; copies without its folder are common."""
    folder = tmp_path / "sd2"
    shutil.copytree(tiny_sd2, folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    (folder / "model_index.json").write_text(json.dumps(index))
    image, flag = started(folder, steps=1, batch_size=1).render(rows_of(["a cat"], [1]))[0]
    assert image.size == (768, 768) and flag == ""


def test_each_row_draws_its_noise_from_its_own_seed(tiny_sd2, monkeypatch):
    """One noise for all pictures looks right on each of them, and costs the model that learns from them a lot."""
    backend, noises = started(tiny_sd2, steps=1), []
    plain = backend.pipeline.prepare_latents
    monkeypatch.setattr(
        backend.pipeline, "prepare_latents", lambda *a, **k: noises.append(plain(*a, **k)) or noises[-1]
    )
    backend.render(rows_of(["a cat", "a cat"], [5, 6]))
    backend.render(rows_of(["a dog", "a cat"], [6, 5]))
    (five, six), (six_again, five_again) = noises
    assert not (five == six).all()
    assert (five == five_again).all() and (six == six_again).all()


def test_the_pipeline_is_asked_as_the_reference_asks_it(tiny_sd2, monkeypatch):
    backend, asked, pictures, flags = started(tiny_sd2, steps=7), [], [], []

    def pipeline(**values):
        asked.append(values)
        pictures[:] = [Image.effect_noise((768, 768), 50 + number).convert("RGB") for number in range(2)]
        images = np.stack([np.asarray(picture, np.float32) for picture in pictures]) / 255
        images = torch.from_numpy(images).permute(0, 3, 1, 2)
        return SimpleNamespace(images=images, nsfw_content_detected=flags[0])

    pipeline.unet, pipeline.vae_scale_factor = SimpleNamespace(config=SimpleNamespace(sample_size=64)), 8
    monkeypatch.setattr(backend, "pipeline", pipeline)
    for black, expected in ((None, ["", ""]), ([True, False], [NSFW, ""])):
        flags[:] = [black]
        found = backend.render(rows_of(["a cat", "a dog"], [5, 6]))
        assert [flag for _, flag in found] == expected
        assert all(image == picture for (image, _), picture in zip(found, pictures, strict=True))
    generators = asked[0].pop("generator")
    assert [one.initial_seed() for one in generators] == [5, 6] and {str(one.device) for one in generators} == {"cpu"}
    expected = {
        "prompt": ["a cat", "a dog"],
        "num_inference_steps": 7,
        "guidance_scale": 9,
        "height": 768,
        "width": 768,
        "output_type": "pt",
    }
    assert asked[0] == expected
    backend.any_model = True
    backend.render(rows_of(["a cat", "a dog"], [5, 6]))
    assert asked[-1]["height"] == asked[-1]["width"] == 512


def test_pictures_are_those_that_diffusers_makes(tiny_sd2):
    backend = started(tiny_sd2, steps=2)
    found = [image for image, _ in backend.render(rows_of(["a cat", "a dog"], [5, 6]))]
    plain = backend.pipeline(
        ["a cat", "a dog"],
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in (5, 6)],
        num_inference_steps=2,
        guidance_scale=9.0,
        height=found[0].height,
        width=found[0].width,
    ).images
    assert all(np.array_equal(one, other) for one, other in zip(found, plain, strict=True))
    assert np.asarray(plain[0]).std() > 1, "a flat picture would say nothing"


def test_an_attached_single_file_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "KAGGLE_INPUT", tmp_path)
    file = tmp_path / "stable-diffusion-2-768" / "768-v-ema.ckpt"
    file.parent.mkdir()
    file.write_bytes(b"x")
    assert weights.locate("stable-diffusion-2") == file
