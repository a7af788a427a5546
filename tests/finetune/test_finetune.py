"""Fine-tuning: it learns, validates honestly, resumes, and refuses what it cannot use."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from rows import loaded_rows

from image_to_prompts import finetune, profiles
from image_to_prompts.data import images, metadata
from image_to_prompts.data.rows import ImageRows
from image_to_prompts.finetune.validation import validate
from image_to_prompts.infer import submission
from image_to_prompts.models import backbones, checkpoints, doubt, freezing, metrics
from image_to_prompts.predict import predictors
from image_to_prompts.run.errors import UserError
from image_to_prompts.run.resume import is_finished
from image_to_prompts.training import epochs, frozen_features, loop


def config(run, out, **overrides):
    values = {"epochs": 1, "image_size": 64, "out": out, **overrides}
    return profiles.default_config("finetune", run, "embedded", **values)


def test_checkpoint_holds_everything(small_checkpoint, small_run):
    loaded = checkpoints.load(small_checkpoint)
    assert loaded.spec.name == "timm:tf_efficientnet_lite2" and loaded.spec.image_size == 64
    assert set(loaded.config["metrics"]) == {"epoch", "validation_cosine", "constant", "knn", "knn_k"}
    assert loaded.config["rows"]["train"] > loaded.config["rows"]["validate"] > 0
    assert abs(np.linalg.norm(loaded.mean) - 1) < 1e-5
    assert list(pd.read_csv(small_checkpoint / "history.csv")) == ["epoch", "loss", "cosine"]
    assert (small_checkpoint / "history.png").stat().st_size > 5000


def test_only_the_last_groups_change(small_checkpoint):
    after = checkpoints.load(small_checkpoint)
    before = backbones.build(after.spec)
    backbones.load_pretrained(before, after.spec)
    trained = set(freezing.unfreeze(before, 12))
    parameters = dict(before.named_parameters())
    for name, value in after.model.backbone.named_parameters():
        exact = parameters[name]  # frozen matrices are kept in the type of mixed precision
        same = torch.equal(value, exact) or torch.equal(value, exact.bfloat16().float())
        assert same == (name not in trained), name


def test_validation_is_what_the_saved_model_scores(small_checkpoint, small_run):
    """Validation over cached activations, in eval mode, equals the checkpoint's score on the images themselves."""
    loaded = checkpoints.load(small_checkpoint)
    rows = loaded_rows(small_run.metadata, small_run.images)
    predicted = validate(loaded.model, ImageRows(rows.paths, loaded.spec.image_size), rows, torch.device("cpu"))
    score = metrics.mean_cosine(predicted, rows.targets[rows.valid])
    assert score == pytest.approx(loaded.config["metrics"]["validation_cosine"], abs=0.01)


def test_training_lowers_the_loss(small_run, tmp_path):
    history = finetune.run(config(small_run, tmp_path / "c", epochs=4))
    assert history["loss"].iloc[-1] < history["loss"].iloc[1] - 0.02


def test_cached_and_uncached_training_agree(small_run, tmp_path):
    options = {"precision": "fp32", "learning_rate": 1e-4}
    cached = finetune.run(config(small_run, tmp_path / "a", **options))
    plain = finetune.run(config(small_run, tmp_path / "b", cache_features=False, **options))
    assert cached["cosine"].iloc[-1] == pytest.approx(plain["cosine"].iloc[-1], abs=0.005)
    assert cached["loss"].iloc[-1] == pytest.approx(plain["loss"].iloc[-1], abs=0.005)


def test_what_is_cached_already_needs_no_room_again(small_run, tmp_path, monkeypatch):
    room, free = shutil.disk_usage(tmp_path), [1000]
    monkeypatch.setattr(frozen_features.shutil, "disk_usage", lambda _: room._replace(free=free[0]))
    settings = config(small_run, tmp_path / "c", epochs=2)
    with pytest.raises(UserError, match=r"GB, 0\.0 are free; use --no-cache-features"):
        finetune.run(settings)
    free[0] = room.free
    finetune.run(replace(settings, max_hours=1e-6))
    free[0] = 1000
    assert len(finetune.run(settings)) == 3  # epoch 0 and the two


