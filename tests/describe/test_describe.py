import json
import os
import shutil
import subprocess
import sys
import tarfile

import numpy as np
import pandas as pd
import pytest
import tiny_models
import written_images as written
from caption_stub import Stub
from PIL import Image

from image_to_prompts import describe, ensemble, profiles
from image_to_prompts.encode import encoders
from image_to_prompts.models import hub
from image_to_prompts.predict import predictors
from image_to_prompts.run import folders
from image_to_prompts.run.errors import UserError


@pytest.fixture
def trained(trained_run, small_run, tmp_path):
    """A run with a checkpoint and known prompts, and a folder of seven images, one of them damaged."""
    run = folders.Run(shutil.copytree(trained_run.folder, tmp_path / "run"))
    pictures = tmp_path / "pictures"
    (pictures / "inner").mkdir(parents=True)
    for number, path in enumerate(sorted(small_run.images.glob("*.png"))[:4]):
        shutil.copyfile(path, (pictures / "inner" if number % 2 else pictures) / path.name)
    (pictures / "damaged.png").write_bytes(path.read_bytes()[:3000])
    return run, pictures


def config(run, *paths, **values):
    return profiles.default_config("describe", run, "embedded", paths=paths, views=("whole",), **values)


def test_a_folder_is_described_into_a_table(trained, tmp_path):
    run, pictures = trained
    found = describe.run(config(run, pictures, out=tmp_path / "p.csv", top=3))
    table = pd.read_csv(tmp_path / "p.csv", keep_default_na=False)
    assert len(found) == len(table) == 5 and list(table["image"]) == [str(one.path) for one in found]
    good = [one for one in found if not one.error]
    assert len(good) == 4 and all(one.prompt and one.cosine >= one.nearest[0][1] - 0.01 for one in good)
    assert all(len(one.nearest) == 3 and one.nearest[0][1] >= one.nearest[1][1] for one in good)
    (broken,) = [one for one in found if one.error]
    assert broken.path.name == "damaged.png" and broken.prompt == "" and "cannot be read" in broken.error
    assert list(table.columns)[:5] == ["image", "prompt", "source", "familiar", "cosine"] and "cosine_3" in table
    others = [[text for text in row if text] for row in table[["candidate_2", "candidate_3"]].to_numpy().tolist()]
    assert others == [list(one.candidates) for one in found] and any(others)
    assert all(len({one.prompt, *one.candidates}) == 1 + len(one.candidates) for one in found)
    assert set(table["source"]) == {"checkpoint", ""} and table["error"].ne("").sum() == 1

    describe.run(config(run, pictures, out=tmp_path / "p.jsonl", top=3))
    rows = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == list(table["prompt"]) and len(rows[1]["nearest"]) == 3


@pytest.fixture
def shown(monkeypatch):
    """The names of the images that are shown to models, in order."""
    seen, original = [], describe.Describer.predict

    def predict(self, files):
        seen.extend(path.name for path in files)
        return original(self, files)

    monkeypatch.setattr(describe.Describer, "predict", predict)
    return seen


def test_what_is_done_is_not_done_again(trained, tmp_path, shown):
    run, pictures = trained
    out = tmp_path / "p.csv"
    first = describe.run(config(run, pictures, out=out))
    assert len(shown) == 5
    table = out.read_bytes()
    assert describe.run(config(run, pictures, out=out)) == first and out.read_bytes() == table
    Image.new("RGB", (64, 64), "red").save(pictures / "new.png")
    assert len(describe.run(config(run, pictures, out=out))) == 6 == len(pd.read_csv(out))
    assert shown[5:] == ["damaged.png", "damaged.png", "new.png"]  # the first might have been repaired
    del shown[:]
    assert all(len(one.nearest) == 2 for one in describe.run(config(run, pictures, top=2, out=out)) if not one.error)
    assert shown == ["damaged.png"]
    describe.run(config(run, pictures, most_words=9, out=out))
    assert len(shown) == 1 + 6
    describe.run(config(run, pictures, most_words=9, out=out, recompute=True))
    assert len(shown) == 1 + 6 + 6
    assert sorted(path.name.partition(".csv")[2] for path in tmp_path.glob(".p.csv*")) == sorted(
        [".done", ".lock", next(tmp_path.glob(".p.csv.*.journal")).name.partition(".csv")[2]]
    )


