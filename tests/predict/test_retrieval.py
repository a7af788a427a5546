"""A bank predicts what its nearest prompts say, as computed plainly; known pairs choose the settings."""

import logging
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from image_to_prompts import infer
from image_to_prompts.data import metadata
from image_to_prompts.encode import banks, embeddings, text_head, text_tower
from image_to_prompts.models import metrics
from image_to_prompts.predict import blend, predictors, retrieval
from image_to_prompts.run.errors import UserError

WIDTH = 24


def units(rows, width, seed):
    return metrics.unit(np.random.default_rng(seed).standard_normal((rows, width)))


@pytest.fixture
def tower(tiny_encoders):
    return f"open_clip:{tiny_encoders['clip']}"


@pytest.fixture
def bank(tower, tmp_path):
    """150 prompts in two shards, whose vectors a linear map makes of their embeddings."""
    targets = units(150, 384, 0)
    world = np.random.default_rng(1).standard_normal((384, WIDTH))
    for number, rows in enumerate((slice(0, 60), slice(60, 150))):
        texts = [f"prompt {row}" for row in range(150)][rows]
        banks.write_shard(tmp_path / "bank", number, metrics.unit(targets[rows] @ world), targets[rows], texts)
    about = {
        "tower": tower,
        "weights": text_tower.digest(tower),
        "projected": False,
        "width": WIDTH,
        "shards": [60, 90],
    }
    banks.write_about(tmp_path / "bank", about, "")
    return tmp_path / "bank"


def write_pairs(folder, tower, world_noise=0.3, also=None):
    """Images whose vectors the same map makes of their prompts' embeddings, which are near to some of the bank's."""
    targets = metrics.unit(units(150, 384, 0)[:80] + 0.8 * units(80, 384, 5))
    world = np.random.default_rng(1).standard_normal((384, WIDTH))
    vectors = metrics.unit(metrics.unit(targets @ world) + world_noise * units(80, WIDTH, 3))
    names = pd.DataFrame({"image_name": [f"{row}.png" for row in range(80)]})
    embeddings.write(folder, "tower", 3 * vectors, names, {"backbone": {"name": tower}})
    for name, array in (also or {}).items():
        embeddings.write(folder, "second", array, names, {"backbone": {"name": name}})
    embeddings.write(folder, embeddings.PROMPTS, targets, names.assign(prompt="a"), {})
    return vectors, targets


def test_without_pairs_it_is_the_mean_of_the_60_nearest(bank, caplog):
    made = retrieval.Retrieval(bank)
    opened, queries = banks.open_bank(bank), units(70, WIDTH, 7)
    found = made([5 * queries])
    vectors, targets = (array[:].astype(np.float32) for array in (opened.vectors, opened.targets))
    for row in (0, 33, 69):
        nearest = np.argsort(-(vectors @ queries[row]), kind="stable")[:60]
        assert np.allclose(found[row], metrics.unit(targets[nearest].mean(0)), atol=1e-6)
    assert "mean of the 60 nearest prompts, no text head" in caplog.text
    alone = np.concatenate([made([queries[row : row + 1]]) for row in range(70)])
    assert np.array_equal(alone, found), "what an image gets does not depend on its company"
    assert np.allclose(made.mean, metrics.unit(targets.mean(0)), atol=1e-3)


def test_near_prompts_weigh_more_where_the_temperature_is_low():
    cosines = np.array([[0.9, 0.8, 0.5, 0.1]], np.float32)
    one = retrieval.shares(cosines, None, retrieval.Settings(3))
    assert np.allclose(one, [[1 / 3, 1 / 3, 1 / 3, 0]])
    other = retrieval.shares(cosines, None, retrieval.Settings(3, 0.1))
    assert np.allclose(other, [[1, np.exp(-1), np.exp(-4), 0]] / (1 + np.exp(-1) + np.exp(-4)))
    cosines[0, 0] = np.nan  # near to the truth: the next ones move up
    assert np.allclose(retrieval.shares(cosines, None, retrieval.Settings(2)), [[0, 0.5, 0.5, 0]])


