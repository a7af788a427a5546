"""Who may use the page, and what it takes: passwords, uploads, room on the disk."""

import base64
import ipaddress
import secrets
import socket
import warnings
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from PIL import Image

from ..data.images import UNREADABLE
from ..run.errors import UserError

MEGABYTES, MEGAPIXELS = 20, 40  # of an upload
FORMATS = ("PNG", "JPEG", "WEBP")
STARTED = "/gradio_api/startup-events"  # by which Gradio asks itself whether it has started
UPLOADS = ("/upload", "/describe")
MOST_BYTES = 2_000_000_000  # of all uploads together; they are deleted after an hour


def why_refused(path: Path) -> str:
    """Why an upload is no image, or too large to decode, from its first bytes; "" if it is neither."""
    if path.stat().st_size > MEGABYTES * 1_000_000:
        return f"The file has more than {MEGABYTES} MB."
    pixels = float("inf")
    try:
        with warnings.catch_warnings():  # Pillow warns of, and then refuses, what is large; our limit is lower
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as file:
                pixels = file.width * file.height
    except Image.DecompressionBombError:
        pass
    except UNREADABLE:
        return "This file cannot be read as a PNG, JPEG or WebP picture."
    return f"The image has more than {MEGAPIXELS} megapixels. Make it smaller." if pixels > MEGAPIXELS * 1e6 else ""


def account(auth: str) -> tuple[str, str]:
    """User and password from `USER:PASSWORD_FILE`; ("", "") from "".

    Raises:
        UserError: If there is no such file, or nothing in it.
    """
    if not auth:
        return "", ""
    user, _, file = auth.partition(":")
    try:
        password = Path(file).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--auth {auth}: {file or 'no file'} cannot be read; give USER:PASSWORD_FILE") from error
    if not user or not password:
        raise UserError(f"--auth {auth}: the user or the password is empty; give USER:PASSWORD_FILE")
    return user, password


def check_address(host: str, port: int, auth: str) -> None:
    """Raises UserError where the page cannot answer, or would let others in unasked, before anything is loaded."""
    if not 1 <= port <= 65_535:
        raise UserError(f"--port {port}: must be from 1 to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise UserError(f"--host {host} --port {port}: {error.strerror}; give others") from error
    if not auth and not ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback:
        raise UserError(f"--host {host} lets others in: add --auth USER:PASSWORD_FILE")


class Gate:
    """Middleware (ASGI) before all of the page: asks for the password, and takes uploads only while there is room."""

    def __init__(self, app: Callable[..., Awaitable[None]], folder: Path, user: str, password: str) -> None:
        """Takes what is behind it, the folder of uploads, and the one account ("" for none)."""
        self.app, self.folder = app, folder
        self.expected = b"Basic " + base64.b64encode(f"{user}:{password}".encode()) if password else b""

    async def __call__(self, scope: dict[str, Any], receive: Callable[..., Any], send: Callable[..., Any]) -> None:
        """Answers in place of the page, or lets it answer."""
        from starlette.responses import PlainTextResponse

        headers = dict(scope.get("headers", ()))
        given = headers.get(b"authorization", b"")
        asked = scope["type"] in ("http", "websocket") and self.expected and scope["path"] != STARTED
        if asked and not secrets.compare_digest(given, self.expected):
            asking = {"www-authenticate": 'Basic realm="image-to-prompts"'}
            await PlainTextResponse("Password, please.", 401, asking)(scope, receive, send)
        elif scope["type"] == "http" and scope["path"].endswith(UPLOADS) and self._full(headers):
            full = "Too many uploads are kept at the moment. Try again in an hour."
            await PlainTextResponse(full, 507)(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def _full(self, headers: dict[bytes, bytes]) -> bool:
        used = sum(file.stat().st_size for file in self.folder.rglob("*") if file.is_file())
        return used + int(headers.get(b"content-length", 0)) > MOST_BYTES
