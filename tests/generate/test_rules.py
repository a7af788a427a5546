"""Cleaning rules, each on the mess it is for."""

import gzip
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from image_to_prompts.generate import rules
from image_to_prompts.models import clip_tokenizer
from image_to_prompts.run.errors import UserError

SHARED = Path(__file__).parents[3] / "shared" / "data"
LONG = ", ".join(["an astonishingly detailed kingfisher"] * 30)


def after(name, *prompts, **columns):
    frame = pl.DataFrame({"prompt": list(prompts), **columns}, schema_overrides={"prompt": pl.String})
    return rules.clean(frame, {name: rules.load(name)})[0]["prompt"].to_list()


@pytest.mark.parametrize(
    ("name", "before", "expected"),
    [
        ("mojibake", "cafÃ© au lait, PokÃ©mon", "café au lait, Pokémon"),
        ("mojibake", "the wizardâ€™s tower", "the wizard’s tower"),
        ("mojibake", "a café, naïve 猫 🦊", "a café, naïve 猫 🦊"),
        ("unicode", " a\tred\u00a0fox \n\r in\u2003snow ", "a red fox in snow"),
        ("unicode", "cafe\u200b\u0301\x07\ufeff \x00 bar", "café bar"),
        ("interface", "fox <lora:detail_v2:0.8>, forest", "fox, forest"),
        ("interface", "((masterpiece)), [blurry], (red fox:1.3), {{cute}}", "masterpiece, blurry, red fox, cute"),
        ("interface", "a (small (brown:0.9) fox : 1.25) asleep", "a small brown fox asleep"),
        ("interface", r"fox \(animal\), solo", "fox (animal), solo"),
        ("interface", "castle at dusk --ar 16:9 --v 4 --testp", "castle at dusk"),
        ("interface", "hot::2 dog::-1 stand", "hot dog stand"),
        ("interface", "a fox --no text, watermark --ar 3x2 --style raw", "a fox"),
        ("interface", "a castle --very old, at (10:30), (Psalm 23:4)", "a castle --very old, at 10:30, Psalm 23:4"),
        ("interface", "(fox:1), (owl :2), [12:45], (portrait, 16:9)", "fox, owl, 12:45, portrait, 16:9"),
        ("interface", "a t-shirt, 16:9 screen, time 10:30", "a t-shirt, 16:9 screen, time 10:30"),
        ("html", "Tom &amp; Jerry &lt;3 &#39;toon&#39;", "Tom & Jerry <3 'toon'"),
        ("html", "a <b>bold</b> fox<br/>in <a href='x'>snow</a>", "a bold fox in snow"),
        ("html", "Tom &amp; region &region", "Tom & region &region"),
        ("html", "x < 3 and y > 2 & more", "x < 3 and y > 2 & more"),
        ("urls", "fox from https://a.b/c?d=1, www.foxes.com art", "fox from, art"),
        ("artists", "a fox, art by Greg Rutkowski and Alphonse Mucha, oil", "a fox, oil"),
        ("artists", "portrait by wlop, beautiful", "portrait, beautiful"),
        ("artists", "a bystander in a monetary crisis", "a bystander in a monetary crisis"),
        ("artists", "an artist painting in constant motion", "an artist painting in constant motion"),
        ("artists", "greg rutkowski, a fox by disney", "a fox"),
    ],
)
def test_a_rule_mends(name, before, expected):
    assert after(name, before) == [expected]


@pytest.mark.parametrize(
    ("name", "gone", "kept"),
    [
        ("blank", ["", "  ", "NULL", "nan", "None", "!!", "1234"], ["a fox", "猫"]),
        ("words", ["a red fox running", "fox,cat,dog,owl,bee"], ["a red fox running fast"]),
        ("characters", ["a fox (2012)", "café fox", "a_b", "it's"], ["A fox, 3 owls. semi-real"]),
        (
            "english",
            ["ein roter Fuchs sitzt auf einem Stuhl am Fenster", "рыжая лиса в лесу, масло", "一只在月光下的狐狸"],
            ["a red fox on a chair, oil painting", "greg rutkowski, artstation, 8k, cyberpunk city"],
        ),
        ("short", [LONG], ["a red fox", "fox " * 75]),
    ],
)
def test_a_rule_drops(name, gone, kept):
    assert after(name, *gone, *kept) == kept


