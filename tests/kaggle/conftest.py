"""A stub of Kaggle, and the real `kaggle` package against it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from kaggle_stub import ME, Stub, assert_redirected, environment, serving, sign_in

from image_to_prompts.kaggle import kernels

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def chain(tmp_path):
    """The committed kernels, with an owner."""
    folder = tmp_path / "kernels"
    shutil.copytree(ROOT / "kernels", folder)
    for path in [*folder.glob(f"*/{kernels.FILE}"), folder / "owner.json"]:
        path.write_text(path.read_text().replace(kernels.PLACEHOLDER, ME))
    return folder


@pytest.fixture
def home(tmp_path, monkeypatch):
    for name in ("KAGGLE_API_TOKEN", "KAGGLE_USERNAME", "KAGGLE_KEY", "KAGGLE_CONFIG_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".kaggle").mkdir()
    return tmp_path


@pytest.fixture
def kaggle(home, chain):
    """Runs `image-to-prompts kaggle ...` in a process of its own against a stub."""
    sign_in(home)
    stub = Stub()
    owner = json.loads((ROOT / "kernels" / "owner.json").read_text())
    stub.datasets = {f"{ME}/{owner[name]}" for name in ("wheels", "weights", "metadata", "embeddings")}
    with serving(stub) as port:
        env = environment(port, home, IMAGE_TO_PROMPTS_ASK_EVERY="0")
        assert_redirected(env)

        def run(*words):
            argv = [sys.executable, "-m", "image_to_prompts", "kaggle", *map(str, words)]
            argv += ["--kernels", str(chain)]
            result = subprocess.run(argv, env=env, capture_output=True, text=True, cwd=ROOT, timeout=120)
            assert "0123456789abcdef" not in result.stdout + result.stderr
            assert "Traceback" not in result.stderr, result.stderr
            return result.returncode, result.stdout, result.stderr

        run.stub, run.chain, run.home = stub, chain, home
        yield run
