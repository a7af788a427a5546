"""Puts the GPU table of benchmarks/gpu.json, or "unmeasured", into docs/performance.md: `make bench-table`."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- GPU table, by make bench-table -->\n", "<!-- end of the GPU table -->"
KAGGLE_WEEK = 30  # GPU hours
ROWS = {
    "render": ("Stable Diffusion 2, 768 px, seconds an image", ("ours", "ours --fast")),
    "train": ("training ConvNeXt-XXLarge, 512 px, seconds an image", ("ours",)),
    "infer": ("inference with it, decoding included, seconds an image", ("ours",)),
    "encode": ("encoding, seconds a 1,000 prompts", ("ours",)),
    "dedupe": ("deduplication of 20,000 vectors, seconds", ("ours",)),
}


def table(result: dict[str, Any] | None) -> str:
    """The table as Markdown.

    Args:
        result: What benchmarks/gpu.py wrote; None: nobody has run it.
    """
    parts = {} if result is None else result["parts"]

    def seconds(part: str, way: str) -> float | None:
        return statistics.median(parts[part]["seconds"][way]) if part in parts else None

    def row(name: str, *values: Any) -> str:
        return f"| {name} | " + " | ".join("unmeasured" if value is None else value for value in values) + " |"

    lines = [f"| {'GPU' if result is None else result['device']} | the reference's way | ours | with `--fast` |"]
    lines.append("| --- | --- | --- | --- |")
    each = [seconds("render", way) for way in ("reference", "ours", "ours --fast")]
    lines.append(row("images a GPU hour", *(s and f"{3600 / s:,.0f}" for s in each)))
    cost = [s and f"{100_000 * s / 3600:,.0f} h ({100_000 * s / 3600 / KAGGLE_WEEK:.1f} weeks of quota)" for s in each]
    lines.append(row("100,000 images", *cost))
    for part, (name, ways) in ROWS.items():
        values = [seconds(part, way) for way in ("reference", *ways)]
        cells = [value and f"{value:.3g}" for value in values]
        lines.append(row(name, *cells, *([""] if len(ways) == 1 else [])))
    return "\n".join(lines) + "\n"


def main() -> None:
    path = ROOT / "benchmarks" / "gpu.json"
    page = ROOT / "docs" / "performance.md"
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    result = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    if result and result["small"]:
        raise SystemExit(f"{path}: made with --small; these are no figures to show")
    text = table(result)
    page.write_text(before + BEGIN + text + END + after, encoding="utf-8")


if __name__ == "__main__":
    main()
