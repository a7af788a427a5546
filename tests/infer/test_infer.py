"""Inference over any folder: complete, valid, independent of batches, scored against a key."""

import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from image_to_prompts import finetune, infer, profiles
from image_to_prompts.data import metadata
from image_to_prompts.data.rows import Fit
from image_to_prompts.encode import backbone
from image_to_prompts.infer import submission
from image_to_prompts.models import backbones, checkpoints, doubt, metrics
from image_to_prompts.predict import predictors
from image_to_prompts.run import devices, folders
from image_to_prompts.training import by_source, dataset


def settings(images, checkpoint, out, **overrides):
    return infer.Config(images=images, checkpoint=(checkpoint,), out=out, **overrides)


@pytest.fixture
def folder(small_run, tmp_path):
    """A few images in sub-folders, one of them broken."""
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    for i, name in enumerate(metadata.read(small_run.metadata)["image_name"][:6]):
        shutil.copy(small_run.images / name, folder / ("sub" if i % 2 else ".") / name)
    Image.new("RGBA", (30, 60), (255, 0, 0, 90)).save(folder / "odd.webp")
    (folder / "broken.jpg").write_bytes(b"")
    return folder


def test_submission_is_complete_and_valid(folder, small_checkpoint, tmp_path, caplog):
    out = tmp_path / "new" / "submission.csv"
    result = infer.run(settings(folder, small_checkpoint, out))
    assert submission.check(out, folder) == 8
    assert result.broken == [folder / "broken.jpg"] and "broken.jpg: cannot be read" in caplog.text
    from image_to_prompts.models import checkpoints

    row = result.files.index(folder / "broken.jpg")
    np.testing.assert_allclose(result.vectors[row], checkpoints.load(small_checkpoint).mean, atol=1e-6)
    without = infer.run(settings(folder / "sub", small_checkpoint, tmp_path / "sub.csv"))
    for file, vector in zip(without.files, without.vectors, strict=True):
        assert vector @ result.vectors[result.files.index(file)] > 0.9999


def test_batches_change_nothing_that_matters(folder, small_checkpoint, tmp_path):
    one = infer.run(settings(folder, small_checkpoint, tmp_path / "a.csv", batch_size=1))
    many = infer.run(settings(folder, small_checkpoint, tmp_path / "b.csv", batch_size=5))
    assert (one.vectors * many.vectors).sum(1).min() > 0.9999


def test_key_and_bank(small_run, small_checkpoint, tmp_path):
    out = tmp_path / "s.csv"
    with_key = settings(small_run.images, small_checkpoint, out, key=small_run.metadata, bank=(small_run.metadata,))
    first, second = infer.run(with_key), infer.run(with_key)
    assert first.score > first.constant  # most of these images were trained on
    assert (second.score, second.constant) == (first.score, first.constant)
    pd.testing.assert_frame_equal(first.prompts, second.prompts)
    np.testing.assert_array_equal(first.vectors, second.vectors)
    assert set(first.prompts["prompt"]) <= set(metadata.read(small_run.metadata)["prompt"])
    assert infer.run(settings(small_run.images, small_checkpoint, out)).score is None


def test_strange_images_are_counted_and_drawn_to_the_mean(
    folder, small_run, small_checkpoint, strange_picture, tmp_path, caplog
):
    shutil.copy(strange_picture, folder)
    checkpoint = shutil.copytree(small_checkpoint, tmp_path / "checkpoint")
    own = doubt.load(checkpoint)
    replace(own, pull=np.array([1, 0], np.float32)).save(checkpoint)
    plain = infer.run(settings(folder, checkpoint, tmp_path / "a.csv", bank=(small_run.metadata,)))
    replace(own, pull=np.array([1, 1e-3], np.float32)).save(checkpoint)
    drawn = infer.run(settings(folder, checkpoint, tmp_path / "b.csv", bank=(small_run.metadata,)))
    row, mean = drawn.files.index(folder / strange_picture.name), checkpoints.load(checkpoint).mean
    assert drawn.strange == plain.strange >= 1 and json.loads((tmp_path / "b.json").read_text())["strange"]
    assert "images are unlike those that the checkpoint knows: it has only seen emoji scenes" in caplog.text
    assert plain.vectors[row] @ mean < 0.999 < drawn.vectors[row] @ mean
    familiar = drawn.prompts["familiar"].to_numpy()
    assert familiar[row] == "false" and familiar[drawn.files.index(folder / "broken.jpg")] == ""
    same = np.flatnonzero(familiar == "true")
    assert len(same) >= 4
    np.testing.assert_array_equal(drawn.vectors[same], plain.vectors[same])
    (checkpoint / doubt.FILE).unlink()
    none = infer.run(settings(folder, checkpoint, tmp_path / "c.csv", bank=(small_run.metadata,)))
    assert none.strange == 0 and set(none.prompts["familiar"]) == {""}


