"""data_meta: the catalogue and its commands, the committed prompts, and what describes their columns."""

import json
import shlex
from pathlib import Path

import pandas as pd
import pytest

from image_to_prompts import cli, profiles
from image_to_prompts.data import catalogue, metadata
from image_to_prompts.generate import rules
from image_to_prompts.generate.collect import SOURCES
from image_to_prompts.training import dataset

DATA = Path(__file__).parents[2] / "data_meta"
REFERENCE = {
    *("sd2_meta_211k_filter.csv", "sd2_meta_540k_part1.csv", "sd2_meta_540k_part2.csv", "sd2_meta_cc660k_part1.csv"),
    *("sd2_meta_cc660k_part2.csv", "sd2_meta_hard_filter.csv", "sd2_meta_laioncoco_p1.csv"),
    *("sd2_meta_laioncoco_p2.csv", "sd2_meta_pszemraj.csv"),
}


@pytest.fixture(scope="module")
def listed():
    return catalogue.read(DATA)


def test_the_references_nine_and_every_source_are_listed(listed):
    assert set(listed.loc[listed["reference"] == "yes", "file"]) == REFERENCE
    assert set(listed["reference"]) == {"yes", "no"} and listed["file"].is_unique
    assert all(listed[["source", "where", "licence", "generate"]].ne("").all())
    assert pd.to_numeric(listed["rows"]).dropna().gt(0).all()
    assert all(f"--source {source}" in " ".join(listed["generate"]) for source in SOURCES)


def test_the_commands_are_ours_and_lead_to_the_file(listed):
    for row in listed.to_dict("records"):
        written = set()
        for command in row["generate"].split(" && "):
            program, *words = shlex.split(command)
            assert (program, words[0]) == ("image-to-prompts", "generate")
            config = cli.parse(words)
            assert set(config.rules) <= set(rules.RULES)
            assert bool(config.input) == (config.source in SOURCES)
            written.add(config.out)
        last = config.out
        if row["dedupe"]:
            config = cli.parse(shlex.split(row["dedupe"])[1:])
            assert set(config.prompts) == written and config.threshold == 0.8
            assert {path.name for path in config.against} <= set(listed["file"])
            last = config.out
        assert last == Path("data_meta") / row["file"]


def test_what_is_missing_comes_with_its_commands(listed, command):
    code, said, _ = command("catalogue", "--data", DATA)
    assert code == 0
    assert "embedded_meta_10k.csv: there, 10,000 rows" in said
    for row in listed.to_dict("records"):
        if not row["found"]:
            assert f"{row['file']}: missing" in said and row["generate"].split(" && ")[0] in said


def test_a_missing_catalogue_is_refused(refused, tmp_path):
    refused(["catalogue", "--data", tmp_path], "catalogue.csv", "no such file")


def test_the_committed_prompts_are_what_they_say():
    frame = dataset.load_metadata((DATA / "embedded_meta_10k.csv",))
    assert len(frame) == 10_000 and frame["prompt"].is_unique and set(frame["source"]) == {"grammar"}
    folds = profiles.PROFILE_DEFAULTS["embedded"]["dedupe"]["folds"]
    assert all(
        fold == metadata.fold_of(group, folds)
        for group, fold in zip(frame["group"].head(500), frame["fold"].head(500), strict=True)
    )


def test_every_column_is_described_in_one_way():
    described = metadata.read_table(DATA / "columns.csv", ("column", "type", "description")).set_index("column")
    package = json.loads((DATA / "datapackage.json").read_text(encoding="utf-8"))
    assert {one["path"] for one in package["resources"]} == {path.name for path in DATA.glob("*.csv") if _tracked(path)}
    for resource in package["resources"]:
        fields = resource["schema"]["fields"]
        assert [field["name"] for field in fields] == list(pd.read_csv(DATA / resource["path"], nrows=1).columns)
        if resource["path"] == "catalogue.csv":
            continue  # its file is not that of removed.csv
        for field in fields:
            assert field["description"] == described["description"][field["name"]]
            assert field["type"] == described["type"][field["name"]].replace("numeric", "number")


def _tracked(path: Path) -> bool:
    return path.name in ("catalogue.csv", "columns.csv", "embedded_meta_10k.csv")
