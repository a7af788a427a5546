"""Builds the release and tries it as a stranger would: in empty environments, away from the clone.

`make release-check` runs this with Python 3.11, 3.12 and 3.13, and once more with the lowest versions that
pyproject.toml allows, and writes docs/release.md.
"""

import argparse
import csv
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
NEWEST, LOWEST = "highest", "lowest-direct"  # uv's names
ROWS = (("3.11", NEWEST), ("3.12", NEWEST), ("3.13", NEWEST), ("3.11", LOWEST))
SHOWN = ("torch", "transformers", "timm", "numpy", "pandas")
PROMPT = "a lighthouse in a storm, oil painting"
PICTURES = f"""
from PIL import Image, PngImagePlugin
about = PngImagePlugin.PngInfo()
about.add_text("parameters", "{PROMPT}\\nSteps: 20, Sampler: Euler, CFG scale: 7, Seed: 1, Size: 64x64")
Image.effect_mandelbrot((64, 64), (-2, -1, 1, 1), 20).convert("RGB").save("named.png", pnginfo=about)
Image.effect_mandelbrot((64, 64), (-2, -1, 1, 1), 20).convert("RGB").save("plain.png")
"""


def said(*words: object, cwd: Path) -> str:
    """What a command prints on both streams; a failed one ends the check with it."""
    done = subprocess.run([*map(str, words)], cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, words))}\n{done.stdout}\nfailed with {done.returncode}")
    return done.stdout


def expect(text: str, inside: str) -> None:
    """Ends the check unless a text is in what a command printed."""
    if text not in inside:
        sys.exit(f"expected {text!r} in\n{inside}")


def try_base(command: Path, empty: Path) -> None:
    """What works without extras, and what is said of the rest."""
    said(command.with_name("python"), "-c", PICTURES, cwd=empty)
    expect(PROMPT, said(command, "describe", "named.png", cwd=empty))
    expect("image-to-prompts[full]", said(command, "describe", "plain.png", cwd=empty))
    with (empty / "prompts.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["prompt"], [PROMPT], [f"{PROMPT}s"], ["portrait of a robot, neon lights"]])
    expect("3 rows, 2 kept", said(command, "dedupe", "--prompts", "prompts.csv", "--out", "kept.csv", cwd=empty))


def try_full(command: Path, empty: Path) -> float:
    """The whole chain, a guess for a picture without a prompt, and the chain's score."""
    printed = said(command, "run", "--quick", cwd=empty)
    (submission,) = empty.glob("runs/*/submission/submission.csv")
    expect("valid", said(command, "check-submission", submission, cwd=empty))
    expect("guess", said(command, "describe", "plain.png", cwd=empty))
    return float(printed.rpartition("\nscore ")[2].split()[0])


def check(wheel: Path, room: Path, python: str, resolution: str, file: Path) -> None:
    """Installs the wheel into a new environment, without and with its extras, tries it, and writes a row as JSON."""
    place = file.with_suffix("")
    empty = place.with_name(f"{place.name}_empty")
    for folder in (place, empty):
        shutil.rmtree(folder, ignore_errors=True)
    empty.mkdir(parents=True)
    begun = time.monotonic()
    said("uv", "venv", "--quiet", "--python", python, place, cwd=room)
    install = ("uv", "pip", "install", "--quiet", "--python", place)
    own = ("--resolution", LOWEST, "-r", HERE / "pyproject.toml")  # lowest are the versions that pyproject.toml names
    if resolution == LOWEST:
        said(*install, *own, cwd=room)
    said(*install, wheel, cwd=room)
    command, sizes = place / "bin" / "image-to-prompts", [size(place)]
    try_base(command, empty)
    if resolution == LOWEST:
        said(*install, *own, "--extra", "full", cwd=room)
    said(*install, f"{wheel}[full]", cwd=room)
    sizes.append(size(place))
    listed = said("uv", "pip", "list", "--python", place, "--format", "json", cwd=room)
    installed = json.loads(listed[listed.index("[") :])
    versions = {one["name"]: one["version"] for one in installed}
    score = try_full(command, empty)
    row: dict[str, object] = {"Python": python, "versions": {NEWEST: "newest", LOWEST: "lowest"}[resolution]}
    row |= {name: versions[name] for name in SHOWN}
    row |= {"GB": f"{sizes[0]:.1f}, {sizes[1]:.1f}", "score": f"{score:.3f}"}
    print(row, f"{time.monotonic() - begun:.0f} s", flush=True)
    file.write_text(json.dumps(row))
    shutil.rmtree(place)


def size(folder: Path) -> float:
    """GB of the files below a folder."""
    return sum(path.lstat().st_size for path in folder.rglob("*")) / 1e9


def page(rows: list[dict[str, object]], wheel: Path) -> Iterator[str]:
    """The lines of docs/release.md."""
    yield "# Release check\n"
    yield f"`{wheel.name}`, checked by `make release-check` on {time.strftime('%d %B %Y').lstrip('0')}. It builds the"
    yield "source distribution and, from that, the wheel. Then it installs the wheel with uv into empty environments"
    yield "outside the clone: with the newest version of every package that pyproject.toml allows, and once with the"
    yield "lowest. There it describes pictures with and without a prompt in the file, deduplicates, and, with the extra"
    yield "`[full]`, runs `image-to-prompts run --quick`. GB are without and with `[full]`, most of both is CUDA.\n"
    for cells in (rows[0].keys(), ["---"] * len(rows[0]), *(row.values() for row in rows)):
        yield f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    """Runs the rows that are asked for, all of them by default."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("room", type=Path, help="folder for the environments; about 10 GB")
    parser.add_argument(
        "--rows", type=int, nargs="+", default=range(len(ROWS)), help="which rows; others are taken from ROOM"
    )
    asked = parser.parse_args()
    room = asked.room.resolve()
    room.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(room / "dist", ignore_errors=True)
    said("uv", "build", "--quiet", "--out-dir", room / "dist", HERE, cwd=room)
    (wheel,) = (room / "dist").glob("*.whl")
    files = [room / f"{python.replace('.', '_')}-{resolution}.json" for python, resolution in ROWS]
    for number in asked.rows:
        check(wheel, room, *ROWS[number], files[number])
    if all(file.is_file() for file in files):
        lines = page([json.loads(file.read_text()) for file in files], wheel)
        (HERE / "docs" / "release.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
