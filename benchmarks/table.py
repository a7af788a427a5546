"""Puts the table of benchmarks/gpu.json, or that there is none, into docs/performance.md: `make bench-table`."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from turns import ratio

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- GPU table, by make bench-table -->\n", "<!-- end of the GPU table -->"
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


def table(result: dict[str, Any] | None) -> str:
    """The table as Markdown.

    Args:
        result: What benchmarks/gpu.py wrote; None: nobody has run it.
    """
    if result is None:
        return NOTHING
    lines = [f"| {result['device']} | beside what | theirs | ours | times as fast: min, median, max |"]
    lines.append("| --- | --- | --- | --- | --- |")
    for part, rows in ROWS.items():
        found = result["parts"].get(part, {})
        for name, one in {"": found, **found}.items():
            if isinstance(one, dict) and "seconds" in one:
                there = [row for row in rows if {row[2], row[3]} <= set(one["seconds"])]
                lines += [_row(name, one["seconds"], UNITS.get(part, "s"), *row) for row in there]
    return "\n".join(lines) + "\n"


def _row(name: str, seconds: dict[str, list[float]], unit: str, what: str, beside: str, theirs: str, ours: str) -> str:
    times = "{min:.2f}, {median:.2f}, {max:.2f}".format(**ratio(seconds, theirs, ours))
    both = " | ".join(f"{statistics.median(seconds[way]):.3g} {unit}" for way in (theirs, ours))
    return f"| {what}{name and f' ({name})'} | {beside} | {both} | {times} |"


def main() -> None:
    path = ROOT / "benchmarks" / "gpu.json"
    page = ROOT / "docs" / "performance.md"
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    result = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    if result and result["small"]:
        raise SystemExit(f"{path}: made with --small; these are no figures to show")
    page.write_text(before + BEGIN + table(result) + END + after, encoding="utf-8")


if __name__ == "__main__":
    main()
