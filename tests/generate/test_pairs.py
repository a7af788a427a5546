"""Images with tables of their prompts, in the layouts of others."""

import shutil

import pair_sets
import pandas as pd
import pytest
from PIL import Image

from image_to_prompts import generate
from image_to_prompts.data import images, metadata
from image_to_prompts.run import archives
from image_to_prompts.run.errors import UserError
from image_to_prompts.training import dataset


@pytest.fixture
def rows(tmp_path):
    """Twelve pictures of a colour each, and their prompts."""
    found = []
    for number in range(12):
        path = tmp_path / "made" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (20 * number, 0, 0)).save(path)
        found.append((path, f"a picture of {number} red things, oil on canvas"))
    return found


def collect(folder, **more):
    out = folder.parent / f"{folder.name}.csv"
    report = generate.run(generate.Config(source="pairs", input=(str(folder),), out=out, quiet=True, **more))
    return metadata.read(out), report


LAYOUTS = [*dict.fromkeys([*pair_sets.SETS.values(), pair_sets.inside])]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda one: one.__name__)
def test_every_row_gets_its_own_picture(layout, rows, tmp_path):
    layout(tmp_path / "set", rows)
    frame, _ = collect(tmp_path / "set")
    assert sorted(frame["prompt"]) == sorted(prompt for _, prompt in rows)
    loaded = dataset.load_metadata(tmp_path / "set.csv", tmp_path / "set")
    red = {prompt: 20 * number for number, (_, prompt) in enumerate(rows)}
    for path, prompt in zip(loaded["path"], loaded["prompt"], strict=True):
        assert images.read(path).getpixel((0, 0))[0] == red[prompt]
    assert frame["model"].eq("unknown").all()


def test_what_a_table_says_of_model_sampler_and_seed_is_kept(rows, tmp_path):
    pair_sets.inside(tmp_path / "set", rows)
    frame, _ = collect(tmp_path / "set")
    assert frame["sampler"].eq("k_lms").all() and frame["seed"].tolist() == list(range(12))
    pair_sets.json_lines(tmp_path / "sd2gpt2", rows)
    frame, _ = collect(tmp_path / "sd2gpt2")
    assert frame["model"].eq("Stable Diffusion 2").all() and frame["seed"].eq(7).all()


def test_rows_without_a_picture_and_foreign_tables_are_told(rows, tmp_path, caplog):
    pair_sets.relative(tmp_path / "set", rows)
    (tmp_path / "set" / "images" / "0" / "custom_0_4.png").unlink()
    pd.DataFrame({"a": [1]}).to_csv(tmp_path / "set" / "other.csv", index=False)
    frame, report = collect(tmp_path / "set")
    assert len(frame) == 11 and report["dropped"][0] == 1
    assert "row 5: no image of this row" in caplog.text and "left out" in caplog.text and "other.csv (a)" in caplog.text


@pytest.mark.parametrize(
    ("columns", "said"), [({"a": ["x"], "b": ["y"]}, "name its columns"), ({"prompt": ["x"]}, "name its columns")]
)
def test_a_folder_that_says_no_pairs_is_refused_in_one_line(columns, said, rows, tmp_path, refused):
    (tmp_path / "set").mkdir()
    shutil.copy(rows[0][0], tmp_path / "set" / "one.png")
    pd.DataFrame(columns).to_csv(tmp_path / "set" / "table.csv", index=False)
    with pytest.raises(UserError, match=said) as error:
        collect(tmp_path / "set")
    assert "\n" not in str(error.value) and "table.csv" in str(error.value)


def test_a_folder_may_count_from_one(rows, tmp_path):
    pair_sets.numbered(tmp_path / "set", rows)
    folder = tmp_path / "set" / "gpt_generated_images" / "gpt_generated_images"
    for number in reversed(range(12)):
        (folder / f"{number}.png").rename(folder / f"{number + 1}.png")
    frame, _ = collect(tmp_path / "set")
    assert frame.set_index("prompt")["image_name"][rows[0][1]].endswith("/1.png") and len(frame) == 12


def test_of_several_numbered_folders_the_one_called_like_the_table_counts(rows, tmp_path, caplog):
    pair_sets.numbered(tmp_path / "set", rows)
    shutil.copytree(tmp_path / "made", tmp_path / "set" / "gpt_others")
    frame, _ = collect(tmp_path / "set")
    assert frame["image_name"].str.startswith("gpt_generated_images/").all() and len(frame) == 12
    shutil.copytree(tmp_path / "made", tmp_path / "set" / "gpt_generated_more")
    with pytest.raises(UserError, match="name its columns"):
        collect(tmp_path / "set", name="again")  # which of two is not known


def test_pictures_in_a_parquet_file_are_read_in_any_order(rows, tmp_path):
    pair_sets.inside(tmp_path / "set", rows)
    found = images.find(tmp_path / "set")
    assert [path.name for path in found[:2]] == ["0000000.png", "0000001.png"] and len(found) == 12
    for number in (7, 0, 11, 3):
        assert images.read(found[number]).getpixel((0, 0)) == (20 * number, 0, 0)
        assert archives.stat(found[number])[0] == rows[number][0].stat().st_size
    pd.DataFrame({"prompt": ["a"]}).to_parquet(tmp_path / "made" / "metadata.parquet")
    assert len(images.find(tmp_path / "made")) == 12, "a table of prompts holds no images"


def test_a_table_of_ones_own_images_keeps_their_names(rows, tmp_path):
    names = [f"sub/IMG_{number}.jpg" for number in range(12)]
    table = pd.DataFrame({"filename": names, "caption": [prompt for _, prompt in rows]})
    table.to_csv(tmp_path / "my.csv", index=False)
    how = {"prompt_column": "caption", "image_column": "filename"}
    given = generate.Config(source="table", input=(str(tmp_path / "my.csv"),), out=tmp_path / "m.csv", **how)
    generate.run(given)
    assert metadata.read(tmp_path / "m.csv")["image_name"].tolist() == names
    frame = dataset.load_metadata(tmp_path / "my.csv", (), {"image_name": "filename", "prompt": "caption"})
    assert frame["image_name"].tolist() == names and frame["prompt"].tolist() == [prompt for _, prompt in rows]


def test_a_picture_that_comes_later_is_collected_too(rows, tmp_path):
    pair_sets.relative(tmp_path / "set", rows)
    (moved, *_) = sorted((tmp_path / "set").rglob("*.png"))
    moved.rename(tmp_path / moved.name)
    assert len(collect(tmp_path / "set")[0]) == len(rows) - 1
    (tmp_path / moved.name).rename(moved)
    assert len(collect(tmp_path / "set")[0]) == len(rows)


def test_the_column_of_the_prompts_may_be_chosen(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "made.png")
    (tmp_path / "set").mkdir()
    shutil.move(tmp_path / "made.png", tmp_path / "set" / "a.png")
    (tmp_path / "set" / "t.csv").write_text(
        "file_name,prompt,recaption\na.png,short one here,a long one of red foxes\n"
    )
    assert collect(tmp_path / "set")[0]["prompt"].tolist() == ["short one here"]
    assert collect(tmp_path / "set", prompt_column="Recaption")[0]["prompt"].tolist() == ["a long one of red foxes"]
    with pytest.raises(UserError, match="no table of prompts"):
        collect(tmp_path / "set", prompt_column="none")
