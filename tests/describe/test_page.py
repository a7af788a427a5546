"""The page, served by a process of its own: in a browser, to ten users at once, and to hostile uploads."""

import asyncio
import base64
import contextlib
import csv
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
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from image_to_prompts import describe, profiles
from image_to_prompts.describe import gate, page, session

pytest.importorskip("gradio")
pytestmark = pytest.mark.slow
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
USERS, BROWSERS = 10, 4
PATIENCE = 300  # seconds: machines are slow, and others are using them
get, post = (partial(one, timeout=PATIENCE) for one in (httpx.get, httpx.post))
SIMILARITY = "Number(document.querySelector('#similarity strong')?.innerText)"
UPLOADS = int(os.environ.get("UPLOADS", 10))  # 200 by hand: docs/log.md


class Server:
    def __init__(self, run, folder, *more):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url, self.temporary = f"http://127.0.0.1:{self.port}", folder / "temporary"
        self.temporary.mkdir()
        (folder / "secret.txt").write_text("secret")
        words = ["demo", "--run", run.folder, "--port", self.port, *more]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "image_to_prompts", *map(str, words)],
            cwd=folder,
            env={**os.environ, "TMPDIR": str(self.temporary)},
            stderr=(folder / "log").open("w"),
        )
        for _ in range(5 * PATIENCE):
            assert self.process.poll() is None, (folder / "log").read_text()
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(self.url).status_code in (200, 401):
                    break
            time.sleep(0.2)

    def ask(self, path):
        """What the page's API answers of an image."""
        answer = post(f"{self.url}/describe", content=Path(path).read_bytes())
        return answer.status_code, answer.json()

    def describe(self, path):
        """Prompt, similarity and nearest prompts of an image."""
        status, said = self.ask(path)
        assert status == 200, said
        return said["prompt"], said["cosine"], said["nearest"]

    def stop(self):
        self.process.terminate()
        self.process.wait(PATIENCE)

    def memory(self):
        """GB in use."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) / 1e6


@pytest.fixture(scope="module")
def server(trained_run, tmp_path_factory):
    server = Server(trained_run, tmp_path_factory.mktemp("server"))
    yield server
    server.stop()


@pytest.fixture(scope="module")
def pictures(small_run):
    return sorted(small_run.images.glob("*.png"))[: USERS // 2]


@pytest.fixture(scope="module")
def alone(trained_run, pictures):
    """What each picture gets when nobody else is there."""
    one = describe.Describer(profiles.default_config("describe", trained_run, "embedded"))
    return [one.describe([path])[0] for path in pictures]


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium (apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Visit:
    """A person at the page."""

    def __init__(self, browser, url, width=1280, scheme="light"):
        self.context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, accept_downloads=True
        )
        self.page, self.asked, self.errors = self.context.new_page(), [], []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.set_default_timeout(1000 * PATIENCE)
        self.page.goto(url)
        self.page.wait_for_selector("#picture input[type=file]", state="attached")

    def drop(self, path):
        self.page.set_input_files("#picture input[type=file]", path)

    def value(self, name):
        return self.page.evaluate(f"document.querySelector('#{name} textarea, #{name} input')?.value ?? ''")

    def wait(self, condition):
        self.page.wait_for_function(condition)

    def described(self):
        self.wait("document.querySelector('#prompt textarea')?.value.length > 0")
        return self.value("prompt")

    def similarity(self):
        self.wait(f"{SIMILARITY} > -1")
        return float(self.page.evaluate(SIMILARITY))

    def said(self, words, where="body"):
        """Waits for words; Gradio's own line of the queue may stand above them for a moment."""
        self.wait(f"document.querySelector({where!r})?.innerText.includes({words!r})")

    def many(self):
        """Opens the other tab; two frames later Gradio has set its inputs back to what they were at first."""
        self.page.get_by_role("tab", name="Many pictures").click()
        self.page.wait_for_selector("#files input[type=file]", state="attached")
        self.page.evaluate(
            "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done))))"
        )

    def folder(self, files):
        self.many()
        self.page.set_input_files("#files input[type=file]", files)
        self.page.wait_for_selector("#files a")
        self.page.click("#start")
        self.page.wait_for_function("document.querySelector('#state').innerText.includes('described')")

    def table(self):
        """Rows of the list of many pictures, as they are shown: file, prompt, source, familiar."""
        found = []
        for line in self.page.locator("#table .line").all():
            image, about = line.get_attribute("data-image"), line.locator(".text").inner_text()
            said, _, strange = about.strip().removeprefix(image).strip().partition(" · ")
            source = {words: name for name, words in session.SOURCES.items()}.get(said, said)
            familiar = "no" if strange else "yes" if source == "checkpoint" else ""
            prompt = line.locator("textarea")
            found.append([image, prompt.input_value() if prompt.count() else "", source, familiar])
        return found

    def download(self, name):
        with self.page.expect_download() as waiting:
            self.page.click(f"#{name}")
        return Path(waiting.value.path())


