"""Which files of a folder are loaded: one format, complete, of the right library."""

import os

import pytest

from image_to_prompts.models import layouts
from image_to_prompts.models.layouts import LAYOUTS
from image_to_prompts.run.errors import UserError

SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
BIN_SHARDS = [name.replace("model", "pytorch_model").replace("safetensors", "bin") for name in SHARDS]


@pytest.mark.parametrize(
    ("names", "layout", "half", "chosen"),
    [
        (["model.safetensors", "pytorch_model.bin"], "transformers", False, ["model.safetensors"]),
        (["pytorch_model.bin", "training_args.bin", "tf_model.h5"], "transformers", False, ["pytorch_model.bin"]),
        ([*SHARDS, *BIN_SHARDS], "transformers", False, SHARDS),
        ([*SHARDS[1:], *BIN_SHARDS], "transformers", False, BIN_SHARDS),
        (["model.safetensors", *SHARDS], "transformers", False, ["model.safetensors"]),
        (["model.safetensors", "model.fp16.safetensors"], "transformers", False, ["model.safetensors"]),
        (["model.safetensors", "model.fp16.safetensors"], "transformers", True, ["model.fp16.safetensors"]),
        (["model.fp16.safetensors"], "transformers", False, ["model.fp16.safetensors"]),
        (["model.safetensors", "pytorch_model.fp16.bin"], "transformers", True, ["pytorch_model.fp16.bin"]),
        (["model.non_ema.safetensors", "pytorch_model.bin"], "transformers", False, ["pytorch_model.bin"]),
        (["open_clip_pytorch_model.bin", "model.safetensors"], "open_clip", False, ["open_clip_pytorch_model.bin"]),
        (
            ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"],
            "open_clip",
            False,
            ["open_clip_model.safetensors"],
        ),
        (
            ["unet/diffusion_pytorch_model.bin", "model.safetensors"],
            "diffusers",
            False,
            ["unet/diffusion_pytorch_model.bin"],
        ),
        (["onnx/model.safetensors", "model.onnx", "openvino/openvino_model.bin"], "transformers", False, []),
    ],
)
def test_one_complete_format_is_loaded(names, layout, half, chosen):
    assert layouts.needed(names, LAYOUTS[layout], half) == sorted(chosen)


def test_settings_are_loaded_but_not_those_of_other_shards():
    names = ["config.json", "vocab.txt", "README.md", "1_Pooling/config.json", "a/b/c.json", *SHARDS, *BIN_SHARDS]
    assert layouts.needed(names, LAYOUTS["transformers"]) == sorted([*names[:2], names[3], *SHARDS])


def test_what_lies_beside_does_not_change_a_models_digest(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    before = layouts.digest(tmp_path)
    for name in ("pytorch_model.bin", "model.fp16.safetensors", "tf_model.h5", "README.md"):
        (tmp_path / name).write_bytes(b"another format")
    assert layouts.digest(tmp_path) == before
    assert layouts.digest(tmp_path, half=True) != before
    (tmp_path / "config.json").write_text("{1}")
    assert layouts.digest(tmp_path) != before


def test_a_digest_covers_every_shard(tmp_path):
    for name in SHARDS:
        (tmp_path / name).write_bytes(name.encode())
    first = tmp_path / SHARDS[0]
    before = layouts.digest(first)
    (tmp_path / SHARDS[1]).write_bytes(b"another")
    assert layouts.digest(first) != before
    (tmp_path / SHARDS[1]).unlink()
    with pytest.raises(UserError, match="1 of 2 shards"):
        layouts.check_shards(first)


def test_a_digest_is_remembered_until_the_file_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(layouts, "REMEMBERED", 3)
    read = []
    plain = layouts.sha256
    monkeypatch.setattr(layouts, "sha256", lambda file: read.append(file) or plain(file))
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"weights")
    before = layouts.file_digest(file)
    layouts._remembered.cache_clear()  # as in another process
    assert layouts.file_digest(file) == before and read == [file]
    file.write_bytes(b"WEIGHTS")
    os.utime(file, ns=(1, 1))  # times of files may have steps of 4 ms
    assert layouts.file_digest(file) != before and len(read) == 2
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(b"weights")
    assert layouts.file_digest(copy) == before
