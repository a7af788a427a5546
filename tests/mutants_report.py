"""docs/reliability.md's table of mutants, from what `mutmut run` left in mutants/.

python tests/mutants_report.py
"""

from __future__ import annotations

import json
from pathlib import Path

HEAD = """## Mutants

Written by `make mutants`, not by hand. mutmut puts one-line faults into the modules where a fault that nobody notices
costs most; a fault counts as caught when a test fails, or runs for ever. Texts of messages are left as they are.

"""
CAUGHT, MARK = (1, 3, 24, 36, 152, 255, -24), "## Mutants"  # exit codes of mutmut: tests failed, or time was over


def main() -> None:
    """Writes the table."""
    lines, total = ["| module | mutants | caught | |", "| --- | --- | --- | --- |"], [0, 0]
    for meta in sorted(Path("mutants").rglob("*.meta")):
        codes = [code for code in json.loads(meta.read_text())["exit_code_by_key"].values() if code is not None]
        caught = sum(code in CAUGHT for code in codes)
        if codes:
            module = meta.relative_to("mutants").with_suffix("").as_posix()
            lines.append(f"| `{module}` | {len(codes)} | {caught} | {caught / len(codes):.1%} |")
            total = [total[0] + len(codes), total[1] + caught]
    lines.append(f"| all | {total[0]} | {total[1]} | {total[1] / max(total[0], 1):.1%} |")
    path = Path("docs/reliability.md")
    before = path.read_text(encoding="utf-8").partition(MARK)[0].rstrip()
    path.write_text(f"{before}\n\n{HEAD}" + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
