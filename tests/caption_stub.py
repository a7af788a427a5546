"""A server that answers as Ollama, vLLM and LM Studio do."""

import base64
import contextlib
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
from PIL import Image

SAYS = " brightness {brightness}\nseed {seed} "
MODELS = [{"id": "llava"}, {"id": "moondream"}]


class Stub(BaseHTTPRequestHandler):
    """A server that says how bright the middle of an image is."""

    asked: list = []  # noqa: RUF012
    broken = False
    says = SAYS
    models: list | None = MODELS

    def answer(self, value, code=200):
        self.send_response(code)
        self.end_headers()
        self.wfile.write(json.dumps(value).encode())

    def do_GET(self):
        self.answer({"data": type(self).models} if self.path == "/v1/models" else {}, 200)

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).asked.append(asked)
        if type(self).broken:
            self.answer({"error": "out of memory"}, 500)
            return
        url = asked["messages"][0]["content"][1]["image_url"]["url"]
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))))
        text = type(self).says.format(brightness=pixels[256, 256, 0], seed=asked["seed"])
        self.answer({"choices": [{"message": {"content": text}}]})

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def serve():
    """Its address, as long as it runs."""
    Stub.asked, Stub.broken, Stub.says, Stub.models = [], False, SAYS, MODELS
    made = ThreadingHTTPServer(("127.0.0.1", 0), Stub)
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{made.server_port}/v1"
    made.shutdown()
    made.server_close()
