"""A server on the loopback address that answers as the Hugging Face hub does, with the real repositories' file lists.

The files' contents are made up: as large as the real ones, or `scale` times as large. `serve` runs one beside a test,
`python tests/hub_stub.py PORT` by itself.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

LISTS = json.loads((Path(__file__).parent / "data" / "hub_lists.json").read_text(encoding="utf-8"))["repositories"]
COMMIT = "c0ffee" * 6 + "c0ff"
BLOCK = bytes(range(256)) * 4096


def open_clip_config(repository: str) -> bytes:
    """The configuration of a tower; as long as the real one to the byte where its length is known."""
    import open_clip

    from image_to_prompts.models.weights import WEIGHTS

    name = next(name for name, one in WEIGHTS.items() if name.startswith("open_clip:") and repository in one.hub)
    preprocess, indent = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}, 4
    if repository.startswith("timm/"):
        preprocess, indent = {**preprocess, "interpolation": "bicubic", "resize_mode": "shortest"}, 2
    settings = {"model_cfg": open_clip.get_model_config(name.partition(":")[2]), "preprocess_cfg": preprocess}
    return json.dumps(settings, indent=indent).encode()


class Hub:
    """What the server has, and what it was asked.

    Attributes:
        scale: Size of the files beside the real ones.
        given: Bytes sent of each file, by `repository/path`.
        gated, gone: Repositories that want an agreement first, or are not there.
        cut: Bytes after which the connection breaks off, the next time it does, by path.
        wrong: Paths of files whose bytes are not those of their hash.
    """

    def __init__(self, scale: float = 1.0) -> None:
        self.scale, self.given = scale, {}
        self.gated: set[str] = set()
        self.gone: set[str] = set()
        self.cut: dict[str, int] = {}
        self.wrong: set[str] = set()
        self.url = ""
        self._digests: dict[str, str] = {}

    def size(self, repository: str, path: str) -> int:
        size = LISTS[repository]["files"][path]["size"] or 1000
        return size if size < 10_000 else max(1000, round(size * self.scale))

    def content(self, repository: str, path: str, start: int = 0):
        """Yields the bytes of a file, from `start` on."""
        mark = hashlib.sha256(f"{repository}/{path}".encode()).digest() * 16
        if path == "model_index.json":
            parts = {one.split("/")[0] for one in LISTS[repository]["files"] if one.count("/") == 1}
            mark = json.dumps({"_class_name": "Pipeline", **{part: ["library", "Class"] for part in parts}}).encode()
            mark = mark.ljust(self.size(repository, path))
        if path == "open_clip_config.json":
            mark = open_clip_config(repository).ljust(self.size(repository, path))
        left, at = self.size(repository, path), 0
        while left > 0:
            block = (mark + BLOCK)[: min(left, len(BLOCK))]
            left, at = left - len(block), at + len(block)
            if at > start:
                yield block[max(0, len(block) - (at - start)) :]

    def digest(self, repository: str, path: str) -> str:
        key = f"{repository}/{path}"
        if key not in self._digests:
            digest = hashlib.sha256()
            for block in self.content(repository, path):
                digest.update(block)
            self._digests[key] = digest.hexdigest()
        return self._digests[key]

    def tree(self, repository: str) -> list[dict]:
        found = []
        for path in LISTS[repository]["files"]:
            size = self.size(repository, path)
            one = {"type": "file", "path": path, "size": size, "oid": hashlib.sha1(path.encode()).hexdigest()}
            if path.endswith((".bin", ".safetensors", ".ckpt", ".h5", ".onnx", ".ot")):
                one["lfs"] = {"oid": self.digest(repository, path), "size": size, "pointerSize": 134}
            found.append(one)
        return found


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        parts = path.split("/")
        if not path:
            self._send(200, b"hub", body)
        elif parts[:2] == ["api", "models"]:
            repository = "/".join(parts[2:4])
            if not self._refused(repository, body):
                self._send(200, json.dumps(self.hub.tree(repository)).encode(), body)
        else:
            repository, file = "/".join(parts[:2]), "/".join(parts[4:])
            if not self._refused(repository, body):
                self._file(repository, file, body)

    def _refused(self, repository: str, body: bool) -> bool:
        if repository in self.hub.gated:
            self._send(403, b"{}", body, **{"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"})
        elif repository in self.hub.gone or repository not in LISTS:
            self._send(404, b"{}", body, **{"X-Error-Code": "RepoNotFound"})
        return repository in self.hub.gated | self.hub.gone or repository not in LISTS

    def _file(self, repository: str, path: str, body: bool) -> None:
        size, start = self.hub.size(repository, path), 0
        headers = {
            "X-Repo-Commit": COMMIT,
            "ETag": f'"{self.hub.digest(repository, path)}"',
            "Accept-Ranges": "bytes",
        }
        if wanted := self.headers.get("Range"):
            start = int(wanted.partition("=")[2].partition("-")[0])
            headers["Content-Range"] = f"bytes {start}-{size - 1}/{size}"
        self.send_response(206 if wanted else 200)
        for name, value in {**headers, "Content-Length": str(size - start)}.items():
            self.send_header(name, value)
        self.end_headers()
        stop = self.hub.cut.pop(path, None) if body else None
        sent = 0
        for block in self.hub.content(repository, path, start) if body else ():
            block = bytes(len(block)) if path in self.hub.wrong else block
            if stop is not None and sent + len(block) > stop:
                self.wfile.write(block[: stop - sent])
                self.wfile.flush()
                self._count(repository, path, stop - sent)
                self.connection.shutdown(2)
                self.close_connection = True
                return
            self.wfile.write(block)
            sent += len(block)
            self._count(repository, path, len(block))

    def _count(self, repository: str, path: str, size: int) -> None:
        key = f"{repository}/{path}"
        self.hub.given[key] = self.hub.given.get(key, 0) + size

    def _send(self, status: int, content: bytes, body: bool, **headers: str) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serve(hub: Hub, port: int = 0):
    """Runs the server; `hub.url` is its address."""
    server = ThreadingHTTPServer(("127.0.0.1", port), type("Own", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def environment(hub: Hub, folder: Path) -> dict[str, str]:
    """Environment in which the real client goes to the stub, and keeps its files below `folder`."""
    own = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(folder / "hf"), "HF_HUB_DISABLE_XET": "1"}
    own |= {"HF_HUB_CACHE": str(folder / "hf" / "hub"), "IMAGE_TO_PROMPTS_WEIGHTS": str(folder / "weights")}
    own |= {"IMAGE_TO_PROMPTS_CACHE": str(folder / "cache"), "HOME": str(folder)}
    return {**os.environ, **own}


if __name__ == "__main__":
    with serve(Hub(), int(sys.argv[1])):
        threading.Event().wait()
