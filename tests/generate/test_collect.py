"""Readers of public sources in their native formats, and what collects their prompts."""

import contextlib
import gzip
import json
import logging
import os
import subprocess
import sys
import zipfile

import numpy as np
import pandas as pd
import polars as pl
import pytest
import written_images as written
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from image_to_prompts import embed, generate
from image_to_prompts.data import images, metadata
from image_to_prompts.encode import embeddings
from image_to_prompts.generate import collect, formats, readers
from image_to_prompts.models import hub
from image_to_prompts.run import archives
from image_to_prompts.run.errors import UserError
from image_to_prompts.training import dataset


def read(source, path, column="prompt"):
    reading = readers.Reading(path, {column: "prompt"})
    blocks = list(readers.SOURCES[source].read(reading))
    return (pl.concat(blocks) if blocks else None), reading.broken


@pytest.fixture
def collected(tmp_path):
    """Collects from files; returns the rows and the report by rule."""

    def run(source, *files, **options):
        out = tmp_path / "out.csv"
        report = collect.collect(source, tuple(map(str, files)), out, **options)
        return metadata.read(out), report.set_index("rule")

    return run


def diffusiondb_metadata(path, count=6):
    """DiffusionDB's own schema."""
    prompts = [f"a wide painting of {number} red foxes in snow" for number in range(count)]
    columns = {
        "image_name": [f"{number:08x}-aaaa.png" for number in range(count)],
        "prompt": prompts,
        "part_id": pl.Series([1] * count, dtype=pl.UInt16),
        "seed": pl.Series([4_294_967_290 - number for number in range(count)], dtype=pl.UInt32),
        "step": pl.Series([50] * count, dtype=pl.UInt16),
        "cfg": pl.Series([7.0] * count, dtype=pl.Float32),
        "sampler": pl.Series([8] * count, dtype=pl.UInt8),
        "width": pl.Series([512] * count, dtype=pl.UInt16),
        "height": pl.Series([512] * (count - 1) + [1024], dtype=pl.UInt16),
        "user_name": ["x"] * count,
        "timestamp": pl.Series([0] * count, dtype=pl.Datetime("us", "UTC")),
        "image_nsfw": pl.Series([0.1] * (count - 2) + [2.0, 0.1], dtype=pl.Float32),
        "prompt_nsfw": pl.Series([0.0] * count, dtype=pl.Float32),
    }
    pl.DataFrame(columns).write_parquet(path)
    return prompts


def test_diffusiondb(tmp_path, collected):
    prompts = diffusiondb_metadata(tmp_path / "metadata.parquet")
    frame, report = collected("diffusiondb", tmp_path / "metadata.parquet")
    assert list(frame.columns) == list(collect.COLUMNS)
    assert frame["prompt"].tolist() == prompts[:4]
    assert frame["image_name"][0] == frame["source_id"][0] == "00000000-aaaa.png"
    assert frame["seed"][0] == 4_294_967_290 and set(frame["source"]) == {"diffusiondb"}
    assert report.loc["size", "dropped"] == 1 and report.loc["nsfw", "dropped"] == 1


def part(folder, count=3, **changes):
    """A part of DiffusionDB, as a zip file."""
    path, records = folder / "part-000007.zip", {}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(count):
            name = f"{number}f47c66c.png"
            records[name] = {"p": f"fox number {number}", "se": 100 + number, "c": 7.0, "st": 50, "sa": "k_lms"}
            image = folder / name
            Image.new("RGB", (24, 16), (40 * number, 0, 0)).save(image)
            archive.write(image, name)
            image.unlink()
        archive.writestr("part-000007.json", json.dumps(records | changes))
    return path


