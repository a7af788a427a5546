"""No command removes or overwrites what it reads, or what it did not write."""

import hashlib
import json
import shutil

import numpy as np
import pytest

from image_to_prompts import cli
from image_to_prompts.data import metadata
from image_to_prompts.kaggle.commands import ACTIONS
from image_to_prompts.pipeline import STAGES

MINE = b"written by hand, kept for years"
READ_ONLY = {
    *("explain", "catalogue", "check-submission", "demo"),
    *("kaggle push", "kaggle status", "kaggle submit"),  # of these, push writes its own journal alone
}


@pytest.fixture
def inputs(tmp_path, small_run, small_checkpoint, small_embeddings):
    """Copies of everything that a command may read, in one folder each."""
    folder = tmp_path / "inputs"
    folder.mkdir()
    shutil.copytree(small_run.images, folder / "images", ignore=shutil.ignore_patterns(".*"))
    shutil.copytree(small_checkpoint, folder / "checkpoint", ignore=shutil.ignore_patterns(".*"))
    shutil.copytree(small_embeddings, folder / "embeddings", ignore=shutil.ignore_patterns(".*"))
    (folder / "data").mkdir()
    shutil.copyfile(small_run.metadata, folder / "data" / "prompts.csv")
    columns = {"image_name": "string", "prompt": "string", "seed": "integer", "source": "string"}
    columns |= {"group": "string", "fold": "integer"}
    rows = "".join(f"{name},{kind},what it is\n" for name, kind in columns.items())
    (folder / "data" / "columns.csv").write_text(f"column,type,description\n{rows}")
    (folder / "kernels").mkdir()
    owner = {"owner": "ada", **{which: f"image-to-prompts-{which}" for which in ("weights", "metadata", "embeddings")}}
    (folder / "kernels" / "owner.json").write_text(json.dumps({**owner, "wheels": "image-to-prompts-wheels"}))
    import torch

    from image_to_prompts.models import checkpoints

    found = checkpoints.load(small_checkpoint).model
    state = {f"backbone.{name}": value for name, value in found.backbone.state_dict().items()}
    state |= {f"head.{name}": value for name, value in found.head.state_dict().items()}
    torch.save(state, folder / "reference.pt")
    (folder / "768-v-ema.ckpt").write_bytes(b"weights")
    return folder


def prompts(inputs):
    return inputs / "data" / "prompts.csv"