def test_newest_checkpoint_is_the_default(small_run, small_checkpoint, tmp_path, command):
    shutil.copytree(small_checkpoint, tmp_path / "run" / "checkpoints" / "mine")
    out = tmp_path / "s.csv"
    code, _, err = command("infer", "--run", tmp_path / "run", "--images", small_run.images, "--out", out)
    assert code == 0, err
    assert submission.check(out, small_run.images) > 0


def test_the_best_epoch_is_the_default_not_the_last(small_checkpoint, tmp_path, monkeypatch):
    shutil.copytree(small_checkpoint, tmp_path / "input" / "kernel" / "convnext")
    os.utime(tmp_path / "input" / "kernel" / "convnext" / "last" / "model.safetensors")
    monkeypatch.setattr(folders, "KAGGLE_INPUT", tmp_path / "input")
    assert folders.Run(tmp_path / "run").newest_checkpoints() == [tmp_path / "input" / "kernel" / "convnext"]


def test_what_cannot_be_used_is_refused(folder, small_run, small_checkpoint, tmp_path, refused):
    out = tmp_path / "s.csv"
    words = ["infer", "--run", tmp_path / "r", "--out", out]
    empty = tmp_path / "empty"
    empty.mkdir()
    refused([*words, "--images", empty, "--checkpoint", small_checkpoint], "no images")
    refused([*words, "--images", tmp_path / "none", "--checkpoint", small_checkpoint], "no such folder")
    refused([*words, "--images", folder], "no checkpoint under")
    shutil.copy(folder / "odd.webp", folder / "sub" / "odd.webp")
    refused([*words, "--images", folder, "--checkpoint", small_checkpoint], "share the stem 'odd'")
    (folder / "sub" / "odd.webp").unlink()
    base = [*words, "--images", folder, "--checkpoint", small_checkpoint]
    refused([*base, "--key", small_run.metadata], "no row for image")
    refused([*base, small_checkpoint, "--blend", 1, 1], "--blend has 2 numbers for 1 checkpoints")
    (tmp_path / "key.csv").write_text("name,prompt\na,b\n")
    refused([*base, "--key", tmp_path / "key.csv"], "no column 'image_name'")
    (tmp_path / "file").write_text("x")
    refused([*base[:3], "--out", tmp_path / "file" / "s.csv", *base[5:]], "regular file")
    assert not out.exists()


def test_real_images_get_a_valid_submission_and_a_score(shared_data, small_checkpoint, tmp_path):
    sample = shared_data / "diffusiondb_sample"
    out = tmp_path / "s.csv"
    result = infer.run(settings(sample / "images", small_checkpoint, out, key=sample / "prompts.csv"))
    assert submission.check(out, sample / "images") == 6
    assert -1 <= result.score <= 1 and not result.broken


def test_of_several_views_the_mean_counts(tmp_path):
    """Each view by its own direction alone, however long its vectors; an image that cannot be read has none."""

    class Sides:
        fits, about = (Fit(8),), {}

        def see(self, squares):
            left, right = squares[0].float().chunk(2, dim=3)
            sides = torch.stack([left.mean((1, 2, 3)), right.mean((1, 2, 3))], 1)
            sides[sides[:, 0] < sides[:, 1]] *= 10
            return torch.nn.functional.pad(sides, (0, 382)).numpy()

    files = [tmp_path / name for name in ("a.png", "b.png", "c.png")]
    for file, grey in zip(files, (10, 0, 90), strict=True):
        picture = Image.new("RGB", (8, 8), (200, 200, 200))
        picture.paste((grey, grey, grey), (4, 0, 8, 8))
        picture.save(file)
    files[1].write_bytes(b"no image")
    predictor = predictors.Predictor(np.zeros(384, np.float32), [Sides()], lambda arrays: 2 * arrays[0])

    def predict(chosen, *views):
        return predictors.predict(predictor, chosen, predictors.Viewing(views, 2)).vectors

    whole = predict(files, "whole")
    np.testing.assert_allclose(whole[:, :2], metrics.unit(np.array([[200, 10], [np.nan, np.nan], [200, 90]])))
    both = predict(files, "whole", "mirror")
    np.testing.assert_allclose(both[[0, 2], :2], np.full((2, 2), np.sqrt(0.5)), atol=1e-6)
    assert both.dtype == np.float32 and np.isnan(both[1]).all() and not both[[0, 2], 2:].any()
    assert np.isnan(predict(files[1:2], "whole", "mirror")).all()


