"""What the package does where it is installed without its extras: everything that is left is told in one line."""

import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import written_images
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from image_to_prompts import __version__
from image_to_prompts.kaggle.folders import needed

ROOT = Path(__file__).resolve().parents[1]
WITHOUT = """
import sys
from importlib.machinery import PathFinder

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in GONE else PathFinder.find_spec(name, path, target)

sys.meta_path[:] = [Without if finder is PathFinder else finder for finder in sys.meta_path]
"""
PROMPT = "a lighthouse in a storm"


def absent() -> set[str]:
    """The importable names that an installation without extras lacks, of those installed here."""
    there = needed(["image-to-prompts"])
    modules = metadata.packages_distributions()
    return {name for name, owners in modules.items() if not there & {canonicalize_name(one) for one in owners}}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Runs a command as if no extra were installed; returns its exit code and what it printed."""
    folder = tmp_path_factory.mktemp("plain")
    names = {name for name in absent() if name.isidentifier()} - {"image_to_prompts"}
    said = {"parameters": f"{PROMPT}\nSteps: 20, Sampler: Euler, CFG scale: 7, Seed: 1, Size: 64x64"}
    written_images.png(folder / "named.png", said)
    written_images.png(folder / "plain.png", {})
    (folder / "prompts.csv").write_text(f"prompt\n{PROMPT}\n{PROMPT}s\nneon robot portrait\n")

    def run(*words):
        begin = f"GONE = {names!r}\n{WITHOUT}sys.path.insert(0, {str(ROOT)!r})\n"
        program = f"{begin}from image_to_prompts.cli import main\nmain({words!r})"
        done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr

    return run


@pytest.mark.slow
def test_prompts_in_files_and_deduplication_need_no_extra(plain):
    code, said, log = plain("describe", "named.png", "plain.png", "--out", "found.csv")
    assert code == 0 and "1 prompts from their files, 1 without an answer" in log
    assert log.count("no prompt in the file, and ") == 1 and "image-to-prompts[full]" in log
    code, said, log = plain("describe", "named.png")
    assert (code, said) == (0, f"named.png\t{PROMPT}\n")
    code, said, log = plain("dedupe", "--prompts", "prompts.csv", "--out", "kept.csv")
    assert code == 0 and "3 rows, 2 kept" in log


@pytest.mark.slow
@pytest.mark.parametrize(
    "words, extra",
    [
        (("run", "--quick"), "full"),
        (("generate", "--source", "table", "--input", "prompts.csv", "--out", "new.csv"), "full"),
        (("demo",), "demo"),
    ],
)
def test_what_needs_an_extra_names_it_in_one_line(plain, words, extra):
    code, _, log = plain(*words)
    assert code == 2 and "Traceback" not in log
    assert log.endswith(f" is not installed; python -m pip install 'image-to-prompts[{extra}]'\n")


def test_version_and_changelog_agree():
    first = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert first and first[1] in (__version__, "Unreleased")
    assert metadata.version("image-to-prompts") == __version__


def test_every_import_of_the_package_is_declared():
    """Not through what others happen to need: scikit-learn came with sentence-transformers alone."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    declared = {canonicalize_name(Requirement(line).name) for line in lines}
    text = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "image_to_prompts").rglob("*.py"))
    names = set(re.findall(r"^\s*(?:from|import) ([a-z_0-9]+)", text, re.MULTILINE)) - set(sys.stdlib_module_names)
    owners = metadata.packages_distributions()
    parts = {"starlette": "gradio", "gradio-client": "gradio", "kagglesdk": "kaggle"}  # these bring them with them
    known = {
        name: {parts.get(one, one) for one in map(canonicalize_name, owners[name])} for name in names if name in owners
    }
    assert len(known) > 20
    assert {name for name, some in known.items() if not some & declared} <= {"image_to_prompts"}
