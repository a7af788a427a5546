"""Which images a checkpoint knows."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from image_to_prompts.models import backbones, doubt, freezing, metrics
from image_to_prompts.models.doubt import Doubt, best_pull, pulled
from image_to_prompts.run.errors import UserError


def cloud(seed, count=400, shift=0.0, width=30):
    """Points near a plane of five directions, away from it by `shift`."""
    rng = np.random.default_rng(seed)
    plane = np.random.default_rng(0).normal(size=(5, width))
    away = np.random.default_rng(1).normal(size=width)
    points = rng.normal(size=(count, 5)) @ plane + 0.1 * rng.normal(size=(count, width)) + shift * away
    return points.astype(np.float32)


def test_what_lies_off_the_known_is_strange():
    own = Doubt.fit(cloud(2), cloud(3))
    assert abs((own.strangeness(cloud(3)) <= 1).mean() - 0.98) < 0.01  # of the validating images
    assert (own.strangeness(cloud(4)) <= 1).mean() > 0.94
    assert (own.strangeness(cloud(5, shift=1.0)) > 1).all()
    assert own.strangeness(cloud(5, shift=2.0)).mean() > own.strangeness(cloud(5, shift=1.0)).mean()
    nan = np.full((1, 30), np.nan, np.float32)
    assert np.isnan(own.strangeness(nan)).all()


def test_an_image_is_as_strange_in_any_company():
    own, points = Doubt.fit(cloud(2), cloud(3)), cloud(6, 150)
    whole = own.strangeness(points)
    alone = np.concatenate([own.strangeness(points[i : i + 1]) for i in range(20)])
    assert whole[:20].tobytes() == alone.tobytes()
    assert whole[::-1].tobytes() == own.strangeness(points[::-1].copy()).tobytes()


def test_it_is_the_same_again_and_read_back(tmp_path):
    one, other = Doubt.fit(cloud(2), cloud(3)), Doubt.fit(cloud(2), cloud(3))
    one.save(tmp_path)
    read = doubt.load(tmp_path)
    points = cloud(7)
    for found in (other, read):
        np.testing.assert_array_equal(one.strangeness(points), found.strangeness(points))
    assert doubt.load(tmp_path / "none") is None
    (tmp_path / doubt.FILE).write_bytes((tmp_path / doubt.FILE).read_bytes()[:500])
    with pytest.raises(UserError, match=r"damaged.*train it again"):
        doubt.load(tmp_path)


def test_few_images_and_constant_statistics_do_not_break_it():
    known, valid = cloud(2, 6), cloud(3, 3)
    known[:, 0] = valid[:, 0] = 7
    own = Doubt.fit(known, valid)
    assert np.isfinite(own.strangeness(cloud(4))).all()


@given(st.floats(1, 3), st.floats(0.1, 2), st.lists(st.floats(0, 6), min_size=2, max_size=20))
def test_the_stranger_the_nearer_to_the_mean(start, reach, strange):
    rng = np.random.default_rng(0)
    mean, vector = metrics.unit(rng.normal(size=(2, 384)))
    strange = np.sort(np.array(strange, np.float32))
    found = pulled(np.tile(vector, (len(strange), 1)), mean, strange, (start, reach))
    nearness = found @ mean
    assert (np.diff(nearness) >= -1e-5).all()
    assert np.allclose(found[strange <= start], vector, atol=1e-6)
    assert np.allclose(found[strange >= start + reach], mean, atol=1e-6)


def test_nothing_is_pulled_where_nobody_can_tell_or_nothing_is_gained():
    rng = np.random.default_rng(0)
    vectors, mean = metrics.unit(rng.normal(size=(40, 384))), metrics.unit(rng.normal(size=(1, 384)))[0]
    unknown = np.full(40, np.nan, np.float32)
    np.testing.assert_allclose(pulled(vectors, mean, unknown, (1.0, 0.5)), vectors, atol=1e-6)
    strange = np.linspace(0, 4, 40).astype(np.float32)
    np.testing.assert_array_equal(pulled(vectors, mean, strange, (1.0, 0.0)), vectors)
    assert best_pull(vectors, mean, strange, vectors) == (1.0, 0.0)
    wrong = np.where(strange[:, None] > 2, mean, vectors)  # the truth of strange images is the mean
    start, reach = best_pull(vectors, mean, strange, wrong)
    assert reach and 1.5 <= start <= 2


STAGES = {
    "timm:tf_efficientnet_lite0": ["blocks.0.0", "blocks.1.1", "blocks.2.1", "blocks.3.2", "blocks.4.2"],
    "timm:convnext_tiny": ["stages.0.blocks.2", "stages.1.blocks.2"],
    "open_clip:RN50": ["layer1.2", "layer2.3"],
    "open_clip:ViT-B-32": ["transformer.resblocks.1", "transformer.resblocks.2", "transformer.resblocks.4"],
}


@pytest.mark.parametrize("name", STAGES)
def test_the_stages_that_are_looked_at_stay_frozen(name):
    with torch.device("meta"):
        backbone = backbones.build(backbones.describe(name))
    names = {module: path for path, module in backbone.named_modules()}
    found = freezing.stages(backbone)
    assert [names[module] for module in found] == STAGES[name]
    trained = freezing.unfreeze(backbone)
    assert not [path for path in trained if path.startswith(tuple(f"{stage}." for stage in STAGES[name]))]


def test_stages_end_where_a_larger_part_trains():
    with torch.device("meta"):
        backbone = backbones.build(backbones.describe("timm:tf_efficientnet_lite0"))
    names = {module: path for path, module in backbone.named_modules()}
    stages = STAGES["timm:tf_efficientnet_lite0"]
    for first, expected in ((10, stages[:4]), (9, stages[:4]), (8, stages[:3]), (7, stages), (0, stages), (16, stages)):
        found = [names[module] for module in freezing.stages(backbone, first)]
        assert found == expected, first
        trained = freezing.unfreeze(backbone, first)
        if first > 7:
            assert not [path for path in trained if path.startswith(tuple(f"{stage}." for stage in found))]


def test_statistics_of_maps_and_of_tokens():
    module = nn.Identity()
    maps, tokens = torch.randn(2, 3, 4, 5), torch.randn(2, 7, 3)
    with doubt.looking([module]) as seen:
        module(maps)
        module(tokens)
    module(maps)  # nobody looks any more
    assert [tuple(one.shape) for one in seen] == [(2, 3)] * 4
    torch.testing.assert_close(seen[0], maps.mean((2, 3)))
    torch.testing.assert_close(seen[3], tokens.std(1))
