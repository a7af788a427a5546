"""The command line: `image-to-prompts <stage> --flag`, flags derived from each stage's config dataclass."""

from __future__ import annotations

import contextlib
import difflib
import io
import os
import re
import signal
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any

import tyro

from . import __version__
from .pipeline import STAGES, announce
from .run import folders, progress
from .run.devices import rank_and_processes
from .run.errors import UserError, causes, explained
from .run.files import shown

EXTRA = {
    "run": "the whole chain on the embedded profile, ending in a report and one line of scores",
    "explain": "a prompt's nearest neighbours, and why dedupe kept or removed it: explain PROMPT",
    "demo": "a page in the browser: drop an image, edit its prompt, render it again",
    "catalogue": "metadata CSVs by source, which of them are there, and the commands that rebuild the others",
    "import-checkpoint": "converts the references' .pt and .ckpt files: import-checkpoint FILE --out DIR",
    "import-embeddings": "takes over bare .npy arrays of the first seed: import-embeddings FILE... --list TXT",
    "export-embeddings": "writes such bare arrays: export-embeddings DIR --out DIR",
    "kaggle": "kernels: kaggle push|status|output|submit; datasets: kaggle wheels|weights|metadata|embeddings",
    "check-submission": "validates a submission file: check-submission FILE [--images DIR]",
}
EXIT_BAD_INPUT = 2


@dataclass
class ImportCheckpoint:
    """Converts a file of the references' networks into a checkpoint folder."""

    file: Annotated[Path, tyro.conf.Positional]
    """State dict of an image tower and a linear layer to 384, or with --ensemble of the first seed's network."""
    ensemble: bool = False
    """Take the file for a .ckpt of the first seed's transformer ensemble."""
    out: Path = Path("checkpoints/imported")
    """Checkpoint folder to write."""
    backbone: str = "open_clip:convnext_xxlarge"
    """Backbone it was trained with."""
    image_size: int = 512
    """Side of the input in px."""

    def run(self) -> str:
        from . import ensemble
        from .models import backbones, checkpoints

        if self.ensemble:
            ensemble.import_published(self.file, self.out)
        else:
            checkpoints.import_reference(self.file, backbones.describe(self.backbone, self.image_size), self.out)
        return f"{self.file}: imported to {self.out}"


@dataclass
class ImportEmbeddings:
    """Takes over bare .npy arrays, whose rows are in the order of a list of images."""

    files: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """The arrays; prompt.npy holds the prompts' embeddings."""
    list: Path
    """Text file with the image name of each row, a line each; or a CSV with image_name and perhaps prompt."""
    out: Path = Path("embeddings")
    """Folder to write."""

    def run(self) -> str:
        from .encode import embeddings

        return f"{self.out}: {embeddings.import_bare({file.stem: file for file in self.files}, self.list, self.out)}"


@dataclass
class ExportEmbeddings:
    """Writes the arrays of a folder as bare ones, with the list of their images."""

    folder: Annotated[Path, tyro.conf.Positional]
    """What embed wrote."""
    out: Path = Path("bare")
    """Folder to write."""

    def run(self) -> str:
        from .encode import embeddings

        return f"{self.out}: {embeddings.export_bare(self.folder, self.out)}"


@dataclass
class Explain:
    """Says why `dedupe` kept or removed a prompt, and what it resembles."""

    prompt: Annotated[str, tyro.conf.Positional]
    """One of the prompts, or any other."""
    metadata: Path = field(default_factory=lambda: folders.Run(folders.default_run()).metadata)
    """What dedupe wrote."""
    threshold: float = 0.8
    """Its threshold, for prompts that it did not see."""
    fast: bool = False
    """Whether it embedded with --fast."""

    def run(self) -> str:
        from .dedupe import pictures, removed_path

        kept, removed = pictures.read(self.metadata, removed_path(self.metadata))
        return pictures.explain(self.prompt, kept, removed, self.threshold, self.fast)


@dataclass
class CheckSubmission:
    """Validates a submission file."""

    file: Annotated[Path, tyro.conf.Positional]
    """The submission CSV."""
    images: Path | None = None
    """Folder of the images that it must cover."""

    def run(self) -> str:
        from .infer import submission

        return f"{self.file}: valid, {submission.check(self.file, self.images)} images"


@dataclass
class Catalogue:
    """Lists the metadata CSVs of the catalogue, and how to rebuild those that are missing."""

    data: Path = Path("data_meta")
    """Folder of catalogue.csv and of the metadata CSVs."""

    def run(self) -> str:
        from .data import catalogue

        return catalogue.describe(catalogue.read(self.data))


SMALL = {
    **{"explain": Explain, "catalogue": Catalogue, "check-submission": CheckSubmission},
    **{"import-checkpoint": ImportCheckpoint, "import-embeddings": ImportEmbeddings},
    "export-embeddings": ExportEmbeddings,
}
"""The commands that are a call of one function; each `run` gives what to print."""


def usage() -> str:
    """Text of `--help`."""
    lines = ["usage: image-to-prompts <command> [--help] [--flag value ...]", "", "stages, in order:"]
    lines += [f"  {s.name:18}{s.does}" for s in STAGES]
    lines += ["", "besides:"] + [f"  {name:18}{text}" for name, text in EXTRA.items()]
    lines += ["", "Every stage has defaults inside the run's folder (--run, runs/default) and runs without flags after"]
    return "\n".join([*lines, "its predecessor. `image-to-prompts <command> --help` lists its flags and defaults."])


class Terminated(KeyboardInterrupt):
    """SIGTERM, by which schedulers end what they started; handled as Ctrl-C is."""


