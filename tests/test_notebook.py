"""What notebooks call: a stage by several processes, its settings as words, and kernels from their own images."""

import json
import shutil
from pathlib import Path

import pair_sets
import pandas as pd
import pytest
import torch
from kernel_session import Session

from image_to_prompts import cli, embed, finetune, infer, notebook, profiles, render
from image_to_prompts.data import metadata
from image_to_prompts.run import folders

ROOT = Path(__file__).resolve().parents[1]


def kernel(name):
    (path,) = (ROOT / "kernels" / name).glob("*.ipynb")
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("stage", "changed"),
    [
        ("render", {"fast": True, "metadata": Path("a b.csv"), "max_gb": 0.5, "adopt": (Path("x"), Path("y"))}),
        ("finetune", {"images": (Path("x"), Path("y")), "cache_features": False, "epochs": 7, "max_hours": 1.5}),
        ("finetune", {"recipe": "convnext-xxl", "image_size": 512, "epochs": 25, "micro_batch": 2}),
        ("finetune", {"backbone": "timm:resnet50"}),
        ("finetune", {"recipe": "vit-h", "backbone": "open_clip:ViT-B-16", "train_from": 3}),
        ("embed", {"encoders": ("timm:a", "classes"), "artists": False, "mode": "best"}),
        ("infer", {"checkpoint": (Path("x"),), "fallback": False, "key": Path("k.csv"), "blend": (0.25, 0.75)}),
    ],
)
@pytest.mark.parametrize("profile", folders.PROFILES)
def test_the_words_of_settings_are_these_settings(stage, changed, profile, tmp_path):
    config = profiles.default_config(stage, folders.Run(tmp_path / "run"), profile, **changed)
    assert cli.parse([stage, *notebook.arguments(stage, config)]) == config


def test_a_dry_runs_memory_is_free_before_processes_start(monkeypatch, tmp_path):
    done = []

    class Started:
        stdout, returncode = (), 0

        def __init__(self, *_, **__):
            done.append("started")

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: done.append("freed"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("subprocess.Popen", Started)
    notebook.run(profiles.default_config("finetune", folders.Run(tmp_path), "embedded"), processes=2)
    assert done == ["freed", "started"]


@pytest.mark.slow
def test_two_processes_give_what_one_gives(small_run, small_checkpoint, tiny_open_clip, tmp_path):
    """The kernels 03, 04, 05 and 07 with two processes, each on what the one before has left, and the stages themselves
    in this process."""
    prompts = tmp_path / "deduplicated" / "data_meta" / "train.csv"
    metadata.write_table(prompts, metadata.read(small_run.metadata).head(48))
    once = folders.open_run(tmp_path / "once", "embedded")

    def two(name, attached, **parameters):
        session = Session(tmp_path / name, {f"notebooks/ada/{path.name}": path for path in attached})
        session.run(kernel(name), processes=2, **{"profile": "embedded", **parameters})
        assert set(session.who.read_text().split()) == {"0/2", "1/2"}
        return session.working

    def files(folder):
        return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}

    rendered = two("03-render-images", [prompts.parents[1]])
    render.run(profiles.default_config("render", once, "embedded", metadata=prompts, out=once.train_images))
    assert files(rendered / "images" / "train") == files(once.train_images)

    tower = f"open_clip:{tiny_open_clip}"  # without batch norms, whose statistics are those of a process's own share
    how = {"image_size": 64, "epochs": 2, "backbone": tower}
    trained = two("04-finetune-convnext", [rendered], profile="full", **how) / "checkpoints" / "convnext"
    options = {"images": (once.train_images,), **how}
    history = finetune.run(profiles.default_config("finetune", once, "full", **options))
    apart = (pd.read_csv(trained / "history.csv") - history).abs().max()
    assert apart["loss"] < 1e-5 and apart["cosine"] < 1e-4

    embedded = two("05-embed-images", [rendered], image_size=64) / "embeddings"
    options = {"images": (once.train_images,), "image_size": 64}
    embed.run(profiles.default_config("embed", once, "embedded", **options))
    assert files(embedded) == files(once.embeddings)

    competition = tmp_path / "competition"
    (competition / "images").mkdir(parents=True)
    (competition / "sample_submission.csv").write_text("imgId_eId,val\n")
    manifest = pd.read_csv(once.train_images / "manifest.csv").head(7)
    for name in manifest["file"]:
        (competition / "images" / name).write_bytes((once.train_images / name).read_bytes())
    stems = manifest["file"].map(metadata.stem)
    metadata.write_table(competition / "prompts.csv", pd.DataFrame({"imgId": stems, "prompt": manifest["prompt"]}))
    checkpoint = tmp_path / "checkpointed" / "checkpoints"
    checkpoint.mkdir(parents=True)
    (checkpoint / "convnext").symlink_to(small_checkpoint)
    session = Session(tmp_path / "07", {"competitions/c": competition, "notebooks/ada/04": checkpoint.parent})
    said = session.run(kernel("07-infer-submission"), profile="embedded", processes=2)
    assert set(session.who.read_text().split()) == {"0/2", "1/2"} and "score" in said
    options = {"images": competition / "images", "checkpoint": (small_checkpoint,), "key": competition / "prompts.csv"}
    result = infer.run(profiles.default_config("infer", once, "embedded", fallback=True, **options))
    assert (session.working / "submission.csv").read_bytes() == once.submission.read_bytes()
    assert f"{result.score:.4f}" in said, "the seven public images are the only canary"


