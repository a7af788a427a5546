"""What the failure suite is made of: every stage as a command on small inputs, ways to disturb it, and its table.

A stage runs through the command line's own `main` in a forked process, with one thread so that floating point is
reproducible, and blocks so small that there is always something half done.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from image_to_prompts.data import metadata
from image_to_prompts.models import text_cache

MOMENTS = (1, 2, 3, 4, 6, 8, 12, 16)  # kill when the run's folders have changed this often
STAGE_OF = {"magicprompt": "generate", "collect": "generate", "finetune-uncached": "finetune"}
WORDS = {
    "generate": ("--count 3000 --batch-size 16", {}),
    "magicprompt": ("--source magicprompt --count 48 --batch-size 4", {"--weights": "gpt2"}),
    "collect": ("--source table", {"--input": "prompts"}),
    "dedupe": ("", {"--prompts": "prompts"}),
    "render": ("--workers 2", {"--metadata": "metadata"}),
    "render-tar": ("--workers 2 --per-tar 7 --seeds 2", {"--metadata": "some"}),
    "render-sd2": ("--backend sd2 --steps 2 --batch-size 2", {"--metadata": "few", "--weights": "sd2"}),
    "render-sd2-tar": (
        "--backend sd2 --steps 2 --batch-size 2 --per-tar 5 --seeds 2",
        {"--metadata": "few", "--weights": "sd2"},
    ),
    "finetune": ("--epochs 3 --image-size 64 --learning-rate 2e-4 --save-minutes 0", {"--images": "images"}),
    "finetune-uncached": (
        "--epochs 3 --image-size 64 --learning-rate 2e-4 --no-cache-features --precision fp32",
        {"--images": "images"},
    ),
    "embed": (
        "--image-size 64 --encoders timm:tf_efficientnet_lite0 timm:tf_efficientnet_lite2",
        {"--images": "images"},
    ),
    "embed-bank": ("--encoders open_clip:CLIP --dimensions 8", {"--texts": "metadata"}),
    "ensemble": ("--epochs 3 --save-minutes 0", {"--embeddings": "embeddings"}),
    "infer": ("--batch-size 4", {"--images": "images", "--checkpoint": "checkpoint"}),
    "describe": (
        "--batch-size 4 --views whole --most-words 8 --out RUN/prompts.csv",
        {"": "pictures", "--checkpoint": "checkpoint", "--prompts": "metadata", "--vocabulary": "words"},
    ),
}
HANGS = 300  # seconds after which a process is taken for stuck
TARGETS = tuple(WORDS)

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(
    ["torch", "transformers", "sentence_transformers", "diffusers", "timm", "faiss", "accelerate", "pandas", "polars"]
)


def stage_of(target: str) -> str:
    return STAGE_OF.get(target) or target.partition("-")[0]


def make_inputs(folder: Path, fixtures: dict[str, Path]) -> dict[str, Path]:
    """The fixtures and what is cut out of them: fewer rows, a vocabulary that is embedded in no time."""
    frame = metadata.read(fixtures["metadata"])
    for name, rows in (("some", 20), ("few", 6)):
        metadata.write_table(folder / f"{name}.csv", frame.head(rows))
    (folder / "words").mkdir()
    for kind in ("subjects", "mediums", "movements", "flavors", "artists"):
        (folder / "words" / f"{kind}.txt").write_text(f"a piece of {kind}\na cat with {kind}\n")
    (folder / "pictures").mkdir()
    for image in sorted(fixtures["images"].glob("*.png"))[:20]:
        shutil.copy2(image, folder / "pictures")
    own = {
        "pictures": folder / "pictures",
        "some": folder / "some.csv",
        "few": folder / "few.csv",
        "words": folder / "words",
    }
    return {**fixtures, **own}


def _work(words: list[str], cache: Path, log: Path, memory: int) -> None:
    """The command in the forked process; everything it says goes to `log`."""
    with log.open("ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    faulthandler.register(signal.SIGUSR1, all_threads=False)
    import torch

    from image_to_prompts import describe, embed
    from image_to_prompts.__main__ import main
    from image_to_prompts.embed import bank
    from image_to_prompts.embedded.scenes import SceneBackend
    from image_to_prompts.generate import formats
    from image_to_prompts.models import networks, text_encoder
    from image_to_prompts.predict import predictors
    from image_to_prompts.training import frozen_features

    torch.set_num_threads(1)
    text_encoder.BLOCK, predictors.BLOCK, embed.BLOCK, SceneBackend.block, formats.BLOCK = 16, 8, 8, 4, 8
    describe.BLOCK, frozen_features.BLOCK = 8, 16
    bank.BLOCK, bank.SHARD = 8, 20
    networks.WIDTH, networks.LAYERS, networks.HEADS, networks.FEED_FORWARD = 32, 1, 2, 64  # not 10 million parameters
    os.environ[text_cache.FOLDER] = str(cache)
    if memory:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + memory, resource.RLIM_INFINITY))
    log.with_suffix(".began").touch()
    try:
        main(words)
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)


class HangsError(AssertionError):
    """A process did not end."""


def ended(process) -> None:
    """Waits for a process's end, which must come."""
    process.join(HANGS)
    if process.is_alive():
        os.kill(process.pid, signal.SIGUSR1)  # it says where it is
        time.sleep(2)
        process.kill()
        process.join()
        raise HangsError(f"{process} hangs")


