import json
import shutil
import subprocess
import sys

import pandas as pd
import pytest
from PIL import Image

from image_to_prompts import describer, profiles, workspace
from image_to_prompts.errors import UserError


@pytest.fixture
def trained(trained_run, small_run, tmp_path):
    """A run with a checkpoint and known prompts, and a folder of seven images, one of them damaged."""
    run = workspace.Run(shutil.copytree(trained_run.folder, tmp_path / "run"))
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
    found = describer.run(config(run, pictures, out=tmp_path / "p.csv", top=3))
    table = pd.read_csv(tmp_path / "p.csv", keep_default_na=False)
    assert len(found) == len(table) == 7 and list(table["image"]) == [str(one.path) for one in found]
    good = [one for one in found if not one.error]
    assert len(good) == 6 and all(one.prompt and one.cosine >= one.nearest[0][1] - 0.01 for one in good)
    assert all(len(one.nearest) == 3 and one.nearest[0][1] >= one.nearest[1][1] for one in good)
    (broken,) = [one for one in found if one.error]
    assert broken.path.name == "damaged.png" and broken.prompt == "" and "cannot be read" in broken.error
    assert list(table.columns)[:3] == ["image", "prompt", "cosine"] and "cosine_3" in table

    describer.run(config(run, pictures, out=tmp_path / "p.jsonl", top=3))
    rows = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == list(table["prompt"]) and len(rows[1]["nearest"]) == 3


def test_what_is_done_is_not_done_again(trained, tmp_path, monkeypatch):
    run, pictures = trained
    seen = []
    describe = describer.Describer.describe
    monkeypatch.setattr(
        describer.Describer, "describe", lambda self, files: seen.extend(files) or describe(self, files)
    )
    first = describer.run(config(run, pictures))
    assert len(seen) == 7
    assert describer.run(config(run, pictures, out=tmp_path / "p.csv")) == first and len(seen) == 7
    Image.new("RGB", (64, 64), "red").save(pictures / "new.png")
    assert len(describer.run(config(run, pictures))) == 8 and [path.name for path in seen[7:]] == ["new.png"]
    describer.run(config(run, pictures, top=2))
    assert len(seen) == 16


def test_a_text_file_of_the_user_stays(trained, caplog):
    run, pictures = trained
    images = sorted(pictures.glob("*.png"))
    own = images[0].with_suffix(".txt")
    own.write_text("mine\n")
    found = {one.path: one for one in describer.run(config(run, pictures, txt=True))}
    assert own.read_text() == "mine\n" and "1 .txt files are not from here" in caplog.text
    other = next(path for path in images[1:] if path.name != "damaged.png")
    assert other.with_suffix(".txt").read_text() == found[other].prompt + "\n"
    assert not (pictures / "damaged.txt").exists()

    other.with_suffix(".txt").write_text("edited\n")
    describer.run(config(run, pictures, txt=True))
    assert other.with_suffix(".txt").read_text() == "edited\n"
    describer.run(config(run, pictures, txt=True, no_artists=True))  # ours, so replaced; edited ones stay
    assert other.with_suffix(".txt").read_text() == "edited\n"
    describer.run(config(run, pictures, txt=True, overwrite=True))
    assert other.with_suffix(".txt").read_text() == found[other].prompt + "\n"
    assert own.read_text() == found[images[0]].prompt + "\n"


def test_a_table_of_the_user_stays(trained, tmp_path):
    run, pictures = trained
    out = tmp_path / "p.csv"
    describer.run(config(run, pictures, out=out))
    describer.run(config(run, pictures, out=out))
    out.write_text(out.read_text() + "\n")
    with pytest.raises(UserError, match="--overwrite"):
        describer.run(config(run, pictures, out=out))
    describer.run(config(run, pictures, out=out, overwrite=True))
    assert len(pd.read_csv(out)) == 7


def test_without_a_checkpoint_the_interrogator_speaks(trained, tmp_path, caplog):
    _, pictures = trained
    bare = workspace.open_run(tmp_path / "bare", "embedded")
    found = [one for one in describer.run(config(bare, pictures)) if not one.error]
    assert len(found) == 6 and all(one.prompt.count(",") >= 7 and one.cosine is None for one in found)
    assert "image-to-prompts run" in caplog.text
    reference = profiles.default_config("describe", bare, "kaggle", paths=(pictures,))
    with pytest.raises(UserError, match=r"finetune makes one.*blip"):
        describer.run(reference)


def test_mistakes_get_one_line(trained, refused, tmp_path):
    run, pictures = trained
    flags = ["--run", run.folder]
    refused(["describe", *flags], "give image files or folders")
    refused(["describe", tmp_path / "none.png", *flags], "none.png", "no such file")
    refused(["describe", run.metadata, *flags], "not an image")
    refused(["describe", pictures, "--out", "p.xlsx", *flags], "--out", ".csv")
    refused(["describe", pictures, "--top", "0", *flags], "--top 0")
    refused(["describe", pictures, "--prompts", tmp_path / "none.csv", *flags], "none.csv", "no such file")
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
        "import image_to_prompts.describer\n"
        "assert found.vector.shape == (384,) and callable(describe)\n"
        f"try: describe({str(pictures / 'damaged.png')!r}, run={str(run.folder)!r})\n"
        "except Exception as error: print('refused', type(error).__name__)\n"
        "print(found.prompt)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("refused UserError") and len(done.stdout.split()) > 2
