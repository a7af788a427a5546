"""A page on which the prompt of an image can be edited and rendered again: `image-to-prompts demo`.

It answers on this machine alone unless --host says otherwise, and reads no file but those that are uploaded to it. What
is uploaded is checked before it is decoded, and deleted after an hour.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from .. import pipeline, profiles
from ..data import metadata
from ..models import text_encoder
from ..render.store import Row
from ..run import folders
from ..run.errors import UserError
from . import Describer

if TYPE_CHECKING:
    import gradio

log = logging.getLogger(__name__)
MEGABYTES, MEGAPIXELS = 20, 40  # of an upload
FORMATS = ("PNG", "JPEG", "WEBP")
WAITING = 64  # requests in the queue
KEPT, SWEPT = 3600, 600  # seconds for which uploads and sessions are kept, and between two looks at them
MOST_LETTERS = 1000  # of an edited prompt; all-MiniLM-L6-v2 reads the first 256 tokens


@dataclass
class Config:
    """Opens the page."""

    run: Path = Path("runs/default")
    """Run whose checkpoints and known prompts to use."""
    profile: str = "embedded"
    """`embedded` or `full`; left out: the run's own."""
    host: str = "127.0.0.1"
    """Address to answer on; 0.0.0.0 lets others in, without any password."""
    port: int = 7860
    """Port to answer on."""
    artists: bool = True
    """Let prompts name artists."""


def check_upload(path: Path) -> None:
    """Refuses what is no image, or too large to decode, from its first bytes.

    Raises:
        ValueError: Says why.
    """
    try:
        with warnings.catch_warnings():  # Pillow warns of, and then refuses, what is large; our limit is lower
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as file:
                pixels: float = file.width * file.height
    except Image.DecompressionBombError:
        pixels = np.inf
    except (OSError, ValueError, SyntaxError) as error:
        raise ValueError(f"This is no readable image; give a {', '.join(FORMATS)} file.") from error
    if pixels > MEGAPIXELS * 1e6:
        raise ValueError(f"The image has more than {MEGAPIXELS} megapixels; make it smaller.")


def painter(profile: str) -> Callable[[str], Image.Image | None]:
    """What draws a prompt: in the profile `full` Stable Diffusion 2 if its weights are at hand, else scenes."""
    if profile == "full":
        from ..render.stable_diffusion import StableDiffusionBackend

        try:
            backend = StableDiffusionBackend(fast=True)
            backend.start()
        except UserError as error:
            log.warning("embedded scenes instead of Stable Diffusion 2: %s", error)
        else:
            return lambda prompt: backend.render([Row(0, "", prompt, _seed(prompt), "")])[0][0]
    picture = pipeline.embedded("picture")
    return lambda prompt: picture(prompt, _seed(prompt))[0]


def _seed(prompt: str) -> int:
    return metadata.own_seed("", prompt)


class Session:
    """What the page does for its users; what it knows of an image lives in that user's session."""

    def __init__(self, describer: Describer, paint: Callable[[str], Image.Image | None]) -> None:
        """Takes the models."""
        self.describer, self.paint = describer, paint

    def look(self, path: str | None) -> tuple[Any, ...]:
        """The prediction, the prompt, its similarity, the nearest known prompts, and no second picture."""
        if path is None:
            return None, "", "", [], None
        (found,) = self.describer.describe([Path(path)])
        if found.error:
            raise _told("The image is damaged and cannot be read.")
        nearest = [[f"{cosine:.3f}", prompt] for prompt, cosine in found.nearest]
        vector = None if found.familiar is False else found.vector  # the prediction for a strange image says nothing
        return vector, found.prompt, self.similarity(found.prompt, vector), nearest, None

    def similarity(self, prompt: str, vector: np.ndarray | None) -> str:
        """How near an edited prompt comes to the prediction."""
        if vector is None or not prompt.strip():
            return ""
        return f"{float(text_encoder.encode_once([prompt[:MOST_LETTERS]])[0] @ vector):.3f}"

    def draw(self, prompt: str) -> Image.Image | None:
        """The picture of an edited prompt."""
        if not prompt.strip():
            raise _told("Write a prompt first.")
        return self.paint(prompt[:MOST_LETTERS])


