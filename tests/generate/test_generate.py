"""Prompts: the grammar's laws and variety, MagicPrompt's determinism and clean-up."""

import random
import shutil
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from image_to_prompts import generate
from image_to_prompts.data import metadata
from image_to_prompts.embedded import backgrounds, grammar, scenes, styles
from image_to_prompts.generate import magicprompt
from image_to_prompts.run.errors import UserError


def test_vocabulary_is_large_and_drawable_in_both_families():
    things = grammar.vocabulary()
    assert len(things) >= 900 and len(grammar.PLACES) >= 12 and len(grammar.STYLES) >= 12
    for family in scenes.FAMILIES:
        missing = [name for name, thing in things.items() if thing.code not in scenes.pictures(family)]
        assert not missing, (family, missing)
    assert set(grammar.PLACES) == set(backgrounds.PLACES) and set(grammar.STYLES) == set(styles.STYLES)


@given(st.integers(0, 10**9))
@settings(max_examples=300, deadline=None)
def test_parser_reads_back_the_scene_that_was_written(seed):
    rng = random.Random(seed)
    scene = grammar.sample(rng)
    prompt = grammar.write(scene, rng)
    assert grammar.parse(prompt) == scene, prompt


def test_one_scene_is_said_in_several_ways():
    scene = grammar.Scene((("dog", 2), ("castle", 1)), "behind", "forest", "oil")
    assert len({grammar.write(scene, random.Random(seed)) for seed in range(50)}) >= 40


def test_place_and_style_are_in_about_sixty_percent():
    sampled = [grammar.sample(random.Random(seed)) for seed in range(2000)]
    for part in ("place", "style"):
        share = sum(getattr(scene, part) is not None for scene in sampled) / len(sampled)
        assert 0.55 < share < 0.65
    assert set(Counter(len(scene.things) for scene in sampled)) == {1, 2, 3}


def test_any_text_parses():
    assert grammar.parse("").things == ()
    assert grammar.parse("Two DOGS\nnext to a castle").things == (("dog", 2), ("castle", 1))
    assert grammar.parse("a catastrophe of category theory").things == ()


def test_grammar_prompts_depend_on_seed_and_index_alone(tmp_path):
    few = generate.run(generate.Config(count=20, out=tmp_path / "few.csv"))
    many = generate.run(generate.Config(count=40, out=tmp_path / "many.csv", batch_size=7))
    other = generate.run(generate.Config(count=20, out=tmp_path / "other.csv", seed=1))
    assert many["prompt"].tolist()[: len(few)] == few["prompt"].tolist() != other["prompt"].tolist()
    assert metadata.read(tmp_path / "few.csv")["source"].eq("grammar").all()


@pytest.mark.parametrize("bad", [{"count": 0}, {"batch_size": 0}])
def test_bad_settings_are_refused(tmp_path, bad):
    with pytest.raises(UserError, match="at least 1"):
        generate.run(generate.Config(out=tmp_path / "x.csv", **bad))


def test_sets_whose_names_differ_in_the_suffix_do_not_replace_each_other(tmp_path):
    for name in ("scenes.v1", "scenes"):
        with pytest.raises(UserError, match=r"must end in \.csv"):
            generate.run(generate.Config(count=3, out=tmp_path / name))


