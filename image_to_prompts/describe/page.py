"""A page in the browser: the prompt of a picture, edited and rendered again, and those of many.

    image-to-prompts demo                                    on this machine alone
    curl --data-binary @cat.png http://127.0.0.1:7860/describe    the same as JSON

It reads no file but those that are uploaded to it. What is uploaded is checked before it is decoded, and deleted after
an hour. Beside the loopback address it answers to one account only (--auth).
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import profiles
from ..profiles import Models
from ..run import folders
from ..run.errors import UserError
from . import Describer, gate
from . import session as sessions
from .session import MOST_LETTERS, Row, Session

if TYPE_CHECKING:
    import gradio
    from starlette.requests import Request
    from starlette.responses import Response

log = logging.getLogger(__name__)
WAITING = 64  # requests in the queue
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
.lines {width: 100%; margin: 4px 0 16px}
.lines, .lines tr, .lines td {border: none !important; vertical-align: top}
.lines td {padding: 2px 12px 2px 0}
.lines td:first-child {width: 64px}
"""
COLLECT = "(...given) => { given[1] = collect(); return given; }"
CLICK = "() => document.querySelector('#fetch a, a#fetch, #fetch')?.click()"


@dataclass
class Main:
    """Opens the page."""

    run: Path = Path("runs/default")
    """Run whose checkpoints and known prompts to use."""
    profile: str = "embedded"
    """`embedded` or `full`; left out: the run's own."""
    host: str = "127.0.0.1"
    """Address to answer on; any other lets others in and wants --auth."""
    port: int = 7860
    """Port to answer on."""
    auth: str = ""
    """USER:PASSWORD_FILE, the one account of the page."""
    artists: bool = True
    """Let prompts name artists."""
    weights_dir: Path | None = None
    """Folder of weights, looked into before all other places; left out: see `image-to-prompts weights`."""


