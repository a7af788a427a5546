"""docs/reliability.md from what the failure suite noted."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

HEAD = """# What was done to every stage, and how it ended

Written by `make chaos` (tests/test_chaos.py), not by hand. Each line is a kind of failure; the stages are those of the
command line on small inputs, some of them in several variants. "Same bytes": the same command, started again, left
exactly the files of a run that nothing had disturbed. "One clear line": exit code 2 and one line on standard error.

"""


class Table:
    """A pytest plugin that collects the notes of all tests, of xdist's workers too, and writes the table at the end."""

    def __init__(self, file: Path) -> None:
        self.file, self.notes, self.failed = file, [], 0

    def pytest_runtest_logreport(self, report) -> None:
        self.failed += report.failed
        if report.when == "call":
            self.notes += [value for name, value in report.user_properties if name == "chaos"]

    def pytest_sessionfinish(self) -> None:
        write(self.file, self.notes, self.failed)


def write(path: Path, notes: list[str], failed: int) -> None:
    """Writes the tables.

    Args:
        path: Where to.
        notes: `target|kind|outcome` of each disturbance.
        failed: Tests that failed.
    """
    rows = [note.split("|") for note in notes]
    targets = list(dict.fromkeys(row[0] for row in rows))
    kinds = sorted({row[1] for row in rows}, key=lambda kind: (kind.startswith("input "), kind))
    kills = sum(row[1].startswith("kill") for row in rows)
    damaged = sum(kind.startswith("input .") for kind in kinds)
    lines = [
        HEAD
        + f"{len(rows)} disturbances, {kills} of them kill -9; {len(kinds)} kinds, {damaged} of them damaged inputs;",
        f"{failed} tests failed.",
        "",
    ]
    lines += ["| what happened | times | how it ended |", "| --- | --- | --- |"]
    for kind in kinds:
        ends = Counter(row[2] for row in rows if row[1] == kind)
        how = "; ".join(f"{count} × {outcome}" for outcome, count in ends.most_common())
        lines.append(f"| {kind} | {sum(ends.values())} | {how} |")
    lines += ["", "| stage | disturbances | of them kill -9 |", "| --- | --- | --- |"]
    for target in targets:
        own = [row for row in rows if row[0] == target]
        lines.append(f"| {target} | {len(own)} | {sum(row[1].startswith('kill') for row in own)} |")
    _, _, mutants = path.read_text(encoding="utf-8").partition("## Mutants") if path.is_file() else ("", "", "")
    lines += ["", f"## Mutants{mutants.rstrip()}"] if mutants else []
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
