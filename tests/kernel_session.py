"""A Kaggle session rehearsed in this environment: inputs attached, a built kernel executed, its output kept."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

KAGGLEHUB = """
import os, pathlib, shutil
def whoami():
    return {"username": "ada"}
def dataset_upload(handle, local_dataset_dir, version_notes="", ignore_patterns=()):
    target = pathlib.Path(os.environ["PUBLISHED"]) / handle
    shutil.copytree(local_dataset_dir, target, ignore=shutil.ignore_patterns(*[p.rstrip("/") for p in ignore_patterns]))
"""
WHO = """
import os, sys
if os.environ.get("WORLD_SIZE") and "image_to_prompts" in sys.orig_argv:
    with open(os.environ["WHO"], "a") as file:
        file.write(os.environ["RANK"] + "/" + os.environ["WORLD_SIZE"] + "\\n")
"""


class Session:
    """One session.

    Attributes:
        inputs: What is attached at /kaggle/input.
        working: What it leaves at /kaggle/working.
        who: Rank and number of every process that `notebook.run` started, a line each.
    """

    def __init__(self, folder: Path, attached: dict[str, Path]) -> None:
        self.folder, self.inputs, self.working = folder, folder / "input", folder / "working"
        self.inputs.mkdir(parents=True)
        self.working.mkdir()
        for place, source in attached.items():
            shutil.copytree(source, self.inputs / place, copy_function=os.link)
        self.modules = folder / "modules"
        self.modules.mkdir()
        (self.modules / "kagglehub.py").write_text(KAGGLEHUB)
        (self.modules / "sitecustomize.py").write_text(WHO)
        self.who = folder / "who"

    def run(self, notebook: str, **parameters: object) -> str:
        """Executes the text of a notebook to its end; returns what it printed and logged, and keeps its pictures."""
        (self.folder / "kernel.ipynb").write_text(notebook)
        out = self.folder / "executed.ipynb"
        env = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("KAGGLE", "WORLD", "RANK"))},
            "PYTHONPATH": str(self.modules),
            "HF_HUB_OFFLINE": "1",
            "IMAGE_TO_PROMPTS_KAGGLE_INPUT": str(self.inputs),
            "IMAGE_TO_PROMPTS_KAGGLE_WORKING": str(self.working),
            "PUBLISHED": str(self.folder.parent / "published"),
            "WHO": str(self.who),
        }
        how = {
            "input_path": self.folder / "kernel.ipynb",
            "output_path": out,
            "parameters": parameters,
            "cwd": self.working,
            "progress_bar": False,
            "start_timeout": 600,
            "iopub_timeout": 600,  # 4 seconds otherwise, which slow machines exceed
        }
        program = "import json, sys, papermill; papermill.execute_notebook(**json.loads(sys.argv[1]))"
        argv = [sys.executable, "-c", program, json.dumps(how, default=str)]
        result = subprocess.run(argv, env=env, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-6000:]
        self.outputs = [o for cell in json.loads(out.read_text())["cells"] for o in cell.get("outputs", [])]
        return "".join("".join(o["text"]) for o in self.outputs if o["output_type"] == "stream")

    @property
    def pictures(self) -> int:
        """How many pictures the executed notebook shows."""
        return sum("image/png" in o.get("data", {}) for o in self.outputs)
