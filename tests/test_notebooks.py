"""The notebooks, executed in order with small parameters through one folder; the committed ones; the kernel."""

import importlib.util
import json
from pathlib import Path

import pandas as pd
import pytest
from conftest import SHARED

from image_to_prompts.infer import submission
from image_to_prompts.models import checkpoints
from image_to_prompts.pipeline import STAGES
from image_to_prompts.run import folders

ROOT = Path(__file__).resolve().parents[1]
specification = importlib.util.spec_from_file_location("build", ROOT / "notebooks" / "build.py")
build = importlib.util.module_from_spec(specification)
specification.loader.exec_module(build)


@pytest.mark.slow
def test_notebooks_run_in_order_and_their_metrics_hold(tmp_path):
    parameters = {
        "01_generate_prompts": {"count": 120},
        "02_dedupe_prompts": {},
        "03_render_images": {},
        "04_finetune_convnext": {"epochs": 2},
        "05_embed_images": {},
        "06_train_ensemble": {"epochs": 2},
        "07_infer_submission": {},
        "08_edit_prompts": {"scored": 8},
    }
    if (SHARED / "diffusiondb_sample").is_dir():
        parameters["06_train_ensemble"]["demo_folder"] = str(SHARED / "diffusiondb_sample")
    assert list(parameters) == [stage.notebook for stage in STAGES]
    for name, values in parameters.items():
        values = {"run_folder": str(tmp_path / "run"), "profile": "embedded", **values}
        build.execute(name, tmp_path / f"{name}.ipynb", values, tmp_path)
    run = folders.Run(tmp_path / "run")
    assert submission.check(run.submission, run.test_images) == len(pd.read_csv(run.test_metadata))
    metrics = checkpoints.load(run.checkpoint).config["metrics"]
    assert metrics["constant"] < 0.55
    assert metrics["validation_cosine"] > metrics["constant"]
    described = pd.read_csv(run.folder / "prompts.csv")
    assert (
        len(described) == len(pd.read_csv(run.test_metadata))
        and (described["cosine"] >= described["cosine_1"] - 0.01).all()
    )
    scores = json.loads(run.submission.with_suffix(".json").read_text())
    assert scores["score"] > scores["constant"] and len(scores["alone"]) == 2


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.notebook)
def test_committed_notebooks_are_executed_small_and_up_to_date(stage):
    path = ROOT / "notebooks" / f"{stage.notebook}.ipynb"
    text = path.read_text(encoding="utf-8")
    notebook = json.loads(text)
    assert path.stat().st_size <= 300_000
    assert any(cell.get("outputs") for cell in notebook["cells"])
    for private in ("/work/", "/root/", "/home/", "/tmp/"):
        assert private not in text, private
    source = build.read_source(stage.notebook)
    executed = [
        "".join(c["source"]) for c in notebook["cells"] if "injected-parameters" not in c["metadata"].get("tags", [])
    ]
    assert executed == [cell.source for cell in source.cells]


def test_kernels_are_built_from_the_sources():
    built = build.kernels()
    assert {path.parent.name for path in (ROOT / "kernels").glob("*/kernel-metadata.json")} == set(built)
    for name, files in built.items():
        for file, text in files.items():
            assert (ROOT / "kernels" / name / file).read_text(encoding="utf-8") == text, f"{file}: run make kernels"


def test_docs_show_the_stage_table():
    rows = (
        f"| {s.number} | `{s.name}` | `{s.notebook}` | {s.does} | {quote}{s.reads}{quote} | `{s.writes}` |"
        for s, quote in ((s, "`" if "/" in s.reads else "") for s in STAGES)
    )
    table = "| # | stage | notebook | does | reads | writes |\n| --- | --- | --- | --- | --- | --- |\n" + "\n".join(
        rows
    )
    assert table in (ROOT / "docs" / "getting-started.md").read_text(encoding="utf-8")