def test_a_person_uses_the_page(server, pictures, alone, browser):
    visit = Visit(browser, server.url)
    visit.drop(pictures[0])
    assert visit.described() == alone[0].prompt
    page = visit.page
    assert abs(visit.similarity() - alone[0].cosine) < 0.002
    visit.said("The model's prediction, which can be wrong", "#source")
    visit.said(alone[0].nearest[0][0], "#nearest")
    assert [text for text in alone[0].candidates if text in page.inner_text("#candidates")] == [*alone[0].candidates]
    page.locator("#candidates label").nth(1).click()
    visit.wait(f"document.querySelector('#prompt textarea').value == {alone[0].candidates[0]!r}")
    for key in ("ArrowDown", "ArrowUp", "ArrowUp"):  # faster than a server answers
        page.keyboard.press(key)
    visit.wait(f"document.querySelector('#prompt textarea').value == {alone[0].prompt!r}")
    page.locator("#nearest label").nth(1).click()
    visit.wait(f"document.querySelector('#prompt textarea').value == {alone[0].nearest[1][0]!r}")

    page.fill("#prompt textarea", "a bowl of soup, on the moon, by nobody")
    visit.wait(f"Math.abs({SIMILARITY} - {alone[0].cosine}) > 0.1")
    visit.said("on the moon")
    visit.wait("document.querySelector('#source').innerText == 'Your own text'")
    assert len(page.locator("#worth tr").all()) == 3
    page.fill("#seed input", "7")
    page.click("#render")
    page.wait_for_selector("#again img")
    assert "by nobody" in page.inner_text("#undrawn") or "nobody" in page.inner_text("#undrawn")
    first = page.get_attribute("#again img", "src")
    page.fill("#seed input", "8")
    page.click("#render")
    visit.wait(f"document.querySelector('#again img').src != {first!r}")

    visit.drop(pictures[1])
    visit.wait(f"document.querySelector('#prompt textarea').value == {alone[1].prompt!r}")
    page.fill("#prompt textarea", "an owl at night")
    visit.wait(f"Math.abs({SIMILARITY} - {alone[1].cosine}) > 0.1")
    page.locator("#history button:has(img)").nth(0).click()
    visit.wait("document.querySelector('#prompt textarea').value == 'a bowl of soup, on the moon, by nobody'")
    page.locator("#history button:has(img)").nth(1).click()
    visit.wait("document.querySelector('#prompt textarea').value == 'an owl at night'")
    assert not visit.errors
    away = [url for url in visit.asked if not url.startswith((server.url, "data:", "blob:"))]
    assert not away, "the page must work offline"


def test_of_a_strange_picture_a_guess_is_said_and_nothing_rendered(server, strange_picture, browser):
    visit = Visit(browser, server.url)
    visit.drop(strange_picture)
    visit.described()
    visit.said("A guess, not a prompt: this model has only seen emoji scenes.", "#source")
    visit.said("weights get render", "#refusal")
    assert not visit.page.is_visible("#render") and not visit.page.locator("#similarity strong").count()


