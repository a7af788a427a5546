"""Every stage of the profile `full`, at its smallest count, with random weights of the reference models at full size.

    python tools/rehearse_stages.py /folder/with/20/GB [--out docs/rehearsal.md]

Each stage is a command of its own, as a user types it; its peak is the most memory that the process held, weights that
are mapped from their files included. The models are those of tools/rehearsal.py, in the first of their layouts.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import rehearsal

from image_to_prompts.models import weights

COLUMNS = ("stage", "command", "result", "peak GB", "seconds")
MARK = "<!-- stages -->"
TERMS = {"artists": "Ann Black", "flavors": "sharp focus", "mediums": "a photo", "movements": "cubism"}
# Two denoising steps, one image at a time in training: what the smallest machine can do in minutes.
STAGES = (
    ("generate", "--count 8"),
    ("dedupe", "--threshold 0.9999 --folds 2"),
    ("render", "--fast --steps 2 --batch-size 1"),
    ("finetune", "--epochs 1 --cycles 1 --batch-size 4 --micro-batch 1"),
    ("embed", "--terms {root}/terms"),
    ("ensemble", "--epochs 1 --test-fold 9"),
    ("infer", "--key {root}/run/images/prompts/manifest.csv"),
    ("describe", "{root}/run/images/prompts --prompts {root}/run/data_meta/prompts.csv --weights-dir {root}/none"),
)


def make_weights(home: Path) -> None:
    """Writes every model into a folder of weights."""
    for name, (make, layouts, _) in rehearsal.MODELS.items():
        folder = home / weights.own_folder(name)
        if not folder.is_dir():
            part = folder.with_name(f".{folder.name}")
            part.mkdir(parents=True, exist_ok=True)
            make(part, layouts[0])
            part.rename(folder)


def rehearse(root: Path, stage: str, words: str) -> tuple[str, ...]:
    """Runs a stage; returns a row of the table."""
    given = [stage, "--run", str(root / "run"), "--profile", "full", *words.format(root=root).split()]
    env = {**os.environ, "IMAGE_TO_PROMPTS_WEIGHTS": str(root / "home"), "HF_HUB_OFFLINE": "1"}
    begun = time.perf_counter()
    log = (root / f"{stage}.log").open("w+")
    process = subprocess.Popen([sys.executable, "-m", "image_to_prompts", *given], env=env, stdout=log, stderr=log)
    peak = 0
    while process.poll() is None:  # ru_maxrss would begin with what this process held
        peak = max(peak, held(process.pid))
        time.sleep(0.05)
    seconds = time.perf_counter() - begun
    log.seek(0)
    lines = [line for line in log.read().splitlines() if ": " in line] or ["nothing"]
    said = lines[-1].replace(str(root), "...")
    result = f"FAILED: {said}" if process.returncode else said
    return stage, words.replace("{root}", "..."), result[:160], f"{peak / 1e6:.1f}", f"{seconds:.0f}"


def held(pid: int) -> int:
    """The most memory that a process has held so far, in KB."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    return int(status.partition("VmHWM:")[2].split()[0]) if "VmHWM:" in status else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("root", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    root = options.root.resolve()
    make_weights(root / "home")
    for folder in ("terms", "none"):
        (root / folder).mkdir(exist_ok=True)
    for kind, text in TERMS.items():
        (root / "terms" / f"{kind}.txt").write_text(f"{text}\n")
    rows = []
    for stage, words in STAGES:
        rows.append(rehearse(root, stage, words))
        sys.stderr.write(" | ".join(rows[-1]) + "\n")
    if options.out:
        table = rehearsal.markdown(COLUMNS, rows)
        head, _, rest = options.out.read_text(encoding="utf-8").partition(MARK)
        rest = rest[rest.index("\n## ") :] if "\n## " in rest else ""
        options.out.write_text(f"{head}{MARK}\n{table}\n{rest}", encoding="utf-8")
    if any(row[2].startswith("FAILED") for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
