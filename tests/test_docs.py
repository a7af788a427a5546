"""README and docs: every command in them is understood, the site builds with every link, and sentences are short."""

import json
import re
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from image_to_prompts import cli

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LONGEST = 35  # words of a sentence


def commands(page):
    """The words of every command line in a page's fenced blocks of bash."""
    found = []
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words and "=" in words[0]:  # variables before a command
                words = words[1:]
            if words:
                found.append(words)
    return found


def understood(words):
    """Whether a command line is one that this checkout, or what it installs, understands."""
    if words[0] == "srun":
        return understood(shlex.split(words[3]) if words[1:3] == ["bash", "-c"] else words[1:])
    while words and words[0] == "accelerate":
        after = words.index("-m") if "-m" in words else len(words)
        words = ["image-to-prompts", *words[after + 2 :]]
    program, rest = Path(words[0]).name, words[1:]
    if program == "image-to-prompts":
        try:
            cli.parse([word for word in rest if word != "..."])
        except SystemExit as stop:
            return stop.code in (0, None)  # --help
        return True
    if program == "make":
        targets = [word for word in rest if "=" not in word]
        return all(re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE) for target in targets)
    if program == "python" and rest[0].endswith(".py"):
        return (ROOT / rest[0]).is_file() and ("benchmarks" not in rest[0] or part_is_there(rest))
    if program in ("bash", "sh"):
        return (ROOT / rest[0]).is_file()
    return program in {
        "python",
        "python3",
        "source",
        "kaggle",
        "curl",
        "pip",
        "git",
        "ray",
        "cd",
        "echo",
        "sed",
        "for",
        "done",
        "do",
        "export",
    }


def part_is_there(words):
    """Whether a benchmark knows the part that a command names."""
    text = (ROOT / words[0]).read_text(encoding="utf-8")
    return all(re.search(rf"\b{word}\b", text) for word in words[1:] if word.isidentifier())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_understood(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    wrong = []
    for words in commands(page):
        try:
            assert understood(words)
        except Exception as error:
            wrong.append(f"{shlex.join(words)}: {error}")
    assert not wrong, "\n".join(wrong)


def test_there_are_commands_to_understand():
    assert sum(len(commands(page)) for page in PAGES) > 60


def sentences(path):
    """The sentences of a page's prose: no code, no tables, no titles."""
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    blocks = re.split(r"\n\s*\n|\n(?=[-#|]|\d\.)", text)
    prose = (" ".join(block.split()) for block in blocks if not block.lstrip().startswith(("#", "|", "<")))
    return [one for block in prose for one in re.split(r"(?<=[.:;?])\s", block)]


@pytest.mark.parametrize("name", ["README.md", "docs/getting-started.md"])
def test_sentences_are_short(name):
    assert [one for one in sentences(ROOT / name) if len(one.split()) > LONGEST] == []


def test_readme_is_short():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150 and len(text.split()) <= 1500


@pytest.mark.slow
def test_site_builds_with_every_link(tmp_path):
    argv = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    commands = (tmp_path / "site" / "reference" / "commands" / "index.html").read_text(encoding="utf-8")
    assert all(f'id="{name}"' in commands for name in cli.COMMANDS)
    for link in re.findall(r"\]\((docs/[^)#]+)", (ROOT / "README.md").read_text(encoding="utf-8")):
        assert (ROOT / link).is_file(), link


def test_figures_are_those_of_the_benchmarks(bench_table):
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    for marks, text in ((bench_table.FAST, bench_table.speeds()), (bench_table.GPU, bench_table.gpus())):
        assert page.count(marks[0]) == 1 and text in page
        assert bench_table.put(page, marks, text) == page


def test_readme_has_the_same_figures(bench_table):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for what, said in {
        "deduplication of 55,494 real prompts, exact": "{:.0f} times as fast as FAISS",
        "training step of ConvNeXt-XXLarge, 512 px": "{:.1f} times as fast as the reference",
        "60 nearest in a bank of 1,000,000 prompts, 100 queries": "{:.1f} times as fast as FAISS",
    }.items():
        command, place = next(row[2:] for row in bench_table.SPEEDS if row[0] == what)
        assert said.format(bench_table.fast(command, place)[1]) in text
    parts = json.loads((ROOT / "benchmarks" / "gpu_h200.json").read_text(encoding="utf-8"))["parts"]
    drawn, trained = parts["render"]["seconds"], next(iter(parts["train"].values()))["seconds"]
    for seconds, plain, ours, said in (
        (drawn, "plain", "ours, compiled", "{:.1f} times as fast as plain diffusers"),
        (drawn, "plain", "ours --fast, compiled", "{:.1f} times as fast at 20 steps"),
        (trained, "plain, half", "ours, compiled", "{:.1f} times as fast as a plain bf16 loop"),
        (trained, "plain, TF32", "ours, compiled", "{:.1f} times as TF32"),
    ):
        ratios = [slow / fast for slow, fast in zip(seconds[plain], seconds[ours], strict=True)]
        assert said.format(statistics.median(ratios)) in text