@dataclass
class Config(Models, Main):
    """Opens a page in the browser: drop a picture, edit its prompt, render it again; or describe many."""


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

    vector, here = (gr.State(None, time_to_live=KEPT) for _ in range(2))
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
            prompt = gr.Textbox(label="Prompt", lines=3, max_length=MOST_LETTERS, elem_id="prompt", buttons=["copy"])
            fits = gr.Markdown(elem_id="similarity")
            others = gr.Radio([], label="Candidates, best to read first", elem_id="candidates", visible=False)
    worth = gr.HTML(elem_id="worth")
    refusal = gr.Markdown(elem_id="refusal")
    with gr.Row(visible=False) as again:
        with gr.Column(min_width=320):
            info = "The same number draws the same picture of a text."
            seed = gr.Number(label="Seed", precision=0, info=info, elem_id="seed")
            button = gr.Button("Render again", variant="primary", elem_id="render")
            said = gr.HTML(elem_id="undrawn")
        with gr.Column(min_width=320):
            drawn = gr.Image(
                label="Rendered again", type="pil", interactive=False, format="png", height=360, elem_id="again",
                buttons=["download", "fullscreen"], visible=False,
            )  # fmt: skip
    nearest = gr.HTML(elem_id="nearest")

    def look(path: str | None, past: list[tuple[str, str]]) -> dict[Any, Any]:
        blank: dict[Any, Any] = {
            vector: None, here: None, prompt: "", source: "", refusal: "", said: "",
            drawn: gr.Image(None, visible=False), again: gr.Row(visible=False),
            others: gr.Radio(choices=[], visible=False),
            nearest: "", worth: "", fits: "",
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
        choices = session.rated([one.prompt, *one.candidates], known)
        rows = [[f"{value:.2f}", near] for near, value in one.nearest]
        return {
            **blank,
            vector: known, here: path, prompt: text, source: session.source(one), picture: gr.Image(path),
            others: gr.Radio(choices=choices, value=text, visible=len(choices) > 1),
            nearest: _lines("The most similar prompts that the model has learned from", rows), refusal: no,
            again: gr.Row(visible=not no), seed: own, visited: now, **judge(text, known),
            history: gr.Gallery(now, visible=True, selected_index=list(dict(now)).index(path)),
        }  # fmt: skip

    def judge(text: str, known: Any) -> dict[Any, Any]:
        near, rows = session.judge(text, known)
        return {fits: near, worth: _lines("What that number loses without a phrase", rows)}

    def edit(text: str, known: Any, path: str, past: list[tuple[str, str]]) -> dict[Any, Any]:
        left = [(one, text if one == path else old) for one, old in past]
        return {visited: left, others: gr.Radio(value=text), **judge(text, known)}

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
    shown = [vector, here, prompt, source, fits, worth, nearest, others, seed, again, refusal, said, drawn, picture]
    picture.input(look, [picture, visited], [*shown, visited, history], api_name="look", **every)
    private = {"api_visibility": "private"}
    history.select(back, visited, [*shown, visited, history], **private, **every)
    quietly = {"trigger_mode": "always_last", "show_progress": "hidden", "concurrency_limit": 16}
    prompt.change(edit, [prompt, vector, here, visited], [visited, others, fits, worth], **private, **quietly)
    others.input(lambda text: text, others, prompt, show_progress="hidden", **private)
    button.click(draw, [prompt, seed], [drawn, said], concurrency_limit=16, show_progress_on=said, **private)


def _lines(title: str, rows: list[list[str]]) -> str:
    """A small table as HTML, which wraps on a telephone; "" without rows."""
    cells = "".join(f"<tr><td>{escape(first)}</td><td>{escape(text)}</td></tr>" for first, text in rows)
    return f"<b>{title}</b><table class=lines>{cells}</table>" if rows else ""


def _many_pictures(session: Session) -> None:
    import gradio as gr

    rows = gr.State([], time_to_live=KEPT)
    seen = gr.JSON(visible="hidden")  # the prompts as they stand in the list: `page.js` reads them at each action
    files = gr.File(label="Pictures", file_count="multiple", height=140, elem_id="files")
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

    def narrow(every: list[Row], now: Any, kept: str) -> dict[Any, Any]:
        every = sessions.edited(every, now)
        part = sessions.shown(every, kept)
        said = f"{len(part)} of {len(every)} rows." if kept.strip() else sessions.told(every)
        return {rows: every, table: sessions.listing(part), state: said}

    def around(every: list[Row], now: Any, before: str, after: str) -> dict[Any, Any]:
        part = sessions.only(every, now)
        longer = [{**row, "prompt": f"{before}{row['prompt']}{after}"} if row["prompt"] else row for row in part]
        said = f"Added to {sum(bool(row['prompt']) for row in part)} prompts."
        whole = sessions.edited(sessions.edited(every, now), longer)
        return {rows: whole, table: sessions.listing(longer), prefix: "", suffix: "", state: said}

    def save(write: Callable[[list[Row], Path], Path], name: str) -> Callable[[list[Row], Any], str]:
        def saved(every: list[Row], now: Any) -> str:
            if not (part := sessions.only(every, now)):
                raise gr.Error("There is nothing to download yet.", print_exception=False)
            return str(write(part, Path(tempfile.mkdtemp(dir=os.environ["GRADIO_TEMP_DIR"])) / name))

        return saved

    private = {"api_visibility": "private", "js": COLLECT}
    slowly = {"concurrency_limit": 8, "show_progress_on": state}
    start.click(begin, [rows, seen, files, words], [rows, table, state], **slowly, **private)
    quietly = {"show_progress": "hidden", "trigger_mode": "always_last"}
    words.change(narrow, [rows, seen, words], [rows, table, state], **quietly, **private)
    add.click(around, [rows, seen, prefix, suffix], [rows, table, prefix, suffix, state], **private)
    for clicked, write, name in (
        (as_csv, sessions.write_csv, "prompts.csv"),
        (as_texts, sessions.write_texts, "prompts.zip"),
    ):
        clicked.click(save(write, name), [rows, seen], fetched, **private).success(None, js=CLICK)


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


def _answerer(session: Session, folder: Path) -> Callable[[Request], Any]:
    """What answers `POST /describe`: the body is a picture, the answer what was found out, as JSON."""
    from starlette.concurrency import run_in_threadpool
    from starlette.responses import Response

    def reply(said: dict[str, Any], status: int = 200) -> Response:
        return Response(f"{json.dumps(said, ensure_ascii=False)}\n", status, media_type="application/json")

    async def answer(request: Request) -> Response:
        body = b""
        async for chunk in request.stream():
            body += chunk
            if len(body) > gate.MEGABYTES * 1_000_000:
                return reply({"error": f"The file has more than {gate.MEGABYTES} MB."}, 413)
        if not body or "multipart" in request.headers.get("content-type", ""):
            return reply({"error": "Send the picture itself: curl --data-binary @picture.png"}, 400)
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            file.write(body)
            file.flush()
            (found,) = await run_in_threadpool(session.describe, [Path(file.name)])
        if found.error:
            return reply({"error": found.error}, 400)
        said = {name: value for name, value in asdict(found).items() if name not in ("path", "error", "vector")}
        return reply(said)

    return answer


def launch(config: Config, wait: bool = True) -> gradio.Blocks:
    """Serves the page until it is stopped.

    Args:
        config: Settings.
        wait: Whether to return only when the server has been stopped.

    Raises:
        UserError: If gradio is not installed, the address cannot be used or would let others in, or see `Describer`.
    """
    gate.check_address(config.host, config.port, config.auth)
    user, password = gate.account(config.auth)
    folder = tempfile.TemporaryDirectory(prefix="image-to-prompts-")  # lives as long as the page, see below
    os.environ |= {"GRADIO_TEMP_DIR": folder.name, "GRADIO_ANALYTICS_ENABLED": "False"}
    try:
        import gradio as gr
        from starlette.middleware import Middleware
        from starlette.routing import Route
    except ModuleNotFoundError as error:
        raise UserError("gradio is not installed; python -m pip install 'image-to-prompts[demo]'") from error
    chosen = {name: getattr(config, name) for name in ("artists", "caption", "ranker", "weights_dir")}
    describer = Describer(profiles.default_config("describe", folders.Run(config.run), config.profile, **chosen))
    session = Session(describer, sessions.painter(describer.config.profile))
    blocks = page(session).queue(max_size=WAITING)
    blocks.uploads = folder
    try:
        blocks.launch(
            server_name=config.host,
            server_port=config.port,
            max_file_size=5 * gate.MEGABYTES * gr.FileSize.MB,
            app_kwargs={
                "middleware": [Middleware(gate.Gate, folder=Path(folder.name), user=user, password=password)],
                "routes": [Route("/describe", _answerer(session, Path(folder.name)), methods=["POST"])],
            },
            css=CSS,
            head=f"<script>{Path(__file__).with_suffix('.js').read_text(encoding='utf-8')}</script>",
            ssr_mode=False,
            footer_links=[],
            quiet=True,
            share=False,
            prevent_thread_lock=True,
        )
    except OSError as error:
        raise UserError(f"--host {config.host} --port {config.port}: {error}") from error
    log.info("open %s (Ctrl-C stops it)", blocks.local_url)
    if wait:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that the uploads are deleted then, too
        blocks.block_thread()
    return blocks


def run(config: Config) -> str:
    """Runs the command: see `launch`."""
    launch(config)
    return ""
