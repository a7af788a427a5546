"""Prompts: the grammar's laws and variety, MagicPrompt's determinism and clean-up."""

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from image_to_prompts import generate, metadata
from image_to_prompts.errors import UserError
from image_to_prompts.generate import grammar, magicprompt
from image_to_prompts.render import backgrounds, scenes, styles


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


def test_gumbel_noise_samples_the_softmax():
    import torch

    scores = torch.log(torch.tensor([[0.6, 0.3, 0.1]])).repeat(4000, 1)
    generators = [torch.Generator().manual_seed(metadata.row_seed(str(i))) for i in range(4000)]
    drawn = magicprompt._gumbel(generators, 1.0, torch.device("cpu"))(None, scores).argmax(1)
    shares = torch.bincount(drawn, minlength=3) / 4000
    assert torch.allclose(shares, torch.tensor([0.6, 0.3, 0.1]), atol=0.03)


def test_missing_magicprompt_weights_say_where_was_looked(refused, tmp_path):
    refused(
        ["generate", "--run", tmp_path, "--source", "magicprompt"], "magicprompt", "/kaggle/input", "hub Gustavosta"
    )
    refused(["generate", "--run", tmp_path, "--source", "magicprompt", "--weights", tmp_path / "no"], "no such file")
