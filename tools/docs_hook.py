"""Fills docs/reference/commands.md with the `--help` of each command while the site is built (see mkdocs.yml)."""

import os
import subprocess
import sys
from typing import Any

from image_to_prompts.cli import COMMANDS

MARK = "<!-- commands -->"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs for each page."""
    return markdown.replace(MARK, "\n".join(map(shown, COMMANDS))) if MARK in markdown else markdown


def shown(command: str) -> str:
    """A section with the help of a command."""
    environment = os.environ | {"COLUMNS": "100", "TERM": "dumb", "NO_COLOR": "1"}
    argv = [sys.executable, "-m", "image_to_prompts", command, "--help"]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=True)
    lines = (line.rstrip() for line in done.stdout.splitlines())
    return f"## {command}\n\n```text\n" + "\n".join(lines) + "\n```\n"