@pytest.mark.parametrize("given", ["weights", "weights_dir"])
def test_other_weights_write_other_prompts(given, tiny_gpt2, tmp_path):
    folder = tmp_path / "models" / "magicprompt"
    shutil.copytree(tiny_gpt2, folder)
    where = {given: folder if given == "weights" else folder.parent}
    how = {"source": "magicprompt", "count": 3, "out": tmp_path / "x.csv", **where}
    first = generate.run(generate.Config(**how))["prompt"].tolist()
    tensors = load_file(folder / "model.safetensors")
    save_file({name: -tensor for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    assert generate.run(generate.Config(**how))["prompt"].tolist() != first


def test_clean_up_follows_the_reference():
    assert magicprompt.clean(" a cat, v1.5 by artstation.com\n<b>, 4k ., ") == "a cat, by b , 4k"


def test_magicprompt_depends_on_seed_and_index_alone(tiny_gpt2):
    model, tokenizer = magicprompt.load(tiny_gpt2)
    together = magicprompt.sample(model, tokenizer, 3, list(range(6)))
    apart = [magicprompt.sample(model, tokenizer, 3, [index])[0] for index in range(6)]
    assert together == apart
    assert len(set(together)) == 6
    assert magicprompt.sample(model, tokenizer, 4, list(range(6))) != together


def test_magicprompt_lengths_follow_the_reference(tiny_gpt2):
    model, tokenizer = magicprompt.load(tiny_gpt2)
    lengths = []
    tokenizer.decode = lambda row, **_: lengths.append(len(row)) or "text"
    magicprompt.sample(model, tokenizer, 0, list(range(40)))
    # One token of each length is the empty start.
    assert magicprompt.MIN_LENGTH - 1 <= min(lengths) < 50 < 80 < max(lengths) <= magicprompt.MAX_LENGTH - 1


def test_drawn_tokens_follow_the_probabilities():
    import torch

    scores = torch.log(torch.tensor([[0.6, 0.3, 0.1, 0.0]])).repeat(4000, 1)
    generators = [torch.Generator().manual_seed(metadata.row_seed(str(i))) for i in range(4000)]
    uniforms = torch.stack([torch.rand(2, generator=g) for g in generators])
    uniforms[:2] = torch.tensor([0.0, 1 - 2**-24])[:, None]
    process = magicprompt.InverseTransform(uniforms)
    for _ in range(2):
        drawn = process(None, scores).argmax(1)
        shares = torch.bincount(drawn, minlength=4) / 4000
        assert torch.allclose(shares, torch.tensor([0.6, 0.3, 0.1, 0.0]), atol=0.03)
        assert drawn[:2].tolist() == [0, 2]


def test_sampling_flags_change_what_is_drawn(tiny_gpt2):
    model, tokenizer = magicprompt.load(tiny_gpt2)
    drawn = {
        name: magicprompt.sample(model, tokenizer, 0, [0, 1], magicprompt.Sampling(**values, starts=("a cat",)))
        for name, values in {
            "default": {},
            "cold": {"temperature": 0.01},
            "greedy": {"top_k": 1},
            "all": {"top_k": 0},
            "nucleus": {"top_p": 0.05},
        }.items()
    }
    assert len(set(map(tuple, drawn.values()))) >= 4
    shorter, longer = sorted(drawn["greedy"], key=len)
    assert longer.startswith(shorter)  # one likeliest continuation, cut at two lengths


def test_start_phrases_are_taken_in_turn_and_padding_changes_nothing(tiny_gpt2):
    model, tokenizer = magicprompt.load(tiny_gpt2)
    sampling = magicprompt.Sampling(starts=("a cat", "two robots in a forest", "x"))
    together = magicprompt.sample(model, tokenizer, 0, list(range(6)), sampling)
    assert together == [magicprompt.sample(model, tokenizer, 0, [i], sampling)[0] for i in range(6)]
    for index, prompt in enumerate(together):
        assert prompt.startswith(sampling.starts[index % 3])


def test_count_is_reached_whatever_the_batch_size(tiny_gpt2, tmp_path):
    frames = []
    for size in (5, 64):
        values = {"source": "magicprompt", "weights": tiny_gpt2, "batch_size": size, "temperature": 0.3}
        frames.append(generate.run(generate.Config(count=40, out=tmp_path / f"{size}.csv", **values)))
    assert len(frames[0]) == 40 and frames[0]["prompt"].is_unique
    assert (tmp_path / "5.csv").read_bytes() == (tmp_path / "64.csv").read_bytes()


def test_no_more_are_drawn_than_are_asked_for(tiny_gpt2, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(magicprompt, "sample", lambda *some: drawn.extend(some[3]) or [f"a {i}" for i in some[3]])
    generate.run(generate.Config(source="magicprompt", weights=tiny_gpt2, count=8, out=tmp_path / "a.csv"))
    assert len(drawn) == 8


def test_a_session_that_ends_keeps_its_prompts_and_the_next_goes_on(tmp_path, caplog):
    whole = generate.run(generate.Config(count=900, batch_size=100, out=tmp_path / "once.csv"))
    how = {"count": 900, "batch_size": 100, "out": tmp_path / "a.csv"}
    some = generate.run(generate.Config(**how, max_hours=1e-6))
    assert 0 < len(some) < 900 and "run the same command again" in caplog.text
    assert metadata.read(tmp_path / "a.csv")["prompt"].tolist() == whole["prompt"].tolist()[: len(some)]
    more = generate.run(generate.Config(**how))
    assert more["prompt"].tolist() == whole["prompt"].tolist()


def test_a_source_that_repeats_itself_is_said_to(tiny_gpt2, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(generate, "WINDOW", 100)
    (tmp_path / "starts.txt").write_text("a cat\n", encoding="utf-8")
    values = {"source": "magicprompt", "weights": tiny_gpt2, "top_k": 1, "starts": tmp_path / "starts.txt"}
    frame = generate.run(generate.Config(count=5000, out=tmp_path / "x.csv", batch_size=50, **values))
    assert 1 <= len(frame) <= 71 and frame["prompt"].is_unique  # one text, cut at 30 to 100 tokens
    assert f"{len(frame)} prompts, not 5000" in caplog.text and "--temperature" in caplog.text


@given(st.lists(st.sampled_from(["", *"abcdefgh"]), max_size=60), st.integers(1, 10), st.integers(1, 9))
def test_distinct_prompts_do_not_depend_on_blocks(drawn, count, size):
    whole, blocks = generate.Distinct(count), generate.Distinct(count)
    whole.add(drawn)
    for start in range(0, len(drawn), size):
        blocks.add(drawn[start : start + size])
    assert list(whole.prompts) == list(blocks.prompts) == list(dict.fromkeys(p for p in drawn if p))[:count]
    assert (whole.seen, whole.dry) == (blocks.seen, blocks.dry)


def test_after_the_first_block_it_says_how_long_the_rest_takes(tiny_gpt2, tmp_path, caplog):
    caplog.set_level("INFO")
    values = {"source": "magicprompt", "weights": tiny_gpt2, "batch_size": 8, "count": 24}
    generate.run(generate.Config(out=tmp_path / "x.csv", **values))
    (said,) = (one.message for one in caplog.records if one.message.startswith("24 prompts"))
    assert said.startswith(("24 prompts, 16 to do", "24 prompts, 17 to do")) and " min, " in said


def test_bad_magicprompt_settings_are_refused(refused, tiny_gpt2, tmp_path):
    words = ["generate", "--run", tmp_path / "run", "--source", "magicprompt", "--weights", tiny_gpt2]
    refused([*words, "--temperature", 0], "--temperature must be above 0")
    refused([*words, "--top-p", 1.5], "--top-p")
    refused([*words, "--starts", tmp_path / "none.txt"], "none.txt", "one phrase a line")
    (tmp_path / "blank.txt").write_text("\n \n")
    refused([*words, "--starts", tmp_path / "blank.txt"], "no phrase")
    refused(["generate", "--run", tmp_path / "run", "--starts", tmp_path / "blank.txt"], "--source magicprompt")


def test_damaged_magicprompt_weights_name_the_file(refused, tiny_gpt2, tmp_path):
    folder = tmp_path / "MagicPrompt"
    shutil.copytree(tiny_gpt2, folder)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    words = ["generate", "--run", tmp_path / "run", "--source", "magicprompt", "--weights", folder]
    refused(words, file, "damaged", "download it again")


def test_missing_magicprompt_weights_say_where_was_looked(refused, tmp_path):
    refused(
        ["generate", "--run", tmp_path, "--source", "magicprompt"],
        "magicprompt (0.51 GB",
        "huggingface.co",
        "weights get",
    )
    refused(["generate", "--run", tmp_path, "--source", "magicprompt", "--weights", tmp_path / "no"], "no such file")


@pytest.mark.slow
def test_two_processes_write_what_one_writes(command, tiny_gpt2, tmp_path):
    words = ["generate", "--source", "magicprompt", "--weights", str(tiny_gpt2), "--count", "70", "--batch-size", "16"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "image_to_prompts"]
    two = [*launch, *words, "--out", "two.csv"]
    result = subprocess.run(two, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert command(*words, "--out", tmp_path / "one.csv")[0] == 0
    assert result.stderr.count("70 different prompts") == 2  # torchrun really started two
    assert (tmp_path / "one.csv").read_bytes() == (tmp_path / "two.csv").read_bytes()


def test_what_is_written_holds_no_control_characters():
    """pandas 2.2 cuts a field at NUL, so that a later stage would find the prompt blank."""
    assert magicprompt.clean("a red\0 fox\x07,\tin\x1b snow\x7f") == "a red fox, in snow"
    assert magicprompt.clean("\0\x01") == ""