@dataclass
class Case:
    """One folder in which a target runs, is disturbed and runs again.

    Attributes:
        target: One of `TARGETS`.
        folder: Of this case alone.
        inputs: What `make_inputs` gave, or copies.
        memory: Bytes that the process may take beyond those it starts with; 0: any.
        flags: More words of the command.
        processes: Those started so far.
    """

    target: str
    folder: Path
    inputs: dict[str, Path]
    memory: int = 0
    flags: tuple[str, ...] = ()
    processes: list = field(default_factory=list)

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def cache(self) -> Path:
        return self.folder / "cache"

    @property
    def words(self) -> list[str]:
        flags, inputs = WORDS[self.target]
        words = [stage_of(self.target), "--run", str(self.run)]
        clip = str(self.inputs.get("clip"))
        words += [word.replace("RUN", str(self.run)).replace("CLIP", clip) for word in flags.split()]
        for flag, name in inputs.items():
            if flag:
                words += [flag, str(self.inputs[name])]
            else:
                words.insert(1, str(self.inputs[name]))
        return [*words, *self.flags]

    def log(self, number: int) -> Path:
        return self.folder.with_name(f"{self.folder.name}.{number}.log")

    def start(self):
        """Starts the command in a process."""
        self.folder.mkdir(parents=True, exist_ok=True)
        arguments = (self.words, self.cache, self.log(len(self.processes)), self.memory)
        process = context.Process(target=_work, args=arguments)
        self.processes.append(process)
        process.start()
        return process

    def finish(self) -> tuple[int, str]:
        """Runs the command to its end; returns the exit code and what it said."""
        process = self.start()
        ended(process)
        return process.exitcode, self.said()

    def said(self, number: int = -1) -> str:
        """What the last run, or the one of a number, said."""
        log = self.log(number if number >= 0 else len(self.processes) - 1)
        return log.read_text(errors="replace") if log.is_file() else ""

    def files(self) -> list[Path]:
        """Everything in the run's folder and in the caches, but locks."""
        return [f for f in sorted(self.folder.rglob("*")) if f.is_file() and not f.name.endswith(".lock")]

    def contents(self) -> dict[str, bytes]:
        """All files of the run: finished ones with what is in them, and the names of all others, so of leftovers too.

        Without locks, and the log of seconds.
        """
        found = {}
        for path in self.run.rglob("*"):
            if path.is_file() and path.suffix not in (".log", ".lock"):
                inside = path.relative_to(self.run)
                hidden = any(part.startswith(".") for part in inside.parts)
                found[str(inside)] = b"" if hidden else path.read_bytes()
        return found

    def listing(self) -> list[tuple[str, int]]:
        """Names and sizes; what is renamed or deleted while it is being listed is left out."""
        found = []
        for folder, _, names in os.walk(self.folder):  # unlike rglob it passes over a folder that is gone
            for name in names:
                with contextlib.suppress(FileNotFoundError):
                    found.append((f"{folder}/{name}", Path(folder, name).stat().st_size))
        return sorted(found)

    def disturb(self, how: signal.Signals, rng: random.Random, seconds: float) -> bool:
        """Starts the command and sends it a signal at a random moment; False if it had ended before.

        Args:
            how: The signal.
            rng: Decides on the moment: a change of the folders, or a time.
            seconds: What an undisturbed run takes.
        """
        began = self.log(len(self.processes)).with_suffix(".began")
        process = self.start()
        while how != signal.SIGKILL and process.is_alive() and not began.exists():
            time.sleep(0.002)  # before the command is under way a signal is Python's to handle
        moment = rng.choice(MOMENTS) if rng.random() < 0.6 else None
        until = time.monotonic() + (60 if moment else rng.uniform(0.02, 1) * seconds)
        before, seen = None, -1
        while process.is_alive() and time.monotonic() < until and (moment is None or seen < moment):
            if moment is not None and (now := self.listing()) != before:
                before, seen = now, seen + 1
            time.sleep(0.002)
        hit = process.is_alive()
        if hit:
            os.kill(process.pid, how)
        ended(process)
        return hit and process.exitcode != 0