def test_diffusiondb_parts_and_their_images(tmp_path, collected):
    path = part(tmp_path, gone={"p": "has no image", "se": 1})
    frame, report = collected("diffusiondb-parts", path)
    assert frame["seed"].tolist() == [100, 101, 102] and report.loc["broken", "dropped"] == 1
    folder = tmp_path / "folder" / "part-000007"
    with zipfile.ZipFile(path) as archive:
        archive.extractall(folder)
    again, _ = read("diffusiondb-parts", tmp_path / "folder")
    assert again["prompt"].to_list() == frame["prompt"].tolist()


def test_images_that_carry_their_prompts(tmp_path, collected, caplog):
    folder = tmp_path / "images"
    prompt = "a castle on a hill, (masterpiece:1.2), <lora:detail:0.8>, 8k"
    programs = written.write_all(folder, prompt)
    (folder / "beside").mkdir()
    for name in ("beside/a.png", "beside/b.jpg", "none.png", "empty.png", "odd\nname.png"):
        written.picture().save(folder / name)
    (folder / "beside" / "a.txt").write_text("a fox in the snow\n", encoding="utf-8-sig")
    (folder / "empty.txt").write_text(" \n")
    (folder / "comfy.txt").write_text("what the file says comes first")
    with caplog.at_level(logging.WARNING):
        rows, report = collected("images", folder)
    assert report.loc["broken", "dropped"] == 4 and "none.png: no prompt in it, and no .txt beside it" in caplog.text
    rows = rows.set_index("image_name")
    assert rows.loc["beside/a.png", ["prompt", "generator", "model"]].tolist() == ["a fox in the snow", "", ""]
    rows = rows.drop(index="beside/a.png")
    assert set(rows.index) == {file.relative_to(folder).as_posix() for file in programs}
    assert set(rows["prompt"]) == {"a castle on a hill, masterpiece, 8k"}  # by the rules
    assert set(rows["seed"]) == {written.SEED}
    assert {folder / name: generator for name, generator in rows["generator"].items()} == programs
    assert rows.loc["comfy.png", "model"] == written.MODEL
    table = dataset.load_metadata((tmp_path / "out.csv",), (folder,))
    assert len(table) == len(programs) + 1

    (folder / "none.txt").write_text("now it has one")
    again, _ = collected("images", folder)
    assert len(again) == len(programs) + 2


def test_conceptual_captions_in_both_orders(tmp_path, collected):
    three, twelve = tmp_path / "Train_GCC-training.tsv", tmp_path / "cc12m.tsv"
    three.write_text('a "red fox" in the snow\thttp://a/1.jpg\nno address here\na calm sea\thttps://a/2.jpg\n')
    twelve.write_text("http://a/3.jpg\tan owl in a tree\n")
    frame, report = collected("captions-tsv", three, twelve, name="cc")
    assert frame["prompt"].tolist() == ['a "red fox" in the snow', "a calm sea", "an owl in a tree"]
    assert frame["source_id"].tolist() == ["http://a/1.jpg", "https://a/2.jpg", "http://a/3.jpg"]
    assert set(frame["source"]) == {"cc"} and report.loc["broken", "dropped"] == 1
    assert frame["image_name"].tolist() == metadata.with_keys(frame[["prompt"]], three)["image_name"].tolist()


def test_laion_coco(tmp_path, collected):
    columns = {
        "URL": ["http://a/1", "http://a/2"],
        "TEXT": ["alt text", "other"],
        "top_caption": ["a painting of a red fox", "a photo of a calm sea"],
        "all_captions": [["x", "y"], ["z"]],
        "all_similarities": [[0.3, 0.2], [0.1]],
        "WIDTH": [512, 100],
        "HEIGHT": [512, 100],
        "similarity": [0.3, 0.2],
        "hash": [1, 2],
        "pwatermark": [0.1, 0.1],
        "punsafe": pl.Series([0.01, 0.99], dtype=pl.Float32),
    }
    pl.DataFrame(columns).write_parquet(tmp_path / "part-00000.parquet")
    frame, _ = collected("laion-coco", tmp_path / "part-00000.parquet")
    assert frame[["prompt", "source_id"]].to_numpy().tolist() == [["a painting of a red fox", "http://a/1"]]