@pytest.mark.slow
def test_a_training_that_ends_at_its_limit_shows_what_there_is(small_run, tmp_path):
    attached = {"notebooks/ada/03-render-images/images/train": small_run.images}
    session = Session(tmp_path / "session", attached)
    how = {"profile": "embedded", "image_size": 64, "epochs": 100_000}
    said = session.run(kernel("04-finetune-convnext"), max_hours=10 / 3600, **how)
    assert session.pictures == 2 and "kaggle push finetune --continue" in said
    out = session.working / "checkpoints" / "convnext"
    assert {"history.csv", "sources.csv", "model.safetensors"} <= {path.name for path in out.iterdir()}
    assert json.loads((out / "config.json").read_text())["metrics"]["epoch"] < 100_000


@pytest.mark.slow
def test_the_training_kernel_learns_from_pairs_that_exist_already(small_run, tiny_open_clip, tmp_path):
    """All public sets in one session, no render kernel in sight; one that cannot be read is left out with a line."""
    manifest = pd.read_csv(small_run.images / "manifest.csv")
    rows = [(small_run.images / file, prompt) for file, prompt in manifest[["file", "prompt"]].to_numpy()]
    attached, each = {}, len(rows) // len(pair_sets.SETS)
    for number, (name, write) in enumerate(pair_sets.SETS.items()):
        folder = tmp_path / "sets" / name
        mine = rows[number * each : (number + 1) * each] + ([rows[0]] if number else [])  # which is there already
        write(folder, mine)
        attached[f"datasets/{name}"] = folder
    broken = attached.popitem()[1]
    shutil.rmtree(broken / "pictures")
    attached |= {f"datasets/{'/'.join(broken.parts[-2:])}": broken, "datasets/ada/tiny/tiny-convnext": tiny_open_clip}
    (broken / "readme.csv").write_text("nothing\n1\n")
    session = Session(tmp_path / "session", attached)
    tower = f"open_clip:{session.inputs}/datasets/ada/tiny/tiny-convnext"
    said = session.run(kernel("04-finetune-convnext"), profile="full", backbone=tower, image_size=64, epochs=1)
    for name in list(pair_sets.SETS)[:-1]:
        assert f"{name.partition('/')[2]}: {each} pairs to train on" in said
    assert f"{broken.name}: left out: " in said
    config = json.loads((session.working / "checkpoints" / "convnext" / "config.json").read_text())
    assert sum(config["rows"].values()) == each * (len(pair_sets.SETS) - 1)
    sources = pd.read_csv(session.working / "checkpoints" / "convnext" / "sources.csv")
    assert set(sources["source"]) <= {name.partition("/")[2] for name in pair_sets.SETS} | {"all"}
