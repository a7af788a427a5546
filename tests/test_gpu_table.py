"""The GPU benchmark runs, and its figures become a table."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PARTS = ["card", "unet", "render", "train", "loop", "memory", "infer", "encode", "search", "dedupe"]


def test_each_card_has_a_table(bench_table, tmp_path, monkeypatch):
    monkeypatch.setattr(bench_table, "ROOT", tmp_path)
    assert bench_table.gpus() == "Nobody has run it yet.\n"
    (tmp_path / "benchmarks").mkdir()
    for file, device in (("gpu.json", "Tesla T4"), ("gpu_l4.json", "L4")):
        found = {"device": device, "small": False, "parts": {}}
        (tmp_path / "benchmarks" / file).write_text(json.dumps(found))
    lines = bench_table.gpus().splitlines()
    assert len(lines) == 5 and lines[0].startswith("| Tesla T4 |") and lines[3].startswith("| L4 |")
    (tmp_path / "benchmarks" / "gpu.json").write_text(json.dumps(found | {"small": True}))
    with pytest.raises(SystemExit, match="--small"):
        bench_table.gpus()


def test_figures_become_rows(bench_table):
    seconds = {"plain": [10.0, 20.0, 10.0], "ours": [5.0, 5.0, 4.0]}
    tower = {"seconds": {"plain, half": [1.0], "ours": [2.0]}}
    found = bench_table.table(
        {"device": "Tesla T4", "parts": {"dedupe": {"seconds": seconds}, "train": {"a tower": tower}}}
    ).splitlines()
    assert found[0].startswith("| Tesla T4 | ")
    assert found[2] == (
        "| `finetune` (a tower) | a plain loop in half precision | 1 s an image | 2 s an image | 0.50, 0.50, 0.50 |"
    )
    assert found[3] == "| 500,000 vectors at cosine .8 | plain torch, float32 | 10 s | 5 s | 2.00, 2.50, 4.00 |"


@pytest.mark.slow
def test_every_part_of_the_benchmark_runs(tiny_sd2, tmp_path, bench_table):
    script, out = ROOT / "benchmarks" / "gpu.py", tmp_path / "gpu.json"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TORCH_COMPILE_DISABLE": "1"}  # compiling takes minutes on CPUs
    for parts in (PARTS[:2], PARTS[2:]):  # they merge
        command = [sys.executable, script, *parts, "--small", "--weights", tiny_sd2, "--out", out]
        subprocess.run(command, env=env, check=True)
    result = json.loads(out.read_text())
    assert list(result["parts"]) == PARTS and result["small"]
    assert result["parts"]["search"]["same"] == result["parts"]["dedupe"]["same"] == 1
    assert result["parts"]["render"]["levels apart"]["ours"][1] == 1
    assert min(result["parts"]["infer"]["least cosine to TF32"].values()) > 0.999
    assert all(row.count("|") == 6 for row in bench_table.table(result).splitlines())
