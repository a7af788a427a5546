"""The page, served by a process of its own: in a browser, to ten users at once, and to hostile uploads."""

import asyncio
import contextlib
import http.server
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from PIL import Image

from image_to_prompts import describe, profiles
from image_to_prompts.describe import page

gradio_client = pytest.importorskip("gradio_client")
pytestmark = pytest.mark.slow
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
USERS = 10


class Server:
    def __init__(self, run, folder):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url, self.temporary = f"http://127.0.0.1:{self.port}", folder / "temporary"
        self.temporary.mkdir()
        (folder / "secret.txt").write_text("secret")
        words = ["demo", "--run", run.folder, "--port", self.port]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "image_to_prompts", *map(str, words)],
            cwd=folder,
            env={**os.environ, "TMPDIR": str(self.temporary)},
            stderr=(folder / "log").open("w"),
        )
        for _ in range(600):
            assert self.process.poll() is None, (folder / "log").read_text()
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(self.url).status_code == 200:
                    break
            time.sleep(0.2)

    def user(self):
        return gradio_client.Client(self.url, verbose=False)

    def describe(self, path, user=None):
        """What the page shows for an image: prompt, similarity, nearest prompts."""
        prompt, similarity, nearest, _ = (user or self.user()).predict(
            gradio_client.handle_file(str(path)), api_name="/describe"
        )
        return prompt, float(similarity or "nan"), nearest["data"]  # of a strange image nothing is said

    def memory(self):
        """GB in use."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) / 1e6


@pytest.fixture(scope="module")
def server(trained_run, tmp_path_factory):
    server = Server(trained_run, tmp_path_factory.mktemp("server"))
    yield server
    server.process.terminate()
    server.process.wait(30)


@pytest.fixture(scope="module")
def pictures(small_run):
    return sorted(small_run.images.glob("*.png"))[:USERS]


@pytest.fixture(scope="module")
def alone(trained_run, pictures):
    """What each picture gets when nobody else is there."""
    one = describe.Describer(profiles.default_config("describe", trained_run, "embedded"))
    return [one.describe([path])[0] for path in pictures]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium (apt-get install chromium)")
def test_a_person_uses_the_page(server, pictures, alone, tmp_path):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        asked, errors = [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(server.url)
        page.set_input_files("#image input[type=file]", pictures[0])
        shown = "document.querySelector('#{} textarea, #{} input').value"
        prompt, similarity = shown.replace("{}", "prompt"), shown.replace("{}", "similarity")
        page.wait_for_function(f"{prompt}.length > 0")
        assert page.evaluate(prompt) == alone[0].prompt
        page.wait_for_function(f"{similarity}.length > 0")
        assert abs(float(page.evaluate(similarity)) - alone[0].cosine) < 0.002
        assert alone[0].nearest[0][0] in page.inner_text("#nearest")

        page.fill("#prompt textarea", "a bowl of soup")
        page.wait_for_function(f"Math.abs({similarity} - {alone[0].cosine}) > 0.1")
        page.click("#render")
        page.wait_for_selector("#again img")
        page.screenshot(path=tmp_path / "page.png")
        assert (tmp_path / "page.png").stat().st_size > 10_000
        browser.close()
    assert not errors
    away = [url for url in asked if not url.startswith((server.url, "data:", "blob:"))]
    assert not away, "the page must work offline"


def test_ten_users_at_once_get_their_own_answers(server, pictures, alone):
    users = [server.user() for _ in range(USERS)]
    together = threading.Barrier(USERS)

    def use(number):
        together.wait()
        return server.describe(pictures[number], users[number])

    with ThreadPoolExecutor(USERS) as threads:
        first = list(threads.map(use, range(USERS)))
        before = server.memory()
        again = list(threads.map(use, range(USERS)))
    for (prompt, similarity, nearest), expected in zip(first, alone, strict=True):
        assert prompt == expected.prompt and abs(similarity - expected.cosine) < 0.002
        assert [row[1] for row in nearest] == [text for text, _ in expected.nearest]
    assert again == first and len({prompt for prompt, _, _ in first}) > USERS / 2
    assert server.memory() < before + 0.3


def chunk(kind, data):
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


def bomb(path, side):
    """A PNG of one colour; its header promises side * side pixels, and its data, a thousandth as large, holds them."""
    row = b"\0" + bytes(side // 8)
    head = side.to_bytes(4, "big") * 2 + b"\1\0\0\0\0"
    packer = zlib.compressobj(9)
    data = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b""))


def test_hostile_uploads_are_refused_in_words(server, pictures, alone, tmp_path):
    good = pictures[0].read_bytes()
    script = "<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>"
    (tmp_path / "script.svg").write_text(script)
    (tmp_path / "script.png").write_text(script)
    (tmp_path / "page.png").write_text("<html><script>alert(1)</script></html>")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "cut.png").write_bytes(good[: len(good) // 2])
    (tmp_path / "head.png").write_bytes(good[:20])
    bomb(tmp_path / "bomb.png", 64_000)
    bomb(tmp_path / "large.png", 10_000)
    Image.new("RGB", (64, 64)).save(tmp_path / "image.tiff")
    Image.new("RGB", (64, 64)).save(tmp_path / "exif.png", exif=b"Exif\0\0II*\0")
    said = {
        "script.svg": "no readable image",
        "script.png": "no readable image",
        "page.png": "no readable image",
        "empty.png": "no readable image",
        "head.png": "no readable image",
        "image.tiff": "no readable image",
        "cut.png": "damaged",
        "bomb.png": "megapixels",
        "large.png": "megapixels",
    }
    for first in (pictures[0], tmp_path / "exif.png"):  # a scene and a strange image load what they need
        server.describe(first)
    before = server.memory()
    for name, words in said.items():
        with pytest.raises(Exception, match=words):
            server.describe(tmp_path / name)
    polyglot = tmp_path / "polyglot.png"
    polyglot.write_bytes(good)
    with zipfile.ZipFile(polyglot, "a") as archive:
        archive.writestr("evil.html", "<script>alert(1)</script>")
    assert server.describe(polyglot)[0] == alone[0].prompt  # what follows the picture is nobody's business
    assert server.describe(tmp_path / "exif.png")[0]  # a damaged EXIF block says nothing
    assert server.memory() < before + 0.3


def test_an_upload_that_is_too_large_is_not_taken(server, pictures):
    data = pictures[0].read_bytes() + bytes(page.MEGABYTES * 1024**2)
    answer = httpx.post(f"{server.url}/gradio_api/upload", files={"files": ("a.png", data)}, timeout=60)
    assert answer.status_code == 413


@pytest.mark.parametrize("name", ["../../../../outside.png", "..\\..\\outside.png", "/etc/outside.png", "a\0b.png"])
def test_names_do_not_lead_out_of_the_folder_of_uploads(server, pictures, name):
    files = {"files": (name, pictures[0].read_bytes())}
    answer = httpx.post(f"{server.url}/gradio_api/upload", files=files, timeout=60)
    if answer.status_code == 200:
        (path,) = answer.json()
        assert server.temporary in Path(path).resolve().parents
    assert not list(server.temporary.parent.glob("outside*")) and not Path("/etc/outside.png").exists()


def test_no_file_outside_the_uploads_can_be_read(server, trained_run, pictures):
    secret = server.temporary.parent / "secret.txt"
    assert secret.read_text() == "secret"
    outside = [
        secret,
        Path("/etc/passwd"),
        trained_run.metadata,
        Path(page.__file__),
        server.temporary / ".." / secret.name,
    ]
    for path in outside:
        for form in (f"file={path}", f"file/{path}", f"file=%2e%2e/{path.name}"):
            answer = httpx.get(f"{server.url}/gradio_api/{form}")
            assert answer.status_code in (403, 404), (form, answer.status_code)
    asked = []  # whatever version of Gradio there is, it must not fetch an address for a user

    class Elsewhere(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET

    elsewhere = http.server.HTTPServer(("127.0.0.1", 0), Elsewhere)
    threading.Thread(target=elsewhere.serve_forever, daemon=True).start()
    for claim in (
        {"path": f"http://127.0.0.1:{elsewhere.server_port}/a.png"},
        {"path": str(secret)},
        {"path": "secret.txt"},
        {"path": str(secret), "url": f"file://{secret}"},
        {"path": f"{server.url}/gradio_api/file={secret}"},
        {"path": "", "url": f"http://127.0.0.1:{server.port}/config"},
    ):
        data = {"data": [{**claim, "meta": {"_type": "gradio.FileData"}}]}
        call = httpx.post(f"{server.url}/gradio_api/call/describe", json=data)
        text = call.text
        if call.status_code == 200:
            text = httpx.get(f"{server.url}/gradio_api/call/describe/{call.json()['event_id']}", timeout=60).text
        assert "error" in text and "secret\n" not in text, (claim, text)
    assert not asked
    elsewhere.shutdown()
    assert server.describe(pictures[0])[0]  # it keeps serving


def test_a_stopped_server_leaves_no_uploads(trained_run, pictures, tmp_path):
    server = Server(trained_run, tmp_path)
    assert server.describe(pictures[0])[0] and list(server.temporary.rglob("*.png"))
    server.process.terminate()
    server.process.wait(30)
    assert not list(server.temporary.rglob("*.png"))


def test_addresses_are_not_fetched():
    """Neither for the image nor for any other input that claims to be a file."""
    blocks = page.page(None, None)
    move = [block.async_move_resource_to_block_cache for block in blocks.blocks.values()]
    assert len(move) > 5
    for one in move:
        for address in ("http://example.org/a.png", "https://example.org/a.png", "HTTPS://example.org/a.png"):
            with pytest.raises(Exception, match="not fetched"):
                asyncio.run(one(address))


def test_the_port_and_the_run_are_checked(server, refused, trained_run, tmp_path):
    refused(["demo", "--run", trained_run.folder, "--port", server.port], f"--port {server.port}", "in use")
    for port in ("0", "-1", "99999"):
        refused(["demo", "--run", trained_run.folder, "--port", port], f"--port {port}", "65535")
    refused(["demo", "--run", trained_run.folder, "--host", "no.such.host.invalid"], "no.such.host.invalid")
    refused(["demo", "--run", trained_run.folder, "--profile", "other"], "other")