def test_the_prompt_in_the_file_is_shown_with_its_seed(server, tmp_path, browser):
    about = PngInfo()
    text = "a heron at dawn ${1+1} {{prompt}} <img src=x onerror=alert(1)>"
    about.add_text("parameters", f"{text}\nSteps: 20, Sampler: Euler, CFG scale: 7, Seed: 1234, Size: 64x64")
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png", pnginfo=about)
    visit = Visit(browser, server.url)
    visit.drop(tmp_path / "a.png")
    assert visit.described() == text
    visit.said("Found in the file (AUTOMATIC1111, seed 1234)", "#source")
    assert server.ask(tmp_path / "a.png")[1]["seed"] == "1234"


GIVE = """([way, data]) => {
    const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
    const carried = new DataTransfer();
    carried.items.add(new File([bytes], "b.png", { type: "image/png" }));
    const target = way == "drop" ? document.querySelector("#picture img") : document.body;
    const how = { bubbles: true, cancelable: true, dataTransfer: carried, clipboardData: carried };
    target.dispatchEvent(way == "drop" ? new DragEvent("drop", how) : new ClipboardEvent("paste", how));
}"""


def test_a_wrong_file_is_one_message_in_the_place_of_the_picture(server, pictures, alone, wrong, browser):
    visit = Visit(browser, server.url)
    for name, words in wrong.items():
        visit.drop(name)
        visit.wait(f"document.querySelector('#picture').innerText.includes({words!r})")
        assert visit.page.locator(".error:visible").count() == 0
        assert not visit.value("prompt") and not visit.page.is_visible("#render")
        visit.drop(pictures[0])
        visit.described()
        visit.page.locator(
            "#picture button[aria-label=Remove], #picture button[title=Remove], #picture button"
        ).first.click()
        visit.wait("document.querySelector('#prompt textarea').value == ''")
    for way in ("drop", "paste"):  # onto the picture that is there
        visit.drop(pictures[0])
        visit.described()
        data = base64.b64encode(pictures[1].read_bytes()).decode()
        visit.page.evaluate(GIVE, [way, data])
        visit.wait(f"document.querySelector('#prompt textarea')?.value == {alone[1].prompt!r}")
        visit.page.locator("#picture button").first.click()
        visit.wait("document.querySelector('#prompt textarea').value == ''")
    assert not visit.errors


@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), (390, "dark"), (1280, "dark")])
def test_both_tabs_fit_a_telephone_and_the_dark(server, pictures, browser, width, scheme):
    visit = Visit(browser, server.url, width, scheme)
    visit.drop(pictures[0])
    visit.described()
    visit.page.wait_for_selector("#render")
    for name in ("picture", "prompt", "render", "nearest"):
        box = visit.page.locator(f"#{name}").bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= width + 1, name
    assert visit.page.evaluate("document.documentElement.scrollWidth") <= width + 1
    colour = visit.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (int(colour.partition("(")[2].split(",")[0]) < 128) == (scheme == "dark")
    visit.folder(pictures[:2])
    for name in ("files", "start", "table", "csv"):
        box = visit.page.locator(f"#{name}").bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= width + 1, name
    assert visit.page.evaluate("document.documentElement.scrollWidth") <= width + 1


