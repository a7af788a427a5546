"""The command line: one table of commands, over tyro's subcommands.

The flags of most commands are the fields of a `Config`, which the function `run` of its module takes; those of the
small ones here are the arguments of a function. Only the module of the command that was asked for is loaded.
"""

import contextlib
import difflib
import functools
import inspect
import io
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import field, fields, make_dataclass, replace
from itertools import zip_longest
from pathlib import Path
from types import FunctionType
from typing import Annotated, Any, Union

import tyro

from . import __version__, pipeline
from .run import folders, progress
from .run.errors import UserError, causes, explained

STAGES = {stage.name for stage in pipeline.STAGES}
# Name: where it lies below this package, and what it does.
COMMANDS = {stage.name: (f"{stage.name}:Config", f"{stage.number} {stage.does}") for stage in pipeline.STAGES} | {
    "run": ("embedded.whole_run:Config", "the whole chain on the embedded profile; ends in a report and its scores"),
    "demo": ("describe.serve:Config", "a page in the browser: drop an image, edit its prompt, render it again"),
    "explain": ("cli:explain", "a prompt's nearest neighbours, and why dedupe kept or removed it"),
    "catalogue": ("cli:catalogue", "metadata CSVs by source, which are there, and how to rebuild the others"),
    "weights": ("downloads:Config", "lists the models, downloads their weights, checks those that are here"),
    "check-submission": ("cli:check_submission", "validates a submission file"),
    "import-checkpoint": ("cli:import_checkpoint", "converts the reference's .pt files into checkpoint folders"),
    "kaggle": ("kaggle.commands:Action", "pushes and watches kernels, submits, makes datasets"),
}
# What version 0.1 had: until version 0.3 a line says what to take instead.
REPLACED = {
    ("ensemble", "--preset"): "give --batch-size 256 --learning-rate 1e-3 for 43k and 93k (10k is the default)",
    ("ensemble", "--attention"): "for the earlier project's network: python tools/earlier_ensemble.py train",
    ("import-checkpoint", "--ensemble"): "python tools/earlier_ensemble.py import-checkpoint FILE --out DIR",
    ("kaggle", "output"): "kaggle kernels output OWNER/KERNEL -p DIR, of the kaggle package itself, downloads it",
    ("import-embeddings",): "python tools/earlier_ensemble.py import-embeddings FILE... --images LIST --out DIR",
    ("export-embeddings",): "python tools/earlier_ensemble.py export-embeddings DIR --out DIR",
}
ABOUT = """Recovers the prompt of a Stable Diffusion image. The numbered commands are the stages, in their order.

Every stage has defaults inside the run's folder (--run, runs/default) and runs without flags after its predecessor.
Only describe must be told the images."""
EXIT_BAD_INPUT = 2
NEAR = 0.7  # likeness of a word to a command, from 0 to 1, from which on it is suggested


def explain(
    prompt: tyro.conf.Positional[str], metadata: Path | None = None, threshold: float = 0.8, fast: bool = False
) -> str:
    """Says why `dedupe` kept or removed a prompt, and what it resembles.

    Args:
        prompt: One of the prompts, or any other.
        metadata: What dedupe wrote; left out: that of the run.
        threshold: Its threshold, for prompts that it did not see.
        fast: Whether it embedded with --fast.
    """
    from .dedupe import pictures, removed_path

    path = metadata or folders.Run(folders.default_run()).metadata
    return pictures.explain(prompt, *pictures.read(path, removed_path(path)), threshold, fast)


def catalogue(data: Path = Path("data_meta")) -> str:
    """Lists the metadata CSVs of the catalogue, and how to rebuild those that are missing.

    Args:
        data: Folder of catalogue.csv and of the metadata CSVs.
    """
    from .data import catalogue

    return catalogue.describe(catalogue.read(data))


def check_submission(file: tyro.conf.Positional[Path], images: Path | None = None) -> str:
    """Validates a submission file.

    Args:
        file: The submission CSV.
        images: Folder of the images that it must cover.
    """
    from .infer import submission

    return f"{file}: valid, {submission.check(file, images)} images"


def import_checkpoint(
    file: tyro.conf.Positional[Path],
    out: Path = Path("checkpoints/imported"),
    backbone: str = "open_clip:convnext_xxlarge",
    image_size: int = 512,
) -> str:
    """Converts a .pt file of the reference into a checkpoint folder.

    Args:
        file: State dict of an image tower and a linear layer to 384.
        out: Checkpoint folder to write.
        backbone: Backbone it was trained with.
        image_size: Side of the input in px.
    """
    from .models import backbones, checkpoints

    checkpoints.import_reference(file, backbones.describe(backbone, image_size), out)
    return f"{file}: imported to {out}"


class Terminated(KeyboardInterrupt):
    """SIGTERM, by which schedulers end what they started; handled as Ctrl-C is."""


def main(arguments: list[str] | None = None) -> None:
    """Entry point; exits with 0, or with 2 and one line on standard error where the user can mend something."""
    words = sys.argv[1:] if arguments is None else arguments
    try:
        with _sigterm_raises():
            text = _run(words)
            sys.stdout.write(f"{text}\n" if text else "")
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
            return "stopped; run the same command again to continue", 128 + number
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


