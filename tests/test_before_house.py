"""Runs of the commit `before-house` (docs/performance.md), finished or half done: today's commands take them over.

tests/before_house/make.py made them there.
"""

import re
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from before_house import make
from safetensors.torch import load_file

from image_to_prompts import cli
from image_to_prompts.run.devices import mixed_precision

THERE = Path(__file__).with_name("before_house")
EXACT = ("base", "collect", "render-tar")  # what is an integer, a text, or drawn from a row's own seed
DOUBT = "checkpoints/convnext/doubt.safetensors"  # which checkpoints of that commit do not have
CLUSTERS = "checkpoints/clusters.safetensors"  # new: centroids of clusters of prompts
NEW_COLUMN = "clusters_out"  # of sources.csv
# It computed in bf16; a machine without that redoes what depends on it, in float32.
SAME_PRECISION = mixed_precision(torch.device("cpu")) == "bf16"
CLOSE, WEIGHTS_CLOSE = (1e-4, 2e-3) if SAME_PRECISION else (2e-2, 2e-2)
TAKEN_OVER = [name for name in make.FINISHED if name != "describe"]


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("before")
    with tarfile.open(THERE / "runs.tar.xz") as file:
        file.extractall(folder, filter="data")
    return folder


@pytest.fixture
def place(packed, tmp_path, monkeypatch):
    """A copy of its own, as the working directory: the runs' paths are relative."""
    shutil.copytree(packed, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def is_shown(name: str) -> bool:
    return not any(part.startswith(".") for part in Path(name).parts)


def names(run: Path) -> set[str]:
    """Files of a run, without its log and locks."""
    found = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    return {name for name in found if not name.endswith((".log", ".lock"))}


def assert_alike(found: Path, expected: Path, exact: bool) -> None:
    """Bytes where they are exact, else numbers that are close and texts that are equal."""
    if exact:
        assert found.read_bytes() == expected.read_bytes(), found
    elif expected.suffix == ".npy":
        np.testing.assert_allclose(np.load(found), np.load(expected), atol=CLOSE)
    elif expected.suffix == ".safetensors":
        ours, theirs = load_file(found), load_file(expected)
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            np.testing.assert_allclose(ours[name].float(), value.float(), atol=WEIGHTS_CLOSE, err_msg=f"{found} {name}")
    elif expected.suffix == ".csv":
        ours = pd.read_csv(found).drop(columns=NEW_COLUMN, errors="ignore")
        pd.testing.assert_frame_equal(ours, pd.read_csv(expected), atol=2e-3, rtol=0)


THEN = {"finetune": ("--warm-up", "0")}  # defaults that have changed since


def assert_taken_over(case, expected: Path, exact: bool) -> None:
    """The command ends well; what it writes is what `before-house` wrote, and nothing half done is left."""
    code, said = case.finish()
    assert code == 0 and "Traceback" not in said, said
    wanted, found = names(expected), names(case.run) - {DOUBT, CLUSTERS}
    assert (case.target == "finetune") == (case.run / DOUBT).exists()
    assert found <= wanted, found - wanted
    shown, folders = {name for name in found if is_shown(name)}, {Path(name).parts[0] for name in found}
    assert shown == {name for name in wanted if is_shown(name) and Path(name).parts[0] in folders}, said
    assert len(shown) > 1
    for name in shown:
        assert_alike(case.run / name, expected / name, exact)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in make.HALF_DONE if name != "describe"])
def test_half_done_work_ends_as_it_would_have(name, place):
    target = name.partition(",")[0]
    case = make.case(name, "half-done", (*make.HALF_DONE[name][2], *THEN.get(target, ())))
    expected = make.BASE if target in ("generate", "render") else Path("finished") / target / "run"
    assert_taken_over(case, expected, target in (*EXACT, "generate", "render"))


@pytest.mark.slow
@pytest.mark.parametrize("name", TAKEN_OVER)
def test_finished_work_stays(name, place, packed):
    case = make.case(name, "finished", (*make.FINISHED[name], *THEN.get(name, ())))
    assert_taken_over(case, packed / "finished" / name / "run", name in EXACT)


@pytest.mark.slow
def test_what_was_trained_with_other_defaults_is_not_taken_for_the_same(place):
    code, said = make.case("finetune", "finished", make.FINISHED["finetune"]).finish()
    assert code == 0 and "is up to date" not in said and "epoch" in said, said


@pytest.mark.slow
def test_a_table_of_descriptions_stays_until_it_may_be_overwritten(place):
    case = make.case("describe", "finished", ())
    before = (case.run / "prompts.csv").read_bytes()
    code, said = case.finish()
    assert code == 2 and "prompts.csv: not written by describe before" in said
    assert (case.run / "prompts.csv").read_bytes() == before
    case = make.case("describe", "finished", ("--overwrite",))
    assert case.finish()[0] == 0
    assert len(pd.read_csv(case.run / "prompts.csv")) == before.count(b"\n") - 1


@pytest.mark.slow
def test_half_done_descriptions_are_begun_anew(place):
    case = make.case("describe", "half-done", ())
    there = names(case.run)
    assert case.finish()[0] == 0
    assert there < names(case.run) and not pd.read_csv(case.run / "prompts.csv")["prompt"].isna().any()


HELP = [
    path
    for path in sorted(THERE.glob("help/*.txt"))
    if path.stem != "all" and path.stem not in map("-".join, cli.REPLACED)
]
REPLACED = {flag for _, *flags in cli.REPLACED for flag in (*flags, *(f"--no{flag[1:]}" for flag in flags))}


@pytest.mark.parametrize("path", HELP, ids=lambda path: path.stem)
def test_every_flag_is_still_there(path, command):
    words = path.stem.replace("kaggle-", "kaggle ").split()
    code, out, _ = command(*words, "--help")
    assert code == 0
    flags = set(re.findall(r"--[a-z][a-z-]+", path.read_text(encoding="utf-8"))) - REPLACED
    assert flags - set(re.findall(r"--[a-z][a-z-]+", out)) == set()


@pytest.mark.parametrize("words", cli.REPLACED, ids=" ".join)
def test_what_is_no_more_says_what_replaces_it(words, refused):
    refused([*words, "10k"], f"{' '.join(words)}: was removed;", cli.REPLACED[words])
