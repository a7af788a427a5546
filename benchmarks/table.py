"""Puts the figures of the JSON files of benchmarks/ into docs/performance.md, and prints them: `make bench-table`."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from turns import ratio

ROOT = Path(__file__).resolve().parents[1]
FAST = "<!-- table of speeds, by make bench-table -->\n", "<!-- end of the table of speeds -->"
GPU = "<!-- GPU table, by make bench-table -->\n", "<!-- end of the GPU table -->"
SPEEDS = (  # what, beside what, script with its part, and where in its JSON file
    (
        "rendering, the stage around Stable Diffusion",
        "a bare loop of pipeline calls that writes the same files",
        "render",
        "stable diffusion/times as fast",
    ),
    (
        "training step of ConvNeXt-XXLarge, 512 px",
        "the reference's loop, float32",
        "finetune step",
        "step/ours/times as fast",
    ),
    (
        "the same with cached features",
        "the reference's loop",
        "finetune step",
        "step/ours, cached features/times as fast",
    ),
    ("inference with it, decoding included", "the reference's loop", "infer", "times as fast"),
    ("encoding 4,000 prompts", "sentence-transformers, its best batch size", "encode", "times as fast/ours, float32"),
    ("the same with `--fast`", "sentence-transformers", "encode", "times as fast/ours, fast"),
    (
        "deduplication of 55,494 real prompts, exact",
        "FAISS's flat index",
        "dedupe real",
        "real/times as fast/flat index, 1,000 neighbours",
    ),
    ("the same beside semhash", "semhash", "dedupe real", "real/times as fast/semhash"),
    (
        "10 nearest of 1,000,000 prompts, 1,000 queries",
        "FAISS's flat index",
        "retrieval nearest",
        "nearest/times as fast",
    ),
    (
        "60 nearest in a bank of 1,000,000 prompts, 100 queries",
        "block-wise `faiss.knn`",
        "retrieval bank",
        "bank/times as fast",
    ),
    ("an epoch of the transformer ensemble", "the earlier project's loop", "ensemble epoch", "epoch/times as fast"),
    ("embedding images with three encoders, tiny models", "one image at a time", "embed", "times as fast"),
    ("`describe`", "a plain loop over the same models", "describe speed", "speed/times as fast"),
)
NOTHING = "Nobody has run it yet.\n"
ROWS = {  # ways of each part: what, beside what, and their names there
    "render": (
        ("`render`, 50 steps", "plain diffusers, a batch a call", "plain", "ours"),
        ("`render --compile`, 50 steps", "the same", "plain", "ours, compiled"),
        ("`render --compile`, 50 steps", "plain diffusers, one prompt a call", "one prompt a call", "ours, compiled"),
        (
            "`render --compile --fast`, 20 steps",
            "plain diffusers, a batch a call, 50",
            "plain",
            "ours --fast, compiled",
        ),
        (
            "`render --compile --fast --steps 16`",
            "plain diffusers, a batch a call, 50",
            "plain",
            "ours --fast, 16 steps",
        ),
    ),
    "train": (
        ("`finetune`", "a plain loop in TF32", "plain, TF32", "ours"),
        ("`finetune`", "a plain loop in half precision", "plain, half", "ours"),
        ("`finetune --compile`", "a plain loop in TF32", "plain, TF32", "ours, compiled"),
        ("`finetune --compile`", "a plain loop in half precision", "plain, half", "ours, compiled"),
    ),
    "infer": (
        ("`infer`", "a plain loop with a DataLoader, half precision", "plain, half", "ours"),
        ("the same model compiled (not offered)", "the same", "plain, half", "ours, compiled"),
    ),
    "encode": (
        ("prompts, float32", "sentence-transformers", "sentence-transformers", "ours"),
        ("prompts, `--fast`", "sentence-transformers, half", "sentence-transformers, half", "ours, fast"),
        ("`embed --texts`", "open_clip, half", "open_clip, half", "ours"),
    ),
    "search": (("60 nearest of 2,000,000, 1,000 queries", "plain torch, float32", "plain", "ours"),),
    "dedupe": (("500,000 vectors at cosine .8", "plain torch, float32", "plain", "ours"),),
}
UNITS = {"render": "s an image", "train": "s an image", "infer": "s an image", "encode": "s a thousand"}


def table(result: dict[str, Any]) -> str:
    """The table of what benchmarks/gpu.py wrote, as Markdown."""
    lines = [f"| {result['device']} | beside what | theirs | ours | times as fast: min, median, max |"]
    lines.append("| --- | --- | --- | --- | --- |")
    for part, rows in ROWS.items():
        found = result["parts"].get(part, {})
        for name, one in {"": found, **found}.items():
            if isinstance(one, dict) and "seconds" in one:
                there = [row for row in rows if {row[2], row[3]} <= set(one["seconds"])]
                lines += [_row(name, one["seconds"], UNITS.get(part, "s"), *row) for row in there]
    return "\n".join(lines) + "\n"


def gpus() -> str:
    """The tables of all cards, whose files are named gpu*.json.

    Raises:
        SystemExit: If a file was made with --small.
    """
    files = sorted((ROOT / "benchmarks").glob("gpu*.json"))
    found = [json.loads(path.read_text(encoding="utf-8")) for path in files]
    for path, result in zip(files, found, strict=True):
        if result["small"]:
            raise SystemExit(f"{path}: made with --small; these are no figures to show")
    return "\n".join(map(table, found)) or NOTHING


def _row(name: str, seconds: dict[str, list[float]], unit: str, what: str, beside: str, theirs: str, ours: str) -> str:
    times = "{min:.2f}, {median:.2f}, {max:.2f}".format(**ratio(seconds, theirs, ours))
    both = " | ".join(f"{statistics.median(seconds[way]):.3g} {unit}" for way in (theirs, ours))
    return f"| {what}{name and f' ({name})'} | {beside} | {both} | {times} |"


def fast(command: str, place: str) -> list[float]:
    """How many times as fast, minimum, median and maximum, by a benchmark's JSON file."""
    found = json.loads((ROOT / "benchmarks" / f"{command.split()[0]}.json").read_text(encoding="utf-8"))
    for key in place.split("/"):
        found = found[key]
    return [found[name] for name in ("min", "median", "max")]


def speeds() -> str:
    """The table of what was measured on two cores, as Markdown."""
    lines = ["| what | beside what | times as fast: min, median, max | command |", "| --- | --- | --- | --- |"]
    for what, beside, command, place in SPEEDS:
        times = ", ".join(f"{value:.3g}" for value in fast(command, place))
        name, _, part = command.partition(" ")
        lines.append(f"| {what} | {beside} | {times} | `python benchmarks/{name}.py{part and ' ' + part}` |")
    return "\n".join(lines) + "\n"


def put(page: str, marks: tuple[str, str], text: str) -> str:
    """A page with a text between two marks."""
    before, _, rest = page.partition(marks[0])
    return before + marks[0] + text + marks[1] + rest.partition(marks[1])[2]


def main() -> None:
    page = ROOT / "docs" / "performance.md"
    text = put(put(page.read_text(encoding="utf-8"), FAST, speeds()), GPU, gpus())
    page.write_text(text, encoding="utf-8")
    print(speeds())


if __name__ == "__main__":
    main()
