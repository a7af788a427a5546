"""A server on the loopback address that speaks the routes of Kaggle's API which the project uses.

It is reached as a proxy, so that the real `kaggle` package can be sent there by its environment alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

ME = "ada"


class Stub:
    """What the server answers, and what it was asked.

    Attributes:
        replies: By route: a JSON value, or a function of the request that returns one; (status, value) for an error.
        calls: (route, request) of every call, in order.
        uploads: Bytes by path of every PUT.
        datasets: Those that exist, `owner/slug`.
        absent: Slugs of kernels that do not exist.
        not_found: The answer for what does not exist.
        delays: Seconds to wait before answering, by route.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict]] = []
        self.uploads: dict[str, bytes] = {}
        self.delays: dict[str, float] = {}
        self.upload_status = 200
        self.datasets: set[str] = set()
        self.absent: set[str] = set()
        self.not_found = (404, {"code": 404, "message": "Not found"})
        self.replies = {
            "SaveKernel": {"url": "https://www.kaggle.com/code/x", "versionNumber": 3},
            "GetKernelSessionStatus": lambda asked: (
                self.not_found if asked["kernelSlug"] in self.absent else {"status": "COMPLETE"}
            ),
            "GetDatasetStatus": lambda asked: (
                {"status": "ready"}
                if f"{asked['ownerSlug']}/{asked['datasetSlug']}" in self.datasets
                else self.not_found
            ),
            "GetAcceleratorQuotaStatistics": {
                "gpuQuota": {"timeUsed": "30600s", "totalTimeAllowed": "108000s"},
                "quotaRefreshTime": "2026-11-28T00:00:00Z",
            },
            "StartBlobUpload": lambda asked: {"token": f"t-{asked['name']}", "createUrl": self.url(asked["name"])},
            "CreateDataset": {"url": "https://www.kaggle.com/datasets/x", "status": "ok"},
            "CreateDatasetVersion": {"url": "https://www.kaggle.com/datasets/x", "status": "ok"},
            "CreateCodeSubmission": {"message": "Successfully submitted"},
        }

    def url(self, name: str) -> str:
        return f"http://localhost/files/{name}"

    def asked(self, route: str) -> list[dict]:
        """The requests to a route."""
        return [request for name, request in self.calls if name == route]


def handler(stub: Stub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def answer(self, status: int, body: bytes, kind: str = "application/json") -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            with contextlib.suppress(ConnectionError):  # of one who has given up waiting
                self.wfile.write(body)

        def body(self) -> bytes:
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def do_POST(self) -> None:
            route = urlsplit(self.path).path.rsplit("/", 1)[1]
            request = json.loads(self.body() or b"{}")
            stub.calls.append((route, request))
            time.sleep(stub.delays.get(route, 0))
            reply = stub.replies[route]
            reply = reply(request) if callable(reply) else reply
            status, reply = reply if isinstance(reply, tuple) else (200, reply)
            self.answer(status, json.dumps(reply).encode())

        def do_PUT(self) -> None:
            stub.uploads[urlsplit(self.path).path] = self.body()
            self.answer(stub.upload_status, b"{}")

        def log_message(self, *_: object) -> None:
            pass

    return Handler


@contextlib.contextmanager
def serving(stub: Stub):
    """Runs the server; gives its port."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(stub))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()


def environment(port: int, home: Path, **more: str) -> dict[str, str]:
    """An environment in which the `kaggle` package reaches the stub and nothing else, with its own home folder."""
    kept = {k: v for k, v in os.environ.items() if not k.upper().startswith(("KAGGLE", "NO_PROXY", "HTTPS_PROXY"))}
    address = f"http://127.0.0.1:{port}"
    return {
        **kept,
        "KAGGLE_API_ENVIRONMENT": "LOCALHOST",
        "KAGGLE_CONFIG_DIR": str(home / ".kaggle"),
        **dict.fromkeys(("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy"), address),
        "HOME": str(home),
        "TMPDIR": str(home),
        **more,
    }


CHECK = """
import requests
from kagglesdk.kaggle_env import get_endpoint, get_env
url = get_endpoint(get_env())
assert url == "http://localhost", url
proxy = requests.utils.select_proxy(url, requests.utils.get_environ_proxies(url))
assert proxy and proxy.startswith("http://127.0.0.1:"), proxy
"""


def assert_redirected(env: dict[str, str]) -> None:
    """Refuses to go on unless whatever the `kaggle` package sends in this environment ends on the loopback address."""
    subprocess.run([sys.executable, "-c", CHECK], env=env, check=True, capture_output=True, text=True)


def sign_in(home: Path, text: str = '{"username": "ada", "key": "0123456789abcdef"}') -> Path:
    path = home / ".kaggle" / "kaggle.json"
    path.write_text(text)
    path.chmod(0o600)
    return path
