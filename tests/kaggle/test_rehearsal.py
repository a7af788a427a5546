"""Kaggle's runtime rehearsed: its image's packages, our wheels, read-only mounts, no network, the built kernels.

A fresh virtual environment holds what Kaggle's image holds of what we need (August 2026) and gets the rest from the
folder that `image-to-prompts kaggle wheels` makes, as the kernels' set-up cell does it.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata as installed
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from image_to_prompts import embed
from image_to_prompts.data import metadata
from image_to_prompts.infer import submission
from image_to_prompts.kaggle import folders
from image_to_prompts.pipeline import STAGES

pytestmark = pytest.mark.rehearsal
ROOT = Path(__file__).resolve().parents[2]
IMAGE = (
    *(
        "torch",
        "torchvision",
        "timm==1.0.26",
        "transformers>=5,<6",
        "diffusers==0.37.*",
        "sentence-transformers==5.4.*",
    ),
    *("accelerate==1.13.*", "numpy==2.0.*", "pandas==2.2.*", "polars>=1.30,<2", "pyarrow>=18"),
)
JUPYTER = ("papermill", "ipykernel")
OFFLINE = """
import fcntl, os, socket, struct, sys
lo = struct.pack("16sh", b"lo", 0x41)  # up and running
fcntl.ioctl(socket.socket(), 0x8914, lo)
os.execv(sys.argv[1], sys.argv[1:])
"""


def share_torch(packages):
    """Links torch, and what it alone needs, from this environment: five gigabytes that need not be copied."""
    for one in installed.distributions():
        if re.match(r"(torch|torchvision|triton|nvidia|cuda)\b", one.name.replace("_", "-")):
            for top in {file.parts[0] for file in one.files or () if file.parts[0] not in ("..", "__pycache__")}:
                if not (packages / top).exists():
                    (packages / top).symlink_to(one.locate_file(top))


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    """The virtual environment's Python, and the folder of wheels.

    REHEARSAL_PYTHON is the Python to build it with (Kaggle's is 3.12; or this one), REHEARSAL_TORCH the versions
    of torch and torchvision (those installed here), REHEARSAL_FOLDER a folder that keeps it for the next run.
    """
    kept = os.environ.get("REHEARSAL_FOLDER")
    folder = Path(kept) if kept else tmp_path_factory.mktemp("image")
    base, python = os.environ.get("REHEARSAL_PYTHON", sys.executable), folder / "venv" / "bin" / "python"
    pip, own = [python, "-m", "pip"], folder / "image.txt"

    def installed_there():
        return subprocess.run([*pip, "freeze"], capture_output=True, text=True, check=True).stdout

    if own.exists():  # what the kernels have installed goes
        image = own.read_text().splitlines()
        names = [
            line.partition("=")[0].partition(" ")[0] for line in installed_there().splitlines() if line not in image
        ]
        subprocess.run([*pip, "uninstall", "--quiet", "--yes", *names], check=True) if names else None
    else:
        subprocess.run([base, "-m", "venv", folder / "venv"], check=True)
        same = os.environ.get("REHEARSAL_TORCH", "").split()
        if not same:
            share_torch(next((folder / "venv" / "lib").glob("python*")) / "site-packages")
            same = [f"{name}=={installed.version(name)}" for name in ("torch", "torchvision")]
        subprocess.run([*pip, "install", "--quiet", "--no-compile", *same, *IMAGE, *JUPYTER], check=True)
        own.write_text(installed_there())
    names = installed_there()
    assert "faiss" not in names and "open_clip" not in names
    version = subprocess.run([python, "-V"], capture_output=True, text=True, check=True).stdout.split()[1]
    owner = {"owner": "ada", "wheels": "image-to-prompts-wheels"}
    yield python, folders.wheels(folder / "wheels", ROOT, owner, (version.rpartition(".")[0],))
    if not kept:
        subprocess.Popen(["rm", "-rf", folder])  # gigabytes, which take minutes on some disks


@pytest.fixture(scope="module")
def competition(tmp_path_factory):
    """The competition's files, with seven small images."""
    folder = tmp_path_factory.mktemp("competition")
    rng = np.random.default_rng(0)
    (folder / "images").mkdir()
    names = [f"{i:08x}" for i in range(7)]
    for name in names:
        pixels = rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((512, 512)).save(folder / "images" / f"{name}.png")
    prompts = [
        "a fox",
        "an owl on a roof",
        "two boats",
        "neon city at night",
        "a robot",
        "oil painting of bread",
        "sea",
    ]
    metadata.write_table(folder / "prompts.csv", pd.DataFrame({"imgId": names, "prompt": prompts}))
    (folder / "sample_submission.csv").write_text("imgId_eId,val\n")
    return folder


class Machine:
    """A rehearsed Kaggle machine.

    Attributes:
        inputs: What is mounted at /kaggle/input.
        working: /kaggle/working.
    """

    def __init__(self, python, folder):
        self.python, self.inputs, self.working = python, folder / "input", folder / "working"
        self.inputs.mkdir(parents=True)
        self.working.mkdir()

    def run(self, kernel, **parameters):
        """Executes a built kernel without network and with the inputs read-only; returns what it printed."""
        (notebook,) = (ROOT / "kernels" / kernel).glob("*.ipynb")
        out = self.working / "__notebook__.ipynb"
        words = [word for name, value in parameters.items() for word in ("-p", name, str(value))]
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "PYTHON", "KAGGLE", "VIRTUAL"))}
        env = {
            **kept,
            "PIP_CONFIG_FILE": os.devnull,
            "HF_HUB_OFFLINE": "1",
            "PATH": f"{self.python.parent}:{os.environ['PATH']}",
            "JUPYTER_PATH": str(self.python.parent.parent / "share" / "jupyter"),
            "IMAGE_TO_PROMPTS_KAGGLE_INPUT": str(self.inputs),
            "IMAGE_TO_PROMPTS_KAGGLE_WORKING": str(self.working),
        }
        argv = [self.python, "-m", "papermill", notebook, out, *words, "--cwd", self.working, "--no-progress-bar"]
        script = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && exec "$@"'
        argv = ["unshare", "-mn", "sh", "-c", script, self.inputs, sys.executable, "-c", OFFLINE, *argv]
        result = subprocess.run([str(word) for word in argv], env=env, capture_output=True, text=True, timeout=1200)
        assert result.returncode == 0, result.stderr[-6000:]
        cells = json.loads(out.read_text())["cells"]
        streams = [o for cell in cells for o in cell.get("outputs", []) if o["output_type"] == "stream"]
        return "".join("".join(stream["text"]) for stream in streams)