def _run(words: list[str]) -> str:
    """Runs a command; returns what to print."""
    if words == ["--version"]:
        return __version__
    name, found = words[0] if words else "--help", parse(words)
    set_up(getattr(found, "quiet", isinstance(found, functools.partial)))
    if isinstance(found, functools.partial):
        return found()
    if name == "kaggle":
        return found.run()
    module = sys.modules[type(found).__module__]
    if name == "describe":  # leaves no folder of a run where there is none
        pipeline.announce(name)
        module.run(found, None if found.out else lambda some: progress.say(module.printed(some)))
        return ""
    if name == "finetune" and (found.dry_run or found.recipe == module.recipes.LIST):
        return str(module.answer(found))
    if name in STAGES:
        folders.open_run(found.run, found.profile)
        pipeline.announce(name)
    result = module.run(found)
    return result if isinstance(result, str) else ""


def parse(words: list[str]) -> Any:
    """The settings that a command line asks for: a `Config`, or what does the work of a small command when called.

    Raises:
        UserError: If a word is not known or a value does not fit.
    """
    name = words[0] if words else "--help"
    words = [word.replace("--recipe.", "--", 1) if word.startswith("--recipe.") else word for word in words]
    for old, instead in REPLACED.items():
        if name == old[0] and {*old[1:]} <= {word.partition("=")[0] for word in words}:
            raise UserError(f"{' '.join(old)}: was removed; {instead}")
    _check_known(name, COMMANDS)
    if name == "kaggle" and words[1:]:
        _check_known(words[1], pipeline.load("kaggle.commands:ACTIONS"))
    forms: Any = Union[tuple(_form(one, words if one == name else []) for one in COMMANDS)]  # noqa: UP007
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            found = tyro.cli(forms, prog="image-to-prompts", description=ABOUT, args=words or ["--help"])
    except SystemExit as exit_:
        if exit_.code in (0, None):
            raise
        # A frame with a title in its first line; of the frame itself no part has letters.
        framed = [word for line in said.getvalue().splitlines()[1:] for word in line.split()]
        raise UserError(" ".join(word for word in framed if any(map(str.isalnum, word)))) from None
    return found.settings() if hasattr(found, "settings") else found


def _check_known(word: str, known: Iterable[str]) -> None:
    if word not in known and not word.startswith("-"):
        near = [f"; did you mean {one}?" for one in difflib.get_close_matches(word, known, 1, NEAR)]
        raise UserError(f"unknown command {word!r}{''.join(near)}; choose one of {', '.join(known)}")


def _place(words: list[str]) -> tuple[Path, str]:
    """The run's folder and its profile, on which the other flags' defaults depend."""
    folder = Path(_value_of("--run", words) or folders.default_run())
    return folder, folders.profile_of(folder, _value_of("--profile", words))


def _form(name: str, words: list[str]) -> Any:
    """A command as tyro takes it; without its words, where another one was asked for, its name and text alone."""

    def other() -> None: ...

    place, other.__doc__ = COMMANDS[name]
    if not words:
        return Annotated[other, tyro.conf.subcommand(name)]
    form = pipeline.load(place)
    if isinstance(form, FunctionType):
        return Annotated[_later(form), tyro.conf.subcommand(name)]
    if name in STAGES:
        from . import profiles

        folder, profile = _place(words)
        deciding = profiles.DECIDING if name == "finetune" else ()
        chosen = {one: value for one in deciding if (value := _value_of(f"--{one}", words))}
        default = profiles.default_config(name, folders.Run(folder), profile, **chosen)
        return Annotated[_grouped(name, default), tyro.conf.OmitArgPrefixes, tyro.conf.subcommand(name)]
    if name == "demo":
        return Annotated[form, tyro.conf.subcommand(name, default=form(*_place(words)))]
    return Annotated[form, tyro.conf.subcommand(name)]


def _grouped(name: str, default: Any) -> Any:
    """The settings of a stage as tyro takes them: a group for each class that they are made of, in that order."""

    def settings(self: Any) -> Any:
        parts = [getattr(self, one.name) for one in fields(self)]
        return replace(default, **{one.name: getattr(part, one.name) for part in parts for one in fields(part)})

    groups: list[Any] = []
    for base in filter(inspect.get_annotations, type(default).__mro__):
        part = functools.partial(base, **{one.name: getattr(default, one.name) for one in fields(base)})
        groups.append((base.__name__.removesuffix("Config").lower(), base, field(default_factory=part)))
    form: Any = make_dataclass(name, groups, namespace={"__doc__": type(default).__doc__, "settings": settings})
    return form


def _later(function: Callable[..., str]) -> Callable[..., Callable[[], str]]:
    """The same function, but what it does is done when its result is called: after parsing."""

    @functools.wraps(function)
    def prepared(*arguments: Any, **named: Any) -> Callable[[], str]:
        return functools.partial(function, *arguments, **named)

    return prepared


def _value_of(flag: str, words: list[str]) -> str | None:
    """Value of a flag, read before the parser runs because the other flags' defaults depend on it."""
    for word, following in zip_longest(words, words[1:]):
        if word == flag:
            return following
        if word.startswith(f"{flag}="):
            return word.partition("=")[2]
    return None


def set_up(quiet: bool) -> None:
    """Sends the log to standard error, and keeps libraries from saying what nobody asked for."""
    progress.set_quiet(quiet)
    progress.show_log(quiet)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # else each model warns about weights that it does not use
    if quiet or not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TQDM_DISABLE", "1")