def test_what_is_downloaded_of_a_folder_is_what_is_shown(server, pictures, alone, tmp_path, browser):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    again = tmp_path / pictures[0].name  # the same name, another picture
    shutil.copy(pictures[1], again)
    visit = Visit(browser, server.url)
    visit.folder([*pictures[:4], broken, again])
    shown = visit.table()
    assert [row[0] for row in shown] == [*(p.name for p in pictures[:4]), "broken.png", f"{again.stem} (2).png"]
    assert [row[1] for row in shown] == [*(one.prompt for one in alone[:4]), "", alone[1].prompt]
    assert {row[2] for row in shown} == {"checkpoint", "This file cannot be read as a PNG, JPEG or WebP picture."}
    visit.said("5 pictures described.", "#state")
    visit.said("Not read: broken.png.", "#state")

    def downloaded():
        rows = list(csv.reader(visit.download("csv").open(newline="", encoding="utf-8")))
        with zipfile.ZipFile(visit.download("texts")) as archive:
            texts = {name: archive.read(name).decode() for name in archive.namelist()}
        return rows[1:], texts

    rows, texts = downloaded()
    assert rows == shown and texts == {f"{Path(row[0]).stem}.txt": f"{row[1]}\n" for row in shown if row[1]}

    visit.page.locator("#table textarea").nth(2).fill("a heron, at ${1+1} dawn <b>")
    visit.page.fill("#prefix textarea, #prefix input", "sks, ")
    visit.page.fill("#suffix textarea, #suffix input", ", 4k")
    visit.page.click("#add")
    visit.wait("document.querySelectorAll('#table textarea')[2].value.endsWith('4k')")
    shown = visit.table()
    assert (
        shown[2][1] == "sks, a heron, at ${1+1} dawn <b>, 4k"
        and shown[0][1] == f"sks, {alone[0].prompt}, 4k"
        and not shown[4][1]
    )
    visit.page.locator("#table button").nth(0).click()
    shown[0][1] = alone[0].prompt
    assert visit.table() == shown
    rows, texts = downloaded()
    assert rows == shown and texts[f"{pictures[2].stem}.txt"] == "sks, a heron, at ${1+1} dawn <b>, 4k\n"

    visit.page.set_input_files("#files input[type=file]", pictures[4])  # more pictures leave the edits alone
    visit.wait("document.querySelectorAll('#files a').length == 7")
    visit.page.click("#start")
    visit.wait("document.querySelector('#state').innerText.startsWith('6 pictures described')")
    assert visit.table() == [*shown, [pictures[4].name, alone[4].prompt, "checkpoint", "yes"]]
    shown = visit.table()
    visit.page.fill("#filter textarea, #filter input", "HERON")
    visit.wait("document.querySelectorAll('#table .line').length == 1")
    rows, texts = downloaded()
    assert rows == visit.table() == [shown[2]] and len(texts) == 1
    visit.page.fill("#filter textarea, #filter input", "")
    visit.wait("document.querySelectorAll('#table .line').length == 7")
    assert visit.table() == shown
    assert not visit.errors


def test_a_large_folder(server, small_run, alone, pictures, tmp_path, browser):
    files = sorted(small_run.images.glob("*.png"))
    (tmp_path / ".DS_Store").write_bytes(b"Finder's")
    for number in range(UPLOADS):
        shutil.copy(files[number % len(files)], tmp_path / f"{number:03}.png")
    visit = Visit(browser, server.url)
    visit.many()
    visit.page.set_input_files("input[type=file][webkitdirectory]", tmp_path)
    visit.wait(f"document.querySelectorAll('#files a').length == {UPLOADS}")
    visit.page.click("#start")
    visit.wait(f"document.querySelector('#state').innerText == '{UPLOADS} pictures described.'")
    rows = list(csv.DictReader(visit.download("csv").open(newline="", encoding="utf-8")))
    assert [row["image"] for row in rows] == [f"{number:03}.png" for number in range(UPLOADS)]
    expected = {file: one.prompt for file, one in zip(pictures, alone, strict=True)}
    for number, row in enumerate(rows):
        if files[number % len(files)] in expected:
            assert row["prompt"] == expected[files[number % len(files)]]


def test_ten_users_at_once_get_their_own_answers(server, pictures, alone, browser):
    together = threading.Barrier(USERS)

    def use(number):
        together.wait()
        return server.describe(pictures[number % len(pictures)])

    with ThreadPoolExecutor(USERS) as threads:
        first = list(threads.map(use, range(USERS)))
    before = server.memory()
    for (prompt, similarity, nearest), expected in zip(first, alone * 2, strict=True):
        assert prompt == expected.prompt and abs(similarity - expected.cosine) < 0.002
        assert [text for text, _ in nearest] == [text for text, _ in expected.nearest[:5]]
    assert len({prompt for prompt, _, _ in first}) > len(pictures) / 2
    visits = [Visit(browser, server.url) for _ in range(BROWSERS)]
    for visit, picture in zip(visits, pictures[:BROWSERS], strict=True):
        visit.drop(picture)
    for visit, expected in zip(visits, alone[:BROWSERS], strict=True):
        assert visit.described() == expected.prompt
        assert abs(visit.similarity() - expected.cosine) < 0.002
        visit.page.wait_for_selector("#history img")
        assert visit.page.locator("#history img").count() == 1, "nobody sees what others uploaded"
        visit.context.close()
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


