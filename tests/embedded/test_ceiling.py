"""What an embedded scene shows of its prompt."""

import pytest

from image_to_prompts.embedded import grammar
from image_to_prompts.embedded.ceiling import ceiling_score, skill
from image_to_prompts.models import metrics, text_encoder


def test_skill_is_0_for_the_constant_and_1_for_the_ceiling():
    assert skill(0.4, 0.4, 0.8) == 0 and skill(0.8, 0.4, 0.8) == pytest.approx(1)
    assert skill(0.5, 0.4, 0.8) == pytest.approx(0.25)


def test_the_ceiling_knows_what_is_drawn():
    prompts = [grammar.prompt(0, index) for index in range(12)]
    targets = text_encoder.encode(prompts)
    ceiling = ceiling_score(prompts, targets)
    assert metrics.constant_score(targets.mean(0), targets) + 0.2 < ceiling < 1
    assert ceiling == ceiling_score(prompts, targets)
    assert ceiling_score(prompts[::-1], targets) < ceiling - 0.2