# By command: its words, given the inputs and a folder to write to; and the files that it would write there.
COMMANDS = {
    "generate": (lambda i, o: ["generate", "--count", 5, "--out", o / "x.csv"], ["x.csv"]),
    "generate --source": (
        lambda i, o: ["generate", "--source", "table", "--input", prompts(i), "--out", o / "x.csv"],
        ["x.csv", "x.rules.json"],
    ),
    "dedupe": (
        lambda i, o: ["dedupe", "--prompts", prompts(i), "--out", o / "x.csv"],
        ["x.csv", "x.removed.csv", "x.png"],
    ),
    "render": (
        lambda i, o: ["render", "--workers", 1, "--metadata", prompts(i), "--out", o],
        ["manifest.csv", "FIRST"],
    ),
    "render --per-tar": (
        lambda i, o: ["render", "--workers", 1, "--per-tar", 20, "--metadata", prompts(i), "--out", o],
        ["manifest.csv", "00001.tar"],
    ),
    "finetune": (
        lambda i, o: ["finetune", "--images", i / "images", "--epochs", 1, "--image-size", 64, "--out", o],
        ["model.safetensors", "config.json", "history.csv", "last/config.json"],
    ),
    "embed": (
        lambda i, o: ["embed", "--images", i / "images", "--image-size", 64, "--encoders", "classes", "--out", o],
        ["classes.npy", "prompt.names.csv"],
    ),
    "ensemble": (
        lambda i, o: ["ensemble", "--embeddings", i / "embeddings", "--epochs", 1, "--out", o],
        ["model.safetensors", "README.md"],
    ),
    "infer": (
        lambda i, o: [
            *("infer", "--images", i / "images", "--checkpoint", i / "checkpoint", "--bank", prompts(i)),
            *("--views", "whole", "--out", o / "s.csv"),
        ],
        ["s.csv", "s.json", "s.prompts.csv"],
    ),
    "describe": (
        lambda i, o: [
            *("describe", i / "images" / "FIRST", "--checkpoint", i / "checkpoint", "--prompts", prompts(i)),
            *("--views", "whole", "--vocabulary", o.parent / "words", "--out", o / "d.csv"),
        ],
        ["d.csv"],
    ),
    "run": (
        lambda i, o: ["run", "--quick", "--count", 60, "--run", o],
        ["run.json", "data_meta/train.csv", "timings.json"],
    ),
    "weights": (
        lambda i, o: ["weights", "get", i / "768-v-ema.ckpt", "--weights-dir", o],
        ["stable-diffusion-2/768-v-ema.ckpt", "stable-diffusion-2/SHA256SUMS"],
    ),
    "import-checkpoint": (
        lambda i, o: [
            *("import-checkpoint", i / "reference.pt", "--backbone", "timm:tf_efficientnet_lite2"),
            *("--image-size", 64, "--out", o),
        ],
        ["model.safetensors", "config.json", "README.md"],
    ),
    "kaggle weights": (
        lambda i, o: ["kaggle", "weights", i / "checkpoint", "--out", o, "--kernels", i / "kernels"],
        ["checkpoint/model.safetensors", "SHA256SUMS", "dataset-metadata.json"],
    ),
    "kaggle metadata": (
        lambda i, o: ["kaggle", "metadata", "--data", i / "data", "--out", o, "--kernels", i / "kernels"],
        ["prompts.csv", "dataset-metadata.json"],
    ),
    "kaggle embeddings": (
        lambda i, o: ["kaggle", "embeddings", "--data", i / "embeddings", "--out", o, "--kernels", i / "kernels"],
        ["classes.npy", "prompt.json", "dataset-metadata.json"],
    ),
    "kaggle wheels": (
        lambda i, o: ["kaggle", "wheels", "--out", o, "--kernels", i / "kernels"],
        ["dataset-metadata.json"],
    ),
}
CASES = [(name, file) for name, (_, files) in COMMANDS.items() for file in files]


def test_every_command_that_writes_is_here():
    every = set(cli.COMMANDS) - {"kaggle"} | {f"kaggle {name}" for name in ACTIONS}
    assert {name.partition(" --")[0] for name in COMMANDS} == every - READ_ONLY


def words_of(name, inputs, out):
    first = metadata.read(prompts(inputs))["image_name"][0]
    vocabulary = out.parent / "words"
    vocabulary.mkdir(exist_ok=True)
    for kind in ("subjects", "mediums", "movements", "flavors", "artists"):
        (vocabulary / f"{kind}.txt").write_text("a fox\n")
    words = [str(word).replace("FIRST", first) for word in COMMANDS[name][0](inputs, out)]
    return [*words, *(["--run", str(out.parent / "run")] if name.split()[0] in {s.name for s in STAGES} else [])], first


def digests(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".")
    }


@pytest.mark.parametrize(("name", "file"), CASES, ids=[f"{name}-{file}" for name, file in CASES])
def test_what_a_command_did_not_write_stays(name, file, inputs, tmp_path, refused):
    out = tmp_path / "out"
    words, first = words_of(name, inputs, out)
    mine = out / file.replace("FIRST", first)
    mine.parent.mkdir(parents=True)
    mine.write_bytes(MINE)
    refused(words, mine if name != "run" else out)
    assert mine.read_bytes() == MINE