@pytest.fixture(scope="module")
def wrong(pictures, tmp_path_factory):
    """Files that are no pictures, and what is said of them."""
    folder = tmp_path_factory.mktemp("wrong")
    good = pictures[0].read_bytes()
    script = "<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>"
    (folder / "script.svg").write_text(script)
    (folder / "script.png").write_text(script)
    (folder / "page.png").write_text("<html><script>alert(1)</script></html>")
    (folder / "empty.png").write_bytes(b"")
    (folder / "cut.png").write_bytes(good[: len(good) // 2])
    (folder / "head.png").write_bytes(good[:20])
    bomb(folder / "bomb.png", 64_000)
    bomb(folder / "large.png", 10_000)
    Image.new("RGB", (64, 64)).save(folder / "image.tiff")
    said = dict.fromkeys(
        ("script.svg", "script.png", "page.png", "empty.png", "head.png", "image.tiff"),
        "cannot be read as a PNG, JPEG or WebP picture",
    )
    said |= {"cut.png": "damaged", "bomb.png": "megapixels", "large.png": "megapixels"}
    return {folder / name: words for name, words in said.items()}


def test_hostile_uploads_are_refused_in_words(server, pictures, alone, wrong, strange_picture, tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "exif.png", exif=b"Exif\0\0II*\0")
    for first in (pictures[0], strange_picture):  # a scene and a strange image load what they need
        server.describe(first)
    before = server.memory()
    for file, words in wrong.items():
        status, said = server.ask(file)
        assert status == 400 and (words if file.stat().st_size else "Send the picture itself") in said["error"]
    polyglot = tmp_path / "polyglot.png"
    polyglot.write_bytes(pictures[0].read_bytes())
    with zipfile.ZipFile(polyglot, "a") as archive:
        archive.writestr("evil.html", "<script>alert(1)</script>")
    assert server.describe(polyglot)[0] == alone[0].prompt  # what follows the picture is nobody's business
    assert server.describe(tmp_path / "exif.png")[0]  # a damaged EXIF block says nothing
    assert server.memory() < before + 0.3


def test_an_upload_that_is_too_large_is_not_taken(server, pictures):
    data = pictures[0].read_bytes() + bytes(gate.MEGABYTES * 1024**2)
    assert post(f"{server.url}/describe", content=data).status_code == 413
    path = server.temporary.parent / "large.png"
    path.write_bytes(data)
    assert gate.why_refused(path) == "The file has more than 20 MB."
    answer = post(f"{server.url}/gradio_api/upload", files={"files": ("a.png", 5 * data)})
    assert answer.status_code == 413
    assert "data-binary" in post(f"{server.url}/describe", content=b"").json()["error"]
    assert "data-binary" in post(f"{server.url}/describe", files={"file": ("a.png", b"x")}).json()["error"]


@pytest.mark.parametrize("name", ["../../../../outside.png", "..\\..\\outside.png", "/etc/outside.png", "a\0b.png"])
def test_names_do_not_lead_out_of_the_folder_of_uploads(server, pictures, name):
    files = {"files": (name, pictures[0].read_bytes())}
    answer = post(f"{server.url}/gradio_api/upload", files=files)
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
            answer = get(f"{server.url}/gradio_api/{form}")
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
        data["data"].append([])
        call = post(f"{server.url}/gradio_api/call/look", json=data)
        text = call.text
        if call.status_code == 200:
            text = get(f"{server.url}/gradio_api/call/look/{call.json()['event_id']}").text
        assert "error" in text and "secret\n" not in text, (claim, text)
    assert not asked
    elsewhere.shutdown()
    assert server.describe(pictures[0])[0]  # it keeps serving


def test_a_stopped_server_leaves_no_uploads(trained_run, pictures, tmp_path):
    server = Server(trained_run, tmp_path)
    files = {"files": ("a.png", pictures[0].read_bytes())}
    assert post(f"{server.url}/gradio_api/upload", files=files).status_code == 200
    assert list(server.temporary.rglob("*.png"))
    server.stop()
    assert not list(server.temporary.rglob("*.png"))


def finished(work):
    """Ends a coroutine, in a thread of its own: the browser's library has a loop in this one."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, work).result()


def test_addresses_are_not_fetched():
    """Neither for the image nor for any other input that claims to be a file."""
    blocks = page.page(session.Session(SimpleNamespace(folders=[], config=SimpleNamespace(caption="blip-large")), None))
    move = [block.async_move_resource_to_block_cache for block in blocks.blocks.values()]
    move.append(type(next(iter(blocks.blocks.values())))().async_move_resource_to_block_cache)  # made anew for a user
    assert len(move) > 5
    for one in move:
        for address in ("http://example.org/a.png", "https://example.org/a.png", "HTTPS://example.org/a.png"):
            with pytest.raises(Exception, match="not fetched"):
                finished(one(address))


def test_others_are_let_in_with_a_password_alone(trained_run, pictures, refused, tmp_path):
    words = ["demo", "--run", trained_run.folder, "--port", 7999]
    refused([*words, "--host", "0.0.0.0"], "--auth USER:PASSWORD_FILE")
    refused([*words, "--auth", "anna:nowhere"], "nowhere", "cannot be read")
    (tmp_path / "empty").write_text("\n")
    refused([*words, "--auth", f"anna:{tmp_path / 'empty'}"], "empty")
    (tmp_path / "password").write_text("correct horse\n")
    server = Server(trained_run, tmp_path, "--auth", f"anna:{tmp_path / 'password'}", "--host", "0.0.0.0")
    try:
        content = pictures[0].read_bytes()
        for auth in (None, ("anna", "wrong"), ("", ""), ("otto", "correct horse")):
            for path in ("", "config", "gradio_api/info"):
                assert get(f"{server.url}/{path}", auth=auth).status_code == 401
            assert post(f"{server.url}/describe", content=content, auth=auth).status_code == 401
            files = {"files": ("a.png", content)}
            assert post(f"{server.url}/gradio_api/upload", files=files, auth=auth).status_code == 401
        auth = ("anna", "correct horse")
        assert get(server.url, auth=auth).status_code == 200
        answer = post(f"{server.url}/describe", content=content, auth=auth)
        assert answer.json()["prompt"]
    finally:
        server.stop()


def test_uploads_are_taken_only_while_there_is_room(tmp_path, monkeypatch):
    passed, answers = [], []

    async def behind(scope, receive, send):
        passed.append(scope["method"])

    async def send(message):
        answers.append(message.get("status", message.get("body")))

    monkeypatch.setattr(gate, "MOST_BYTES", 1000)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "upload.png").write_bytes(bytes(600))
    one = gate.Gate(behind, tmp_path, "", "")

    def ask(path, length):
        head = [(b"content-length", str(length).encode())]
        finished(one({"type": "http", "path": path, "method": "POST", "headers": head}, None, send))

    ask("/gradio_api/upload", 300)
    ask("/gradio_api/upload", 500)
    ask("/gradio_api/queue/join", 500)
    assert passed == ["POST", "POST"] and answers[0] == 507 and b"Try again" in answers[1]


def test_the_port_and_the_run_are_checked(server, refused, trained_run, tmp_path):
    refused(["demo", "--run", trained_run.folder, "--port", server.port], f"--port {server.port}", "in use")
    for port in ("0", "-1", "99999"):
        refused(["demo", "--run", trained_run.folder, "--port", port], f"--port {port}", "65535")
    refused(["demo", "--run", trained_run.folder, "--host", "no.such.host.invalid"], "no.such.host.invalid")
    refused(["demo", "--run", trained_run.folder, "--profile", "other"], "other")