def test_a_run_that_is_stopped_leaves_a_table_and_goes_on(trained, tmp_path, monkeypatch, shown):
    run, pictures = trained
    whole = describe.run(config(run, pictures, out=tmp_path / "whole.csv"))
    del shown[:]
    out, grown = tmp_path / "p.csv", []

    def stop(found):
        grown.append(len(pd.read_csv(out)))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        describe.run(config(run, pictures, out=out), stop)
    assert grown == [4] and len(pd.read_csv(out)) == 4 and len(shown) == 4
    assert describe.run(config(run, pictures, out=out)) == whole
    assert out.read_bytes() == (tmp_path / "whole.csv").read_bytes() and len(shown) in (
        5,
        6,
    )  # 6: the damaged one twice


def test_an_image_that_changes_or_goes_while_it_is_described(trained, tmp_path, monkeypatch):
    """What was said is of the image as it was; the next run describes the other one."""
    run, pictures = trained
    first, second, *_ = sorted(path for path in pictures.glob("*.png") if path.name != "damaged.png")
    seen, original = [], describe.Describer.predict

    def changing(self, files):
        found = original(self, files)
        seen.extend(files)
        if len(seen) == 2:
            shutil.copyfile(second, first)
            second.unlink()
        return found

    monkeypatch.setattr(describe.Describer, "predict", changing)
    before = describe.run(config(run, first, second, out=tmp_path / "p.csv"))
    assert all(one.prompt for one in before)
    (after,) = describe.run(config(run, first, out=tmp_path / "p.csv"))
    assert seen[2:] == [first] and after.prompt == before[1].prompt


def test_a_table_that_cannot_be_written_is_told_before_weights_are_read(trained, tmp_path, monkeypatch):
    run, pictures = trained
    monkeypatch.setattr(describe, "fingerprint", lambda *_: pytest.fail("hours of hashing"))
    (tmp_path / "p.csv").write_text("mine")
    with pytest.raises(UserError, match="not written by describe before"):
        describe.run(config(run, pictures, out=tmp_path / "p.csv"))
    assert (tmp_path / "p.csv").read_text() == "mine"


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
        assert code == 0 and not said  # nothing beside a table
        assert "caf\ufffd.png" in (tmp_path / "o" / out).read_text(encoding="utf-8")
    code, said, _ = command("describe", odd, "--run", run.folder, "--views", "whole", "--txt")
    assert code == 0 and "caf\ufffd.png\t" in said and odd.with_suffix(".txt").read_text()


