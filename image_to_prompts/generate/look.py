"""Tables and pictures of sources: what the rules did, how long prompts are, how much sources overlap."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from ..models import text_encoder

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST = 20_000  # prompts of a source that are compared


def by_rule(reports: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Prompts that each rule changed and dropped, of several sources side by side.

    Args:
        reports: What `collect` returned, by source.

    Returns:
        One row a rule; two columns a source.
    """
    tables = {name: report.set_index("rule")[["changed", "dropped"]] for name, report in reports.items()}
    return pd.concat(tables, axis=1, sort=False).astype("Int64")


def examples(report: pd.DataFrame) -> pd.DataFrame:
    """Rule, text before and text after of the examples in a report."""
    examples = zip(report["rule"], report["examples"], strict=True)
    rows = [(rule, before, after or "(dropped)") for rule, pairs in examples for before, after in pairs]
    return pd.DataFrame(rows, columns=["rule", "before", "after"])


def overlap(prompts: Mapping[str, list[str]], threshold: float = 0.8) -> pd.DataFrame:
    """Share of the prompts of each source (rows) that reach a cosine with a prompt of each other one (columns).

    Args:
        prompts: By source, none empty; of more than 20,000 every second, third, ... is taken.
        threshold: Least cosine.
    """
    from ..search.near_pairs import near

    some = {name: texts[:: -(-len(texts) // MOST)] for name, texts in prompts.items()}
    vectors = {name: text_encoder.encode(texts) for name, texts in some.items()}
    shares = {
        other: {name: 1.0 if name == other else near(vectors[name], vectors[other], threshold).mean() for name in some}
        for other in some
    }
    return pd.DataFrame(shares)


def plot_lengths(prompts: Mapping[str, list[str]], axes: Axes) -> None:
    """Draws a histogram of words a prompt, a line a source."""
    bins = np.arange(0, 81, 2)
    for name, texts in prompts.items():
        words = np.clip([len(text.split()) for text in texts], 0, bins[-1] - 1)
        axes.hist(words, bins, weights=np.full(len(words), 1 / len(words)), histtype="step", label=name)
    axes.set(xlabel="words in a prompt (80: or more)", ylabel="share of prompts")
    axes.legend()
