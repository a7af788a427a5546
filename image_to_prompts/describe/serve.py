"""`image-to-prompts demo`: a page in the browser for pictures and their prompts.

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
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import profiles
from ..profiles import Models
from ..run import folders
from ..run.errors import UserError
from . import Describer, gate, page
from . import session as sessions
from .session import Session

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

log = logging.getLogger(__name__)
WAITING = 64  # requests in the queue


@dataclass
class Main:
    """Opens the page."""

    run: Path = Path("runs/default")
    """Run whose checkpoints and known prompts to use."""
    profile: str = "embedded"
    """`embedded` or `full`; left out: the run's own."""
    host: str = "127.0.0.1"
    """Address to answer on; any other lets others in and needs --auth."""
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


def run(config: Config) -> None:
    """Serves the page until it is stopped.

    Raises:
        ModuleNotFoundError: If gradio is not installed.
        UserError: If the address cannot be used or would let others in, or see `Describer`.
    """
    gate.check_address(config.host, config.port, config.auth)
    user, password = gate.account(config.auth)
    folder = tempfile.TemporaryDirectory(prefix="image-to-prompts-")  # lives as long as the page, see below
    os.environ |= {"GRADIO_TEMP_DIR": folder.name, "GRADIO_ANALYTICS_ENABLED": "False"}
    import gradio as gr
    from starlette.middleware import Middleware
    from starlette.routing import Route

    chosen = {name: getattr(config, name) for name in ("artists", "caption", "ranker", "weights_dir")}
    describer = Describer(profiles.default_config("describe", folders.Run(config.run), config.profile, **chosen))
    session = Session(describer, sessions.painter(describer.config.profile))
    blocks = page.page(session).queue(max_size=WAITING)
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
            css=page.CSS,
            head=f"<script>{Path(page.__file__).with_suffix('.js').read_text(encoding='utf-8')}</script>",
            ssr_mode=False,
            footer_links=[],
            quiet=True,
            share=False,
            prevent_thread_lock=True,
            _frontend=False,  # or Gradio gives up when it cannot read its own page within 3 seconds
        )
    except OSError as error:
        raise UserError(f"--host {config.host} --port {config.port}: {error}") from error
    log.info("open %s (Ctrl-C stops it)", blocks.local_url)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that the uploads are deleted then, too
    blocks.block_thread()
