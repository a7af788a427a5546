"""What the page does, without a browser: judged prompts, undrawn words, the folder's table."""

import csv
import zipfile
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import written_images
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from image_to_prompts.describe import session
from image_to_prompts.describe.files import Description
from image_to_prompts.embedded import grammar
from image_to_prompts.models import text_encoder


class Pretending:
    """A describer that says the same of every picture."""

    def __init__(self, **about):
        self.folders, self.about = [], {"prompt": "a fox", "source": "checkpoint", "familiar": True, **about}
        self.config = type("Config", (), {"top": 2})

    def describe(self, files):
        return [Description(file, nearest=(("a", 0.5),) * 5, **self.about) for file in files]


def rows(*names):
    return [
        {
            "picture": "<img>",
            "image": n,
            "prompt": f"a {n}",
            "first": f"a {n}",
            "source": "checkpoint",
            "familiar": "yes",
        }
        for n in names
    ]


def test_each_phrase_is_worth_what_the_prompt_loses_without_it():
    vector = text_encoder.encode_once(["a red fox in snow, oil painting"])[0]
    near, worth = session.Session(Pretending(), None).judge("a red fox in snow, oil painting, by nobody", vector)
    cosine = {
        text: float(text_encoder.encode_once([text])[0] @ vector) for text in ("a red fox in snow, oil painting",)
    }
    whole = float(text_encoder.encode_once(["a red fox in snow, oil painting, by nobody"])[0] @ vector)
    assert f"**{whole:.3f}**" in near
    assert [phrase for _, phrase in worth] == ["a red fox in snow", "oil painting", "by nobody"]
    assert worth[2][0] == f"{whole - cosine['a red fox in snow, oil painting']:+.3f}" and float(worth[0][0]) > 0.2
    assert session.Session(Pretending(), None).judge("a fox", None) == ("", [])
    assert session.Session(Pretending(), None).judge("one phrase", vector)[1] == []


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        ("a red fox in snow, by greg rutkowski, 4k", ["red", "snow", "greg rutkowski", "4k"]),
        ("three birds on a theatre stage in the style of aquarelle", []),
        ("two robots beside a castle, oil painting", []),
        ("two robots", []),
        ("portrait of nobody", ["portrait nobody"]),
        ("stained glass window: one cloud, fantasy", ["fantasy"]),
        ("", []),
    ],
)
def test_the_words_that_scenes_cannot_show_are_named(text, missing):
    assert grammar.undrawn(text) == missing


@given(st.integers(0, 2**31), st.integers(0, 1000))
def test_of_a_prompt_of_the_grammar_at_most_the_undrawn_phrases_are_named(seed, index):
    prompt = grammar.prompt(seed, index)
    scene = grammar.parse(prompt)
    for part in grammar.undrawn(prompt):
        assert not grammar.parse(part).things or len(scene.things) == 3, (prompt, part)


def test_it_renders_again_only_what_it_knows():
    scenes = session.Painter(lambda prompt, seed: None, grammar.undrawn)
    everything = session.Painter(lambda prompt, seed: None)
    for source, refused in (("checkpoint", False), ("file", True), ("guess", True), ("interrogator", True)):
        found = Description(Path("a.png"), "a fox", source)
        assert bool(session.Session(Pretending(), scenes).refusal(found)) == refused
        assert not session.Session(Pretending(), everything).refusal(found)


def test_a_refused_file_does_not_reach_the_models(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_text("<html>")
    good, bad = session.Session(Pretending(), None).describe([tmp_path / "good.png", tmp_path / "bad.png"])
    assert good.prompt == "a fox" and len(good.nearest) == 2 and good.path.name == "good.png"
    assert bad.error.startswith("This file cannot be read") and not bad.prompt


def test_a_file_cut_off_behind_its_prompt_does_not_end_the_list(tmp_path):
    whole = written_images.png(tmp_path / "a.png", {"parameters": written_images.automatic1111("a fox")})
    (tmp_path / "b.png").write_bytes(whole.read_bytes()[:-3000])
    made = session.Session(Pretending(), None)
    ((first, second),) = made.rows([whole, tmp_path / "b.png"])
    assert first["prompt"] and second["prompt"] and first["picture"] != second["picture"] != ""


def test_names_are_told_apart():
    assert session.unique(["a.png", "b.png", "a.png", "a.png", "none", "none"]) == [
        *("a.png", "b.png", "a (2).png", "a (3).png", "none", "none (2)"),
    ]


def test_a_filter_hides_rows_and_keeps_their_edits():
    every = rows("cat.png", "dog.png", "heron.png")
    assert session.shown(every, "") == every
    part = session.shown(every, "A DOG")
    assert part == every[1:2]
    changed = session.edited(every, [{"image": "dog.png", "prompt": "a wolf"}])
    assert [row["prompt"] for row in changed] == ["a cat.png", "a wolf", "a heron.png"]
    assert session.edited(every, None) == every and session.only(every, None) == []
    assert (
        session.only(every, [{"image": "dog.png", "prompt": "a wolf"}, {"image": "no", "prompt": ""}]) == changed[1:2]
    )


class Reader(HTMLParser):
    """Reads the list as a browser does."""

    def __init__(self, html):
        super().__init__()
        self.found, self.inside, self.tags = [], False, []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if "data-image" in dict(attributes):
            self.found.append([dict(attributes)["data-image"], ""])
        self.inside = tag == "textarea"

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, data):
        if self.inside:
            self.found[-1][1] += data


@given(st.lists(st.tuples(st.text(min_size=1), st.text().map(lambda text: text.replace("\r", "")))))
def test_what_is_listed_is_what_is_in_the_rows(pairs):
    every = [{**rows("x")[0], "picture": "", "image": name, "prompt": text} for name, text in pairs]
    listed = Reader(session.listing([{**row, "picture": "<i></i>"} for row in every]))
    assert [(name, text.removeprefix("\n")) for name, text in listed.found] == pairs
    assert set(listed.tags) <= {"div", "i", "b", "textarea", "button"}, "no text becomes an element"
    assert "textarea" not in Reader(session.listing(every)).tags, "what is no picture has no prompt"


@given(st.lists(st.text(max_size=20).map(lambda text: text.replace("\r", "").replace("\0", "")), max_size=6))
def test_what_is_written_is_what_is_shown(tmp_path_factory, prompts):
    folder = tmp_path_factory.mktemp("written")
    named = zip(rows(*map(str, range(6))), prompts, strict=False)
    table = [{**row, "prompt": prompt} for row, prompt in named]
    with session.write_csv(table, folder / "t.csv").open(encoding="utf-8", newline="") as file:
        assert [row["prompt"] for row in csv.DictReader(file)] == prompts
    with zipfile.ZipFile(session.write_texts(table, folder / "t.zip")) as archive:
        said = {name: archive.read(name).decode() for name in archive.namelist()}
    assert said == {f"{number}.txt": f"{prompt}\n" for number, prompt in enumerate(prompts) if prompt}


def test_two_pictures_of_one_stem_get_two_texts(tmp_path):
    with zipfile.ZipFile(session.write_texts(rows("a.png", "a.jpg", "b.png"), tmp_path / "t.zip")) as archive:
        assert archive.namelist() == ["a.png.txt", "a.jpg.txt", "b.txt"]


def test_a_vector_of_a_strange_picture_is_not_shown_as_known():
    found = Description(Path("a.png"), "helmet", "guess", familiar=False, vector=np.ones(384, np.float32))
    assert session.Session(Pretending(), None).source(found).startswith("<b>A guess, not a prompt</b>: there is no")