def test_coco_and_vizwiz(tmp_path, collected):
    coco = {"info": {}, "images": [{"id": 9, "file_name": "9.jpg"}], "licenses": []}
    coco["annotations"] = [{"image_id": 9, "id": 48, "caption": "A red fox on a chair."}, {"image_id": 9, "id": 49}]
    flags = [(False, False), (True, False), (False, True)]
    vizwiz = {"images": [], "annotations": [
        {"caption": f"A can of {number} beans.", "image_id": 1, "id": number, "is_precanned": canned,
         "is_rejected": rejected, "text_detected": True}
        for number, (canned, rejected) in enumerate(flags)
    ]}  # fmt: skip
    (tmp_path / "captions_train2017.json").write_text(json.dumps(coco))
    (tmp_path / "val.json").write_text(json.dumps(vizwiz))
    frame, report = collected("captions-json", tmp_path / "captions_train2017.json", tmp_path / "val.json")
    assert frame["prompt"].tolist() == ["A red fox on a chair.", "A can of 0 beans."]
    assert report.loc["rejected", "dropped"] == 2 and report.loc["broken", "dropped"] == 1


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.json", "a.txt", "a.parquet", "a.csv.gz", "a.txt.gz"])
def test_any_table(tmp_path, name):
    texts = ["a red fox, asleep", 'an "owl"', "ein Fuchs\tmit ü"]
    path, kind = tmp_path / name, name.split(".")[1]
    written = {
        "csv": pd.DataFrame({"id": [1, 2, 3], "text": texts}).to_csv(index=False),
        "tsv": pd.DataFrame({"id": [1, 2, 3], "text": texts}).to_csv(index=False, sep="\t"),
        "jsonl": "\n".join(json.dumps({"text": text}) for text in texts),
        "json": json.dumps([{"text": text} for text in texts]),
        "txt": "\n".join(texts) + "\n\n",
    }
    if kind == "parquet":
        pl.DataFrame({"text": texts}).write_parquet(path)
    else:
        data = written[kind].encode()
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    frame, broken = read("table", path, "text")
    assert frame["prompt"].to_list() == texts and frame["source_id"].to_list() == ["1", "2", "3"] and not broken


def test_utf16_is_read_and_broken_rows_are_skipped(tmp_path, collected):
    (tmp_path / "a.txt").write_text("a red fox asleep\nan owl in a tree\n", encoding="utf-16")
    assert collected("table", tmp_path / "a.txt")[0]["prompt"].tolist() == ["a red fox asleep", "an owl in a tree"]
    (tmp_path / "b.csv").write_bytes(
        b'prompt,x\na red fox asleep,1\n\xff\xfe owl,2\na,b,c\n"a never ending,3\nan owl,4\n'
    )
    frame, broken = read("table", tmp_path / "b.csv")
    assert frame["prompt"].to_list() == ["a red fox asleep", "an owl"] and broken == 3
    (tmp_path / "d.csv").write_text('id,prompt\n1,a fox\n\n2,"an owl\n3,a bee\n4,a cat\n')
    frame, broken = read("table", tmp_path / "d.csv")
    assert frame["prompt"].to_list() == ["a fox", "a bee", "a cat"] and broken == 1
    (tmp_path / "e.tsv").write_text('prompt\tx\na fox\t1\n"starry night\t2\nan owl\t3\na "bee"\t4\na 5" cat\t5\n')
    frame, broken = read("table", tmp_path / "e.tsv")
    assert frame["prompt"].to_list() == ["a fox", "an owl", 'a "bee"', 'a 5" cat'] and broken == 1
    assert frame["source_id"].to_list() == ["1", "3", "4", "5"]
    (tmp_path / "c.jsonl").write_text('{"prompt": "a red fox"}\n{"prompt": 3}\n{"pro\n' + "[" * 9000 + "\n")
    frame, broken = read("table", tmp_path / "c.jsonl")
    assert frame["prompt"].to_list() == ["a red fox"] and broken == 3