def clear_line(code: int, said: str) -> bool:
    """Whether a command failed as it should: exit code 2 and one line that says why."""
    lines = [line for line in said.splitlines() if line.startswith("image-to-prompts:")]
    return code == 2 and len(lines) == 1 and "Traceback" not in said


DAMAGES = ("flipped bit", "cut short", "emptied", "zeros within", "garbage", "deleted")


def choose(files: list[Path], rng: random.Random) -> Path:
    """One of the files; each kind of file is as likely as another, however many there are of it."""
    suffix = rng.choice(sorted({file.suffix for file in files}))
    return rng.choice([file for file in files if file.suffix == suffix])


def damage(path: Path, kind: str, rng: random.Random) -> None:
    """Damages a file."""
    data = bytearray(path.read_bytes())
    if kind == "flipped bit" and data:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == "cut short":
        del data[rng.randrange(len(data)) if data else 0 :]
    elif kind == "emptied":
        data.clear()
    elif kind == "zeros within" and data:
        start = rng.randrange(len(data))
        end = min(len(data), start + rng.randint(1, 4096))
        data[start:end] = bytes(end - start)
    elif kind == "garbage":
        data[:] = rng.randbytes(max(len(data), 1))
    elif kind == "deleted":
        path.unlink()
        return
    path.write_bytes(data)


def can_mount() -> bool:
    """Whether this user may mount a small disk."""
    return os.geteuid() == 0 and subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode == 0


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[None]:
    """Lays a disk of `size` bytes over a folder."""
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def remount(folder: Path, option: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{option}", folder], check=True)


def copied(inputs: dict[str, Path], target: str, folder: Path) -> dict[str, Path]:
    """Inputs of a target that may be damaged: copies with the times of the originals."""
    own = dict(inputs)
    for name in WORDS[target][1].values():
        copy = folder / inputs[name].name
        shutil.copytree(inputs[name], copy) if inputs[name].is_dir() else shutil.copy2(inputs[name], copy)
        own[name] = copy
    return own


def input_files(inputs: dict[str, Path], target: str) -> list[Path]:
    """Files of a target's inputs, with the stamps and journals beside them."""
    found: list[Path] = []
    for name in WORDS[target][1].values():
        path = inputs[name]
        found += sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    return [file for file in found if not file.name.endswith(".lock")]