def test_the_second_tower_keeps_a_share_or_what_reaches_a_cosine():
    cosines = np.array([[0.9, 0.8, 0.7, 0.6]], np.float32)
    second = np.array([[0.1, 0.35, 0.3, 0.2]], np.float32)
    half = retrieval.shares(cosines, second, retrieval.Settings(4, keep=0.5))
    assert np.allclose(half, [[0, 0.5, 0.5, 0]])
    assert np.allclose(retrieval.shares(cosines, second, retrieval.Settings(1, keep=0.5)), [[1, 0, 0, 0]])
    high = retrieval.shares(cosines, second, retrieval.Settings(4, least=0.29))
    assert np.allclose(high, half)
    none = retrieval.shares(cosines, second, retrieval.Settings(4, least=0.9))
    assert np.allclose(none, [[0, 1, 0, 0]]), "the best always stays"


def test_pairs_choose_the_settings_and_make_a_head(bank, tower, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    vectors, targets = write_pairs(tmp_path / "pairs", tower)
    plain, made = retrieval.Retrieval(bank), retrieval.Retrieval(bank, [tmp_path / "pairs"])
    score, before = (metrics.mean_cosine(one([vectors], targets), targets) for one in (made, plain))
    assert score > before + 0.02 and "fitted on 80 images" in caplog.text
    head = metrics.mean_cosine(made.head(made.bank.queries(vectors)), targets)
    assert f"text head {head:.4f}" in caplog.text and head > 0.15
    assert sum(made.how.weights) == pytest.approx(1) and made.how.count in retrieval.COUNTS
    with_head = replace(made.how, weights=(0.5, 0.5))
    made.how = replace(made.how, weights=(1.0, 0.0))
    retrieved, made.how = made([vectors]), with_head
    both = metrics.unit(retrieved + made.head(made.bank.queries(vectors)))
    assert np.allclose(made([vectors]), both, atol=1e-6)


def test_the_head_is_shifted_to_where_texts_lie(bank, tower, tmp_path):
    """A gap between the vectors of images and of texts makes no difference."""
    vectors, targets = write_pairs(tmp_path / "pairs", tower, 0.1)
    gap = 0.3 * np.ones(WIDTH, np.float32)
    near, far = (text_head.fit(banks.open_bank(bank), queries, targets) for queries in (vectors, vectors + gap))
    assert np.allclose(near(vectors), far(vectors + gap), atol=1e-5)
    assert not np.allclose(near(vectors), near(vectors + gap), atol=0.05)


def test_captions_of_the_pairs_join_where_they_help(bank, tower, tiny_encoders, tmp_path, caplog):
    """A captioner that says something true gets a share and is asked again; one that says anything is not."""
    caplog.set_level(logging.INFO)
    vectors, targets = write_pairs(tmp_path / "pairs", tower)
    names = pd.DataFrame({"image_name": [f"{row}.png" for row in range(80)]})
    said = {"true": metrics.unit(targets + 0.8 * units(80, 384, 11)), "false": units(80, 384, 12)}
    blip = {"encoder": f"caption:{tiny_encoders['blip']}", "image_size": 0, "settings": {"samples": 2}}
    for name, array in said.items():
        embeddings.write(tmp_path / "pairs", name, array, names, blip)
    gone = {"encoder": f"caption:{tmp_path / 'gone'}", "image_size": 0}
    embeddings.write(tmp_path / "pairs", "gone", said["true"], names, gone)
    made = retrieval.Retrieval(bank, [tmp_path / "pairs"])
    assert list(made.captioners) == ["true"] and made.captioners["true"].samples == 2
    assert "gone: skipped" in caplog.text and "false" in caplog.text
    assert [type(one).__name__ for one in made.encoders] == ["BackboneEncoder", "Captioner"]
    with_them = metrics.mean_cosine(made([vectors, said["true"]], targets), targets)
    assert with_them > metrics.mean_cosine(made([vectors, said["false"]], targets), targets) + 0.05
    for name in said:
        (tmp_path / "pairs" / f"{name}.npy").unlink()
    assert with_them > metrics.mean_cosine(retrieval.Retrieval(bank, [tmp_path / "pairs"])([vectors], targets), targets)


def test_prompts_near_to_the_truth_are_not_taken(bank, tower, tmp_path):
    """Pairs that stand in the bank themselves must not make one neighbour look best."""
    opened = banks.open_bank(bank)
    rows = np.arange(0, 150, 3)
    targets, vectors = (array[rows].astype(np.float32) for array in (opened.targets, opened.vectors))
    names = pd.DataFrame({"image_name": [f"{row}.png" for row in rows]})
    embeddings.write(tmp_path / "pairs", "tower", vectors, names, {"backbone": {"name": tower}})
    embeddings.write(tmp_path / "pairs", embeddings.PROMPTS, metrics.unit(targets), names.assign(prompt="a"), {})
    asked = pd.DataFrame(metrics.unit(targets), names["image_name"]).iloc[:20]
    found = retrieval.validation(bank, asked, [tmp_path / "pairs"])
    assert found.index.tolist() == asked.index.tolist()
    assert metrics.mean_cosine(found.to_numpy(), asked.to_numpy()) < 0.3
    made = retrieval.Retrieval(bank)
    made.how = retrieval.Settings(1)
    assert metrics.mean_cosine(made([vectors]), targets) > 0.999
    assert metrics.mean_cosine(made([vectors], targets), targets) < 0.3
    assert retrieval.validation(bank, asked, []).empty


def test_a_second_tower_looks_at_images_and_texts(bank, tower, tmp_path):
    vectors, targets = write_pairs(tmp_path / "pairs", tower)
    copy = f"open_clip:{shutil.copytree(tower.partition(':')[2], tmp_path / 'clip')}"
    assert retrieval.Retrieval(bank, [tmp_path / "pairs"], copy).known is None, "no vectors by the second tower"
    write_pairs(tmp_path / "both", tower, also={copy: units(80, WIDTH, 9)})
    fitted = retrieval.Retrieval(bank, [tmp_path / "pairs", tmp_path / "both"], copy)
    assert fitted.how.keep in retrieval.SHARES and fitted.known.others.shape == (80, WIDTH)
    arrays = [vectors, fitted.known.others]
    fitted.how, scores = replace(fitted.how, weights=(1.0, 0.0)), {}
    for fitted.how in [replace(fitted.how, keep=keep) for keep in retrieval.SHARES]:
        scores[fitted.how.keep] = metrics.mean_cosine(fitted(arrays, targets), targets)
    assert len(set(scores.values())) == 4
    made = retrieval.Retrieval(bank, second=tower)
    assert made.how == retrieval.Settings(keep=0.5)
    texts = made.bank.texts.to_pylist()
    cosines = made.second.cosines(vectors[:2], [texts[:3], texts[1:4]])
    expected = made.second.texts.embed(texts[:4]) @ vectors[:2].T
    assert np.allclose(cosines, [expected[:3, 0], expected[1:, 1]], atol=1e-6)
    found = made([vectors[:4], vectors[4:8]])
    assert found.shape == (4, 384) and np.isfinite(found).all()


def test_a_bank_made_anew_is_not_taken_for_the_old_one(bank, tmp_path):
    before = predictors.load(bank)
    assert np.array_equal(predictors.load(bank).mean, before.mean)
    targets = units(60, 384, 8)
    banks.write_shard(bank, 0, units(60, WIDTH, 9), targets, [f"other {row}" for row in range(60)])
    about = banks.read_json(bank / "bank.json")
    banks.write_about(bank, {**about, "shards": [60]}, "")
    assert np.allclose(predictors.load(bank).mean, metrics.unit(targets.mean(0)), atol=1e-3)


def test_a_bank_of_other_weights_gets_a_line(bank, tower):
    about = banks.read_json(bank / "bank.json")
    banks.write_about(bank, {**about, "weights": "0" * 64}, "")
    with pytest.raises(UserError, match=r"made with other weights of open_clip.*make the bank again"):
        retrieval.Retrieval(bank)


@pytest.fixture
def pictures(tmp_path):
    (tmp_path / "pictures").mkdir()
    for number in range(6):
        pixels = np.random.default_rng(number).integers(0, 255, (48, 48, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{number}.png")
    return tmp_path / "pictures"


def test_a_bank_alone_makes_a_submission(bank, pictures, tmp_path, command):
    key = tmp_path / "key.csv"
    rows = {"image_name": [f"{n}.png" for n in range(6)], "prompt": [f"a {n}" for n in range(6)]}
    metadata.write_table(key, pd.DataFrame(rows))
    words = ["infer", "--run", tmp_path / "run", "--images", pictures, "--out", tmp_path / "s.csv", "--bank", bank]
    code, _, err = command(*words, "--key", key)
    assert code == 0 and f"predicted by bank of prompts {bank}" in err and "no text head" in err, err
    found = infer.submission.read(tmp_path / "s.csv", [str(n) for n in range(6)])
    seen = predictors.predict(predictors.load(bank), sorted(pictures.iterdir()), predictors.Viewing())
    assert np.allclose(found, seen.vectors, atol=1e-6)
    assert command(*words, "--key", key)[2].endswith("is up to date\n")
    judged = command(*words, "--key", key, "--second-tower", banks.open_bank(bank).tower)
    assert judged[0] == 0 and "is up to date" not in judged[2]
    assert not np.allclose(infer.submission.read(tmp_path / "s.csv", [str(n) for n in range(6)]), found)
    nearest = command(*words, key, "--out", tmp_path / "t.csv")
    assert nearest[0] == 0 and (tmp_path / "t.prompts.csv").is_file(), "a CSV beside it names nearest prompts"


def test_a_bank_nobody_can_weigh_stays_out_of_the_blend(bank, small_run, small_checkpoint, tmp_path, command):
    words = ["infer", "--images", small_run.images, "--checkpoint", small_checkpoint, "--bank", bank]
    code, _, err = command(*words, "--run", tmp_path, "--out", tmp_path / "s.csv", "--views", "whole")
    assert code == 0 and "left out of the blend" in err and "predicted by checkpoint" in err, err
    assert "bank of prompts" not in err.splitlines()[-1]
    code, _, err = command(*words, "--run", tmp_path, "--out", tmp_path / "t.csv", "--blend", 0.5, 0.5)
    assert code == 0 and "bank of prompts" in err.splitlines()[-1], err


def test_a_damaged_bank_is_no_reason_to_give_up(bank, small_run, small_checkpoint, tmp_path, command):
    (bank / "targets-0001.npy").unlink()
    words = ["infer", "--images", small_run.images, "--checkpoint", small_checkpoint, "--bank", bank]
    words += ["--run", tmp_path, "--out", tmp_path / "s.csv", "--views", "whole"]
    assert command(*words)[0] == 2
    code, _, err = command(*words, "--fallback")
    assert code == 0 and "all count the same" in err and "predicted by checkpoint" in err.splitlines()[-1], err


def test_two_checkpoints_are_scored_where_a_bank_stays_out(
    bank, small_run, small_checkpoint, tmp_path, command, monkeypatch
):
    second_checkpoint = shutil.copytree(small_checkpoint, tmp_path / "second")
    words = ["infer", "--images", small_run.images, "--checkpoint", small_checkpoint, second_checkpoint, "--bank", bank]
    words += ["--key", small_run.metadata, "--run", tmp_path, "--out", tmp_path / "s.csv", "--views", "whole"]
    code, _, err = command(*words, "--blend", 0.6, 0.4, 0)
    assert code == 0 and f"{second_checkpoint} alone: " in err and f"{bank} alone" not in err, err
    monkeypatch.setattr(blend, "LEAST_TO_FIT", 10_000)
    assert blend.fitted([small_checkpoint, second_checkpoint, bank]) == [0.5, 0.5, 0]


def test_a_bank_is_weighed_on_what_all_validated(
    bank, tower, small_run, small_checkpoint, tmp_path, command, monkeypatch
):
    from image_to_prompts.training import by_source

    frame, _, targets = by_source.read(small_checkpoint)
    world = np.random.default_rng(1).standard_normal((384, WIDTH))
    names = frame[["image_name"]]
    embeddings.write(tmp_path / "pairs", "tower", targets @ world, names, {"backbone": {"name": tower}})
    embeddings.write(tmp_path / "pairs", embeddings.PROMPTS, targets, frame[["image_name", "prompt"]], {})
    words = [
        "infer",
        "--images",
        small_run.images,
        "--checkpoint",
        small_checkpoint,
        "--bank",
        bank,
        "--views",
        "whole",
    ]
    words += ["--pairs", tmp_path / "pairs", "--run", tmp_path, "--out", tmp_path / "s.csv"]
    code, _, err = command(*words)
    assert code == 0 and "left out of the blend" in err, "fewer than 20 images"
    monkeypatch.setattr(blend, "LEAST_TO_FIT", len(frame))
    code, _, err = command(*words)
    assert code == 0 and f"{bank}: " in err and f"alone on {len(frame)} images" in err, err
    weights = blend.fitted([small_checkpoint, bank], [tmp_path / "pairs"])
    assert sum(weights) == pytest.approx(1) and min(weights) >= 0
    assert f"{weights[1]:.3f} of the blend" in err
    write_pairs(tmp_path / "others", tower)
    assert blend.fitted([small_checkpoint, bank], [tmp_path / "others"]) == [1, 0], "no image in common"
    monkeypatch.setattr(retrieval.backbones, "describe", lambda *_: SimpleNamespace(image_size=64))
    about = {"backbone": {"name": tower, "image_size": 32}}
    embeddings.write(tmp_path / "pairs", "tower", targets @ world, names, about)
    assert retrieval.Retrieval(bank, [tmp_path / "pairs"]).known is None, "not the pixels that the tower sees"


def test_describe_says_prompts_of_a_bank_without_any_checkpoint(bank, pictures, tmp_path, command, refused):
    words = ["describe", pictures, "--run", tmp_path / "run", "--bank", bank, "--ignore-file"]
    code, _, err = command(*words, "--out", tmp_path / "d.jsonl", "--quiet")
    assert code == 0, err
    said = pd.read_json(tmp_path / "d.jsonl", lines=True)
    assert len(said) == 6 and set(said["source"]) == {"bank"} and said["prompt"].str.contains("prompt").all()
    seen = predictors.predict(predictors.load(bank), sorted(pictures.iterdir()), predictors.Viewing())
    opened = banks.open_bank(bank)
    first = np.argmax(seen.vectors @ opened.targets[:].astype(np.float32).T, 1)
    assert [rows[0][0] for rows in said["nearest"]] == [f"prompt {row}" for row in first]
    assert said["familiar"].isna().all(), "nobody can tell"
    again = [*words, "--out", tmp_path / "d.jsonl"]
    assert command(*again)[0] == 0 and pd.read_json(tmp_path / "d.jsonl", lines=True).equals(said)
    write_pairs(tmp_path / "run" / "embeddings", opened.tower)
    assert command(*again)[0] == 0
    assert not pd.read_json(tmp_path / "d.jsonl", lines=True)["cosine"].equals(said["cosine"]), "fitted on pairs now"
    refused([*words[:-3], "--bank", pictures], "neither a checkpoint nor a bank")
