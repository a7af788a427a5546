"""Stage 1, generate: writes new prompts, with MagicPrompt or the embedded grammar, or collects them from a source.

    image-to-prompts generate --source magicprompt --count 1000 --out prompts/x.csv
    image-to-prompts generate --source diffusiondb --input metadata.parquet --out prompts/diffusiondb.csv

`collect` reads and cleans what others wrote. Of new prompts the following holds.

Candidate i depends on the seed and i alone. Empty candidates and exact repetitions are skipped until there are as
many prompts as were asked for; asking for more later keeps the ones already written.
"""

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import pandas as pd

from .. import pipeline
from ..data import metadata
from ..models import layouts, weights
from ..profiles import StageConfig
from ..run.bounds import Amount, NotNegative, Positive
from ..run.devices import gather, rank_and_processes
from ..run.errors import UserError
from ..run.progress import STOPPED, Deadline, Estimate, progress_to
from ..run.resume import Stamp, alone, append_line, read_journal

log = logging.getLogger(__name__)
# A source runs dry when fewer than LEAST_NEW of a window of candidates are new.
WINDOW, LEAST_NEW = 1000, 10
Sources = Literal[
    "diffusiondb", "diffusiondb-parts", "images", "captions-tsv", "laion-coco", "captions-json", "pairs", "table"
]


@dataclass
class Main:
    """What it writes."""

    source: Literal["grammar", "magicprompt", Sources] = "grammar"
    """What writes the prompts, or the format of --input: DiffusionDB's metadata or image parts, Conceptual Captions,
    LAION-COCO, COCO and VizWiz, folders of images with a table of their prompts (pairs), or any table (CSV, TSV, JSONL,
    JSON, Parquet, text)."""
    count: Positive = 3800
    """How many different prompts to write; a source gives all that it has."""
    seed: int = 0
    """Seed of the whole set; prompt i depends on (seed, i)."""
    out: Path = Path("prompts/generated.csv")
    """CSV to write: image_name, prompt, seed, source."""
    max_hours: Amount = 0.0
    """Stop writing new prompts before this process has run for so many hours; 0: no limit."""


@dataclass
class Writing:
    """How MagicPrompt writes."""

    weights: Path | None = None
    """Folder of the MagicPrompt weights; left out: see `image-to-prompts weights`."""
    batch_size: Positive = 256
    """Prompts that the language model writes at once; the prompts do not depend on it."""
    temperature: float = 1.0
    """Divides the language model's logits; below 1 the prompts are more alike."""
    top_k: int = 50
    """Draw from the k likeliest tokens; 0: all."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that make up this share of the probability."""
    starts: Path | None = None
    """Text file with one phrase a line to start prompts from, taken in turn (magicprompt)."""


@dataclass
class Collecting:
    """What is read of a source, and how it is cleaned."""

    input: tuple[str, ...] = ()
    """Files of a source, folders of DiffusionDB's parts, or hf://datasets/<owner>/<name>/<path>."""
    prompt_column: str = "prompt"
    """Column of the prompts in a table."""
    image_column: str = ""
    """Column of the images' names in a table, where each row is an image."""
    name: str = ""
    """What the column source says of collected prompts; left out: the name of the source."""
    rules: tuple[str, ...] = ()
    """Rules that clean collected prompts, in their order, or file.py:function; left out: those of the source."""
    limit: NotNegative = 0
    """Collect at most so many prompts; 0: all."""


@dataclass
class Config(Main, Writing, Collecting, StageConfig):
    """Writes new prompts with MagicPrompt (GPT-2) or the embedded grammar, or collects them from a public source."""


def read_starts(path: Path) -> tuple[str, ...]:
    """The phrases of a `--starts` file, blank lines left out.

    Raises:
        UserError: If the file is missing, not UTF-8, or holds no phrase.
    """
    try:
        phrases = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    except OSError as error:
        raise UserError(f"{path}: no such file; give --starts a text file with one phrase a line") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: bytes that are not UTF-8; save the file as UTF-8") from error
    if not phrases:
        raise UserError(f"{path}: no phrase in it; write one a line")
    return phrases


