"""`image-to-prompts kaggle push`: sends kernels to Kaggle, which runs them, also those that a limit has stopped."""

import itertools
import json
import logging
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from ..pipeline import CONTINUED, IMAGES, STAGES
from ..pipeline import stage as stage_called
from ..run.errors import UserError
from ..run.files import write_json
from . import kernels, remote
from .kernels import Kernel

log = logging.getLogger(__name__)
ASK_EVERY = float(os.environ.get("IMAGE_TO_PROMPTS_ASK_EVERY", 30))  # seconds between two looks at a running kernel
MOST_FAILURES = 20  # of them in a row
NOT_FAILED = ("queued", "running", "complete")  # states of a kernel
PUSHED = ".pushed.json"  # versions of the last push, by kernel, the newest last, in the folder of kernels
OTHER = "-b"  # ends the second slug of finetune's kernel
SESSION = 12  # hours that a kernel may run
# What puts a missing dataset there, by the end of its slug.
REMEDIES = {
    "wheels": "image-to-prompts kaggle wheels --publish",
    "weights": "image-to-prompts kaggle weights --publish",
    "metadata": "image-to-prompts kaggle metadata --publish",
    "embeddings": "image-to-prompts kaggle embeddings --publish",
}


@dataclass
class Command:
    """What every command about kernels has."""

    kernels: Path = Path("kernels")
    """Folder of kernel folders, from `make kernels`."""
    timeout: float = remote.TIMEOUT
    """Seconds to wait for an answer."""

    def run(self) -> str:
        """Does it; returns what to print."""
        raise NotImplementedError