def test_images_of_a_table_need_names_that_stages_take(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,file\na fox,https://x.org/a.png\nan owl,../b.png\na bee,c.png\n")
    reading = readers.Reading(tmp_path / "a.csv", {"prompt": "prompt", "file": "image_name"})
    assert pl.concat(readers.SOURCES["table"].read(reading))["prompt"].to_list() == ["a bee"] and reading.broken == 2


def test_repeats_and_limits(tmp_path, collected, monkeypatch):
    monkeypatch.setattr(formats, "BLOCK", 4)
    (tmp_path / "a.txt").write_text("\n".join(f"a red fox beside {number % 7} birds" for number in range(20)))
    frame, report = collected("table", tmp_path / "a.txt")
    assert frame["prompt"].tolist() == [f"a red fox beside {number} birds" for number in range(7)]
    assert report.loc["repeats", ["rows", "dropped"]].tolist() == [20, 13]
    assert len(collected("table", tmp_path / "a.txt", limit=5)[0]) == 5


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.sampled_from(["a red fox", "an owl", "a bee", "the sea", "a hut"]), min_size=1, max_size=40))
def test_the_first_of_equal_prompts_stays(tmp_path, monkeypatch, prompts):
    monkeypatch.setattr(formats, "BLOCK", 3)
    (tmp_path / "a.txt").write_text("\n".join(prompts))
    collect.collect("table", (str(tmp_path / "a.txt"),), tmp_path / "out.csv", rule_names=("unicode",))
    assert metadata.read(tmp_path / "out.csv")["prompt"].tolist() == list(dict.fromkeys(prompts))


def test_stopped_anywhere_and_started_again_it_ends_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "BLOCK", 5)
    (tmp_path / "a.txt").write_text("\n".join(f"a red fox beside {number % 17} birds" for number in range(40)))
    given_ = ("table", (str(tmp_path / "a.txt"),))
    collect.collect(*given_, tmp_path / "whole.csv")
    real, written = collect.write_block, []

    def torn(*arguments):
        real(*arguments)
        written.append(arguments[4].name)
        if len(written) % 2 == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(collect, "write_block", torn)
    for _ in range(9):
        try:
            collect.collect(*given_, tmp_path / "torn.csv")
            break
        except KeyboardInterrupt:
            continue
    assert len(written) == len(set(written)) == 8  # no block twice
    for name in ("{}.csv", "{}.rules.json"):
        assert (tmp_path / name.format("torn")).read_bytes() == (tmp_path / name.format("whole")).read_bytes()
    assert not list(tmp_path.glob(".torn.done-*"))
    real_read = collect.read_blocks
    monkeypatch.setattr(collect, "read_blocks", lambda *arguments: pytest.fail("read again"))
    collect.collect(*given_, tmp_path / "torn.csv")
    monkeypatch.setattr(collect, "read_blocks", real_read)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    st.sampled_from(["a.csv", "a.tsv", "a.jsonl", "a.json", "a.txt", "a.parquet", "a.csv.gz", "part-1.zip"]),
    st.one_of(
        st.binary(max_size=400),
        st.text('prompt,"\n\r\t\x00{}[]: é猫', max_size=200).map(lambda text: ("prompt\n" + text).encode("utf-16")),
        st.text('prompt,"\n\r\t\x00{}[]: é猫', max_size=200).map(lambda text: ("prompt,x\n" + text).encode()),
        st.lists(st.text(max_size=20)).map(lambda texts: json.dumps([{"prompt": text} for text in texts]).encode()),
        st.lists(st.text(max_size=20)).map(lambda texts: "\n".join(json.dumps({"prompt": t}) for t in texts).encode()),
    ),
    st.sampled_from(list(readers.SOURCES)),
    st.sampled_from([(), ("words",), ("short", "html"), ("unicode",)]),
)
@example("a.csv", "prompt\nan owl\0\n".encode("utf-16"), "table", ("short", "html"))
def test_whatever_is_in_a_file_there_is_one_clear_line(tmp_path, name, data, source, rule_names):
    path = tmp_path / name
    path.write_bytes(data)
    out = tmp_path / "out.csv"
    try:
        collect.collect(source, (str(path),), out, rule_names=rule_names)
        assert len(metadata.read(out)) == len(pl.read_csv(out))  # what any later stage takes
    except UserError as error:
        assert "\n" not in str(error) and name in str(error) and "run" not in str(error)