def test_further_looks_count_as_much_as_the_first(folder, small_checkpoint, tmp_path):
    """A second size, and colours normalised by the images' own: each is what a checkpoint so made predicts."""

    def vectors(out, checkpoint=small_checkpoint, **flags):
        values = {"views": ("whole",), **flags}
        return infer.run(settings(folder, checkpoint, tmp_path / out, **values))

    def changed(name, **values):
        """The checkpoint with other settings of its backbone."""
        copy = tmp_path / name
        shutil.copytree(small_checkpoint, copy)
        (copy / ".finetune.done").unlink()
        config = json.loads((copy / "config.json").read_text())
        config["backbone"] |= values
        (copy / "config.json").write_text(json.dumps(config))
        return vectors(f"{name}.csv", copy).vectors

    plain, larger = vectors("1.csv"), changed("larger", image_size=96)
    both = vectors("1.csv", second_size=96)  # in the place of those without
    good = [file not in plain.broken for file in plain.files]
    np.testing.assert_allclose(both.vectors[good], metrics.unit(plain.vectors + larger)[good], atol=2e-3)
    assert (both.vectors * plain.vectors)[good].sum(1).max() < 0.9999

    found = vectors("3.csv", own_colours=True)
    mean, deviation = found.colours
    recoloured = changed("recoloured", mean=mean, std=deviation)
    np.testing.assert_allclose(found.vectors[good], metrics.unit(plain.vectors + recoloured)[good], atol=2e-3)
    assert json.loads((tmp_path / "3.json").read_text())["colours"] == [list(mean), list(deviation)]
    assert vectors("3.csv", own_colours=True).colours == found.colours, "read again as it was"
    assert plain.colours is None


def test_views_are_averaged(folder, small_checkpoint, tmp_path):
    single = [
        infer.run(settings(folder, small_checkpoint, tmp_path / f"{view}.csv", views=(view,))).vectors
        for view in ("whole", "mirror")
    ]
    both = infer.run(settings(folder, small_checkpoint, tmp_path / "b.csv", views=("whole", "mirror"))).vectors
    readable = [i for i in range(8) if not np.allclose(single[0][i], single[1][i])]
    assert len(readable) >= 6
    np.testing.assert_allclose(both[readable], metrics.unit(single[0] + single[1])[readable], atol=1e-5)


def test_half_precision_predicts_what_float32_does(folder, small_checkpoint, tmp_path, monkeypatch):
    half = infer.run(settings(folder, small_checkpoint, tmp_path / "a.csv"))
    monkeypatch.setattr(backbone, "mixed_precision", lambda device: "no")
    monkeypatch.setattr(devices, "mixed_precision", lambda device: "no")
    full = infer.run(settings(folder, small_checkpoint, tmp_path / "b.csv"))
    assert (half.vectors * full.vectors).sum(1).min() > 0.999


@pytest.mark.parametrize("prefix", ["", "module.model."])
def test_a_reference_checkpoint_is_imported(prefix, folder, tiny_open_clip, tmp_path, command, refused):
    name = f"open_clip:{tiny_open_clip}"
    spec = backbones.describe(name, 64)
    torch.manual_seed(3)
    net = checkpoints.build(spec).eval()
    state = {f"{prefix}visual.{key}": value for key, value in net.backbone.state_dict().items()}
    state |= {f"{prefix}fc.{key}": value for key, value in net.head.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "best.pt")
    words = ["import-checkpoint", tmp_path / "best.pt", "--image-size", 64, "--out", tmp_path / "c"]
    code, said, err = command(*words, "--backbone", name)
    assert code == 0 and str(tmp_path / "c") in said, err
    pictures = torch.randint(0, 255, (2, 3, 64, 64), dtype=torch.uint8)
    with torch.inference_mode():
        torch.testing.assert_close(checkpoints.load(tmp_path / "c").model(pictures), net(pictures))
    infer.run(settings(folder, tmp_path / "c", tmp_path / "s.csv"))
    assert submission.check(tmp_path / "s.csv", folder) == 8
    refused([*words, "--backbone", "timm:tf_efficientnet_lite2"], "no checkpoint of timm:tf_efficientnet_lite2")
    (tmp_path / "best.pt").write_bytes(b"garbage")
    refused([*words, "--backbone", name], "best.pt: not a file of weights")


