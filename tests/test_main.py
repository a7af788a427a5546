"""The command line: quick help, profiles, one-line refusals, defaults that chain the stages."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from image_to_prompts import cli, profiles
from image_to_prompts.pipeline import STAGES
from image_to_prompts.run import folders

HEAVY = ("torch", "diffusers", "transformers", "sentence_transformers", "timm", "open_clip", "faiss", "matplotlib")


@pytest.mark.parametrize("words", [["--help"], *([s.name, "--help"] for s in STAGES), ["run", "--help"]])
def test_help_imports_nothing_heavy(words):
    code = (
        "import sys\nfrom image_to_prompts.__main__ import main\n"
        f"try:\n    main({words!r})\nexcept SystemExit as e:\n    assert not e.code\n"
        f"heavy = [m for m in {HEAVY!r} if m in sys.modules]\nassert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--run" in done.stdout or words == ["--help"]


def test_help_shows_docstrings_and_the_profiles_defaults(command, tmp_path):
    _, embedded, _ = command("finetune", "--run", tmp_path / "r", "--help")
    _, kaggle, _ = command("finetune", "--run", tmp_path / "r", "--profile", "full", "--help")
    assert "tf_efficientnet_lite2" in embedded and "convnext_xxlarge" in kaggle
    assert "Fold that validates" in " ".join(embedded.split())
    assert not (tmp_path / "r").exists()


def test_unknown_words_are_refused_in_one_line(refused, tmp_path):
    refused(["paint"], "unknown command 'paint'", "generate")
    refused(["generate", "--count", "many", "--run", tmp_path], "--count")
    refused(["generate", "--source", "oracle", "--run", tmp_path], "oracle", "grammar")
    refused(["generate", "--colour", "red", "--run", tmp_path], "--colour")
    refused(["generate", "--profile", "cloud", "--run", tmp_path], "unknown profile 'cloud'", "embedded, full")
    refused(["dedupe", "--prompts", tmp_path / "none.csv", "--run", tmp_path / "r"], "none.csv", "no such file")


def test_output_below_a_regular_file_is_refused(refused, tmp_path):
    (tmp_path / "file").write_text("x")
    refused(["generate", "--run", tmp_path / "r", "--out", tmp_path / "file" / "x.csv"], "regular file")
    refused(["generate", "--run", tmp_path / "file"], "regular file")


def test_profile_is_stored_and_an_explicit_one_wins(command, tmp_path, monkeypatch):
    folder = tmp_path / "r"
    code, _, err = command("generate", "--run", folder, "--count", 5)
    assert code == 0, err
    assert json.loads((folder / "run.json").read_text()) == {"profile": "embedded"}
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    assert folders.profile_of(folder) == "embedded"
    assert folders.profile_of(folder, "full") == "full"
    assert folders.profile_of(tmp_path / "new") == "full"
    (folder / "run.json").write_text('{"profile": "kaggle"}')  # as version 0.1 named it
    assert folders.profile_of(folder) == folders.profile_of(folder, "kaggle") == "full"
    (folder / "run.json").write_text("[]")
    with pytest.raises(ValueError, match="not a run file"):
        folders.profile_of(folder)


def test_the_old_name_of_a_profile_is_the_new_one_everywhere(tmp_path):
    settings = cli.parse(["describe", "x.png", "--run", str(tmp_path), "--profile", "kaggle"])
    assert settings.profile == "full" == profiles.default_config("infer", folders.Run(tmp_path), "kaggle").profile
    assert settings == cli.parse(["describe", "x.png", "--run", str(tmp_path), "--profile", "full"])


def test_each_stage_reads_by_default_what_its_predecessor_wrote(tmp_path):
    run = folders.Run(tmp_path)
    for profile in folders.PROFILES:
        configs = {s.name: profiles.default_config(s.name, run, profile) for s in STAGES}
        assert configs["dedupe"].prompts == (configs["generate"].out,)
        assert configs["render"].metadata == configs["dedupe"].out
        assert configs["finetune"].metadata == ()  # the images' manifest
        assert configs["finetune"].images == (configs["render"].out,)
        assert configs["finetune"].out.parent == run.checkpoints
    assert configs["finetune"].backbone == "open_clip:convnext_xxlarge" and configs["finetune"].image_size == 512
    assert configs["render"].backend == "sd2" and configs["generate"].source == "magicprompt"


def test_stages_run_without_flags_after_their_predecessors(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words in (["generate", "--count", "12"], ["dedupe"], ["render", "--workers", "1"]):
        code, _, err = command(*words)
        assert code == 0, err
    assert (tmp_path / "runs/default/images/prompts/manifest.csv").is_file()


@pytest.mark.parametrize("words", [["--help"], ["render", "--help"]])
def test_a_reader_that_stops_early_gets_no_traceback(words):
    reader, writer = os.pipe()
    os.close(reader)
    argv = [sys.executable, "-m", "image_to_prompts", *words]
    process = subprocess.Popen(argv, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert process.stderr.read() == b"" and process.wait() == 1
    process.stderr.close()


def test_a_near_miss_gets_a_suggestion(refused, tmp_path):
    refused(["describ", tmp_path / "cat.png"], "unknown command 'describ'", "did you mean describe?")
    refused(["kaggle", "pusch"], "did you mean push?")
    refused(["describe", tmp_path / "cat.png", "--no-artist"], "--no-artist", "--no-artists")
    refused(["finetune", "--epoch", 3, "--run", tmp_path], "--epoch", "--epochs")


@pytest.mark.parametrize("stage", ["finetune", "describe", "embed"])
def test_a_switch_has_both_names_and_a_text_that_fits(stage, command, tmp_path):
    _, text, _ = command(stage, "--run", tmp_path, "--help")
    text = " ".join(text.split())
    switch = "cache-features" if stage == "finetune" else "artists"
    assert f"--{switch}, --no-{switch}" in text


def test_both_words_of_a_switch_are_understood(command, small_run, tmp_path):
    words = ["finetune", "--images", small_run.images, "--image-size", 64, "--dry-run", "--run", tmp_path / "run"]
    for word in ("--cache-features", "--no-cache-features"):
        code, said, err = command(*words, word)
        assert code == 0 and "groups" in said, err


def test_after_the_chain_each_stage_runs_without_flags(command, small_run, tmp_path, monkeypatch):
    """`make run` leaves its images in images/train and images/test."""
    folder = tmp_path / "runs" / "default"
    shutil.copytree(small_run.folder, folder)
    (folder / "images" / "prompts").rename(folder / "images" / "train")
    shutil.copytree(folder / "images" / "train", folder / "images" / "test")
    monkeypatch.chdir(tmp_path)
    for words in (["finetune", "--dry-run"], ["render", "--verify"]):
        code, _, err = command(*words)
        assert code == 0, err
    assert profiles.default_config("infer", folders.Run(folder), "embedded").images == folder / "images" / "test"


def test_a_folder_of_somebody_else_gets_no_run(tmp_path, refused):
    (tmp_path / "run.json").write_text('{"name": "marathon"}')
    refused(["generate", "--run", tmp_path, "--profile", "embedded"], "run.json", "not a run file")
    assert (tmp_path / "run.json").read_text() == '{"name": "marathon"}'


def test_a_stage_has_a_heading(command, tmp_path):
    _, _, err = command("generate", "--count", 5, "--run", tmp_path / "run")
    assert err.splitlines()[0].startswith("1 generate")


def test_all_missing_weights_are_told_at_once(refused, small_run, tmp_path):
    words = ["embed", "--run", tmp_path, "--images", small_run.images, "--profile", "full"]
    refused(words, "ViT-B-32-quickgelu", "convnext-tiny-224", "blip-large", "ViT-H-14")
