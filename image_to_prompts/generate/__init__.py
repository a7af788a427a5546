"""Stage 1, generate: writes new prompts, with MagicPrompt or with the embedded grammar.

    image-to-prompts generate --source magicprompt --count 1000 --out prompts/x.csv

A prompt depends on the seed and its index alone; asking for more later keeps the ones already written.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pandas as pd

from .. import metadata
from ..errors import UserError
from ..files import Stamp, append_line, read_journal
from ..profiles import StageConfig
from ..progress import progress

log = logging.getLogger(__name__)


@dataclass
class Config(StageConfig):
    """Writes new prompts with MagicPrompt (GPT-2) or with the embedded grammar."""

    source: Literal["grammar", "magicprompt"] = "grammar"
    """Who writes the prompts."""
    count: int = 3800
    """How many prompts to write, before deduplication."""
    seed: int = 0
    """Seed of the whole set; prompt i depends on (seed, i)."""
    out: Path = Path("prompts/generated.csv")
    """CSV to write: image_name, prompt, seed, source."""
    weights: Path | None = None
    """Folder of the MagicPrompt weights; left out: Kaggle input, then hub."""
    batch_size: int = 64
    """Prompts that the language model writes at once."""


def generate(config: Config, start: int = 0) -> Iterator[list[str]]:
    """Yields the prompts from index `start` on, in blocks of `config.batch_size`; "" where a prompt came out empty."""
    from . import grammar

    if config.source == "magicprompt":
        from . import magicprompt

        model, tokenizer = magicprompt.load(config.weights)
    for first in range(start, config.count, config.batch_size):
        indices = list(range(first, min(first + config.batch_size, config.count)))
        if config.source == "magicprompt":
            yield magicprompt.sample(model, tokenizer, config.seed, indices)
        else:
            yield [grammar.prompt(config.seed, index) for index in indices]


def run(config: Config) -> pd.DataFrame:
    """Runs the stage.

    Returns:
        The prompts as written to `config.out`; empty and exactly repeated ones are left out.

    Raises:
        UserError: On bad settings or missing weights.
    """
    if config.count < 1 or config.batch_size < 1:
        raise UserError(f"--count {config.count}, --batch-size {config.batch_size}: both must be at least 1")
    stamp = Stamp(config.out.with_name(f".{config.out.stem}.done"), config.settings("out"))
    if stamp.is_current():
        log.info("%s is up to date", config.out)
        return metadata.read(config.out)
    journal = stamp.work_folder("generate") / "prompts.jsonl"
    written = [record["prompts"] for record in read_journal(journal)]
    done = sum(map(len, written))
    blocks = range(done, config.count, config.batch_size)
    for block, _ in zip(generate(config, done), progress(blocks, "generate prompts"), strict=True):
        append_line(journal, {"prompts": block})
        written.append(block)
    prompts = dict.fromkeys(prompt for block in written for prompt in block if prompt)
    frame = metadata.with_keys(pd.DataFrame({"prompt": list(prompts), "source": config.source}), config.out)
    metadata.write_table(config.out, frame)
    stamp.write([config.out])
    journal.unlink()
    journal.parent.rmdir()
    log.info("%d of %d prompts are distinct", len(frame), config.count)
    return frame
