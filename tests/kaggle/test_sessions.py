"""Sessions that follow each other, against a stub of Kaggle that executes what is pushed to it.

As on Kaggle a kernel sees the output of the last version of another kernel, never of its own, and whole datasets.
"""

import itertools
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from kaggle_stub import ME
from kernel_session import Session

from image_to_prompts import finetune, profiles, render
from image_to_prompts.data import metadata
from image_to_prompts.pipeline import IMAGES
from image_to_prompts.render import shards
from image_to_prompts.run import folders

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
SOON = 1e-6  # hours: a training begins a second step, and stops


class Machines:
    """Executes every kernel that is pushed, with what its metadata asks for attached."""

    def __init__(self, kaggle, folder, outputs, models):
        self.kaggle, self.folder, self.outputs, self.models = kaggle, folder, outputs, models
        self.published, self.numbers = folder / "published", itertools.count()
        kaggle.stub.absent = set()

    def push(self, *words, **parameters):
        """Pushes, executes, and keeps the output in place of that of the kernel's version before."""
        for name in self.published.glob("*/*"):
            self.kaggle.stub.datasets.add(f"{name.parent.name}/{name.name}")
        code, _, err = self.kaggle("push", *words)
        assert code == 0, err
        sent = self.kaggle.stub.asked("SaveKernel")[-1]
        attached = {f"models/{name}": folder for name, folder in self.models.items()}
        for source in sent.get("datasetDataSources", []):
            if (self.published / source).is_dir():
                attached[f"datasets/{source}"] = self.published / source
        for source in sent.get("kernelDataSources", []):
            attached[f"notebooks/{source}"] = self.outputs[source]
        session = Session(self.folder / f"session-{next(self.numbers)}", attached)
        session.said = session.run(sent["text"], **parameters)
        self.outputs[sent["slug"]] = session.working
        return session


def test_three_sessions_of_training_are_one(kaggle, small_run, tmp_path):
    """Two that a limit stops after a step or some, and one to the end, give what one undisturbed training gives."""
    rendered = tmp_path / "rendered"
    shutil.copytree(small_run.images, rendered / "images" / "train")
    machines = Machines(kaggle, tmp_path / "kaggle", {f"{ME}/03-render-images": rendered}, {})
    how = {"profile": "embedded", "image_size": 64, "epochs": 3}
    first = machines.push("finetune", max_hours=SOON, **how)
    assert first.pictures == 2, "its curve, and the best and worst of what there is"
    assert "image-to-prompts kaggle push finetune --continue" in first.said
    second = machines.push("finetune", "--continue", max_hours=SOON, **how)
    third = machines.push("finetune", "--continue", **how)
    steps = [one.said.partition("continuing at epoch ")[2][:9] for one in (first, second, third)]
    assert steps == ["", "1, step 2", "2, step 2"]
    assert "All done. Next: 05_embed_images" in third.said

    once = folders.open_run(tmp_path / "once", "embedded")
    config = profiles.default_config("finetune", once, "embedded", images=(small_run.images,), image_size=64, epochs=3)
    expected = finetune.run(config)
    found = pd.read_csv(third.working / "checkpoints" / "convnext" / "history.csv")
    assert np.allclose(found, expected, atol=1e-5, equal_nan=True), (found, expected)


def test_three_sessions_of_rendering_are_one(kaggle, tiny_sd2, small_run, tmp_path):
    """Each publishes what it has drawn, an unfinished shard, too; together they are the bytes of one session."""
    prompts = tmp_path / "deduplicated" / "data_meta" / "train.csv"
    metadata.write_table(prompts, metadata.read(small_run.metadata).head(30))
    sd2 = "stabilityai/stable-diffusion-v2/pytorch/1/1"
    machines = Machines(kaggle, tmp_path / "kaggle", {f"{ME}/02-dedupe-prompts": prompts.parents[1]}, {sd2: tiny_sd2})
    how = {"profile": "full", "fast": True, "steps": 2}

    once = folders.open_run(tmp_path / "once", "full")
    options = {"metadata": prompts, "out": once.train_images, "fast": True, "steps": 2, "weights": tiny_sd2}
    render.run(profiles.default_config("render", once, "full", **options))
    whole = (once.train_images / "00000.tar").read_bytes()

    room = 1.5 * len(whole) / 1e9
    said = machines.push("render", max_gb=room / 3, **how).said
    assert f"Published as {ME}/{IMAGES}-1" in said and "image-to-prompts kaggle push render --continue" in said
    assert machines.push("render", "--continue", max_gb=room / 1.7, **how).said.count(f"Published as {ME}/{IMAGES}-2")
    last = machines.push("render", "--continue", **how)
    assert "train: All done. Next: 04_finetune_convnext" in last.said

    sets = [machines.published / ME / f"{IMAGES}-{number}" / "train" for number in (1, 2, 3)]
    drawn = [len(shards.read_shard(next(one.glob("00000.tar*")))[0]) for one in sets]
    assert 0 < drawn[0] < drawn[1] < drawn[2] == 30
    assert (sets[2] / "00000.tar").read_bytes() == whole
    assert len(pd.read_csv(sets[0] / "manifest.csv")) == drawn[0], "rows of an unfinished shard are in the manifest"

    tables = [one / "manifest.csv" for one in sets]
    loaded = finetune.dataset.load_metadata(tables, sets)
    assert sorted(loaded["image_name"]) == sorted(metadata.read(prompts)["image_name"]), "none twice, none missing"
