"""The GPU benchmark runs, and its figures become the table of docs/performance.md."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
specification = importlib.util.spec_from_file_location("bench_table", ROOT / "benchmarks" / "table.py")
bench_table = importlib.util.module_from_spec(specification)
specification.loader.exec_module(bench_table)


def test_docs_show_what_was_measured():
    path = ROOT / "benchmarks" / "gpu.json"
    text = bench_table.table(json.loads(path.read_text()) if path.is_file() else None)
    assert bench_table.BEGIN + text + bench_table.END in (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")


def test_what_nobody_measured_is_called_so():
    lines = bench_table.table(None).splitlines()
    assert all("unmeasured" in line for line in lines[2:])
    assert lines[2].startswith("| images a GPU hour |") and lines[3].startswith("| 100,000 images |")


def test_figures_become_rows():
    seconds = {"reference": [10.0, 20.0, 10.0], "ours": [5.0, 5.0, 6.0], "ours --fast": [2.0, 2.0, 2.0]}
    found = bench_table.table({"device": "Tesla T4", "parts": {"render": {"seconds": seconds}}}).splitlines()
    assert found[0] == "| Tesla T4 | the reference's way | ours | with `--fast` |"
    assert found[2] == "| images a GPU hour | 360 | 720 | 1,800 |"
    assert found[3].startswith("| 100,000 images | 278 h (9.3 weeks of quota) | 139 h")
    assert found[5].endswith("| unmeasured | unmeasured |  |")


@pytest.mark.slow
def test_every_part_of_the_benchmark_runs(tiny_sd2, tmp_path):
    argv = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--small", "--weights", tiny_sd2]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([*argv, "--out", tmp_path / "gpu.json"], env=env, check=True)
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert list(result["parts"]) == ["render", "train", "infer", "encode", "dedupe"]
    assert all(len(v) == 2 for part in result["parts"].values() for v in part["seconds"].values())
    assert "unmeasured" not in bench_table.table(result)
