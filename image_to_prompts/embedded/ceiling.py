"""How much of a prompt an embedded scene shows: the highest score that a model of its pictures can reach."""

import random
from collections.abc import Sequence

import numpy as np

from ..models import metrics, text_encoder
from . import grammar

DRAWS = 16


def ceiling_score(prompts: Sequence[str], targets: np.ndarray) -> float:
    """Score of an oracle that knows all that an embedded scene shows and nothing else.

    It reads the scene from the prompt as the renderer does, says it again in `DRAWS` ways of the grammar with
    random undrawn phrases, and predicts the mean embedding.

    Args:
        prompts: Prompts of the embedded grammar.
        targets: float32 (n, 384), their embeddings.
    """
    said = [
        grammar.write(grammar.parse(prompt), random.Random(f"ceiling {prompt} {draw}"))
        for prompt in prompts
        for draw in range(DRAWS)
    ]
    vectors = text_encoder.encode(said).reshape(len(prompts), DRAWS, -1)
    return metrics.mean_cosine(vectors.mean(1), targets)


def skill(score: float, constant: float, ceiling: float) -> float:
    """(score - constant) / (ceiling - constant): 0 knows nothing, 1 all that the picture shows."""
    return (score - constant) / (ceiling - constant)
