"""Makes what tests/test_before_house.py starts from: runs that the commit `before-house` finished, or left half done.

    git worktree add /tmp/house COMMIT
    cd /tmp/house && PYTHONPATH=.:tests PYTHON tests/before_house/make.py OUT

OUT gets runs.tar.xz and the --help of every command. Paths are relative and times whole seconds, so that the settings
and inputs of then are those of now.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sys
import tarfile
import time
from pathlib import Path

import chaos
from chaos import Case

LONG_AGO = 1_700_000_000
BASE, INPUTS = Path("base/run"), Path("inputs")
WHERE = {
    "prompts": BASE / "prompts/generated.csv",
    "metadata": BASE / "data_meta/prompts.csv",
    "images": BASE / "images/prompts",
    "some": INPUTS / "some.csv",
    "words": INPUTS / "words",
    "pictures": INPUTS / "pictures",
    "checkpoint": Path("finished/finetune/run/checkpoints/convnext"),
    "embeddings": Path("finished/embed/run/embeddings"),
}
TOWER = ("--backbone", f"open_clip:{INPUTS}/tower")
NARROW = ("--encoders", f"open_clip:{INPUTS}/tower")
FINISHED = {
    "collect": (),
    "render-tar": (),
    "finetune": TOWER,
    "embed": NARROW,
    "ensemble": (),
    "infer": (),
    "describe": (),
}
HALF_DONE = {  # a run is killed when so many files of a pattern are there
    "generate": ("prompts/.generated-*/prompts.jsonl", 1, ("--count", "32", "--batch-size", "4")),
    "collect": ("prompts/.generated-*/part-*.json.sha256", 1, ()),
    "render": ("images/prompts/.journal-*.jsonl", 1, ()),
    "render-tar": ("images/prompts/*.tar.part", 1, ()),
    "finetune": ("checkpoints/convnext/.finetune-*/features-*.sha256", 1, TOWER),
    "finetune, training": ("checkpoints/convnext/unfinished-*.pt", 1, TOWER),
    "embed": ("embeddings/.embed-*/*.sha256", 2, NARROW),
    "ensemble": ("checkpoints/ensemble/.ensemble-*/state.pt", 1, ()),
    "infer": ("submission/.submission-*/*/*.sha256", 1, ()),
    "describe": ("described/.*.jsonl", 1, ()),
}


def case(name: str, kind: str, flags: tuple[str, ...]) -> Case:
    """The command of a run, in the folder of its kind."""
    return Case(name.partition(",")[0], Path(kind) / name.replace(", ", "-"), WHERE, flags=flags)


def leave_half_done(started: Case, pattern: str, count: int) -> None:
    """Starts a command and kills it when so many files are there."""
    process = started.start()
    while len(list(started.run.glob(pattern))) < count:
        assert process.is_alive(), f"{started.words}: {started.said()}"
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.join()


def finish(started: Case) -> None:
    code, said = started.finish()
    assert code == 0, said


def make_inputs() -> None:
    """A tower with random weights of few bits, which pack well, and what chaos.py cuts out of the base."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    INPUTS.mkdir()
    chaos.make_inputs(INPUTS, {"metadata": WHERE["metadata"], "images": WHERE["images"]})
    (INPUTS / "tower").mkdir()
    model = {
        "embed_dim": 16,
        "vision_cfg": {"timm_model_name": "test_convnext", "timm_pool": "", "timm_proj": "linear", "image_size": 64},
        "text_cfg": {"context_length": 8, "vocab_size": 16, "width": 8, "heads": 1, "layers": 1},
    }
    torch.manual_seed(0)
    weights = open_clip.CLIP(model["embed_dim"], model["vision_cfg"], model["text_cfg"]).state_dict()
    weights = {
        name: (64 * value).round() / 64 if value.is_floating_point() else value for name, value in weights.items()
    }
    save_file(weights, INPUTS / "tower/open_clip_model.safetensors")
    preprocess = {"mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28]}
    text = json.dumps({"model_cfg": model, "preprocess_cfg": preprocess})
    (INPUTS / "tower/open_clip_config.json").write_text(text)


def age() -> None:
    for path in Path().rglob("*"):
        os.utime(path, (LONG_AGO, LONG_AGO))


def helps(out: Path) -> None:
    """The --help of every command."""
    from image_to_prompts.__main__ import EXTRA, main  # as of that commit
    from image_to_prompts.kaggle.commands import ACTIONS
    from image_to_prompts.pipeline import STAGES

    commands = [[], *([s.name] for s in STAGES), *([name] for name in EXTRA), *(["kaggle", name] for name in ACTIONS)]
    out.mkdir(parents=True)
    for words in commands:
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
            main([*words, "--help"])
        (out / f"{'-'.join(words) or 'all'}.txt").write_text(said.getvalue(), encoding="utf-8")


def run(out: Path) -> None:
    """Makes everything in a folder beside `out` and packs it."""
    os.environ["COLUMNS"] = "120"
    helps(out / "help")
    folder = out / "work"
    folder.mkdir()
    os.chdir(folder)
    for words in ("generate --count 32", "dedupe --folds 4", "render --workers 1"):
        stage, *flags = words.split()
        base = Case(
            stage, Path("base"), {"prompts": WHERE["prompts"], "metadata": WHERE["metadata"]}, flags=tuple(flags)
        )
        finish(base)
    make_inputs()
    age()
    for name, flags in FINISHED.items():
        finish(case(name, "finished", flags))
        age()
    for name, (pattern, count, flags) in HALF_DONE.items():
        leave_half_done(case(name, "half-done", flags), pattern, count)
    age()
    for log in [*Path().rglob("*.log"), *Path().rglob("*.began"), *Path().rglob("*.lock")]:
        log.unlink()
    with tarfile.open(out / "runs.tar.xz", "w:xz", preset=9) as packed:
        packed.add(".", ".")


if __name__ == "__main__":
    sys.exit(run(Path(sys.argv[1]).resolve()))
