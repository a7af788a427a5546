"""What the page shows: one picture with its prompt, edited and rendered again, and a list of many."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import session as sessions
from .session import MOST_LETTERS, Row, Session

if TYPE_CHECKING:
    import gradio

KEPT, SWEPT = 3600, 600  # seconds for which uploads and sessions are kept, and between two looks at them
MOST_FILES = 500  # uploads of one folder
DROP = "Drop or paste a picture, or click to choose one"
CSS = """
.line {display: flex; gap: 12px; padding: 8px 0; border-top: 1px solid var(--border-color-primary)}
.line .thumb {flex: 0 0 64px}
.line .thumb img {max-width: 64px; max-height: 64px; margin: 0}
.line .text {flex: 1; min-width: 0; overflow-wrap: anywhere}
.line textarea {width: 100%; margin-top: 4px; padding: 4px 8px; color: inherit; border-radius: 4px;
  background: var(--input-background-fill); border: 1px solid var(--border-color-primary)}
#picture .icon-button, #prompt .icon-button, button[aria-label="Remove Image"], #prompt button {
  min-width: 32px; min-height: 32px}
.line textarea {field-sizing: content; min-height: 48px}
.line textarea[readonly] {opacity: .6}
.line button {min-width: 32px; min-height: 32px; align-self: center; padding: 8px}
.lines {width: 100%; margin: 4px 0 16px}
.lines, .lines tr, .lines td {border: none !important; vertical-align: top}
.lines td {padding: 2px 12px 2px 0}
.lines td:first-child {width: 64px}
"""
COLLECT = "(...given) => { given[1] = collect(); return given; }"
CLICK = "() => document.querySelector('#fetch a, a#fetch, #fetch')?.click()"


def page(session: Session) -> gradio.Blocks:
    """The page: a picture, and many of them."""
    import gradio as gr

    _adapt()
    with gr.Blocks(title="The prompt of a picture", analytics_enabled=False, delete_cache=(SWEPT, KEPT)) as blocks:
        gr.Markdown(f"# The prompt of a picture\n{session.introduction}")
        with gr.Tab("One picture"):
            _one_picture(session)
        with gr.Tab("Many pictures"):
            _many_pictures(session)
        gr.Markdown("For scripts: `curl --data-binary @picture.png ADDRESS-OF-THIS-PAGE/describe`", elem_id="scripts")
    return blocks


def _one_picture(session: Session) -> None:
    import gradio as gr

    vector, here, model = (gr.State(None, time_to_live=KEPT) for _ in range(3))
    visited = gr.State([], time_to_live=KEPT)  # (path, prompt as it was left) of each picture
    with gr.Row():
        with gr.Column(min_width=320):
            upload = {"sources": ["upload"], "placeholder": DROP, "buttons": []}
            picture = gr.Image(label="Picture", height=360, elem_id="picture", **upload)
            history = gr.Gallery(
                label="This visit", columns=6, height=150, fit_columns=False, allow_preview=False, buttons=[],
                object_fit="contain", elem_id="history", visible=False,
            )  # fmt: skip
        with gr.Column(min_width=320):
            source = gr.HTML(elem_id="source")
            prompt = gr.Textbox(
                label=f"Prompt (up to {MOST_LETTERS:,} letters)", max_length=MOST_LETTERS, lines=3, elem_id="prompt",
                buttons=["copy"],
            )  # fmt: skip
            fits = gr.Markdown(elem_id="similarity")
            others = gr.Radio(
                [],
                label="Candidates, the most readable first; the number says how well one fits",
                elem_id="candidates",
                visible=False,
                interactive=True,
            )
    worth = gr.HTML(elem_id="worth")
    refusal = gr.Markdown(elem_id="refusal")
    with gr.Row(visible=False) as again:
        with gr.Column(min_width=320):
            info = "The same number draws the same picture of a text."
            seed = gr.Number(label="Seed", precision=0, info=info, minimum=0, maximum=2**32 - 1, elem_id="seed")
            button = gr.Button("Render again", variant="primary", elem_id="render")
            said = gr.HTML(elem_id="undrawn")
        with gr.Column(min_width=320):
            drawn = gr.Image(
                label="Rendered again", type="pil", interactive=False, format="png", height=360, elem_id="again",
                buttons=["download", "fullscreen"], visible=False,
            )  # fmt: skip
    similar = "The most similar prompts that the model has learned from"
    nearest = gr.Radio([], label=similar, elem_id="nearest", visible=False, interactive=True)

    def look(path: str | None, past: list[tuple[str, str]]) -> dict[Any, Any]:
        blank: dict[Any, Any] = {
            vector: None, here: None, model: None, prompt: "", source: "", refusal: "", said: "",
            drawn: gr.Image(None, visible=False), again: gr.Row(visible=False),
            others: gr.Radio(choices=[], visible=False), nearest: gr.Radio(choices=[], visible=False),
            worth: "", fits: "",
        }  # fmt: skip
        if path is None:  # the picture itself stays as it is: another may be on its way
            return blank
        (one,) = session.describe([Path(path)])
        if one.error:
            return {**blank, picture: gr.Image(None, placeholder=f"# {one.error}\n{DROP}")}
        no, own = session.refusal(one), session.seed(one)
        known = None if one.familiar is False else one.vector  # the prediction for a strange picture says nothing
        text = dict(past).get(path, one.prompt)  # as it was left
        now = past if path in dict(past) else [*past, (path, text)]
        found = {"texts": [one.prompt, *one.candidates], "source": session.source(one)}
        choices = session.rated([one.prompt, *one.candidates], known)
        learned = [(f"{cosine:.2f}  {near}", near) for near, cosine in one.nearest]
        return {
            **blank,
            vector: known, here: path, prompt: text, picture: gr.Image(path, placeholder=DROP),
            model: found, source: _origin(found, text),
            others: gr.Radio(choices=choices, value=text, visible=len(choices) > 1),
            nearest: gr.Radio(choices=learned, value=None, visible=bool(learned)),
            refusal: no, again: gr.Row(visible=not no), seed: own, visited: now, **judge(text, known),
            history: gr.Gallery(now, visible=True, selected_index=list(dict(now)).index(path)),
        }  # fmt: skip

    def judge(text: str, known: Any) -> dict[Any, Any]:
        near, rows = session.judge(text, known)
        return {fits: near, worth: _lines("What that number loses without a phrase", rows)}

    def edit(text: str, known: Any, found: Any, path: str, past: list[tuple[str, str]]) -> dict[Any, Any]:
        left = [(one, text if one == path else old) for one, old in past]
        choices = {others: gr.Radio(value=text), nearest: gr.Radio(value=text)}
        return {visited: left, source: _origin(found, text), **choices, **judge(text, known)}

    def draw(text: str, number: float | None) -> dict[Any, Any]:
        if not text.strip():
            return {drawn: gr.Image(None, visible=False), said: "Write a prompt first."}
        image, missing = session.draw(text, sessions.seed_of(text) if number is None else int(number) % 2**32)
        return {drawn: gr.Image(image, visible=image is not None), said: missing}

    def back(past: list[tuple[str, str]], chosen: gr.SelectData) -> dict[Any, Any]:
        return look(past[chosen.index][0], past)

    back.__annotations__["chosen"] = gr.SelectData
    # The models themselves are asked one after the other. A picture that comes while another goes must not be lost.
    every = {"concurrency_limit": 16, "show_progress_on": source, "trigger_mode": "always_last"}
    shown = [
        vector, here, model, prompt, source, fits, worth, nearest, others, seed, again, refusal, said, drawn, picture,
    ]  # fmt: skip
    picture.input(look, [picture, visited], [*shown, visited, history], api_name="look", **every)
    private = {"api_visibility": "private"}
    history.select(back, visited, [*shown, visited, history], **private, **every)
    quietly = {"trigger_mode": "always_last", "show_progress": "hidden", "concurrency_limit": 16}
    prompt.change(
        edit,
        [prompt, vector, model, here, visited],
        [visited, source, others, nearest, fits, worth],
        **private,
        **quietly,
    )
    for choice in (others, nearest):
        # In the browser: a choice made while the server still answers the one before would be left out.
        choice.input(None, None, prompt, js="() => chosen", **private)
    button.click(draw, [prompt, seed], [drawn, said], concurrency_limit=16, show_progress_on=said, **private)


def _origin(found: dict[str, Any] | None, text: str) -> str:
    """Where the text of a picture comes from, as HTML."""
    return "" if found is None else found["source"] if text in found["texts"] else "<b>Your own text</b>"


def _lines(title: str, rows: list[list[str]]) -> str:
    """A small table as HTML, which wraps on a telephone; "" without rows."""
    cells = "".join(f"<tr><td>{escape(first)}</td><td>{escape(text)}</td></tr>" for first, text in rows)
    return f"<b>{title}</b><table class=lines>{cells}</table>" if rows else ""


def _many_pictures(session: Session) -> None:
    import gradio as gr

    rows = gr.State([], time_to_live=KEPT)
    seen = gr.JSON(visible="hidden")  # the prompts as they stand in the list: `page.js` reads them at each action
    files = gr.File(label="Pictures", file_count="multiple", height=140, elem_id="files")
    folder = gr.UploadButton("Add a whole folder", file_count="directory", elem_id="folder")
    start = gr.Button("Describe the new ones", variant="primary", elem_id="start")
    state = gr.Markdown(elem_id="state")
    with gr.Row(equal_height=True):
        words = gr.Textbox(label="Show only rows with", elem_id="filter", min_width=200)
        prefix = gr.Textbox(label="Text before", placeholder="sks, ", elem_id="prefix", min_width=120)
        suffix = gr.Textbox(label="Text after", placeholder=", 4k", elem_id="suffix", min_width=120)
        add = gr.Button("Add to the prompts shown", elem_id="add", min_width=160)
    table = gr.HTML(elem_id="table", max_height=640)
    with gr.Row():
        as_csv = gr.Button("Download the rows shown (CSV)", elem_id="csv")
        as_texts = gr.Button("Download one .txt per picture shown (zip)", elem_id="texts")
    fetched = gr.DownloadButton(elem_id="fetch", visible="hidden")

    def begin(old: list[Row], now: Any, paths: list[str] | None, kept: str) -> Iterator[dict[Any, Any]]:
        given = list(dict.fromkeys(paths or []))[:MOST_FILES]
        done = [row for row in sessions.edited(old, now) if row["path"] in given]
        left = [Path(path) for path in given if path not in {row["path"] for row in done}]
        yield {state: f"0 of {len(left)} files", table: sessions.listing(sessions.shown(done, kept), locked=True)}
        before = len(done)
        for part in session.rows(left, {row["image"] for row in done}):
            done += part
            said = f"{len(done) - before} of {len(left)} files"
            yield {rows: done, table: sessions.listing(sessions.shown(done, kept), locked=True), state: said}
        yield {rows: done, table: sessions.listing(sessions.shown(done, kept)), state: sessions.told(done)}

    def narrow(every: list[Row], now: Any, kept: str, paths: list[str] | None) -> dict[Any, Any]:
        every = [row for row in sessions.edited(every, now) if row["path"] in (paths or ())]
        part = sessions.shown(every, kept)
        said = f"{len(part)} of {len(every)} rows." if kept.strip() else sessions.told(every)
        return {rows: every, table: sessions.listing(part), state: said}

    def around(every: list[Row], now: Any, before: str, after: str) -> dict[Any, Any]:
        part = sessions.only(every, now)
        longer = [{**row, "prompt": f"{before}{row['prompt']}{after}"} if row["prompt"] else row for row in part]
        count = sum(row["prompt"] != new["prompt"] for row, new in zip(part, longer, strict=True))
        said = (
            f"Added to {count} of {len(every)} prompts." if count else "Nothing to add: write a text before or after."
        )
        whole = sessions.edited(sessions.edited(every, now), longer)
        return {rows: whole, table: sessions.listing(longer), prefix: "", suffix: "", state: said}

    def save(write: Callable[[list[Row], Path], Path], name: str) -> Callable[[list[Row], Any], str]:
        def saved(every: list[Row], now: Any) -> str:
            if not (part := sessions.only(every, now)):
                raise gr.Error(
                    "No rows are shown: describe pictures first, or show more of them.", print_exception=False
                )
            return str(write(part, Path(tempfile.mkdtemp(dir=os.environ["GRADIO_TEMP_DIR"])) / name))

        return saved

    private = {"api_visibility": "private", "js": COLLECT}
    slowly = {"concurrency_limit": 8, "show_progress_on": state}
    folder.upload(
        lambda old, new: [*(old or []), *sorted(new, key=_name)], [files, folder], files, api_visibility="private"
    )
    start.click(begin, [rows, seen, files, words], [rows, table, state], **slowly, **private)
    quietly = {"show_progress": "hidden", "trigger_mode": "always_last"}
    for changed in (words, files):
        changed.change(narrow, [rows, seen, words, files], [rows, table, state], **quietly, **private)
    add.click(around, [rows, seen, prefix, suffix], [rows, table, prefix, suffix, state], **private)
    for clicked, write, name in (
        (as_csv, sessions.write_csv, "prompts.csv"),
        (as_texts, sessions.write_texts, "prompts.zip"),
    ):
        clicked.click(save(write, name), [rows, seen], fetched, **private).success(None, js=CLICK)


def _name(path: str) -> str:
    return Path(path).name


def _adapt() -> None:
    """Changes Gradio in this process: no input fetches an address, and pictures come as files, not decoded.

    Of an address it would fetch the whole into memory, whatever its size, for any input that claims to be a file. In
    the classes, since Gradio makes a component anew for each user whenever it changes one.
    """
    import gradio as gr
    from gradio_client.utils import is_http_url_like

    block, move = gr.blocks.Block, gr.blocks.Block.async_move_resource_to_block_cache

    async def move_local(self: Any, path: Any) -> str | None:
        if is_http_url_like(str(path).lower()):
            raise ValueError("Upload a file; addresses are not fetched.")
        return await move(self, path)

    block.async_move_resource_to_block_cache = move_local
    gr.Image.preprocess = lambda self, payload: payload and payload.path