@pytest.fixture
def machine(image, tmp_path):
    """A machine with only the wheels attached."""
    probe = subprocess.run(["unshare", "-mn", "true"], capture_output=True)
    if probe.returncode:
        pytest.skip("this machine forbids network namespaces")
    python, wheels = image
    made = Machine(python, tmp_path)
    shutil.copytree(wheels, made.inputs / "datasets" / "ada" / "image-to-prompts-wheels")
    return made


def test_the_submission_kernel_scores_before_and_after_anybody_trained(
    machine, competition, small_run, small_checkpoint, tiny_encoders, tmp_path
):
    """Today's layout of mounts; test_mounts.py has the others."""
    shutil.copytree(competition, machine.inputs / "competitions" / "c")
    said = machine.run("07-infer-submission")
    assert "7 images" in said and "predicted by the mean embedding" in said and ": competition" in said
    assert submission.check(machine.working / "submission.csv", competition / "images") == 7

    clip = shutil.copytree(
        tiny_encoders["clip"], machine.inputs / "datasets" / "ada" / "image-to-prompts-weights" / "clip"
    )
    shutil.copy(small_run.metadata, machine.inputs / "datasets" / "ada" / "prompts.csv")
    said = machine.run("bank", tower=f"open_clip:{clip}")
    bank, left = machine.working / "banks" / "prompts", machine.inputs / "notebooks" / "ada" / "image-to-prompts-bank"
    rows = len(metadata.read(small_run.metadata))
    assert f"{rows} prompts, 24 numbers each, in 1 shards" in said
    shutil.move(bank, left / "banks" / "prompts")
    said = machine.run("07-infer-submission")
    assert "predicted by bank of prompts" in said and "no text head" in said
    assert submission.check(machine.working / "submission.csv", competition / "images") == 7
    shutil.rmtree(left)

    embeddings = machine.inputs / "datasets" / "ada" / "image-to-prompts-embeddings" / "embeddings"
    embed.run(embed.Config(images=(small_run.images,), out=embeddings, image_size=64, encoders=("classes",)))
    said = machine.run("07-infer-submission")
    assert "predicted by kNN over" in said

    trained = machine.inputs / "notebooks" / "ada" / "04-finetune-convnext" / "checkpoints" / "convnext"
    shutil.copytree(small_checkpoint, trained)
    said = machine.run("07-infer-submission")
    assert "predicted by checkpoint" in said and "checkpoint" in said
    assert submission.check(machine.working / "submission.csv", competition / "images") == 7


def test_the_chain_runs_kernel_by_kernel(machine, tiny_gpt2, tiny_sd2, tiny_open_clip, competition, image, tmp_path):
    """Each kernel starts on a fresh machine that has only its sources attached."""
    attached = {
        "datasets/ada/magicprompt/MagicPrompt-Stable-Diffusion": tiny_gpt2,
        "models/stabilityai/stable-diffusion-v2/pytorch/1/1": tiny_sd2,
        "datasets/ada/tiny/tiny-convnext": tiny_open_clip,
        "competitions/stable-diffusion-image-to-prompts": competition,
    }
    steps = {
        "01-generate-prompts": {"count": 24},
        "02-dedupe-prompts": {"threshold": 0.999},
        "03-render-images": {"fast": True, "steps": 2},
        "04-finetune-convnext": {"epochs": 1, "image_size": 64},
        "05-embed-images": {"image_size": 64},
        "06-train-ensemble": {"epochs": 1},
        "07-infer-submission": {},
        "08-edit-prompts": {"scored": 4},
    }
    done: dict[str, Machine] = {}
    for stage, (name, parameters) in zip(STAGES, steps.items(), strict=True):
        here = Machine(image[0], tmp_path / name)
        shutil.copytree(image[1], here.inputs / "datasets" / "ada" / "image-to-prompts-wheels")
        for place, source in attached.items():
            shutil.copytree(source, here.inputs / place)
        for earlier in (*stage.kernel.after, *stage.kernel.also):
            attached_output = here.inputs / "notebooks" / "ada" / done[earlier].inputs.parent.name
            shutil.copytree(done[earlier].working, attached_output)
        tiny = f"open_clip:{here.inputs}/datasets/ada/tiny/tiny-convnext"
        if stage.name == "finetune":
            parameters["backbone"] = tiny
        if stage.name == "embed":
            parameters["encoders"] = tiny
        said = here.run(name, **parameters)
        done[stage.name] = here
        if stage.name == "infer":
            assert "predicted by checkpoint" in said and "06-train-ensemble" in said
            assert submission.check(here.working / "submission.csv", competition / "images") == 7
    described = pd.read_csv(here.working / "prompts.csv")  # trained on a few images, it may find all others strange
    assert described[["prompt", "source", "familiar"]].notna().all(axis=None)
    assert (described["source"].eq("checkpoint") == described["familiar"]).all()
