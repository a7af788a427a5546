"""Recipes: rows that can be used, and the reference's as it was."""

from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from image_to_prompts import cli, finetune, profiles
from image_to_prompts.data import images
from image_to_prompts.finetune import recipes
from image_to_prompts.models import backbones, freezing
from image_to_prompts.predict import predictors
from image_to_prompts.run import folders
from image_to_prompts.run.errors import UserError
from image_to_prompts.training import epochs


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_a_recipe_sets_the_flags_of_a_tower_that_there_is(name, tmp_path):
    config = cli.parse(["finetune", "--run", str(tmp_path), "--recipe", name, "--recipe.epochs", "7"])
    assert config == cli.parse(["finetune", "--run", str(tmp_path), "--recipe", name, "--epochs=7"])
    row = recipes.RECIPES[name]
    assert {key: getattr(config, key) for key in row.flags()} == {**row.flags(), "epochs": 7}
    assert {one.name for one in fields(recipes.Recipe)} - {"about"} <= {one.name for one in fields(finetune.Config)}
    with torch.device("meta"):
        tower = backbones.build(backbones.describe(row.backbone, row.image_size))
    assert freezing.unfreeze(tower, row.train_from)


def test_the_profiles_have_the_recipes_that_they_had(tmp_path):
    full = profiles.default_config("finetune", folders.Run(tmp_path), "full")
    assert (full.backbone, full.image_size, full.epochs, full.cycles) == ("open_clip:convnext_xxlarge", 512, 25, 2)
    assert (full.learning_rate, full.batch_size, full.micro_batch, full.cache_features) == (5e-5, 32, 4, False)
    own = profiles.default_config("finetune", folders.Run(tmp_path), "embedded")
    assert own == finetune.Config(run=own.run, images=own.images, out=own.out, train_from=12)
    assert (own.learning_rate, own.epochs, own.warm_up, full.warm_up) == (2e-3, 4, 60, 0)
    assert (own.train_from, full.train_from) == (12, -1)
    for config in (full, own):
        assert (config.ema, config.layer_decay) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("words", "first"),
    [
        (["--backbone", "timm:resnet50"], -1),
        (["--backbone=timm:resnet50", "--train-from", "3"], 3),
        (["--backbone", "timm:tf_efficientnet_lite2"], 12),
        (["--recipe", "vit-h", "--backbone", "open_clip:ViT-B-16"], -1),
        (["--recipe", "vit-b", "--backbone", "open_clip:ViT-L-14"], 0),
    ],
)
def test_the_first_group_of_a_recipe_holds_for_its_own_tower(words, first, tmp_path):
    assert cli.parse(["finetune", "--run", str(tmp_path), *words]).train_from == first


def test_an_unknown_recipe_and_values_out_of_bounds_are_refused(refused, small_run, tmp_path):
    refused(["finetune", "--run", tmp_path, "--recipe", "vit-x"], "choose one of reference, vit-b")
    for words in (["--ema", "1"], ["--layer-decay", "0"], ["--train-from", "99"]):
        with pytest.raises(UserError, match=words[0]):
            finetune.run(cli.parse(["finetune", "--run", str(small_run.folder), "--dry-run", *words]))


def test_the_table_lists_every_recipe_with_its_cost(command, tmp_path):
    code, said, _ = command("finetune", "--run", tmp_path / "run", "--recipe", "list")
    rows, abouts = ([line.split() for line in part.splitlines()] for part in said.split("\n\n"))
    costs = {row[0]: row for row in rows[1:]}
    assert code == 0 and not (tmp_path / "run").exists()
    assert costs.keys() == recipes.RECIPES.keys() == {about[0].rstrip(":") for about in abouts}
    assert costs["vit-b"][2:12] == ["224", "4", "160", "0.0001", "86", "of", "86", "M", "105", "1.7"]
    trained, every, operations = recipes.cost(recipes.RECIPES["vit-b"])
    assert trained == every and operations == pytest.approx(3 * 35.1e9, rel=0.02)  # 17.56 G products an image


@given(st.lists(st.sampled_from("abcde"), min_size=1), st.integers(0, 3), st.integers(1, 4))
def test_of_the_images_of_a_prompt_an_epoch_takes_one(prompts, seed, epoch):
    rows = np.arange(len(prompts)) + 10
    drawn = epochs.one_of_each(rows, np.array(prompts), seed, epoch)
    assert [prompts[row - 10] for row in drawn] == list(dict.fromkeys(prompts))
    assert (drawn == epochs.one_of_each(rows, np.array(prompts), seed, epoch)).all()


def test_every_image_of_a_prompt_is_taken_in_some_epoch():
    rows, prompts = np.arange(6), np.array(["a", "a", "a", "b", "b", "c"])
    seen = {int(row) for epoch in range(1, 40) for row in epochs.one_of_each(rows, prompts, 0, epoch)}
    assert seen == set(range(6))


def test_a_tower_that_trains_as_a_whole_gets_the_doubt_of_its_trained_stages(small_run, tiny_open_clip, tmp_path):
    """Not of the pretrained ones, by which all images would be strange to what it is now."""
    how = {"backbone": f"open_clip:{tiny_open_clip}", "image_size": 64, "epochs": 2, "cache_features": False}
    how |= {"train_from": 0, "learning_rate": 1e-2, "precision": "fp32", "out": tmp_path / "c"}
    finetune.run(profiles.default_config("finetune", small_run, "embedded", **how))
    predictor = predictors.checkpoint(tmp_path / "c")
    _, strange = predictors.predict(predictor, images.find(small_run.images), predictors.Viewing(("whole",)))
    assert (strange > 1).mean() < 0.3
