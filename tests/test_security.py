"""Files from strangers: nothing in them is run, leaves its folder, or takes all memory; secrets stay where they are."""

import hashlib
import io
import json
import pickle
import shutil
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path

import earlier_ensemble
import numpy as np
import pytest
from PIL import Image

from image_to_prompts.data import images
from image_to_prompts.data.metadata import read_prompts
from image_to_prompts.encode import embeddings, interrogator
from image_to_prompts.generate import magicprompt
from image_to_prompts.models import backbones, checkpoints, hub, weights
from image_to_prompts.run import archives
from image_to_prompts.run.errors import UserError
from image_to_prompts.training import state


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.write_text, (self.marker, "run")


@pytest.fixture
def marker(tmp_path):
    """A file that evil code would write; the test fails if it did."""
    path = tmp_path / "marker"
    pickle.loads(pickle.dumps(Evil(path)))  # the trap works
    path.unlink()
    yield path
    assert not path.exists(), "strange code was run"


def evil_weights(path: Path, marker: Path) -> Path:
    """A PyTorch file with what real ones hold, and a trap."""
    import torch

    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": {"weight": torch.zeros(3)}, "trap": Evil(marker)}, path)
    return path


EVIL_CODE = "import pathlib\npathlib.Path({!r}).write_text('run')\n"


@pytest.mark.parametrize("suffix", [".pth", ".ckpt", ".bin", ".pt"])
def test_weights_are_not_unpickled(suffix, tmp_path, marker):
    file = evil_weights(tmp_path / f"weights{suffix}", marker)
    with pytest.raises(UserError, match="not a file of weights"):
        backbones.read_state(file)
    file.write_bytes(pickle.dumps(Evil(marker)))  # a bare pickle, as PyTorch wrote them long ago
    with pytest.raises(UserError, match="not a file of weights"):
        backbones.read_state(file)


def test_checkpoints_states_and_arrays_are_not_unpickled(tmp_path, marker, small_embeddings, refused):
    file = evil_weights(tmp_path / "published.ckpt", marker)
    refused(["import-checkpoint", file, "--out", tmp_path / "out"], "published.ckpt")
    with pytest.raises(UserError, match=r"published\.ckpt"):
        earlier_ensemble.import_checkpoint(file, tmp_path / "out")
    assert state.read(evil_weights(tmp_path / "state.pt", marker), "cpu") is None
    folder = tmp_path / "e"
    shutil.copytree(small_embeddings, folder)
    (folder / ".embed.done").unlink()
    np.save(folder / "prompt.npy", np.array([Evil(marker)], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match=r"prompt\.npy"):
        embeddings.load(folder)
    (tmp_path / "names.txt").write_text("a.png\n")
    with pytest.raises(UserError, match=r"prompt\.npy"):
        earlier_ensemble.import_embeddings((folder / "prompt.npy",), tmp_path / "names.txt", tmp_path / "out")
    spec = backbones.describe("timm:tf_efficientnet_lite2", 64)
    with pytest.raises(UserError):
        checkpoints.import_reference(file, spec, tmp_path / "out")


def test_models_of_libraries_are_not_unpickled(tmp_path, marker, tiny_gpt2, tiny_sd2, tiny_encoders):
    def with_pickle(source: Path, safe: str, pickled: str) -> Path:
        folder = tmp_path / source.name / pickled.replace("/", "-")
        shutil.copytree(source, folder)
        (folder / safe).unlink()
        evil_weights(folder / pickled, marker)
        return folder

    with pytest.raises(UserError):
        magicprompt.load(with_pickle(tiny_gpt2, "model.safetensors", "pytorch_model.bin"))
    for source, load in (
        (tiny_encoders["blip"], lambda f: interrogator.load(str(f), terms=str(tiny_encoders["terms"]))),
        (
            tiny_encoders["convnext"],
            lambda f: backbones.load_pretrained(_backbone(f), backbones.describe(f"transformers:{f}", 32)),
        ),
    ):
        folder = with_pickle(source, "model.safetensors", "pytorch_model.bin")
        with pytest.raises(UserError):
            load(folder)
    from image_to_prompts.render import stable_diffusion

    weights_name = "diffusion_pytorch_model"
    folder = with_pickle(tiny_sd2, f"unet/{weights_name}.safetensors", f"unet/{weights_name}.bin")
    with pytest.raises(UserError):
        stable_diffusion.load(folder)
    with pytest.raises(UserError):
        stable_diffusion.load(evil_weights(tmp_path / "768-v-ema.ckpt", marker))


def _backbone(folder: Path):
    return backbones.build(backbones.describe(f"transformers:{folder}", 32))


def test_python_files_beside_weights_are_not_run(tmp_path, marker, tiny_gpt2, tiny_sd2, tiny_encoders, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # transformers would ask
    folder = tmp_path / "gpt2"
    shutil.copytree(tiny_gpt2, folder)
    (folder / "evil.py").write_text(EVIL_CODE.format(str(marker)))
    config = json.loads((folder / "config.json").read_text())
    remote = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model", "AutoTokenizer": ["evil.T", None]}
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": remote}))
    magicprompt.load(folder)  # by the library's own code
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "evil", "auto_map": remote}))
    with pytest.raises(UserError):
        magicprompt.load(folder)

    folder = tmp_path / "convnext"
    shutil.copytree(tiny_encoders["convnext"], folder)
    (folder / "evil.py").write_text(EVIL_CODE.format(str(marker)))
    for name, value in (("config.json", "evil.Config"), ("preprocessor_config.json", "evil.Processor")):
        content = json.loads((folder / name).read_text())
        content["auto_map"] = {"AutoConfig": value, "AutoModel": value, "AutoImageProcessor": value}
        (folder / name).write_text(json.dumps(content))
    _backbone(folder)

    from image_to_prompts.render import stable_diffusion

    folder = tmp_path / "sd2"
    shutil.copytree(tiny_sd2, folder)
    for place in (folder / "evil.py", folder / "unet" / "evil.py", folder / "pipeline.py"):
        place.write_text(EVIL_CODE.format(str(marker)))
    index = json.loads((folder / "model_index.json").read_text())
    for evil in ({"unet": ["evil", "Evil"]}, {"_class_name": ["pipeline", "Evil"]}):
        (folder / "model_index.json").write_text(json.dumps(index | evil))
        with pytest.raises(UserError):
            stable_diffusion.load(folder)


