"""Estimates in words."""

import fcntl
import logging
import os
import struct
import subprocess
import sys
import termios

import pytest

from image_to_prompts.run.progress import Estimate, short


@pytest.mark.parametrize(
    ("value", "said"), [(0.02816, "0.028"), (1.53, "1.5"), (26.4, "26"), (266.4, "266"), (2664.4, "2,664"), (0, "0")]
)
def test_numbers_are_short(value, said):
    assert short(value) == said


def test_an_estimate_says_images_seconds_hours_and_room():
    slow = Estimate("images", 100_000, 90_000, 19.2, 464_000)
    assert str(slow) == "100,000 images, 90,000 to do, 19.20 s each: 480 h, 46 GB in all"
    fast = Estimate("prompts", 3000, 3000, 0.01, 100)
    assert str(fast) == "3,000 prompts, 3,000 to do, 100 a second: 0.5 min, 0.0003 GB in all"
    assert str(Estimate("images", 5, 0, 0.0, 0.0)) == "5 images: all done"


def test_log_lines_stand_above_the_bar():
    """On a terminal, as a person sees it: no text of the log shares a line with a bar."""
    pty = pytest.importorskip("pty")
    code = (
        "import logging, time\n"
        "from image_to_prompts.run import progress\n"
        "progress.show_log()\n"
        "for i in progress.progress(range(30), 'things'):\n"
        "    time.sleep(0.02)\n"
        "    if i == 20: logging.getLogger('image_to_prompts.x').info('%d images', 97)\n"
    )
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name != "TQDM_DISABLE"}
    process = subprocess.Popen([sys.executable, "-c", code], stderr=child, env=environment)
    os.close(child)
    said = b""
    while True:
        try:
            part = os.read(parent, 4096)
        except OSError:
            break
        if not part:
            break
        said += part
    assert process.wait() == 0
    lines = [line.rpartition("\r")[2] for line in said.decode().replace("\r\n", "\n").split("\n")]
    assert "97 images" in [line.strip() for line in lines], said
    assert b"things" in said
    assert logging.getLogger("image_to_prompts").handlers == []


def test_models_load_without_reports(tiny_encoders):
    """transformers reports each weight that it does not use, and shows bars of its own."""
    code = (
        "from image_to_prompts.cli import set_up\n"
        "set_up(quiet=False)\n"
        "from image_to_prompts.encode import encoders\n"
        f"encoders.build('interrogator', 0, caption={str(tiny_encoders['blip'])!r}, "
        f"ranker='open_clip:{tiny_encoders['clip']}', terms={str(tiny_encoders['terms'])!r})\n"
        "from image_to_prompts.models import text_encoder\n"
        "text_encoder.encode_once(['a cat'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    said = [line for line in done.stderr.splitlines() if "terms" not in line]
    assert not said, done.stderr