def test_texts_beside_images(trained, shown, caplog):
    run, pictures = trained
    caplog.set_level("INFO")
    images = sorted(path for path in pictures.glob("*.png") if path.name != "damaged.png")
    own, other = images[0].with_suffix(".txt"), images[1].with_suffix(".txt")
    own.write_text("mine\n")
    found = {one.path: one for one in describe.run(config(run, pictures, txt=True))}
    assert images[0] not in found and images[0].name not in shown and "1 images have a .txt already" in caplog.text
    assert own.read_text() == "mine\n" and other.read_text() == found[images[1]].prompt + "\n"
    assert not (pictures / "damaged.txt").exists()

    other.write_text("edited\n")
    del shown[:]
    describe.run(config(run, pictures, txt=True))
    assert shown == ["damaged.png"] and other.read_text() == "edited\n"
    describe.run(config(run, pictures, txt=True, recompute=True))
    assert other.read_text() == "edited\n" and f"{other}: holds another text and stays" in caplog.text
    said = {one.path: one.prompt for one in describe.run(config(run, pictures, txt=True, append=True))}
    assert own.read_text() == f"mine, {said[images[0]]}\n" and other.read_text() == f"edited, {said[images[1]]}\n"
    texts = {path: path.read_text() for path in pictures.rglob("*.txt")}
    describe.run(config(run, pictures, txt=True, append=True))
    assert texts == {path: path.read_text() for path in pictures.rglob("*.txt")}  # not added twice
    own.write_text(f"{said[images[0]]}, mine\n")
    other.write_text("")
    describe.run(config(run, pictures, txt=True, append=True))
    assert own.read_text() == f"{said[images[0]]}, mine\n" and other.read_text() == f"{said[images[1]]}\n"
    describe.run(config(run, pictures, txt=True, overwrite=True, prefix="sks, ", suffix=", 8k"))
    assert own.read_text() == f"sks, {said[images[0]]}, 8k\n"


def test_words_can_be_banned(trained, tmp_path):
    run, pictures = trained
    image = next(path for path in sorted(pictures.glob("*.png")) if path.name != "damaged.png")
    (before,) = describe.run(config(run, image))
    word = before.prompt.split(",")[-1].split()[-1].upper()
    (tmp_path / "words.txt").write_text(f"{word}\nnowhere\n")
    for ban in ((word,), (str(tmp_path / "words.txt"),)):
        (after,) = describe.run(config(run, image, ban=ban))
        assert word.lower() not in " ".join([after.prompt, *after.candidates]).lower().split()
        assert after.prompt != before.prompt
    with pytest.raises(UserError, match="--ban"):
        describe.run(config(run, image, ban=(str(tmp_path / "none.txt"),)))


def test_banned_words_with_a_hyphen_and_prompts_of_several_lines(tmp_path, capsys):
    file = written.png(tmp_path / "a.png", {"parameters": "a fox,\nsci-fi, fire, t-shirt art\nNegative prompt: hands"})
    said = describe.run(config(folders.Run(tmp_path), file, ban=("Sci-Fi", "t-shirt", "art,")))
    assert [one.prompt for one in said] == ["a fox, fire"]
    assert describe.printed(describe.run(config(folders.Run(tmp_path), file))).count("\n") == 1


def test_an_image_that_goes_while_others_are_described(trained, tmp_path, monkeypatch):
    run, pictures = trained
    files = sorted(pictures.rglob("*.png"))
    monkeypatch.setattr(describe, "FIRST", 1)
    found = describe.run(config(run, *files, out=tmp_path / "p.csv"), show=lambda _: files[-1].unlink(missing_ok=True))
    assert [bool(one.error) for one in found] == [one.path in (files[-1], pictures / "damaged.png") for one in found]


def test_the_newest_checkpoint_speaks_in_python_too(trained):
    run, pictures = trained
    (image, *_) = sorted((pictures / "inner").glob("*.png"))
    checkpoint = run.folder / "aside"
    run.checkpoint.rename(checkpoint)
    assert describe.describe(image, run.folder, "embedded").source == "guess"
    checkpoint.rename(run.checkpoint)
    assert describe.describe(image, run.folder, "embedded").source == "checkpoint"


def test_a_table_of_the_user_stays(trained, tmp_path):
    run, pictures = trained
    out = tmp_path / "p.csv"
    describe.run(config(run, pictures, out=out))
    describe.run(config(run, pictures, out=out))
    out.write_text(out.read_text() + "\n")
    with pytest.raises(UserError, match="was edited"):
        describe.run(config(run, pictures, out=out))
    describe.run(config(run, pictures, out=out, overwrite=True))
    assert len(pd.read_csv(out)) == 5
    with pytest.raises(UserError, match="is read here"):
        describe.run(config(run, pictures, out=run.train_metadata if run.train_metadata.exists() else run.metadata))