def test_huge_fields_end(tmp_path):
    endless = "a " * 123_456
    (tmp_path / "a.csv").write_text(f"prompt,x\n{endless},1\nan owl in a tree,2\n")
    (tmp_path / "a.txt").write_text(f"a fox\n{endless}\nan owl in a tree\n")
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": endless}) + '\n{"prompt": "an owl in a tree"}\n')
    for name, before in (("a.csv", []), ("a.txt", ["a fox"]), ("a.jsonl", [])):
        frame, broken = read("table", tmp_path / name)
        assert frame["prompt"].to_list() == [*before, "an owl in a tree"] and broken == 1
    assert frame["source_id"].to_list() == ["2"]


def test_what_cannot_be_used_is_refused(tmp_path, refused):
    (tmp_path / "a.csv").write_text("text\na fox\n")
    (tmp_path / "a.xyz").write_text("text\na fox\n")
    pl.DataFrame({"prompt": [1, 2]}).write_parquet(tmp_path / "a.parquet")
    words = ["generate", "--run", tmp_path / "r", "--out", tmp_path / "o.csv", "--source"]
    refused([*words, "table"], "--source table: no input; give --input FILE")
    refused([*words, "table", "--input", tmp_path / "none.csv"], "no such file or folder; correct --input")
    refused([*words, "table", "--input", tmp_path / "a.csv"], "no column 'prompt', found text; give --prompt-column")
    refused([*words, "table", "--input", tmp_path / "a.xyz"], "ends with none of .csv")
    refused([*words, "table", "--input", tmp_path / "a.parquet"], "the prompts are Int64, not text")
    refused([*words, "diffusiondb", "--input", tmp_path / "a.parquet"], "no column 'image_name'")
    refused([*words, "captions-json", "--input", tmp_path / "a.csv"], "not JSON")
    refused([*words, "diffusiondb-parts", "--input", tmp_path], "no part-*.zip and no part-*.json in it")
    refused(
        [*words, "grammar", "--input", tmp_path / "a.csv"], "grammar writes new prompts; give --source diffusiondb, "
    )
    refused(
        [*words, "table", "--input", tmp_path / "a.csv", "--prompt-column", "text", "--rules", "nap"], "no such rule"
    )
    (tmp_path / "a.txt").write_text("a fox\n")
    refused([*words, "table", "--input", tmp_path / "a.txt", "--image-column", "file"], "a text file has no columns")
    refused(
        [*words, "table", "--input", tmp_path / "a.csv", "--prompt-column", "x", "--image-column", "x"], "give another"
    )
    refused([*words, "laion-coco", "--input", tmp_path / "a.parquet", "--prompt-column", "x"], "has columns of its own")
    (tmp_path / "pictures").mkdir()
    for source in ("images", "pairs"):
        refused([*words, source, "--input", tmp_path / "pictures", tmp_path], "takes one folder")
        refused([*words, source, "--input", tmp_path], "lies in the folder that is read; choose another --out")
    refused([*words, "table", "--input", "hf://datasets/x"], "must be hf://datasets/<owner>/<name>/<path>")