def test_members_of_archives_stay_inside(tmp_path):
    outside = tmp_path / "outside.png"
    Image.new("RGB", (8, 8), "red").save(outside)
    folder = tmp_path / "images"
    folder.mkdir()
    picture = io.BytesIO()
    Image.new("RGB", (8, 8), "blue").save(picture, "PNG")
    names = ["../outside.png", str(outside), "a/../../outside2.png", "..\\outside3.png"]
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = len(picture.getvalue())
            tar.addfile(member, io.BytesIO(picture.getvalue()))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            member = tarfile.TarInfo(f"link{kind.decode()}.png")
            member.type, member.linkname = kind, str(outside)
            tar.addfile(member)
    with zipfile.ZipFile(folder / "part-000001.zip", "w") as archive:
        for name in names:
            archive.writestr(name, picture.getvalue())
    before = sorted(tmp_path.rglob("*"))
    found = images.find(folder)
    assert found and not any("link" in path.name for path in found)
    assert all(path.parent.parent == folder and ".." not in path.parts for path in found)
    assert all(images.read(path).getpixel((0, 0)) == (0, 0, 255) for path in found)  # what is inside, never outside
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "name",
    ["../x.png", "/etc/x.png", "a\\b.png", "..", ".", " ", "a/../../b.png", "x\x01.png", "x\x7f.png", "y" * 300],
)
def test_image_names_stay_in_the_folder(name, tmp_path, refused):
    csv = tmp_path / "m.csv"
    csv.write_text(f'image_name,prompt\ngood.png,a fox\n"{name}",a cat\n')
    with pytest.raises(UserError, match="row 2"):
        read_prompts(csv)
    refused(["render", "--run", tmp_path / "r", "--metadata", csv], "row 2", "a file name, or a path below")
    (tmp_path / "i").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "i" / "good.png")
    refused(["finetune", "--run", tmp_path / "r", "--metadata", csv, "--images", tmp_path / "i"], "row 2")
    assert not list((tmp_path / "r").rglob("*.png"))


def test_huge_pictures_are_refused_before_they_are_decoded(tmp_path):
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 14_000, 14_000, 8, 2, 0, 0, 0)
    bomb = tmp_path / "bomb.png"
    bomb.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    )
    with pytest.raises(images.BrokenImageError, match=r"14000 x 14000 px|decompression bomb"):
        images.read(bomb)
    large = tmp_path / "large.png"
    with large.open("wb") as file:
        file.truncate(images.MOST_BYTES + 1)
    with pytest.raises(images.BrokenImageError, match="bytes"):
        images.read(large)
    with zipfile.ZipFile(tmp_path / "part-000001.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zeros.png", bytes(images.MOST_BYTES + 1))
    with pytest.raises(images.BrokenImageError, match="bytes"):
        images.read(tmp_path / "part-000001.zip" / "zeros.png")


def test_a_zip_member_never_gives_more_than_it_says(tmp_path):
    file = tmp_path / "part-000002.zip"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zeros.png", bytes(50_000_000))
    data = file.read_bytes()  # both headers say 100 bytes
    file.write_bytes(data.replace(struct.pack("<I", 50_000_000), struct.pack("<I", 100)))
    with pytest.raises(OSError, match="CRC"):
        archives.read(file / "zeros.png")


def test_downloads_are_checked_against_the_hubs_hashes(tmp_path, monkeypatch):
    import huggingface_hub

    content = b"weights" * 1000
    repository = tmp_path / "models--laion--CLIP-ViT-H-14-laion2B-s32B-b79K"
    blob = repository / "blobs" / hashlib.sha256(content).hexdigest()
    snapshot = repository / "snapshots" / "abc"
    for folder in (blob.parent, snapshot):
        folder.mkdir(parents=True)
    blob.write_bytes(content)
    (snapshot / "open_clip_model.safetensors").symlink_to(blob)
    monkeypatch.setattr(hub, "cache", lambda: tmp_path)
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", lambda *_, **__: str(snapshot / "open_clip_model.safetensors")
    )
    assert weights.locate("open_clip:ViT-H-14") == snapshot / "open_clip_model.safetensors"
    assert hub.dataset_files("hf://datasets/a/b/c.parquet")
    blob.write_bytes(b"x" + content[1:])
    with pytest.raises(UserError, match="SHA-256"):
        weights.locate("open_clip:ViT-H-14")
    with pytest.raises(UserError, match="SHA-256"):
        hub.dataset_files("hf://datasets/a/b/c.parquet")


def test_secrets_are_in_no_file_and_no_log(tmp_path, monkeypatch, command):
    secrets = {name: f"secret-of-{name}" for name in ("KAGGLE_KEY", "KAGGLE_API_TOKEN", "HF_TOKEN", "KAGGLE_USERNAME")}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    said = ""
    for words in (["generate", "--count", 20], ["dedupe"], ["render", "--workers", 1], ["infer"], ["catalogue"]):
        _, out, err = command(*words, *(["--run", tmp_path] if words != ["catalogue"] else []))
        said += out + err
    written = b"".join(file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    for value in secrets.values():
        assert value not in said and value.encode() not in written