def main(arguments: list[str] | None = None) -> None:
    """Entry point; exits with 0, or with 2 and one line on standard error where the user can mend something."""
    words = sys.argv[1:] if arguments is None else arguments
    try:
        with _sigterm_raises():
            _dispatch(words)
        sys.stdout.flush()
    except BrokenPipeError:  # `... --help | head`; nobody reads on, also not what the interpreter flushes at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (Exception, KeyboardInterrupt) as error:
        said, code = _ending(error)
        if not said:
            raise
        sys.stderr.write(f"image-to-prompts: {said}\n")
        sys.exit(code)


def _ending(error: BaseException) -> tuple[str, int]:
    """What to say at the end and the exit code; "" of an error in the program."""
    for stop in causes(error):  # libraries may turn what interrupts them into an error of their own
        if isinstance(stop, KeyboardInterrupt):
            number = signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT
            return "stopped; the same command goes on from here", 128 + number
    return str(explained(error) or ""), EXIT_BAD_INPUT


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Lets SIGTERM end a stage as Ctrl-C does, which closes files and removes half-written ones."""

    def stop(*_: object) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _dispatch(words: list[str]) -> None:
    if not words or words[0] in ("-h", "--help"):
        sys.stdout.write(usage() + "\n")
    elif words[0] == "--version":
        sys.stdout.write(f"{__version__}\n")
    elif words[0] == "describe":
        found = _run_stage(words[0], words[1:])
        if rank_and_processes()[0] == 0:
            sys.stdout.writelines(f"{shown(one.path)}\t{one.prompt}\n" for one in found)
    elif words[0] in {s.name for s in STAGES}:
        _run_stage(words[0], words[1:])
    elif words[0] == "run":
        from .embedded import whole_run

        config = _parse(whole_run.Config, words[1:], "run", whole_run.Config())
        _set_up(config.quiet)
        sys.stdout.write(whole_run.run(config) + "\n")
    elif words[0] == "kaggle":
        _run_kaggle(words[1:])
    elif words[0] == "demo":
        from .describe import page

        config = _parse(page.Config, words[1:], words[0], page.Config(*_place(words)))
        _set_up(quiet=False)
        page.launch(config)
    elif words[0] in SMALL:
        config = _parse(SMALL[words[0]], words[1:], words[0])
        _set_up(quiet=True)
        sys.stdout.write(config.run() + "\n")
    else:
        known = [*(s.name for s in STAGES), *EXTRA]
        raise UserError(f"unknown command {words[0]!r}{_near(words[0], known)}; choose one of {', '.join(known)}")


def _run_stage(name: str, words: list[str]) -> Any:
    from . import profiles

    folder, profile = _place(words)
    default = profiles.default_config(name, folders.Run(folder), profile)
    config = _parse(type(default), words, name, default)
    _set_up(config.quiet)
    stage = sys.modules[type(config).__module__]
    folders.open_run(folder, profile)
    announce(name)
    return stage.run(config)


def _run_kaggle(words: list[str]) -> None:
    from .kaggle.commands import ACTIONS

    if words[:1] in (["-h"], ["--help"]):
        lines = [f"  {name:12}{(action.__doc__ or '').splitlines()[0]}" for name, action in ACTIONS.items()]
        sys.stdout.write("\n".join(["usage: image-to-prompts kaggle <command> [--help]", "", *lines]) + "\n")
        return
    if not words or words[0] not in ACTIONS:
        raise UserError(f"kaggle: give one of {', '.join(ACTIONS)}{_near(' '.join(words[:1]), ACTIONS)}")
    config = _parse(ACTIONS[words[0]], words[1:], f"kaggle {words[0]}")
    _set_up(quiet=False)
    sys.stdout.write(config.run() + "\n")


def _place(words: list[str]) -> tuple[Path, str]:
    """The run's folder and its profile."""
    folder = Path(_value_of("--run", words) or folders.default_run())
    return folder, folders.profile_of(folder, _value_of("--profile", words))


def _value_of(flag: str, words: list[str]) -> str | None:
    """Value of a flag, read before the parser runs because the other flags' defaults depend on it."""
    for word, following in zip_longest(words, words[1:]):
        if word == flag:
            return following
        if word.startswith(f"{flag}="):
            return word.partition("=")[2]
    return None


def _parse(config: type, words: list[str], command: str, default: Any = None) -> Any:
    """Parses flags with tyro; a parse error becomes one line."""
    options = {} if default is None else {"default": default}
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(
                config,
                prog=f"image-to-prompts {command}",
                args=words,
                **options,
            )
    except SystemExit as exit_:
        if exit_.code in (0, None):
            raise
        # tyro prints framed sections: a title, what is wrong, help.
        sections = re.split("[─-]{3,}", re.sub("[╭╮╰╯│|]", " ", said.getvalue()))
        text = " ".join([" ".join(s.split()) for s in sections if s.strip(" ─\n")][1:2])
        near = next((_near(word, _flags(config)) for word in words if word.startswith("--") and word in text), "")
        raise UserError(f"{command}: {text}{near}; see image-to-prompts {command} --help") from None


def _flags(config: type) -> list[str]:
    names = [f"--{field.name.replace('_', '-')}" for field in fields(config)]
    return [*names, *(f"--no{name[1:]}" for name in names)]


def _near(word: str, known: Iterable[str]) -> str:
    """A question about the known word that is most like an unknown one; "" if none is like it."""
    found = difflib.get_close_matches(word, list(known), 1)
    return f"; did you mean {found[0]}?" if found else ""


def _set_up(quiet: bool) -> None:
    progress.set_quiet(quiet)
    progress.show_log(quiet)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # else each model tells of weights that it does not use
    if quiet or not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TQDM_DISABLE", "1")


if __name__ == "__main__":
    main()
