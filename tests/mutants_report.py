"""docs/reliability.md's table of mutants, from what `mutmut run` left in mutants/.

python tests/mutants_report.py
"""

from __future__ import annotations

import ast
import difflib
import json
import re
from collections import Counter
from pathlib import Path

HEAD = """## Mutants

Written by `make mutants`, not by hand. mutmut puts one-line faults into the modules where a fault that nobody notices
costs most; a fault counts as caught when a test fails, or runs for ever. Texts of messages are left as they are.

"""
CAUGHT, MARK = (1, 3, 24, 36, 152, 255, -24), "## Mutants"  # exit codes of mutmut: tests failed, or time was over
STRICT = re.compile(r", strict=\w+")
ARGUED = json.loads(Path(__file__).with_name("mutants_argued.json").read_text(encoding="utf-8"))


def why(change: list[str]) -> str:
    """Why no test can or need notice what a change puts in; "" where nobody has said."""
    removed, added = (" ".join(line[1:] for line in change if line.startswith(sign)) for sign in "-+")
    if STRICT.sub("", removed) == STRICT.sub("", added):
        return "zip's strict= guards lengths that are equal by construction"
    return next((reason for pattern, reason in ARGUED.items() if re.search(pattern, added)), "")


def change_of(functions: dict[str, ast.AST], name: str) -> list[str]:
    """The lines of a function that a mutant takes out (-) and puts in (+)."""
    original = re.sub(r"__mutmut_\d+$", "__mutmut_orig", name)
    texts = [ast.unparse(functions[one]).replace(one, "f").splitlines() for one in (original, name)]
    found = list(difflib.unified_diff(*texts, lineterm="", n=0))[2:]
    return [re.sub(r"\s+", " ", line) for line in found if not line.startswith("@@")]


def main() -> None:
    """Writes the table."""
    lines, total = ["| module | mutants run | caught | |", "| --- | --- | --- | --- |"], [0, 0]
    reasons, open_ = Counter(), []
    for meta in sorted(Path("mutants").rglob("*.meta")):
        every = json.loads(meta.read_text())["exit_code_by_key"]
        codes = {name: code for name, code in every.items() if code is not None}
        if not codes:
            continue
        begun = {name.partition("__mutmut_")[0] for name in codes}  # of some modules only a function is asked for
        some = 2 * len(codes) < len(every)
        asked = sum(name.partition("__mutmut_")[0] in begun for name in every) if some else len(every)
        tree = ast.parse(meta.with_suffix("").read_text(encoding="utf-8"))
        functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        survivors = [name for name, code in codes.items() if code not in CAUGHT]
        for name in survivors:
            change = change_of(functions, name.rpartition(".")[2])
            if reason := why(change):
                reasons[reason] += 1
            else:
                open_.append(f"- `{name.removeprefix('image_to_prompts.')}`: `{' '.join(change)}`")
        caught = len(codes) - len(survivors)
        module = meta.relative_to("mutants").with_suffix("").as_posix()
        run = f"{len(codes)}" if len(codes) == asked else f"{len(codes)} of {asked}"
        lines.append(f"| `{module}` | {run} | {caught} | {caught / len(codes):.1%} |")
        total = [total[0] + len(codes), total[1] + caught]
    lines.append(f"| all | {total[0]} | {total[1]} | {total[1] / max(total[0], 1):.1%} |")
    lines += ["", "Why the others may live (tests/mutants_argued.json):", ""]
    lines += [f"- {count}: {reason}" for reason, count in reasons.most_common()]
    if open_:
        lines += ["", f"{len(open_)} that nobody has looked at:", "", *open_]
    path = Path("docs/reliability.md")
    before = path.read_text(encoding="utf-8").partition(MARK)[0].rstrip()
    path.write_text(f"{before}\n\n{HEAD}" + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
