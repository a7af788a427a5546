"""What is attached, under every layout that Kaggle mounts or mounted inputs in."""

import json

import pytest

from image_to_prompts.kaggle import mounts
from image_to_prompts.run import folders

COMPETITION = "stable-diffusion-image-to-prompts"
LAYOUTS = {
    "2026": {
        "competition": f"competitions/{COMPETITION}",
        "dataset": "datasets/ada/{}",
        "notebook": "notebooks/ada/{}",
        "model": "models/stabilityai/stable-diffusion-v2/pytorch/1/1",
    },
    "older": {
        "competition": COMPETITION,
        "dataset": "{}",
        "notebook": "{}",
        "model": "stable-diffusion-v2/pytorch/1/1",
    },
}


def put(path, text="x"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_input_is_found_and_named(layout, tmp_path, monkeypatch):
    where = {name: tmp_path / path for name, path in LAYOUTS[layout].items()}
    monkeypatch.setattr(folders, "KAGGLE_INPUT", tmp_path)
    put(where["competition"] / "sample_submission.csv")
    put(where["competition"] / "images" / "a.png")
    wheels, other = (type(tmp_path)(str(where["dataset"]).format(name)) for name in ("wheels", "other"))
    put(wheels / "image_to_prompts-0.1.0-py3-none-any.whl")
    put(other / "notes.txt")
    trained = type(tmp_path)(str(where["notebook"]).format("04-finetune-convnext"))
    put(trained / "checkpoints" / "convnext" / "config.json", json.dumps({"backbone": {}}))
    put(trained / "data_meta" / "train.csv")
    listed = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}
    put(where["model"] / "model_index.json", json.dumps(listed))
    put(where["model"] / "unet" / "config.json")
    put(where["model"] / "unet" / "diffusion_pytorch_model.bin")

    lines = dict(line.split(": ", 1) for line in mounts.table().splitlines())
    model = where["model"] if layout == "2026" else tmp_path / "stable-diffusion-v2"
    assert lines == {
        str(where["competition"]): "2 files, 0.00 GB: competition",
        str(wheels): "1 files, 0.00 GB: wheels",
        str(other): "1 files, 0.00 GB: nothing of ours",
        str(trained): "2 files, 0.00 GB: metadata, checkpoint",
        str(model): "3 files, 0.00 GB: weights of stable-diffusion-2",
    }
    assert folders.competition_images() == where["competition"] / "images"
    assert folders.Run(tmp_path / "run").target_images() == where["competition"] / "images"


def test_nothing_attached_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "KAGGLE_INPUT", tmp_path / "nowhere")
    assert mounts.table() == f"nothing is attached under {tmp_path / 'nowhere'}"


def test_the_competitions_prompts_are_a_key_only_where_all_images_have_one(tmp_path):
    """In the hidden run thousands of images stand beside the seven prompts."""
    (tmp_path / "images").mkdir()
    for name in ("a.png", "b.png"):
        (tmp_path / "images" / name).touch()
    assert folders.competition_key(tmp_path / "images") is None
    (tmp_path / "prompts.csv").write_text("imgId,prompt\na,a fox\nb,an owl\n")
    assert folders.competition_key(tmp_path / "images") == tmp_path / "prompts.csv"
    (tmp_path / "images" / "c.png").touch()
    assert folders.competition_key(tmp_path / "images") is None