def test_without_a_checkpoint_there_is_a_guess_and_it_is_called_one(trained, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(hub, "listing", lambda repository: pytest.fail("asked the hub, though nobody named a model"))
    _, pictures = trained
    for profile in ("embedded", "full"):
        bare = profiles.default_config("describe", folders.Run(tmp_path / "bare"), profile, paths=(pictures,))
        found = [one for one in describe.run(bare) if not one.error]
        assert len(found) == 4 and {(one.source, one.familiar, one.cosine) for one in found} == {("guess", None, None)}
        assert all(one.prompt.count(",") == 2 for one in found)
        assert "4 prompts are guesses" in caplog.text and "weights get describe" in caplog.text
    assert not (tmp_path / "bare").exists()


def test_a_captioner_of_ones_own_speaks_where_nothing_else_can(
    trained, tmp_path, command, refused, caption_server, tiny_encoders
):
    _, pictures = trained
    words = ["describe", pictures, "--run", tmp_path / "bare", "--out", tmp_path / "p.csv", "--caption"]
    code, _, err = command(*words, f"{caption_server}#llava")
    assert code == 0 and "4 captioned, 1 without an answer" in err, err
    table = pd.read_csv(tmp_path / "p.csv", keep_default_na=False)
    assert sorted(table["source"]) == ["", *["caption"] * 4]
    assert sum(prompt.startswith("brightness") for prompt in table["prompt"]) == 4 and len(Stub.asked) == 4
    assert command(*words, f"{caption_server}#llava")[0] == 0 and len(Stub.asked) == 4, "what is done stays"
    assert command(*words, f"{caption_server}#moondream")[0] == 0 and len(Stub.asked) == 8
    folder = tiny_models.save_captioner("git", tmp_path / "git")
    code, _, err = command(*words, folder)
    assert code == 0 and "captioned" in err, err
    refused([*words, "http://127.0.0.1:9/v1"], "http://127.0.0.1:9/v1/models", "is the server still there?")
    words = ["infer", "--images", pictures, "--run", tmp_path / "bare", "--out", tmp_path / "s.csv", "--fallback"]
    code, _, err = command(*words, "--caption", caption_server)
    assert code == 0 and f"predicted by captions by {caption_server}" in err, err


def test_of_a_strange_image_nothing_is_composed(trained, strange_picture, tmp_path, command):
    run, pictures = trained
    shutil.copy(strange_picture, pictures)
    code, _, err = command("describe", pictures, "--run", run.folder, "--out", tmp_path / "p.csv")
    assert code == 0 and "1 of 6 images are unlike all that the checkpoint knows: it has only seen emoji scenes" in err
    table = pd.read_csv(tmp_path / "p.csv", keep_default_na=False).set_index("image")
    strange = table.loc[str(pictures / strange_picture.name)]
    assert (strange["source"], strange["familiar"], strange["cosine"]) == ("guess", "false", "")
    rest = table.drop(index=[str(pictures / strange_picture.name), str(pictures / "damaged.png")])
    assert set(rest["source"]) == {"checkpoint"} and set(rest["familiar"]) == {"true"} and (rest["cosine"] != "").all()

    (run.checkpoint / "doubt.safetensors").unlink()  # as earlier versions left it
    code, _, err = command("describe", pictures, "--run", run.folder, "--out", tmp_path / "q.csv")
    assert code == 0 and "cannot tell which images are unlike all that it knows; finetune, run again, adds that" in err
    old = pd.read_csv(tmp_path / "q.csv", keep_default_na=False)
    assert set(old["source"]) == {"checkpoint", ""} and set(old["familiar"]) == {""}


def test_the_prompt_in_the_file_comes_first(trained, tmp_path, shown, command):
    run, pictures = trained
    folder = tmp_path / "written"
    programs = written.write_all(folder, "a castle on a hill, (masterpiece:1.2)")
    shutil.copyfile(next(pictures.glob("*.png")), folder / "z.png")
    code, said, err = command("describe", folder, "--run", tmp_path / "none", "--out", tmp_path / "p.csv")
    assert code == 0 and not said and shown == ["z.png"] and not (tmp_path / "none").exists(), err
    assert f"{len(programs)} prompts from their files" in err
    table = pd.read_csv(tmp_path / "p.csv", keep_default_na=False).set_index("image")
    for file, generator in programs.items():
        row = table.loc[str(file)]
        assert (row["prompt"], row["source"]) == ("a castle on a hill, (masterpiece:1.2)", "file")
        assert (row["generator"], str(row["seed"]), row["familiar"]) == (generator, str(written.SEED), "")
    assert table.loc[str(folder / "a1111.png"), ["negative_prompt", "model"]].tolist() == [
        written.NEGATIVE,
        written.MODEL,
    ]

    del shown[:]
    code, _, err = command("describe", folder, "--run", run.folder, "--ignore-file", "--out", tmp_path / "q.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "q.jsonl").read_text().splitlines()]
    assert code == 0 and len(shown) == len(rows) == len(programs) + 1
    assert not {row["source"] for row in rows} & {"file"}
    code, said, _ = command("describe", folder, "--no-recursive", "--run", run.folder, "--prefix", "p: ")
    assert code == 0 and len(said.splitlines()) == sum(file.parent == folder for file in programs) + 1
    assert f"{folder / 'a1111.png'}\tp: a castle on a hill" in said


def test_the_prompt_in_the_file_needs_no_torch_and_no_second(tmp_path):
    file = written.png(tmp_path / "a.png", {"parameters": written.automatic1111("a fox")})
    code = (
        "import sys; from image_to_prompts.cli import main\n"
        f"main(['describe', {str(file)!r}])\n"
        "assert not {'torch', 'transformers', 'polars', 'sklearn'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout == f"{file}\ta fox\n" and "1 prompts from their files" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


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
        "neighbours": lambda: predictors.load(small_embeddings),
        "classes": lambda: predictors.Predictor(np.zeros(384), [encoders.build("classes", 224)]),
    }[kind]()
    viewing = predictors.Viewing(("whole", "mirror"))

    def seen(files):
        return predictors.predict(predictor, files, viewing).vectors

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
    assert found.prompt == describe(path, run=run.folder).prompt == describe(path.read_bytes(), run=run.folder).prompt
    carried = written.png(path.with_name("carried.png"), {"prompt": "a fox"})
    with Image.open(carried) as image:
        some = describe([image, path, str(pictures / "damaged.png"), carried.read_bytes()], run=run.folder)
    assert [one.prompt for one in some] == ["a fox", found.prompt, "", "a fox"] and "cannot be read" in some[2].error
    assert describe([], run=run.folder) == []


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
    with pytest.raises(UserError, match=r"is a folder; describe takes images"):
        describe(pictures, run=run.folder)
    for odd in (7, None, {"a": 1}, [7]):
        with pytest.raises(UserError, match="give a path, bytes, a PIL image, or a list of them"):
            describe(odd, run=run.folder)
    with pytest.raises(UserError, match=r"none\.png: no such file or folder; correct it$"):
        describe(pictures / "none.png", run=run.folder)


def test_broken_images_and_files_that_stay_are_named_once(trained, command):
    run, pictures = trained
    (pictures / "torn.png").write_bytes(b"")
    own = next(path for path in sorted(pictures.glob("*.png")) if path.name not in ("damaged.png", "torn.png"))
    own.with_suffix(".txt").write_text("mine")
    code, _, err = command("describe", pictures, "--run", run.folder, "--txt", "--recompute")
    assert code == 0, err
    for name in ("damaged.png", "torn.png", own.with_suffix(".txt").name):
        assert sum(name in line for line in err.splitlines()) == 1, (name, err)
