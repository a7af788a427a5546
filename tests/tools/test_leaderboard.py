"""The script from pairs to a submission, in its small size; a second run does nothing again."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_pairs_become_a_checked_submission_of_three_towers(tmp_path):
    environment = {**os.environ, "SIZE": "tiny", "RUN": str(tmp_path / "run"), "PYTHON": sys.executable}
    script = ["bash", ROOT / "tools" / "leaderboard.sh"]
    done = subprocess.run(script, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.endswith("submission.csv: valid, 20 images\n")
    assert "of the blend" in done.stderr and "beyond the best alone" in done.stderr and "score " in done.stderr
    assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} >= {"tower-0", "tower-1", "tower-2"}


def test_the_script_is_short():
    """Two minutes to read."""
    assert len((ROOT / "tools" / "leaderboard.sh").read_text().splitlines()) <= 75
