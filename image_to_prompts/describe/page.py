"""A page in the browser: the prompt of a picture, edited and rendered again, and the prompts of a folder.

    image-to-prompts demo                                    on this machine alone
    curl --data-binary @cat.png http://127.0.0.1:7860/describe    the same as JSON

It reads no file but those that are uploaded to it. What is uploaded is checked before it is decoded, and deleted after
an hour. Beside the loopback address it answers to one account only (--auth).
"""

from __future__ import annotations

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
from .session import MOST_LETTERS, Session

if TYPE_CHECKING:
    import gradio
    import pandas as pd
    from starlette.requests import Request
    from starlette.responses import Response

log = logging.getLogger(__name__)
WAITING = 64  # requests in the queue
KEPT, SWEPT = 3600, 600  # seconds for which uploads and sessions are kept, and between two looks at them
MOST_FILES = 500  # uploads of one folder
DROP = "Drop a picture here, paste one, or click to choose"
CSS = """
#table img {max-width: 64px; max-height: 64px}
.lines {width: 100%; margin: 4px 0 16px}
.lines td {padding: 2px 12px 2px 0; vertical-align: top; border: none}
"""
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
    """Opens a page in the browser: drop a picture, edit its prompt, render it again; or describe a folder."""


def page(session: Session) -> gradio.Blocks:
    """The page: a picture, and a folder."""
    import gradio as gr

    _adapt()
    with gr.Blocks(title="image-to-prompts", analytics_enabled=False, delete_cache=(SWEPT, KEPT)) as blocks:
        gr.Markdown("# The prompt of a picture")
        with gr.Tab("One picture"):
            _one_picture(session)
        with gr.Tab("A folder"):
            _a_folder(session)
    return blocks


def _one_picture(session: Session) -> None:
    import gradio as gr

    found = gr.State(None, time_to_live=KEPT)
    visited = gr.State([], time_to_live=KEPT)
    with gr.Row():
        with gr.Column(min_width=320):
            picture = gr.Image(
                label="picture",
                sources=["upload", "clipboard"],
                height=360,
                placeholder=DROP,
                elem_id="picture",
                buttons=[],
            )
        with gr.Column(min_width=320):
            source = gr.Markdown(elem_id="source")
            prompt = gr.Textbox(
                label="prompt", lines=3, max_length=MOST_LETTERS, elem_id="prompt", interactive=True, buttons=["copy"]
            )
            cosine = gr.Textbox(
                label="similarity to the prediction", interactive=False, elem_id="similarity", visible=False
            )
            others = gr.Radio([], label="candidates", elem_id="candidates", visible=False)
    worth = gr.HTML(elem_id="worth")
    with gr.Row(visible=False) as again:
        with gr.Column(min_width=320):
            seed = gr.Number(label="seed", precision=0, minimum=0, maximum=2**32 - 1, elem_id="seed")
            button = gr.Button("Render again", variant="primary", elem_id="render")
            said = gr.Markdown(elem_id="undrawn")
        with gr.Column(min_width=320):
            drawn = gr.Image(
                label="rendered again", type="pil", interactive=False, format="png", height=360, elem_id="again",
                buttons=["download", "fullscreen"],
            )  # fmt: skip
    refusal = gr.Markdown(elem_id="refusal")
    nearest = gr.HTML(elem_id="nearest")
    history = gr.Gallery(
        label="this visit",
        columns=8,
        height=180,
        fit_columns=False,
        allow_preview=False,
        buttons=[],
        object_fit="contain",
        elem_id="history",
        visible=False,
    )

    def look(path: str | None, past: list[tuple[str, str]]) -> dict[Any, Any]:
        blank: dict[Any, Any] = {
            found: None, prompt: "", source: "", refusal: "", drawn: None, said: "",
            picture: gr.Image(None, placeholder=DROP), again: gr.Row(visible=False),
            others: gr.Radio(choices=[], visible=False), nearest: "",
            worth: "", cosine: gr.Textbox("", visible=False),
        }  # fmt: skip
        if path is None:
            return blank
        (one,) = session.describe([Path(path)])
        if one.error:
            return {**blank, picture: gr.Image(None, placeholder=f"# {one.error}\n{DROP}")}
        no = session.refusal(one)
        vector = None if one.familiar is False else one.vector  # the prediction for a strange picture says nothing
        choices = [one.prompt, *one.candidates]
        now = [*((old, text) for old, text in past if old != path), (path, one.prompt)]
        own = int(one.seed) if one.seed.isdigit() and int(one.seed) < 2**32 else sessions.seed_of(one.prompt)
        rows = [[f"{value:.3f}", text] for text, value in one.nearest]
        return {
            **blank,
            found: vector, prompt: one.prompt, source: f"**{session.source(one)}**", picture: gr.Image(path),
            others: gr.Radio(choices=choices, value=one.prompt, visible=len(choices) > 1),
            nearest: _lines("Nearest known prompts", rows), refusal: no, again: gr.Row(visible=not no), seed: own,
            visited: now, history: gr.Gallery(now[::-1], visible=len(now) > 1), **judge(one.prompt, vector),
        }  # fmt: skip

    def judge(text: str, vector: Any) -> dict[Any, Any]:
        near, rows = session.judge(text, vector)
        return {
            cosine: gr.Textbox(near, visible=bool(near)),
            worth: _lines("What each phrase adds to the similarity", rows),
        }

    def draw(text: str, number: float | None) -> dict[Any, Any]:
        if not text.strip():
            return {said: "Write a prompt first."}
        image, missing = session.draw(text, sessions.seed_of(text) if number is None else int(number))
        return {drawn: image, said: missing}

    def back(past: list[tuple[str, str]], chosen: gr.SelectData) -> dict[Any, Any]:
        return look(past[::-1][chosen.index][0], past)

    shown = [found, visited, prompt, source, cosine, worth, nearest, others, seed, again, refusal, said, drawn, picture]
    every = {"concurrency_limit": 16}  # the models themselves are asked one after the other, see `Session`
    picture.input(look, [picture, visited], [*shown, history], api_name="look", **every)
    back.__annotations__["chosen"] = gr.SelectData
    history.select(back, visited, [*shown, history], api_visibility="private", **every)
    quietly = {"trigger_mode": "always_last", "show_progress": "hidden", "api_visibility": "private"}
    prompt.change(judge, [prompt, found], [cosine, worth], **quietly, **every)
    others.input(lambda text: text, others, prompt, api_visibility="private")
    button.click(draw, [prompt, seed], [drawn, said], api_visibility="private", **every)