def test_columns_of_the_source_decide():
    three = ["one", "two", "three"]
    assert after("size", *three, width=[512, 1024, None], height=[768, 512, 512]) == ["one", "three"]
    assert after("nsfw", *three, image_nsfw=[0.1, 2.0, None], prompt_nsfw=[0.1, 0.0, 0.9]) == ["one"]
    assert after("rejected", *three, rejected=[False, True, False]) == ["one", "three"]
    for name in ("size", "nsfw", "rejected"):
        assert after(name, *three) == three  # a source that does not say


def test_truncated_prompts_are_what_clip_reads():
    open_clip = pytest.importorskip("open_clip")
    encode = open_clip.get_tokenizer("ViT-B-32").encode
    clip_tokenizer.load()("a fox", truncation=True, padding="max_length")  # as a pipeline of the same process does
    for text in (LONG, "日本語 " * 60 + "fox", "日本語" * 60, "don't " * 50 + "it's 1234567890 " * 8):
        cut = after("truncate", text)[0]
        assert text.startswith(cut) and 60 <= len(encode(cut)) <= rules.CLIP_TOKENS
        if " " in text:  # of one endless word a part stays
            assert encode(cut) == encode(text)[: len(encode(cut))] and not text[len(cut)].isalpha()
    assert after("truncate", "a red fox", "fox " * 75) == ["a red fox", "fox " * 75]


def test_own_rules(tmp_path):
    own = tmp_path / "own.py"
    own.write_text(
        "import polars as pl\n"
        "def no_foxes(frame):\n    return frame['prompt'].set(frame['prompt'].str.contains('fox'), None)\n"
        "def too_few(frame):\n    return frame['prompt'].head(1)\n"
        "def broken(frame):\n    return frame['nothing']\n"
    )
    assert after(f"{own}:no_foxes", "a fox", "an owl") == ["an owl"]
    for name, said in (("too_few", "1 prompts for 2 rows"), ("broken", "nothing"), ("missing", "no function")):
        with pytest.raises(UserError, match=said):
            after(f"{own}:{name}", "a fox", "an owl")
    with pytest.raises(UserError, match="no such rule; choose from"):
        rules.load("sharpen")


def test_the_report_counts_each_rule():
    frame = pl.DataFrame({"prompt": ["a  fox", None, "NULL", "an owl", "b  c"]})
    kept, report = rules.clean(frame, {name: rules.RULES[name] for name in ("unicode", "blank")})
    assert kept["prompt"].to_list() == ["a fox", "an owl", "b c"]
    assert [(one["rule"], one["rows"], one["changed"], one["dropped"]) for one in report] == [
        ("unicode", 5, 2, 1),
        ("blank", 4, 0, 1),
    ]
    assert report[0]["examples"] == [("a  fox", "a fox"), ("", None), ("b  c", "b c")]
    both = rules.merge([report, report])
    assert both[0]["rows"] == 10 and both[0]["changed"] == 4 and len(both[0]["examples"]) == rules.EXAMPLES


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(max_size=200), max_size=20))
def test_rules_take_any_text(prompts):
    for name in rules.RULES:
        kept = after(name, *prompts)
        assert len(kept) <= len(prompts) and all(kept)


@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=80), min_size=1, max_size=8))
def test_cleaning_twice_is_cleaning_once(prompts):
    usual = {name: rules.RULES[name] for name in ("unicode", "urls", "blank", "words", "truncate")}
    once, _ = rules.clean(pl.DataFrame({"prompt": prompts}), usual)
    twice, _ = rules.clean(once, usual)
    assert once.equals(twice)


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared data")
def test_real_prompts_are_taken_for_english():
    with gzip.open(SHARED / "real_prompts.txt.gz", "rt", encoding="utf-8") as file:
        prompts = file.read().splitlines()
    assert len(after("english", *prompts)) / len(prompts) > 0.99  # asked: 97 %
