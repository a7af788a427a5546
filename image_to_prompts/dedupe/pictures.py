"""Pictures and tables by which a person can judge a threshold, and the fate of one prompt."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from ..data import metadata
from ..models import text_encoder
from ..run.files import atomic_path
from .result import Result, normalised

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HIGHEST, STEP = 0.95, 0.025  # of the thresholds that the curve shows


def curve(result: Result) -> pd.DataFrame:
    """How many rows each threshold keeps: `threshold,kept`, from the least that the known pairs reach."""
    lowest = result.floor if result.pairs is not None else result.threshold
    steps = np.arange(lowest, HIGHEST + STEP / 2, STEP) if result.pairs is not None else [lowest]
    thresholds = np.maximum(np.round(steps, 3), lowest)
    return pd.DataFrame({"threshold": thresholds, "kept": [len(result.at(value).kept_rows) for value in thresholds]})


def borderline(result: Result, count: int = 5) -> pd.DataFrame:
    """Pairs just below and just above the threshold: `similarity,prompt,other`, the least alike first.

    Args:
        result: With `pairs`; without, the table is empty.
        count: Pairs on either side.
    """
    if result.pairs is None:
        return pd.DataFrame(columns=["similarity", "prompt", "other"])
    order = np.argsort(result.pairs.cosine, kind="stable")
    middle = np.searchsorted(result.pairs.cosine[order], np.float32(result.threshold))
    chosen = order[max(0, middle - count) : middle + count]
    prompts = result.frame["prompt"].to_numpy()[result.first]
    return pd.DataFrame(
        {
            "similarity": result.pairs.cosine[chosen].round(4),
            "prompt": prompts[result.pairs.later[chosen]],
            "other": prompts[result.pairs.earlier[chosen]],
        }
    )


def figure(result: Result) -> Figure:
    """The nearest neighbours' similarities with the threshold, and what each threshold keeps."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(10, 3.2), layout="constrained")
    left, right = drawn.subplots(1, 2)
    left.hist(result.nearest, np.linspace(0, 1, 51))
    left.set(xlabel="cosine to the nearest other prompt", ylabel=f"of {len(result.nearest)} prompts")
    table = curve(result)
    right.plot(table["threshold"], table["kept"] / (len(result.frame) - result.fixed), marker="o", markersize=3)
    right.set(xlabel="threshold", ylabel="share kept")
    for axes in (left, right):
        axes.axvline(result.threshold, color="grey", linestyle="--")
    return drawn


def save(result: Result, path: Path) -> None:
    """Writes `figure` as PNG."""
    with atomic_path(path) as part:
        figure(result).savefig(part, format="png", dpi=110, metadata={"Software": None})


def explain(
    prompt: str, kept: pd.DataFrame, removed: pd.DataFrame, threshold: float, fast: bool = False, count: int = 8
) -> str:
    """A prompt's fate and its neighbours, as text.

    Args:
        prompt: One of the rows, or any other.
        kept: The stage's metadata.
        removed: What it removed.
        threshold: Least cosine at which a row counts as a copy.
        fast: Whether the rows were embedded in half precision.
        count: Neighbours to name.
    """
    standing = [*dict.fromkeys([*kept["prompt"], *removed["kept_prompt"]])]  # those of --against, too
    texts = [*standing, *removed["prompt"]]
    vectors = text_encoder.encode([prompt, *texts], fast=fast)
    cosines = vectors[1:] @ vectors[0]
    key = normalised(prompt)
    same = removed[[normalised(text) == key for text in removed["prompt"]]]
    if any(normalised(text) == key for text in kept["prompt"]):
        fate = "kept"
        if len(same):
            fate += f"; {len(same)} more of this text removed"
    elif len(same):
        row = same.iloc[0]
        fate = f"removed ({row['reason']}, {float(row['similarity']):.4f}) because of row {row['kept_row']} of "
        fate += f"{row['kept_file']}: {row['kept_prompt']}"
    else:
        near = cosines[: len(standing)].max(initial=-1)
        fate = f"not among the rows; would be {'removed' if near >= threshold else 'kept'}: nearest kept row {near:.4f}"
    lines = [fate, "", "cosine   fate     prompt"]
    others = (number for number in np.argsort(-cosines, kind="stable") if normalised(texts[number]) != key)
    for number in islice(others, count):
        what = "kept   " if number < len(standing) else "removed"
        lines.append(f"{cosines[number]:.4f}   {what}  {texts[number]}")
    return "\n".join(lines)


def read(out: Path, removed: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The stage's two files; what was removed may be nothing.

    Raises:
        UserError: If a file is missing or damaged.
    """
    kept = metadata.read(out)
    names = ("prompt", "kept_prompt", "similarity", "reason", "kept_file", "kept_row")
    some = removed.is_file() and not metadata.header_alone(removed)
    return kept, metadata.read_table(removed, names) if some else pd.DataFrame(columns=names)
