"""Who may import whom: the contracts of pyproject.toml, and that they can fail."""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def linted(folder: Path) -> tuple[int, str]:
    """What import-linter says of the package in a folder."""
    words = ["-c", "from importlinter.cli import lint_imports_command as main; main()", "--no-cache"]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run([sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_each_layer_imports_only_those_below_it():
    code, said = linted(ROOT)
    assert code == 0, said


@pytest.mark.parametrize(
    "module, line, contract",
    [
        ("run/files.py", "from ..describe import compose", "Each layer imports only those below it BROKEN"),
        ("data/pictures.py", "if False:\n    from . import catalogue", "2 kept"),
        ("models/metrics.py", "from . import checkpoints", "No circles BROKEN"),
    ],
)
def test_an_import_that_is_forbidden_is_found(tmp_path, module, line, contract):
    shutil.copytree(ROOT / "image_to_prompts", tmp_path / "image_to_prompts")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / "image_to_prompts" / module).open("a", encoding="utf-8") as file:
        file.write(f"\n{line}\n")
    code, said = linted(tmp_path)
    assert (code != 0) == ("BROKEN" in contract) and contract in said, said


def test_no_import_is_ignored():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    assert not any(one.get("ignore_imports") for one in contracts)
