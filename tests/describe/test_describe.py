import json
import os
import shutil
import subprocess
import sys
import tarfile

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from image_to_prompts import describe, ensemble, profiles
from image_to_prompts.encode import encoders
from image_to_prompts.predict import predictors
from image_to_prompts.run import folders
from image_to_prompts.run.errors import UserError


@pytest.fixture
def trained(trained_run, small_run, tmp_path):
    """A run with a checkpoint and known prompts, and a folder of seven images, one of them damaged."""
    run = folders.Run(shutil.copytree(trained_run.folder, tmp_path / "run"))
    pictures = tmp_path / "pictures"
    (pictures / "inner").mkdir(parents=True)
    for number, path in enumerate(sorted(small_run.images.glob("*.png"))[:6]):
        shutil.copyfile(path, (pictures / "inner" if number % 2 else pictures) / path.name)
    (pictures / "damaged.png").write_bytes(path.read_bytes()[:3000])
    return run, pictures


def config(run, *paths, **values):
    return profiles.default_config("describe", run, "embedded", paths=paths, views=("whole",), **values)


def test_a_folder_is_described_into_a_table(trained, tmp_path):
    run, pictures = trained
    found = describe.run(config(run, pictures, out=tmp_path / "p.csv", top=3))
    table = pd.read_csv(tmp_path / "p.csv", keep_default_na=False)
    assert len(found) == len(table) == 7 and list(table["image"]) == [str(one.path) for one in found]
    good = [one for one in found if not one.error]
    assert len(good) == 6 and all(one.prompt and one.cosine >= one.nearest[0][1] - 0.01 for one in good)
    assert all(len(one.nearest) == 3 and one.nearest[0][1] >= one.nearest[1][1] for one in good)
    (broken,) = [one for one in found if one.error]
    assert broken.path.name == "damaged.png" and broken.prompt == "" and "cannot be read" in broken.error
    assert list(table.columns)[:3] == ["image", "prompt", "cosine"] and "cosine_3" in table

    describe.run(config(run, pictures, out=tmp_path / "p.jsonl", top=3))
    rows = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == list(table["prompt"]) and len(rows[1]["nearest"]) == 3


def test_what_is_done_is_not_done_again(trained, tmp_path, monkeypatch):
    run, pictures = trained
    seen = []
    original = describe.Describer.describe
    monkeypatch.setattr(describe.Describer, "describe", lambda self, files: seen.extend(files) or original(self, files))
    first = describe.run(config(run, pictures))
    assert len(seen) == 7
    assert describe.run(config(run, pictures, out=tmp_path / "p.csv")) == first and len(seen) == 8
    Image.new("RGB", (64, 64), "red").save(pictures / "new.png")
    assert len(describe.run(config(run, pictures))) == 8
    assert [path.name for path in seen[7:]] == ["damaged.png", "damaged.png", "new.png"]
    del seen[7:9]
    assert all(len(one.nearest) == 2 for one in describe.run(config(run, pictures, top=2)) if not one.error)
    assert [path.name for path in seen[8:]] == ["damaged.png"]  # might have been mended; all others are kept
    describe.run(config(run, pictures, most_words=9))
    assert len(seen) == 9 + 8


def test_an_image_that_changes_or_goes_while_it_is_described(trained, monkeypatch):
    """What was said is of the image as it was; the next run describes the other one."""
    run, pictures = trained
    first, second, *_ = sorted(path for path in pictures.glob("*.png") if path.name != "damaged.png")
    seen, original = [], describe.Describer.describe

    def changing(self, files):
        found = original(self, files)
        seen.extend(files)
        if len(seen) == 2:
            shutil.copyfile(second, first)
            second.unlink()
        return found

    monkeypatch.setattr(describe.Describer, "describe", changing)
    before = describe.run(config(run, first, second))
    assert all(one.prompt for one in before)
    (after,) = describe.run(config(run, first))
    assert seen[2:] == [first] and after.prompt == before[1].prompt