def _told(what: str) -> Exception:
    import gradio as gr

    return gr.Error(what, print_exception=False)


def _path_of(payload: Any) -> str | None:
    """In place of what Gradio would do with an upload, namely decode it."""
    if payload is None or not payload.path:
        return None
    try:
        check_upload(Path(payload.path))
    except ValueError as error:
        raise _told(str(error)) from error
    return payload.path


def page(describer: Describer, paint: Callable[[str], Image.Image | None]) -> gradio.Blocks:
    """The page."""
    import gradio as gr

    session = Session(describer, paint)
    with gr.Blocks(title="image-to-prompts", analytics_enabled=False, delete_cache=(SWEPT, KEPT)) as blocks:
        gr.Markdown("# The prompt of an image\nDrop an image, edit what was found, render it again.")
        vector = gr.State(None, time_to_live=KEPT)
        with gr.Row():
            image = gr.Image(label="image", sources=["upload", "clipboard"], height=384, elem_id="image", buttons=[])
            image.preprocess = _path_of
            shown = {"interactive": False, "format": "png", "buttons": ["download", "fullscreen"]}
            again = gr.Image(label="rendered again", type="pil", height=384, elem_id="again", **shown)
        prompt = gr.Textbox(label="prompt", lines=2, max_length=MOST_LETTERS, elem_id="prompt")
        with gr.Row(equal_height=True):
            cosine = gr.Textbox(label="similarity to the prediction", interactive=False, elem_id="similarity", scale=1)
            button = gr.Button("Render again", variant="primary", elem_id="render", scale=1)
        columns = ["similarity", "known prompt"]
        nearest = gr.Dataframe(headers=columns, label="nearest known prompts", interactive=False, elem_id="nearest")
        one = {"concurrency_id": "models", "concurrency_limit": 1}  # they share the models
        image.change(session.look, image, [vector, prompt, cosine, nearest, again], api_name="describe", **one)
        quietly = {"trigger_mode": "always_last", "show_progress": "hidden", "api_name": "similarity"}
        prompt.change(session.similarity, [prompt, vector], cosine, **quietly, **one)
        button.click(session.draw, prompt, again, api_name="render", **one)
    for block in blocks.blocks.values():  # any input may claim to be a file
        block.async_move_resource_to_block_cache = _local_only(block.async_move_resource_to_block_cache)
    return blocks


def _local_only(move: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Refuses addresses, which Gradio would fetch whole into memory, whatever their size."""
    from gradio_client.utils import is_http_url_like

    async def move_local(path: Any) -> str | None:
        if is_http_url_like(str(path).lower()):
            raise _told("Upload a file; addresses are not fetched.")
        return await move(path)

    return move_local


def launch(config: Config, wait: bool = True) -> gradio.Blocks:
    """Serves the page until it is stopped.

    Args:
        config: Settings.
        wait: Whether to return only when the server has been stopped.

    Raises:
        UserError: If gradio is not installed, the address cannot be used, or see `Describer`.
    """
    _check_address(config.host, config.port)
    folder = tempfile.TemporaryDirectory(prefix="image-to-prompts-")  # lives as long as the page, see below
    os.environ |= {"GRADIO_TEMP_DIR": folder.name, "GRADIO_ANALYTICS_ENABLED": "False"}
    try:
        import gradio as gr
    except ModuleNotFoundError as error:
        raise UserError("gradio is not installed; python -m pip install 'image-to-prompts[demo]'") from error
    run = folders.Run(config.run)
    describer = Describer(profiles.default_config("describe", run, config.profile, artists=config.artists))
    blocks = page(describer, painter(describer.config.profile)).queue(max_size=WAITING)
    blocks.uploads = folder
    try:
        blocks.launch(
            server_name=config.host,
            server_port=config.port,
            max_file_size=MEGABYTES * gr.FileSize.MB,
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


def _check_address(host: str, port: int) -> None:
    """Raises UserError where the page cannot answer, before anything is loaded."""
    if not 1 <= port <= 65_535:
        raise UserError(f"--port {port}: must be from 1 to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise UserError(f"--host {host} --port {port}: {error.strerror}; give others") from error