@dataclass
class Push(Command):
    """Sends kernels to Kaggle, which runs them."""

    stage: Positional[str] = ""
    """Stage whose kernel to push, or bank, or benchmark."""
    all: bool = False
    """Push all stages, in order."""
    dry_run: bool = False
    """Only show what would be sent, and send nothing."""
    verbose: Annotated[bool, arg(aliases=["-v"])] = False
    """With --dry-run: every field."""
    set: tuple[str, ...] = ()
    """Values of the notebook's parameters, as NAME=VALUE: --set recipe=vit-l-336 epochs=4."""
    wait: bool = False
    """Wait until each kernel has run before the next, which reads its output, is pushed."""
    go_on: Annotated[bool, arg(name="continue")] = False
    """Continue where the last session of render or finetune was stopped by its limit."""

    def run(self) -> str:
        """Pushes.

        Returns:
            A line a kernel, or the table.

        Raises:
            UserError: If a kernel or one of its sources is refused or missing, if one that was waited for fails, or if
                there is nothing to continue.
        """
        found = chosen(self.kernels, self.stage, self.all)
        self._check(found[0])
        if self.dry_run:
            return kernels.table(found, self.verbose)
        api = remote.connect(self.timeout)
        before: set[str] = set()
        needed = []
        for kernel in found:
            needed.append((kernel, remote.missing(api, kernel, before, self.timeout)))
            before.add(kernel.id)
        lacking = [
            (kernel, source) for kernel, missing in needed for source in missing if source not in kernel.optional
        ]
        if lacking:
            remedies = {source: _remedy(kernel, source) for kernel, source in lacking}
            said = "; ".join(f"{source} ({remedy})" for source, remedy in remedies.items())
            raise UserError(f"nothing was pushed, for what it needs is not on Kaggle: {said}")
        for kernel, source in ((kernel, source) for kernel, missing in needed for source in missing):
            log.warning("%s: goes without %s, which is not on Kaggle", kernel.id, source)
        for line in remote.quota(api, sum(kernel.metadata["enable_gpu"] for kernel in found), SESSION, self.timeout):
            log.info("%s", line)
        lines = []
        for number, (kernel, missing) in enumerate(needed):
            with tempfile.TemporaryDirectory() as folder:
                sent = self._prepared(api, kernel, missing, Path(folder) / kernel.folder.name)
                version = remote.push(api, sent, self.timeout)
            others = {name: old for name, old in pushed(self.kernels).items() if name != sent.id}
            write_json(self.kernels / PUSHED, {**others, sent.id: version})
            lines.append(f"{sent.id}: version {version} pushed, it runs now; https://www.kaggle.com/code/{sent.id}")
            log.info("%s", lines[-1])
            if self.wait and number + 1 < len(needed):
                self._wait(api, sent)
        return "\n".join(lines)

    def _check(self, kernel: Kernel) -> None:
        """Raises UserError where flags do not go together."""
        if self.go_on and self.stage not in CONTINUED:
            raise UserError(
                f"--continue: only {' and '.join(CONTINUED)} continue from session to session; name one of them"
            )
        if self.set and self.all:
            raise UserError("--set: parameters are those of one notebook; name a stage instead of --all")
        if self.set:
            kernel.settings(self.set)

    def _prepared(self, api: Any, kernel: Kernel, missing: list[str], folder: Path) -> Kernel:
        """A kernel as it is sent: without what is missing, with what sessions before it have left."""
        fields: dict[str, Any] = {
            name: [source for source in kernel.metadata[name] if source not in missing] for name in kernels.LISTS
        }
        owner = kernel.id.partition("/")[0]
        first = f"{owner}/{stage_called('finetune').slug}"
        last = self._last_session(api, first, first in fields["kernel_sources"])
        fields["kernel_sources"] = [last if one == first else one for one in fields["kernel_sources"]]
        asks, rendering = kernel.stage and kernel.stage.kernel, kernel.stage is stage_called("render")
        if asks and asks.images and (self.go_on or not rendering):
            published = (f"{owner}/{IMAGES}-{number}" for number in itertools.count(1))
            there = itertools.takewhile(lambda one: remote.is_there(api, one, "dataset", self.timeout), published)
            fields["dataset_sources"] += there
        if rendering and not self.go_on and remote.is_there(api, f"{owner}/{IMAGES}-1", "dataset", self.timeout):
            log.warning("%s/%s-1 gets a new version, with the images of this session alone", owner, IMAGES)
        if self.go_on:
            ended = kernel.id if rendering else last
            state, _ = remote.status(api, ended, self.timeout)
            if state in ("queued", "running"):
                raise UserError(f"{ended} is {state}; continue it when it has ended")
            if rendering and not any(IMAGES in one for one in fields["dataset_sources"]):
                raise UserError(f"{owner}/{IMAGES}-1 is not on Kaggle, so no session has published images; see its log")
            if not rendering:
                other = first if last != first else first + OTHER
                # One that failed has left nothing: it runs again, with what the one before it left.
                done = state == "complete"
                following, earlier = (other, last) if done else (last, other)
                fields |= {"id": following, "title": following.partition("/")[2].replace("-", " ")}
                fields["kernel_sources"] += [earlier] if done or earlier in pushed(self.kernels) else []
                if not done:
                    log.warning("%s: %s; it runs again", last, state)
        return kernel.changed(folder, self.set, **fields)

    def _last_session(self, api: Any, first: str, is_read: bool) -> str:
        """The kernel that trained last; where its output is read, the one that left some."""
        sessions = [one for one in reversed(pushed(self.kernels)) if one in (first, first + OTHER)]
        needed = not sessions and (is_read or (self.stage == "finetune" and self.go_on))
        if needed and remote.is_there(api, first + OTHER, "kernel", self.timeout):
            said = f"{first + OTHER} was pushed from another clone; copy its {self.kernels / PUSHED}"
            if self.go_on:
                raise UserError(said)
            log.warning("%s, or %s counts as the last session", said, first)
        if is_read and len(sessions) > 1:
            state, _ = remote.status(api, sessions[0], self.timeout)
            if state not in NOT_FAILED:
                log.warning("%s: %s; %s is attached in its place", sessions[0], state, sessions[1])
                return sessions[1]
        return (sessions or [first])[0]

    def _wait(self, api: Any, kernel: Kernel) -> None:
        state, failures = "queued", 0
        while state != "complete":
            time.sleep(ASK_EVERY)
            try:
                state, message = remote.status(api, kernel.id, self.timeout)
                failures = 0
            except UserError as error:  # Kaggle has bad minutes, a kernel runs for hours
                failures += 1
                if failures == MOST_FAILURES:
                    raise
                log.warning("%s; asking again", error)
                continue
            if state not in NOT_FAILED:
                raise UserError(f"{kernel.id}: {state}{message and f', {message}'}; those after it were not pushed")


def _remedy(kernel: Kernel, source: str) -> str:
    """What puts a missing source there."""
    if source in kernel.metadata["kernel_sources"]:
        return "push that kernel first"
    return REMEDIES.get(source.rpartition("-")[2], "see its page")


def chosen(folder: Path, stage: str, every: bool) -> list[Kernel]:
    """The kernels of a stage or all, the whole chain checked."""
    found = kernels.find(folder)
    if bool(stage) == every:
        raise UserError("name a stage or give --all")
    if every:
        return [kernel for kernel in found if kernel.stage]
    names = {"bank": "bank", "benchmark": "benchmark"} | {each.name: each.slug for each in STAGES}
    if stage not in names:
        raise UserError(f"unknown stage {stage!r}; choose one of {', '.join(names)}")
    kernel = [kernel for kernel in found if kernel.folder.name == names[stage]]
    if not kernel:
        raise UserError(f"{folder}: no kernel of {stage}; run make kernels")
    return kernel


def pushed(folder: Path) -> dict[str, int]:
    """The version of each kernel that was pushed from a folder, the newest last."""
    path = folder / PUSHED
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