def test_a_second_run_reads_words_that_pandas_takes_for_nothing(small_run, small_checkpoint, tmp_path):
    (tmp_path / "bank.csv").write_text("prompt\nNone\nNA\n")
    config = settings(small_run.images, small_checkpoint, tmp_path / "s.csv", bank=(tmp_path / "bank.csv",))
    first, second = infer.run(config), infer.run(config)
    assert set(first.prompts["prompt"]) <= {"None", "NA"}
    pd.testing.assert_frame_equal(first.prompts, second.prompts)


def test_prompts_that_read_like_nothing_count_in_the_mean(tmp_path):
    from image_to_prompts.models import text_encoder
    from image_to_prompts.predict import ladder

    (tmp_path / "p.csv").write_text("prompt\nNone\nNA\n")
    expected = metrics.unit(text_encoder.encode(["None", "NA"]).mean(0))
    np.testing.assert_allclose(ladder.prompt_mean([tmp_path / "p.csv"]).mean, expected, atol=1e-6)


@pytest.fixture
def dotted(small_run, tmp_path):
    """Images whose names have a dot and no suffix, with their metadata; some in a folder below."""
    from image_to_prompts import render

    frame = metadata.read(small_run.metadata)
    frame["image_name"] = [f"{'sub/' if row % 3 == 0 else ''}photo.v{row}" for row in range(len(frame))]
    frame["group"] = frame["image_name"]
    metadata.write_table(tmp_path / "m.csv", frame)
    render.run(render.Config(metadata=tmp_path / "m.csv", out=tmp_path / "images", workers=1))
    return tmp_path / "images", tmp_path / "m.csv"


def test_every_stage_joins_rows_and_images_by_one_rule(dotted, small_checkpoint, tmp_path, caplog):

    folder, csv = dotted
    names = metadata.read(csv)["image_name"]
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png")) == sorted(names + ".png")
    rows = dataset.load_metadata((csv,), (folder,))
    assert [path.relative_to(folder).as_posix() for path in rows["path"]] == [f"{name}.png" for name in names]
    found = infer.run(settings(folder, small_checkpoint, tmp_path / "s.csv", key=csv))
    assert found.score is not None
    values = {"metadata": (csv,), "images": (folder,), "out": tmp_path / "c", "epochs": 1, "image_size": 64}
    finetune.run(profiles.default_config("finetune", folders.Run(tmp_path / "run"), "embedded", **values))
    area, likeness = by_source.domain_gap(tmp_path / "c", (folder,), sorted(folder.rglob("*.png"))[:20])
    assert len(likeness) > 0 and 0 <= area <= 1


def test_a_score_on_images_that_were_trained_on_is_said_to_be_one(small_run, small_checkpoint, tmp_path, caplog):
    found = infer.run(settings(small_run.images, small_checkpoint, tmp_path / "s.csv", key=small_run.metadata))
    rows = json.loads((small_checkpoint / "config.json").read_text())["rows"]["train"]
    (said,) = [r.getMessage() for r in caplog.records if "trained on" in r.getMessage()]
    assert f"{rows} of {len(found.files)}" in said
    caplog.clear()
    held_out = metadata.read_table(small_checkpoint / "validation.csv", ("image_name",))["image_name"]
    (tmp_path / "valid").mkdir()
    for name in held_out:
        shutil.copy(small_run.images / name, tmp_path / "valid" / name)
    infer.run(settings(tmp_path / "valid", small_checkpoint, tmp_path / "v.csv", key=small_run.metadata))
    assert "trained on" not in caplog.text


def test_a_broken_image_is_told_of_once(folder, small_checkpoint, tmp_path, command):
    (folder / "torn.png").write_bytes(b"\x89PNG\r\n")
    shutil.copytree(small_checkpoint, tmp_path / "other")
    words = ["infer", "--images", folder, "--checkpoint", small_checkpoint, tmp_path / "other", "--blend", 1, 1]
    code, _, err = command(*words, "--out", tmp_path / "s.csv", "--run", tmp_path / "run")
    assert code == 0, err
    for name in ("broken.jpg", "torn.png"):
        assert sum(name in line for line in err.splitlines()) == 1, err