def test_rows_near_training_rows_do_not_validate(tmp_path, small_run):
    frame = metadata.read(small_run.metadata)
    frame = frame.head(12).assign(fold=[0, 0, 0, 0, *[1] * 8])
    frame.loc[0, "prompt"] = frame.loc[10, "prompt"]
    metadata.write_table(tmp_path / "m.csv", frame)
    rows = loaded_rows(tmp_path / "m.csv", small_run.images)
    assert rows.left_out == 1 and rows.valid.tolist() == [1, 2, 3] and len(rows.train) == 8


def test_rows_without_folds_get_them(tmp_path, small_run):
    frame = metadata.read(small_run.metadata)[["image_name", "prompt"]]
    metadata.write_table(tmp_path / "m.csv", frame)
    rows = loaded_rows(tmp_path / "m.csv", small_run.images)
    assert len(rows.train) + len(rows.valid) == len(frame)


def test_damaged_images_are_left_out_and_counted(small_run, tmp_path, caplog):
    folder = tmp_path / "images"
    shutil.copytree(small_run.images, folder)
    frame = metadata.read(small_run.metadata)
    for name, content in zip(frame["image_name"][:2], (b"", b"garbage"), strict=True):
        (folder / name).write_bytes(content)
    for cache in (True, False):
        caplog.clear()
        finetune.run(config(small_run, tmp_path / f"c{cache}", images=(folder,), cache_features=cache))
        assert sum("cannot be read as an image" in line for line in caplog.text.splitlines()) == 2


def test_what_cannot_be_used_is_refused(small_run, tmp_path, refused):
    base = ["finetune", "--run", small_run.folder, "--out", tmp_path / "c", "--image-size", "64"]
    refused([*base, "--images", tmp_path], "no manifest.csv", "--metadata")
    given = [*base, "--metadata", small_run.metadata]
    (tmp_path / "x.png").write_bytes(b"")
    refused([*given, "--images", tmp_path], small_run.metadata, "row 1", "no image")
    refused([*base, "--fold", "99"], "fold 99 holds 0")
    refused([*base, "--backbone", "timm:efficientnet_lite2x"], "nearest", "efficientnet_lite")
    refused([*base, "--epochs", "0"], "--epochs 0")
    refused([*base, "--learning-rate", "-1"], "--learning-rate")
    refused([*base, "--weights", tmp_path / "none.pth"], "no such file")
    (tmp_path / "file").write_text("x")
    refused([*base[:3], "--out", tmp_path / "file" / "c"], "regular file")
    assert not (tmp_path / "c" / "config.json").exists()


