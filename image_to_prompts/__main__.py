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
from dataclasses import dataclass, fields, replace
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any

import tyro

from . import __version__, progress, workspace
from .devices import rank_and_processes
from .errors import UserError, causes, explained
from .files import shown
from .stages import STAGES

EXTRA = {
    "run": "the whole chain on the embedded profile, ending in a report and one line of scores",
    "explain": "a prompt's nearest neighbours, and why dedupe kept or removed it: explain PROMPT",
    "demo": "a page in the browser: drop an image, edit its prompt, render it again",
    "compare": "what each embedding, their ridge regression and both kinds of attention score, over several seeds",
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


@dataclass
class ImportEmbeddings:
    """Takes over bare .npy arrays, whose rows are in the order of a list of images."""

    files: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """The arrays; prompt.npy holds the prompts' embeddings."""
    list: Path
    """Text file with the image name of each row, a line each; or a CSV with image_name and perhaps prompt."""
    out: Path = Path("embeddings")
    """Folder to write."""


@dataclass
class ExportEmbeddings:
    """Writes the arrays of a folder as bare ones, with the list of their images."""

    folder: Annotated[Path, tyro.conf.Positional]
    """What embed wrote."""
    out: Path = Path("bare")
    """Folder to write."""


@dataclass
class Explain:
    """Says why `dedupe` kept or removed a prompt, and what it resembles."""

    prompt: Annotated[str, tyro.conf.Positional]
    """One of the prompts, or any other."""
    metadata: Path = Path("data_meta/prompts.csv")
    """What dedupe wrote."""
    threshold: float = 0.8
    """Its threshold, for prompts that it did not see."""
    fast: bool = False
    """Whether it embedded with --fast."""


@dataclass
class CheckSubmission:
    """Validates a submission file."""

    file: Annotated[Path, tyro.conf.Positional]
    """The submission CSV."""
    images: Path | None = None
    """Folder of the images that it must cover."""


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
        from . import chain

        config = _parse(chain.Config, words[1:], "run", chain.Config())
        _set_up(config.quiet)
        sys.stdout.write(chain.run(config) + "\n")
    elif words[0] == "kaggle":
        _run_kaggle(words[1:])
    elif words[0] == "explain":
        from .dedupe import look, removed_path

        fate = Explain("", workspace.Run(workspace.default_run()).metadata)
        config = _parse(Explain, words[1:], words[0], replace(fate, prompt=tyro.MISSING))
        _set_up(quiet=True)
        kept, removed = look.read(config.metadata, removed_path(config.metadata))
        sys.stdout.write(look.explain(config.prompt, kept, removed, config.threshold, config.fast) + "\n")
    elif words[0] == "demo":
        from . import demo

        folder = Path(_value_of("--run", words) or workspace.default_run())
        profile = workspace.profile_of(folder, _value_of("--profile", words))
        config = _parse(demo.Config, words[1:], words[0], demo.Config(folder, profile))
        _set_up(quiet=False)
        demo.launch(config)
    elif words[0] == "check-submission":
        from . import submission

        config = _parse(CheckSubmission, words[1:], words[0])
        count = submission.check(config.file, config.images)
        sys.stdout.write(f"{config.file}: valid, {count} images\n")
    elif words[0] == "import-checkpoint":
        from . import backbones, ensemble, model

        config = _parse(ImportCheckpoint, words[1:], words[0])
        if config.ensemble:
            ensemble.import_published(config.file, config.out)
        else:
            model.import_reference(config.file, backbones.describe(config.backbone, config.image_size), config.out)
        sys.stdout.write(f"{config.file}: imported to {config.out}\n")
    elif words[0] == "compare":
        from . import compare

        config = _parse(
            compare.Config, words[1:], words[0], compare.Config(workspace.Run(workspace.default_run()).embeddings)
        )
        _set_up(config.quiet)
        sys.stdout.write(compare.summary(compare.run(config)).to_string() + "\n")
    elif words[0] == "catalogue":
        from . import catalogue

        config = _parse(catalogue.Config, words[1:], words[0])
        sys.stdout.write(catalogue.describe(catalogue.read(config.data)) + "\n")
    elif words[0] == "import-embeddings":
        from . import embeddings

        config = _parse(ImportEmbeddings, words[1:], words[0])
        shapes = embeddings.import_bare({file.stem: file for file in config.files}, config.list, config.out)
        sys.stdout.write(f"{config.out}: {shapes}\n")
    elif words[0] == "export-embeddings":
        from . import embeddings

        config = _parse(ExportEmbeddings, words[1:], words[0])
        sys.stdout.write(f"{config.out}: {embeddings.export_bare(config.folder, config.out)}\n")
    else:
        known = [*(s.name for s in STAGES), *EXTRA]
        raise UserError(f"unknown command {words[0]!r}{_near(words[0], known)}; choose one of {', '.join(known)}")


def _run_stage(name: str, words: list[str]) -> Any:
    from . import profiles

    folder = Path(_value_of("--run", words) or workspace.default_run())
    profile = workspace.profile_of(folder, _value_of("--profile", words))
    default = profiles.default_config(name, workspace.Run(folder), profile)
    config = _parse(type(default), words, name, default)
    _set_up(config.quiet)
    stage = sys.modules[type(config).__module__]
    workspace.open_run(folder, profile)
    progress.heading(name)
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
