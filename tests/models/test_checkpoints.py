"""What a checkpoint's folder says about where it comes from."""

import subprocess

from image_to_prompts.models import checkpoints


def commit_in(folder):
    folder.mkdir(parents=True, exist_ok=True)
    git = ["git", "-c", "user.name=me", "-c", "user.email=me@here", "-C", str(folder)]
    for words in (["init", "--quiet"], ["commit", "--quiet", "--allow-empty", "--message", "first"]):
        subprocess.run([*git, *words], check=True)
    found = subprocess.run([*git, "rev-parse", "--short", "HEAD"], check=True, capture_output=True, text=True)
    return found.stdout.strip()


def test_the_revision_is_that_of_the_checkout_and_of_no_other_repository(tmp_path, monkeypatch):
    commit = commit_in(tmp_path)
    own, installed = tmp_path, tmp_path / ".venv" / "site-packages"
    for root, expected in ((own, commit), (installed, "")):
        file = root / "image_to_prompts" / "models" / "checkpoints.py"
        file.parent.mkdir(parents=True)
        monkeypatch.setattr(checkpoints, "__file__", str(file))
        assert checkpoints.revision() == expected