def test_files_on_the_hub(tmp_path, monkeypatch):
    import huggingface_hub

    asked = []

    def download(repository, file, repo_type):
        asked.append((repository, file, repo_type))
        return str(tmp_path / file)

    class FileSystem:
        def glob(self, pattern):
            assert pattern == "datasets/owner/name/data/*.parquet"
            return ["datasets/owner/name/data/b.parquet", "datasets/owner/name/data/a.parquet"]

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "HfFileSystem", FileSystem)
    assert hub.dataset_files("hf://datasets/owner/name/metadata.parquet") == [tmp_path / "metadata.parquet"]
    found = hub.dataset_files("hf://datasets/owner/name/data/*.parquet")
    assert [path.name for path in found] == ["a.parquet", "b.parquet"]
    assert asked[0] == ("owner/name", "metadata.parquet", "dataset")

    def unreachable(*_, **__):
        raise OSError("cannot reach\nthe hub")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    with pytest.raises(UserError, match="cannot reach the hub; download it where the hub can be reached"):
        hub.dataset_files("hf://datasets/owner/name/metadata.parquet")


def test_the_hub_cannot_be_reached_for_many_files(tmp_path):
    code = "import sys; from image_to_prompts.models import hub; hub.dataset_files(sys.argv[1])"
    environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9"}
    words = [sys.executable, "-c", code, "hf://datasets/owner/name/data/*.parquet"]
    said = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=600).stderr.splitlines()[-1]
    assert "UserError: hf://datasets/owner/name/data/*.parquet" in said and "give --input FILE" in said


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.sampled_from(["a.txt.gz", "a.parquet", "part-000007.zip"]), st.data())
def test_a_few_flipped_bytes_never_end_in_a_traceback(tmp_path, name, data):
    path = tmp_path / name
    if name == "a.txt.gz":
        path.write_bytes(gzip.compress("\n".join(f"a red fox beside {n} birds" for n in range(400)).encode()))
    elif name == "a.parquet":
        pl.DataFrame({"prompt": [f"a red fox beside {n} birds" for n in range(400)]}).write_parquet(path)
    else:
        part(tmp_path)
    content = bytearray(path.read_bytes())
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=20)):
        content[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    source = "diffusiondb-parts" if name.endswith(".zip") else "table"
    try:
        collect.collect(source, (str(path),), tmp_path / "out.csv")
        metadata.read(tmp_path / "out.csv")
    except UserError as error:
        assert "\n" not in str(error)
    if name.endswith(".zip"):
        with contextlib.suppress(UserError):
            for image in images.find(tmp_path):
                with contextlib.suppress(images.BrokenImageError):
                    images.read(image)


def test_odd_values_are_skipped_or_missing(tmp_path, collected):
    path = part(tmp_path, 2, **{"x.png": []})
    for odd in ("abc", [], 1e300, 2**70, -1, None):
        records = {"0f47c66c.png": {"p": "fox \ud83d number", "se": odd}}
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("0f47c66c.png", b"")
            archive.writestr("p.json", json.dumps(records))
        frame, _ = collected("diffusiondb-parts", path)
        assert frame["prompt"].tolist() == ["fox number"] and frame["seed"][0] < 2**31
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("p.json", "[]")
    with pytest.raises(UserError, match="no prompt is left"):
        collected("diffusiondb-parts", path)
    diffusiondb_metadata(tmp_path / "m.parquet", 8)
    table = pl.read_parquet(tmp_path / "m.parquet").with_columns(
        pl.col("seed").cast(pl.Float64),
        image_name=pl.Series(["a.png", "..", "b/c.png", None, " ", "a.png", "d.png", "e.png"]),
        image_nsfw=pl.Series([float("nan")] * 8),
        width=pl.lit(512),
        height=pl.lit(512),
    )
    table.write_parquet(tmp_path / "m.parquet")
    frame, report = collected("diffusiondb", tmp_path / "m.parquet")
    assert frame["image_name"].tolist() == ["a.png", "d.png", "e.png"]
    assert report.loc["broken", "dropped"] == 4 and report.loc["repeats", "dropped"] == 1


def test_a_part_that_comes_later_is_collected_too(tmp_path, collected):
    folder = tmp_path / "parts" / "images"
    folder.mkdir(parents=True)
    part(folder)
    assert len(collected("diffusiondb-parts", tmp_path / "parts")[0]) == 3
    os.utime(tmp_path / "parts", (1, 1))
    (folder / "part-000007.zip").rename(folder / "part-000008.zip")
    part(folder, 5)
    assert len(collected("diffusiondb-parts", tmp_path / "parts")[0]) == 5


def test_nothing_is_left_of_a_block(tmp_path, collected, monkeypatch):
    monkeypatch.setattr(formats, "BLOCK", 2)
    (tmp_path / "a.txt").write_text("NULL\n123\nnan\nein roter Fuchs sitzt auf einem Stuhl\na red fox on a chair\n")
    assert collected("table", tmp_path / "a.txt")[0]["prompt"].tolist() == ["a red fox on a chair"]


def test_own_rules_through_the_command_line(tmp_path, command, refused):
    (tmp_path / "a.txt").write_text("a red fox\nan owl\n")
    own = tmp_path / "own.py"
    own.write_text("def shout(frame):\n    return frame['prompt'].str.to_uppercase()\n"
                   "def lazily(frame):\n    import polars\n    return polars.col('prompt')\n"
                   "def not_a_number(frame):\n    return frame['prompt'].str.replace('an owl', 'NaN')\n")  # fmt: skip
    words = ["generate", "--run", tmp_path / "r", "--source", "table", "--input", tmp_path / "a.txt", "--out"]
    assert command(*words, tmp_path / "o.csv", "--rules", "unicode", f"{own}:shout")[0] == 0
    assert metadata.read(tmp_path / "o.csv")["prompt"].tolist() == ["A RED FOX", "AN OWL"]
    assert command(*words, tmp_path / "o.csv", "--rules", f"{own}:not_a_number")[0] == 0
    assert metadata.read(tmp_path / "o.csv")["prompt"].tolist() == ["a red fox"]
    refused([*words, tmp_path / "o.csv", "--rules", f"{own}:lazily"], "a rule returns a Series, not Expr")
    (tmp_path / "own.csv").write_text("prompt\na red fox asleep\n")
    read_here = ["generate", "--run", tmp_path / "r", "--source", "table", "--input", tmp_path / "own.csv"]
    refused([*read_here, "--out", tmp_path / "own.csv"], "is read here; choose another --out")
    refused(["generate", "--run", tmp_path / "r", "--limit", 3], "grammar writes new prompts")


def test_the_command_line_knows_all_sources():
    assert set(generate.get_args(generate.Sources)) == set(readers.SOURCES)
    for source in readers.SOURCES.values():
        assert set(source.rules) <= set(collect.rules.RULES)


def test_parts_are_image_folders_too(tmp_path):
    path = part(tmp_path)
    frame = pd.DataFrame({"image_name": ["0f47c66c.png", "2f47c66c.png", "gone.png"], "prompt": ["a", "b", "c"]})
    metadata.write_table(tmp_path / "m.csv", frame)
    found = dataset.load_metadata((tmp_path / "m.csv",), (tmp_path,))
    assert found["path"].tolist() == [path / "0f47c66c.png", path / "2f47c66c.png"]
    assert images.read(path / "2f47c66c.png").getpixel((3, 3)) == (80, 0, 0)
    assert archives.stat(path / "2f47c66c.png")[0] == len(archives.read(path / "2f47c66c.png"))
    data = bytearray(path.read_bytes())
    data[60:90] = bytes(30)
    path.write_bytes(data)
    with pytest.raises(images.BrokenImageError):
        images.read(path / "0f47c66c.png")
    path.write_bytes(data[:-40])
    with pytest.raises(UserError, match="not a whole archive"):
        images.find(tmp_path)
    path.rename(tmp_path / "other.zip")
    with pytest.raises(UserError, match="no images"):
        images.find(tmp_path)


def test_real_pairs_are_embedded_like_rendered_ones(tmp_path, collected):
    (tmp_path / "parts").mkdir()
    part(tmp_path / "parts")
    frame, _ = collected("diffusiondb-parts", tmp_path / "parts")
    settings_ = {"encoders": ("timm:tf_efficientnet_lite0",), "image_size": 64}
    config = embed.Config(
        images=(tmp_path / "parts",), metadata=(tmp_path / "out.csv",), out=tmp_path / "e", **settings_
    )
    assert embed.run(config)["timm-tf_efficientnet_lite0"] == (3, 1280)
    table = embeddings.load(tmp_path / "e")
    assert table.frame["prompt"].tolist() == frame["prompt"].tolist()
    assert (
        np.abs(table.arrays["timm-tf_efficientnet_lite0"][0] - table.arrays["timm-tf_efficientnet_lite0"][2]).max() > 0
    )


def test_metadata_of_several_files_is_merged(tmp_path, caplog):
    caplog.set_level("INFO", "image_to_prompts")
    logging.getLogger("image_to_prompts").propagate = True
    (tmp_path / "sd2_meta_hard_filter.csv").write_text("image_name,prompt\na.png,a fox\nb.png,an owl\na.png,a fox\n")
    (tmp_path / "own.csv").write_text("image_name,prompt,source\nb.png,an owl,x\nc.png,a fox,y\n")
    found = dataset.load_metadata((tmp_path / "sd2_meta_hard_filter.csv", tmp_path / "own.csv"))
    assert found["image_name"].tolist() == ["a.png", "b.png", "c.png"]
    assert found["source"].tolist() == ["sd2_meta_hard_filter", "sd2_meta_hard_filter", "y"]
    assert "1 rows repeat an image_name (a.png, ...)" in caplog.text
    assert "own.csv: 1 rows stand in an earlier file" in caplog.text
    assert "3 rows of 2 prompts, sd2_meta_hard_filter 66.7 %, y 33.3 %" in caplog.text
    for name in ("a", "c"):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    with pytest.raises(UserError, match="2 files, --images 3 folders"):
        dataset.load_metadata((tmp_path / "own.csv",) * 2, (tmp_path,) * 3)
    assert len(dataset.load_metadata((tmp_path / "own.csv",), (tmp_path,))) == 1
    assert "row 1: no image of b.png" in caplog.text and "(1 of 2 rows have none and were left out)" in caplog.text


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=40), st.integers(1, 9))
def test_rows_repeat_no_key_of_a_row_that_stayed(rows, size):
    seen, kept, expected = collect.Seen(("prompt", "image_name")), [], []
    for start in range(0, len(rows), size):
        frame = pl.DataFrame(rows[start : start + size], ["prompt", "image_name"], orient="row").cast(pl.String)
        first, hashes = seen.first(frame)
        kept += frame.filter(pl.Series(first)).rows()
        seen.add(hashes[:, first])
    for row in ((str(one), str(other)) for one, other in rows):
        if all(row[0] != one and row[1] != other for one, other in expected):
            expected.append(row)
    assert kept == expected


def test_metadata_may_be_given_as_one_path_or_as_text(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("image_name,prompt\na.png,a fox\n")
    for given_ in (path, str(path), [str(path)], (path,)):
        assert dataset.load_metadata(given_)["prompt"].tolist() == ["a fox"]
    with pytest.raises(UserError, match=r"none\.csv: no such file"):
        dataset.load_metadata("none.csv")
    with pytest.raises(UserError, match="paths of CSVs"):
        dataset.load_metadata(7)