def candidates(config: Config, start: int = 0) -> Iterator[list[str]]:
    """Yields candidate prompts from index `start` on, without end, in blocks; "" where one came out empty.

    Under `accelerate launch` every process writes its share of each block and all of them get the whole block.
    """
    write = _writer(config)
    rank, processes = rank_and_processes()
    while True:
        block = range(start, start + min(config.batch_size, -(-config.count // processes)) * processes)
        yield gather(write(list(block[rank::processes])), len(block))
        start = block.stop


def _writer(config: Config) -> Callable[[list[int]], list[str]]:
    """What writes the candidates of given indices."""
    if config.source == "grammar":
        prompt = pipeline.embedded("prompt")
        return lambda indices: [prompt(config.seed, index) for index in indices]
    from . import magicprompt

    starts = read_starts(config.starts) if config.starts else ()
    sampling = magicprompt.Sampling(config.temperature, config.top_k, config.top_p, starts)
    model, tokenizer = magicprompt.load(config.weights)
    return lambda indices: magicprompt.sample(model, tokenizer, config.seed, indices, sampling)


class Distinct:
    """Takes candidates in order and keeps the first `count` different ones, or those there are."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.prompts: dict[str, None] = {}
        self.seen = 0
        self._new = 0
        self.dry = False

    @property
    def finished(self) -> bool:
        """Whether there are enough prompts, or no hope of more."""
        return self.dry or len(self.prompts) >= self.count

    def add(self, block: list[str]) -> None:
        """Takes a block of candidates; where windows end depends on their indices alone, not on the blocks."""
        for prompt in block:
            if self.finished:
                return
            self.seen += 1
            if prompt and prompt not in self.prompts:
                self.prompts[prompt] = None
                self._new += 1
            if self.seen % WINDOW == 0:
                self.dry, self._new = self._new < LEAST_NEW, 0


def _fill(config: Config, stamp: Stamp) -> Distinct:
    """Adds candidates to those of an earlier run until there are enough, or no time is left.

    After the first block the log says how long the rest will take.
    """
    journal = stamp.work_folder() / "prompts.jsonl"
    found = Distinct(config.count)
    done = 0
    kept = {record["start"]: record["prompts"] for record in read_journal(journal)}
    while prompts := kept.get(done):  # up to the first block that is missing
        found.add(prompts)
        done += len(prompts)
    if found.finished:
        return found
    begun, deadline = time.monotonic(), Deadline(config.max_hours)
    with progress_to(config.count, "generate prompts", len(found.prompts)) as advance:
        for number, block in enumerate(candidates(config, done)):
            if rank_and_processes()[0] == 0:
                append_line(journal, {"start": done, "prompts": block})
            before = len(found.prompts)
            found.add(block)
            done += len(block)
            new = len(found.prompts) - before
            advance(new)
            if found.finished or any(gather([deadline.passed()], rank_and_processes()[1])):
                break
            if not number and new:
                size = sum(len(prompt.encode()) + 1 for prompt in found.prompts) / len(found.prompts)
                left = config.count - len(found.prompts)
                log.info("%s", Estimate("prompts", config.count, left, (time.monotonic() - begun) / new, size))
    return found


def _stamp(config: Config) -> Stamp:
    if config.starts and config.source != "magicprompt":
        raise UserError("--starts needs --source magicprompt; the grammar knows no start phrases")
    if config.input or config.rules or config.limit or config.name:
        known = ", ".join(get_args(Sources))
        raise UserError(f"--input, --rules, --limit, --name: {config.source} writes new prompts; give --source {known}")
    inputs = [path for path in (config.starts,) if path]
    settings = config.settings("out", "batch_size", "starts", "max_hours", "image_column")
    if config.source == "magicprompt" and (config.weights or config.weights_dir):
        settings["weights"] = layouts.digest(weights.locate("magicprompt", config.weights))
    return Stamp(config.out.with_name(f".{config.out.stem}.done"), "generate", settings, inputs)


def _collect(config: Config) -> pd.DataFrame:
    from . import collect

    if not config.input:
        raise UserError(f"--source {config.source}: no input; give --input FILE [FILE ...]")
    if config.starts:
        raise UserError("--starts needs --source magicprompt; a source has its own prompts")
    if config.source not in ("table", "pairs") and (config.prompt_column != "prompt" or config.image_column):
        raise UserError(f"--prompt-column, --image-column: {config.source} has columns of its own; leave them out")
    if config.prompt_column == config.image_column:
        raise UserError(f"--image-column {config.image_column}: is the column of the prompts, too; give another")
    if rank_and_processes()[1] > 1:
        raise UserError(f"--source {config.source}: one process reads and cleans; start it without a launcher")
    with alone(config.out):
        return collect.collect(
            *(config.source, config.input, config.out, config.name),
            {config.prompt_column: "prompt", **({config.image_column: "image_name"} if config.image_column else {})},
            *(config.rules, config.limit),
        )


def run(config: Config) -> pd.DataFrame:
    """Runs the stage.

    Returns:
        The prompts as written to `config.out`: `config.count` different ones, or fewer, with a warning that says why,
        where the source repeats itself. Of collected ones, which may be many millions, what `collect.collect` returns.

    Raises:
        UserError: On bad settings or missing weights, or if the source wrote nothing.
    """
    if config.out.suffix.lower() != ".csv":
        raise UserError(f"--out {config.out}: must end in .csv")
    if config.source in get_args(Sources):
        return _collect(config)
    stamp = _stamp(config)
    with alone(config.out):
        return _write(config, stamp)


def _write(config: Config, stamp: Stamp) -> pd.DataFrame:
    """Writes new prompts until there are enough."""
    if stamp.is_current():
        log.info("%s is up to date", config.out)
        return metadata.read(config.out)
    stamp.claim([config.out])
    found = _fill(config, stamp)
    prompts = list(found.prompts)
    if not prompts:
        raise UserError(f"{config.source}: all of {found.seen} candidates came out empty; check the weights")
    frame = metadata.with_keys(pd.DataFrame({"prompt": prompts, "source": config.source}), config.out)
    if rank_and_processes()[0] == 0:
        metadata.write_table(config.out, frame)
        if found.finished:
            stamp.write([config.out])
        else:
            log.warning(STOPPED, config.max_hours)
    if found.dry:
        log.warning(
            "%s: %d prompts, not %d: fewer than %d of the last %d candidates were new; "
            "raise --temperature, --top-k or --top-p, or give other --starts",
            *(config.out, len(frame), config.count, LEAST_NEW, WINDOW),
        )
    log.info("%s: %d different prompts from %d candidates", config.out, len(frame), found.seen)
    return frame