# A command told to write where it reads: what it must leave as it is.
ONTO_INPUTS = {
    "generate --source": lambda i: ["generate", "--source", "table", "--input", prompts(i), "--out", prompts(i)],
    "generate --starts": lambda i: ["generate", "--source", "magicprompt", "--starts", prompts(i), "--out", prompts(i)],
    "dedupe": lambda i: ["dedupe", "--prompts", prompts(i), "--out", prompts(i)],
    "dedupe --against": lambda i: [
        *("dedupe", "--prompts", i / "data/other.csv", "--against", prompts(i), "--out", prompts(i))
    ],
    "render": lambda i: ["render", "--metadata", i / "images/manifest.csv", "--out", i / "images"],
    "finetune --init": lambda i: [
        *("finetune", "--images", i / "images", "--init", i / "checkpoint", "--out", i / "checkpoint"),
        *("--epochs", 1, "--image-size", 64),
    ],
    "infer --bank": lambda i: [
        *("infer", "--images", i / "images", "--checkpoint", i / "checkpoint", "--bank", prompts(i)),
        *("--out", prompts(i)),
    ],
    "describe": lambda i: [
        *("describe", i / "images", "--checkpoint", i / "checkpoint", "--prompts", prompts(i)),
        *("--out", prompts(i), "--overwrite"),
    ],
    "kaggle weights": lambda i: ["kaggle", "weights", i / "checkpoint", "--out", i, "--kernels", i / "kernels"],
    "kaggle metadata": lambda i: [
        *("kaggle", "metadata", "--data", i / "data", "--out", i / "data", "--kernels", i / "kernels")
    ],
    "kaggle embeddings": lambda i: [
        *("kaggle", "embeddings", "--data", i / "embeddings", "--out", i / "embeddings", "--kernels", i / "kernels")
    ],
}


@pytest.mark.parametrize("name", ONTO_INPUTS)
def test_what_a_command_reads_stays(name, inputs, tmp_path, command):
    shutil.copyfile(prompts(inputs), inputs / "data/other.csv")
    before = digests(inputs)
    words = ONTO_INPUTS[name](inputs)
    run = ["--run", tmp_path / "run"] if words[0] in {s.name for s in STAGES} else []
    for _ in range(2):  # the second time it may take what it found for its own
        code, _, err = command(*words, *run)
        assert code == 2 and err.splitlines()[-1].startswith("image-to-prompts:"), err
        assert before.items() <= digests(inputs).items()


@pytest.mark.parametrize("name", ["kaggle weights", "kaggle metadata", "kaggle embeddings", "embed", "dedupe"])
def test_a_command_replaces_what_it_wrote_itself(name, inputs, tmp_path, command):
    """With other inputs, and none of what is gone stays."""
    out = tmp_path / "out"
    words, _ = words_of(name, inputs, out)
    for _ in range(2):
        code, _, err = command(*words)
        assert code == 0, err
        (inputs / "checkpoint" / "history.png").unlink(missing_ok=True)
        (inputs / "data" / "prompts.csv").write_text("image_name,prompt\na.png,a fox\nb.png,a red house\n")
    assert not (out / "checkpoint" / "history.png").exists()
    if name == "kaggle metadata":
        assert (out / "prompts.csv").read_bytes() == prompts(inputs).read_bytes()


def test_an_array_of_somebody_else_stays_beside_those_of_embed(inputs, tmp_path, command):
    out = tmp_path / "out"
    out.mkdir()
    np.save(out / "clip.npy", np.ones((3, 5), np.float32))
    words, _ = words_of("embed", inputs, out)
    code, _, err = command(*words)
    assert code == 0, err
    assert sorted(path.name for path in out.glob("*.npy")) == ["classes.npy", "clip.npy", "prompt.npy"]
    words[words.index("classes")] = "timm:tf_efficientnet_lite0"  # its own array of before goes
    code, _, err = command(*words)
    assert code == 0, err
    assert sorted(path.name for path in out.glob("*.npy")) == [
        *("clip.npy", "prompt.npy", "timm-tf_efficientnet_lite0.npy")
    ]


def test_a_stage_does_not_take_another_stages_file_for_its_own(inputs, tmp_path, command, refused):
    code, _, err = command("generate", "--count", 5, "--out", tmp_path / "x.csv", "--run", tmp_path / "run")
    assert code == 0, err
    before = (tmp_path / "x.csv").read_bytes()
    refused(["dedupe", "--prompts", prompts(inputs), "--out", tmp_path / "x.csv"], tmp_path / "x.csv")
    assert (tmp_path / "x.csv").read_bytes() == before