def test_a_table_that_cannot_be_written_is_told_before_weights_are_read(trained, tmp_path, monkeypatch):
    run, pictures = trained
    monkeypatch.setattr(describe, "fingerprint", lambda *_: pytest.fail("hours of hashing"))
    (tmp_path / "p.csv").write_text("mine")
    with pytest.raises(UserError, match="is not from here"):
        describe.run(config(run, pictures, out=tmp_path / "p.csv"))


def test_a_damaged_image_that_was_mended_is_described(trained):
    run, pictures = trained
    whole = next(path for path in sorted(pictures.glob("*.png")) if path.name != "damaged.png").read_bytes()
    assert describe.run(config(run, pictures / "damaged.png"))[0].error
    before = (pictures / "damaged.png").stat()
    (pictures / "damaged.png").write_bytes(whole)
    os.utime(pictures / "damaged.png", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert describe.run(config(run, pictures / "damaged.png"))[0].prompt


def test_images_that_would_share_a_text_file_are_refused(trained):
    run, pictures = trained
    image = next(path for path in sorted(pictures.glob("*.png")) if path.name != "damaged.png")
    shutil.copyfile(image, image.with_suffix(".jpg"))
    with pytest.raises(UserError, match=r"would write the same file"):
        describe.run(config(run, pictures, txt=True))
    assert not list(pictures.rglob("*.txt"))


def test_a_name_that_is_not_utf8_can_be_told(trained, tmp_path, command):
    run, pictures = trained
    image = next(path for path in sorted(pictures.glob("*.png")) if path.name != "damaged.png")
    odd = tmp_path / os.fsdecode(b"caf\xe9.png")
    shutil.copyfile(image, odd)
    (tmp_path / os.fsdecode(b"bad\xe9.png")).write_bytes(b"x")
    for out in ("p.csv", "p.jsonl"):
        code, said, _ = command(
            "describe", tmp_path, "--run", run.folder, "--views", "whole", "--out", tmp_path / "o" / out
        )
        assert code == 0 and "caf\ufffd.png\t" in said
        assert "caf\ufffd.png" in (tmp_path / "o" / out).read_text(encoding="utf-8")
    describe.run(config(run, odd, txt=True))
    assert odd.with_suffix(".txt").read_text()


def test_a_text_file_of_the_user_stays(trained, caplog):
    run, pictures = trained
    images = sorted(pictures.glob("*.png"))
    own = images[0].with_suffix(".txt")
    own.write_text("mine\n")
    found = {one.path: one for one in describe.run(config(run, pictures, txt=True))}
    assert own.read_text() == "mine\n" and f"{own}: not from here, or edited" in caplog.text
    other = next(path for path in images[1:] if path.name != "damaged.png")
    assert other.with_suffix(".txt").read_text() == found[other].prompt + "\n"
    assert not (pictures / "damaged.txt").exists()

    other.with_suffix(".txt").write_text("edited\n")
    describe.run(config(run, pictures, txt=True))
    assert other.with_suffix(".txt").read_text() == "edited\n"
    describe.run(config(run, pictures, txt=True, artists=False))  # ours, so replaced; edited ones stay
    assert other.with_suffix(".txt").read_text() == "edited\n"
    describe.run(config(run, pictures, txt=True, overwrite=True))
    assert other.with_suffix(".txt").read_text() == found[other].prompt + "\n"
    assert own.read_text() == found[images[0]].prompt + "\n"


def test_a_table_of_the_user_stays(trained, tmp_path):
    run, pictures = trained
    out = tmp_path / "p.csv"
    describe.run(config(run, pictures, out=out))
    describe.run(config(run, pictures, out=out))
    out.write_text(out.read_text() + "\n")
    with pytest.raises(UserError, match="--overwrite"):
        describe.run(config(run, pictures, out=out))
    describe.run(config(run, pictures, out=out, overwrite=True))
    assert len(pd.read_csv(out)) == 7


def test_without_a_checkpoint_the_interrogator_speaks(trained, tmp_path, caplog):
    _, pictures = trained
    bare = folders.open_run(tmp_path / "bare", "embedded")
    found = [one for one in describe.run(config(bare, pictures)) if not one.error]
    assert len(found) == 6 and all(one.prompt.count(",") >= 7 and one.cosine is None for one in found)
    assert "image-to-prompts run" in caplog.text
    reference = profiles.default_config("describe", bare, "full", paths=(pictures,))
    with pytest.raises(UserError, match=r"finetune makes one.*blip"):
        describe.run(reference)


def test_mistakes_get_one_line(trained, refused, tmp_path):
    run, pictures = trained
    flags = ["--run", run.folder]
    refused(["describe", *flags], "give image files or folders")
    refused(["describe", tmp_path / "none.png", *flags], "none.png", "no such file")
    refused(["describe", run.metadata, *flags], "not an image")
    refused(["describe", pictures, "--out", "p.xlsx", *flags], "--out", ".csv")
    refused(["describe", pictures, "--top", "0", *flags], "--top 0")
    refused(["describe", pictures, "--prompts", tmp_path / "none.csv", *flags], "none.csv", "no such file")
    describe.run(config(run, pictures))  # what is kept hides no mistake
    refused(["describe", pictures, "--prompts", run.metadata, tmp_path / "none.csv", *flags], "none.csv")
    refused(["describe", pictures, "--vocabulary", tmp_path, *flags], "subjects.txt")
    refused(["describe", pictures, "--checkpoint", run.checkpoint, tmp_path / "none", *flags], "none", "--checkpoint")
    refused(["describe", pictures, "--views", *flags], "--views")
    refused(["describe", pictures, "--loader-workers", "-1", *flags], "--loader-workers -1")
    refused(["describe", tmp_path / ("x" * 300 + ".png"), *flags], "too long")
    refused(["describe", pictures, "--out", "/proc/x.csv", *flags], "/proc/x.csv")
    refused(["describe", pictures, "--out", next(pictures.glob("*.png")) / "x.csv", *flags], "regular file")
    with tarfile.open(pictures / "shard.tar", "w") as shard:
        shard.add(pictures / "damaged.png", "a.png")
    (pictures / "torn.tar").write_bytes(b"x" * 100)
    refused(["describe", pictures / "shard.tar" / "none.png", *flags], "none.png")
    refused(["describe", pictures / "torn.tar" / "a.png", *flags], "not a whole archive")
    refused(["describe", pictures / "shard.tar" / "a.png", "--txt", *flags], "archive")
    (pictures / "torn.tar").unlink()
    run.metadata.unlink()
    refused(["describe", pictures, *flags], "--prompts CSV")


def test_prompts_go_to_standard_output(trained, command):
    run, pictures = trained
    image = sorted(pictures.glob("*.png"))[0]
    code, out, _ = command("describe", image, "--run", run.folder, "--views", "whole")
    assert code == 0 and out.startswith(f"{image}\t") and out.count("\n") == 1


def test_three_lines_of_python(trained):
    run, pictures = trained
    image = next(path for path in sorted(pictures.glob("*.png")) if path.name != "damaged.png")
    code = (
        "from image_to_prompts import describe\n"
        f"found = describe({str(image)!r}, run={str(run.folder)!r})\n"
        "import image_to_prompts.describe\n"
        "assert found.vector.shape == (384,) and callable(describe)\n"
        f"try: describe({str(pictures / 'damaged.png')!r}, run={str(run.folder)!r})\n"
        "except Exception as error: print('refused', type(error).__name__)\n"
        "print(found.prompt)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("refused UserError") and len(done.stdout.split()) > 2


@pytest.fixture
def crowd(small_run, tmp_path):
    """32 images of the small run and a byte-identical copy of each."""
    folder = tmp_path / "crowd"
    folder.mkdir()
    for path in sorted(small_run.images.glob("*.png"))[:32]:
        for name in ("a", "b"):
            shutil.copyfile(path, folder / f"{name}-{path.name}")
    return sorted(folder.glob("*.png"))


@pytest.mark.parametrize("kind", ["finetune", "ensemble", "neighbours", "classes"])
def test_what_an_image_gets_does_not_depend_on_its_company(kind, small_checkpoint, small_embeddings, crowd, tmp_path):
    """Byte for byte: alone, in batches of 7 and 64, reversed; and so do copies."""
    if kind == "ensemble":
        ensemble.run(ensemble.Config(embeddings=small_embeddings, out=tmp_path / "ensemble", epochs=2))
    predictor = {
        "finetune": lambda: predictors.checkpoint(small_checkpoint),
        "ensemble": lambda: predictors.checkpoint(tmp_path / "ensemble"),
        "neighbours": lambda: predictors.neighbours(small_embeddings),
        "classes": lambda: predictors.Predictor(np.zeros(384), [encoders.build("classes", 224)]),
    }[kind]()
    viewing = predictors.Viewing(("whole", "mirror"))

    def seen(files):
        return predictors.predict(predictor, files, viewing)

    together = seen(crowd)
    assert len(crowd) == 64 and len(np.unique(together, axis=0)) > 10
    by_seven = np.concatenate([seen(crowd[start : start + 7]) for start in range(0, 64, 7)])
    alone = np.concatenate([seen([path]) for path in crowd[:8]])
    for other in (by_seven, seen(crowd[::-1])[::-1], alone):
        assert together[: len(other)].tobytes() == other.tobytes()
    assert together[:32].tobytes() == together[32:].tobytes()


def test_what_is_said_of_an_image_does_not_depend_on_its_company(trained_run, crowd, tmp_path):
    settings = profiles.default_config("describe", trained_run, "embedded", views=("whole",))
    one, some = describe.Describer(settings), [*crowd[:5], crowd[32]]
    together = one.describe(some)
    assert len({found.prompt for found in together}) == 5 and together[0].prompt == together[5].prompt
    by_four = [found for start in (0, 4) for found in one.describe(some[start : start + 4])]
    alone = [one.describe([path])[0] for path in some[:3]]
    for others in (by_four, one.describe(some[::-1])[::-1], alone):
        for found, other in zip(together, others, strict=False):
            assert found.vector.tobytes() == other.vector.tobytes(), found.path
            assert (found.prompt, found.cosine, found.nearest) == (other.prompt, other.cosine, other.nearest)


def test_an_image_in_memory_is_described(trained):
    from image_to_prompts import describe

    run, pictures = trained
    path = next(path for path in sorted(pictures.glob("*.png")) if path.name != "damaged.png")
    with Image.open(path) as image:
        found = describe(image, run=run.folder)
    assert found.prompt == describe(path, run=run.folder).prompt


def test_one_image_with_a_checkpoint_loads_few_modules_and_none_that_train(trained_run, crowd):
    code = (
        "import sys; from image_to_prompts import describe\n"
        f"assert describe({str(crowd[0])!r}, run={str(trained_run.folder)!r}).cosine\n"
        "print(*(name for name in sys.modules if name.partition('.')[0] == 'image_to_prompts'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert 20 < len(loaded) <= 45, sorted(loaded)
    assert not {f"image_to_prompts.{name}" for name in ("finetune", "ensemble", "training", "render")} & loaded


def test_describe_says_what_it_takes(trained):
    from image_to_prompts import describe

    run, pictures = trained
    with pytest.raises(UserError, match=r"is a folder.*one image"):
        describe(pictures, run=run.folder)
    with pytest.raises(UserError, match="a path or a PIL image"):
        describe(7, run=run.folder)
    with pytest.raises(UserError, match=r"none\.png: no such file or folder; correct it$"):
        describe(pictures / "none.png", run=run.folder)


def test_broken_images_and_files_that_stay_are_named_once(trained, command):
    run, pictures = trained
    (pictures / "torn.png").write_bytes(b"")
    own = next(path for path in sorted(pictures.glob("*.png")) if path.name not in ("damaged.png", "torn.png"))
    own.with_suffix(".txt").write_text("mine")
    code, _, err = command("describe", pictures, "--run", run.folder, "--txt")
    assert code == 0, err
    for name in ("damaged.png", "torn.png", own.with_suffix(".txt").name):
        assert sum(name in line for line in err.splitlines()) == 1, (name, err)