def test_all_images_damaged_is_one_clear_line(small_run, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for name in metadata.read(small_run.metadata)["image_name"]:
        (folder / name).write_bytes(b"garbage")
    for cache in (True, False):
        with pytest.raises(UserError, match=r"no image can be read|0 training and 0 validation images"):
            given = {"metadata": (small_run.metadata,), "images": (folder,), "cache_features": cache}
            finetune.run(config(small_run, tmp_path / "c", **given))


def test_an_infinite_loss_stops(small_run, tmp_path):
    with pytest.raises(
        UserError, match=r"epoch \d+, step \d+: the (loss|gradients).*images .*best checkpoint so far is kept"
    ):
        finetune.run(config(small_run, tmp_path / "c", learning_rate=1e30, epochs=3))


def test_checkpoint_of_another_shape_is_refused(small_checkpoint, small_run, tmp_path, refused):
    broken = tmp_path / "broken"
    shutil.copytree(small_checkpoint, broken)
    settings = json.loads((broken / "config.json").read_text())
    settings["backbone"]["name"] = "timm:tf_efficientnet_lite0"
    (broken / "config.json").write_text(json.dumps(settings))
    words = ["infer", "--images", small_run.images, "--out", tmp_path / "s.csv", "--checkpoint"]
    refused([*words, broken], broken / "config.json", "damaged", ".finetune.done")
    (broken / ".finetune.done").unlink()
    refused([*words, broken], broken, "another shape")
    refused([*words, tmp_path / "none"], "no such file")
    (broken / "config.json").write_text("{}")
    refused([*words, broken], "not a checkpoint")
    assert not (tmp_path / "s.csv").exists()


def test_knn_averages_as_many_neighbours_as_asked():
    rng = np.random.default_rng(0)
    features, targets = rng.normal(size=(30, 8)).astype(np.float32), rng.normal(size=(30, 384)).astype(np.float32)
    for k in (1, 2, 7):
        found = metrics.nearest_mean(features[:4], features, targets, k)
        order = np.argsort(-metrics.unit(features[:4]) @ metrics.unit(features).T, axis=1)[:, :k]
        np.testing.assert_allclose(found, targets[order].mean(1), atol=1e-5)


def test_of_many_rows_the_baselines_take_some(small_run, tmp_path, monkeypatch):
    from safetensors.numpy import load_file

    monkeypatch.setattr(frozen_features, "KNN_ROWS", 10)
    finetune.run(config(small_run, tmp_path / "c", cache_features=False))
    assert 5 <= len(load_file(tmp_path / "c" / "baselines.safetensors")["targets"]) <= 10


def test_validation_sees_the_model_in_eval_mode(small_run):
    """The reference validated in training mode, with stochastic depth on: twice the same images, two scores."""

    class Noisy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = torch.nn.Linear(3, 384)
            self.drop = torch.nn.Dropout(0.5)

        def forward(self, pixels):
            return self.drop(self.head(pixels.float().mean((2, 3))))

    model_ = Noisy().train()
    rows = loaded_rows(small_run.metadata, small_run.images)
    images = ImageRows(rows.paths, 64)
    found = validate(model_, images, rows, torch.device("cpu"), mixed=False)
    assert (found != 0).all() and not model_.training
    np.testing.assert_array_equal(found, validate(model_, images, rows, torch.device("cpu"), mixed=False))


def test_a_model_that_is_no_better_than_the_mean_is_said_so(small_run, tmp_path, caplog):
    """Own pairs of images and prompts that have nothing to do with each other."""
    frame = metadata.read(small_run.metadata)[["image_name", "prompt"]]
    frame["prompt"] = frame["prompt"].sample(frac=1, random_state=1).to_numpy()
    metadata.write_table(tmp_path / "m.csv", frame)
    finetune.run(config(small_run, tmp_path / "c", metadata=(tmp_path / "m.csv",), images=(small_run.images,)))
    scores = json.loads((tmp_path / "c" / "config.json").read_text())["metrics"]
    assert scores["validation_cosine"] < scores["constant"]
    (said,) = [r.getMessage() for r in caplog.records if "no better than" in r.getMessage()]
    assert f"{scores['validation_cosine']:.3f}" in said and f"{scores['constant']:.3f}" in said


def test_knn_of_the_nearest_alone_is_its_own_target():
    rng = np.random.default_rng(0)
    features, targets = rng.normal(size=(30, 8)).astype(np.float32), rng.normal(size=(30, 384)).astype(np.float32)
    np.testing.assert_allclose(metrics.nearest_mean(features, features, targets, 1), targets)
    assert metrics.best_k(features, targets, features, targets) == 1
    assert metrics.mean_cosine(targets, 3 * targets) == pytest.approx(1)


def test_learning_rate_restarts():
    assert epochs.learning_rate_factor(0, 2) == epochs.learning_rate_factor(0.5, 2) == 1
    assert epochs.learning_rate_factor(0.25, 2) == pytest.approx(0.5)
    assert epochs.learning_rate_factor(0.999, 1) < 1e-4


def test_a_checkpoint_tells_familiar_images_from_strange_ones(small_run, small_checkpoint, tmp_path):
    own = doubt.load(small_checkpoint)
    assert own.border > 0 and own.axes.shape[0] == len(own.mean)
    predictor, whole = predictors.checkpoint(small_checkpoint), predictors.Viewing(("whole",))
    known = predictors.predict(predictor, sorted(small_run.images.glob("*.png")), whole).strangeness
    assert (known <= 1).mean() > 0.9  # eight images drew the border
    noise = np.random.default_rng(0).integers(0, 256, (4, 96, 96, 3), np.uint8)
    for number, pixels in enumerate(noise):
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    strange = predictors.predict(predictor, sorted(tmp_path.glob("*.png")), whole).strangeness
    assert strange.min() > np.percentile(known, 95)


def test_a_larger_part_that_trains_needs_no_second_look(small_run, tmp_path, monkeypatch):
    monkeypatch.setattr(finetune, "_add_doubt", lambda *_: pytest.fail("it looks at the images again"))
    finetune.run(config(small_run, tmp_path / "half", epochs=1, train_from=12))
    strange = np.random.default_rng(0).integers(0, 256, (96, 96, 3), np.uint8)
    Image.fromarray(strange).save(tmp_path / "noise.png")
    files = [tmp_path / "noise.png", *images.find(small_run.images)[:8]]
    found = predictors.predict(predictors.checkpoint(tmp_path / "half"), files, predictors.Viewing(("whole",)))
    assert found.strangeness[0] > found.strangeness[1:].max()


def test_an_older_checkpoint_gets_its_doubt_without_training(small_run, small_checkpoint, tmp_path, monkeypatch):
    out = shutil.copytree(small_checkpoint, tmp_path / "convnext")
    before = doubt.load(out)
    (out / doubt.FILE).unlink()
    stamp = json.loads((out / ".finetune.done").read_text())
    del stamp["outputs"][doubt.FILE]
    (out / ".finetune.done").write_text(json.dumps(stamp))
    weights = (out / "model.safetensors").stat().st_mtime_ns
    monkeypatch.setattr(loop.Trainer, "epoch", lambda self: pytest.fail("it trains"))
    config = profiles.default_config("finetune", small_run, "embedded", out=out, epochs=1, image_size=64)
    finetune.run(config)
    after = doubt.load(out)
    np.testing.assert_allclose(after.mean, before.mean, atol=0.05)
    assert abs(after.border / before.border - 1) < 0.05 and (after.pull == before.pull).all()
    assert (out / "model.safetensors").stat().st_mtime_ns == weights
    done = (out / doubt.FILE).stat().st_mtime_ns
    finetune.run(config)
    assert (out / doubt.FILE).stat().st_mtime_ns == done
    assert not [path for path in out.iterdir() if path.name.startswith(".finetune-")]


def test_an_own_folder_is_trained_on_in_one_command(small_run, tmp_path, command):
    """Sixty images with `filename,caption`, or a .txt beside each; then one command predicts."""
    manifest = metadata.read(small_run.images / "manifest.csv")
    folder = tmp_path / "my-pictures"
    (folder / "sub").mkdir(parents=True)
    names = [f"sub/IMG_{number}.png" if number % 2 else f"IMG_{number}.png" for number in range(len(manifest))]
    for name, file, prompt in zip(names, manifest["file"], manifest["prompt"], strict=True):
        shutil.copy(small_run.images / file, folder / name)
        (folder / name).with_suffix(".txt").write_text(prompt)
    table = pd.DataFrame({"filename": names, "caption": manifest["prompt"]})
    table.to_csv(tmp_path / "my.csv", index=False)
    how = ["--images", folder, "--image-size", "64", "--epochs", "1", "--run", tmp_path / "run"]
    columns = ["--metadata", tmp_path / "my.csv", "--image-column", "filename", "--prompt-column", "caption"]
    for out, more in (("by-csv", columns), ("by-txt", [])):
        code, _, err = command("finetune", *how, *more, "--out", tmp_path / out)
        assert code == 0, err
        config = checkpoints.load(tmp_path / out).config
        assert sum(config["rows"].values()) == len(manifest) and config["sources"] == [
            folder.name if not more else "my"
        ]
    code, _, err = command(
        "infer", "--images", folder, "--checkpoint", tmp_path / "by-csv", "--out", tmp_path / "s.csv"
    )
    assert code == 0 and submission.check(tmp_path / "s.csv", folder) == len(manifest), err
    assert predictors.knows([tmp_path / "by-csv"]) == f"it has seen {config['rows']['train']} images of my"
    (folder / "sub" / "IMG_1.txt").write_text("another prompt")
    code, _, err = command("finetune", *how, "--out", tmp_path / "by-txt")
    assert code == 0 and "is up to date" not in err, "a changed text is another training"


def test_a_training_that_is_stopped_writes_what_there_is(small_run, tmp_path):
    whole = finetune.run(config(small_run, tmp_path / "whole", epochs=2))
    some = finetune.run(config(small_run, tmp_path / "some", epochs=2, max_hours=1e-6))
    assert some["epoch"].tolist() == [0] and whole["epoch"].tolist() == [0, 1, 2]
    for name in ("history.csv", "history.png", "sources.csv", "best_and_worst.png"):
        assert (tmp_path / "some" / name).is_file()
    assert not is_finished(tmp_path / "some" / ".finetune.done") and is_finished(tmp_path / "whole" / ".finetune.done")
    finetune.run(config(small_run, tmp_path / "some", epochs=2))
    for name in ("history.csv", "model.safetensors", "last/model.safetensors"):
        assert (tmp_path / "some" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