def _lines(title: str, rows: list[list[str]]) -> str:
    """A small table as HTML, which wraps on a telephone; "" without rows."""
    cells = "".join(f"<tr><td>{escape(first)}</td><td>{escape(text)}</td></tr>" for first, text in rows)
    return f"<b>{title}</b><table class=lines>{cells}</table>" if rows else ""


def _a_folder(session: Session) -> None:
    import gradio as gr

    rows = gr.State([], time_to_live=KEPT)
    files = gr.File(label="pictures", file_count="multiple", height=140, elem_id="files")
    start = gr.Button("Describe them", variant="primary", elem_id="start")
    state = gr.Markdown(elem_id="state")
    with gr.Row():
        words = gr.Textbox(label="show only rows with", elem_id="filter", min_width=200)
        prefix = gr.Textbox(label="text before", elem_id="prefix", min_width=120)
        suffix = gr.Textbox(label="text after", elem_id="suffix", min_width=120)
        add = gr.Button("Add to the prompts shown", elem_id="add", min_width=160)
    table = gr.Dataframe(
        headers=list(sessions.COLUMNS),
        datatype=["html", "str", "str", "str", "str"],
        static_columns=[0, 1, 3, 4],
        column_widths=["90px", "190px", "600px", "180px", "110px"],
        interactive=True,
        wrap=True,
        elem_id="table",
    )
    with gr.Row():
        as_csv = gr.Button("Download the table (CSV)", elem_id="csv")
        as_texts = gr.Button("Download one .txt per picture (zip)", elem_id="texts")
    fetched = gr.DownloadButton(elem_id="fetch", visible="hidden")

    def begin(paths: list[str] | None) -> Iterator[tuple[list[dict[str, Any]], pd.DataFrame, str]]:
        given = [Path(path) for path in (paths or [])[:MOST_FILES]]
        done: list[dict[str, Any]] = []
        for part in session.rows(given):
            done += part
            yield done, sessions.shown(done, ""), f"{len(done)} of {len(given)} pictures"
        left = len(paths or []) - len(given)
        bad = sum(not row["picture"] for row in done)
        said = [f"{len(done) - bad} pictures described" if given else "Choose pictures first"]
        said += [f"{bad} files are no pictures that can be read"] if bad else []
        said += [f"{left} left out: at most {MOST_FILES} at once"] if left else []
        yield done, sessions.shown(done, ""), "; ".join(said) + "."

    def save(write: Callable[[pd.DataFrame, Path], Path], name: str) -> Callable[[pd.DataFrame], str]:
        def saved(shown: pd.DataFrame) -> str:
            return str(write(shown, Path(tempfile.mkdtemp(dir=os.environ["GRADIO_TEMP_DIR"])) / name))

        return saved

    private = {"api_visibility": "private"}
    start.click(begin, files, [rows, table, state], concurrency_limit=8, **private)
    table.input(sessions.edited, [rows, table], rows, show_progress="hidden", **private)
    words.change(sessions.shown, [rows, words], table, show_progress="hidden", trigger_mode="always_last", **private)
    around = add.click(sessions.surrounded, [rows, table, prefix, suffix], rows, **private)
    around.then(sessions.shown, [rows, words], table, **private)
    for clicked, write, name in (
        (as_csv, sessions.write_csv, "prompts.csv"),
        (as_texts, sessions.write_texts, "prompts.zip"),
    ):
        clicked.click(save(write, name), table, fetched, **private).then(None, js=CLICK, **private)


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
    from starlette.responses import JSONResponse

    async def answer(request: Request) -> Response:
        body = b""
        async for chunk in request.stream():
            body += chunk
            if len(body) > gate.MEGABYTES * 1_000_000:
                return JSONResponse({"error": f"The file has more than {gate.MEGABYTES} MB."}, 413)
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            file.write(body)
            file.flush()
            (found,) = await run_in_threadpool(session.describe, [Path(file.name)])
        if found.error:
            return JSONResponse({"error": found.error}, 400)
        said = {name: value for name, value in asdict(found).items() if name not in ("path", "error", "vector")}
        return JSONResponse(said)

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
            max_file_size=gate.MEGABYTES * gr.FileSize.MB,
            app_kwargs={
                "middleware": [Middleware(gate.Gate, folder=Path(folder.name), user=user, password=password)],
                "routes": [Route("/describe", _answerer(session, Path(folder.name)), methods=["POST"])],
            },
            css=CSS,
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
