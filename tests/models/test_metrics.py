"""Scores, baselines and blends against plain arithmetic."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from image_to_prompts.models import metrics


def some(rows, width=6, seed=0):
    return np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)


def test_rows_are_scaled_to_length_one_and_zero_stays_zero():
    vectors = np.array([[3, 4], [0, 0], [-0.5, 0]], np.float64)
    found = metrics.unit(vectors)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, [[0.6, 0.8], [0, 0], [-1, 0]], atol=1e-7)
    np.testing.assert_allclose(metrics.unit(np.array([5.0, 0.0])), [1, 0])
    tiny = np.array([[1e-7, 0]], np.float32)
    np.testing.assert_allclose(metrics.unit(tiny), [[1, 0]])


def test_the_score_is_the_mean_cosine_whatever_the_lengths():
    one, other = np.array([[2.0, 0], [0, 3]]), np.array([[1.0, 1], [0, 0.1]])
    assert metrics.mean_cosine(one, other) == pytest.approx((np.sqrt(0.5) + 1) / 2)
    assert metrics.mean_cosine(one, -other) == pytest.approx(-(np.sqrt(0.5) + 1) / 2)
    assert metrics.constant_score(np.array([1.0, 0]), other) == pytest.approx((np.sqrt(0.5) + 0) / 2)


@pytest.mark.parametrize("k", [1, 2, 5, 40])
def test_neighbours_are_the_nearest_by_cosine_and_their_targets_are_averaged(k):
    train, asked, targets = some(30), 7 * some(4, seed=1), some(30, 9, seed=2)
    order = np.argsort(-metrics.unit(asked) @ metrics.unit(train).T, axis=1)[:, :k]
    found = metrics.nearest_mean(asked, train, targets, k)
    assert found.shape == (4, 9)
    np.testing.assert_allclose(found, targets[order].mean(1), atol=1e-5)


def test_the_best_number_of_neighbours_is_the_one_that_scores_best():
    """Groups of three alike: three neighbours average the noise of their targets, more mix in other groups."""
    rng = np.random.default_rng(0)
    centres, truth = np.eye(60, 60, dtype=np.float32), metrics.unit(rng.normal(size=(60, 32)))
    features = np.repeat(centres, 3, 0) + rng.normal(scale=0.01, size=(180, 60)).astype(np.float32)
    targets = np.repeat(truth, 3, 0) + rng.normal(scale=0.15, size=(180, 32)).astype(np.float32)
    assert metrics.best_k(centres, truth, features, targets) == 3
    scores = {k: metrics.mean_cosine(metrics.nearest_mean(centres, features, targets, k), truth) for k in (1, 3, 5)}
    assert scores[3] > max(scores[1], scores[5])


def test_ridge_finds_a_linear_map_and_its_bias():
    features, weight, bias = some(400, 5), some(5, 7, seed=3), np.arange(7)
    targets = (features @ weight + bias).astype(np.float32)
    found, middle = metrics.ridge(features + 100, targets)
    predicted = (features + 100) @ found + middle
    np.testing.assert_allclose(predicted.mean(0), targets.mean(0), atol=1e-3)
    assert metrics.mean_cosine(predicted, targets) > 0.999
    assert found.shape == (5, 7) and middle.shape == (7,)


def test_ridge_holds_noise_down(monkeypatch):
    """With more numbers than the rows can fix, a large penalty is chosen: better than the smallest on new rows."""
    features, fresh = some(40, 60), some(500, 60, seed=5)
    truth = some(60, 3, seed=1)
    targets = features @ truth + 8 * some(40, 3, seed=2)
    weight, bias = metrics.ridge(features, targets)
    with monkeypatch.context() as patch:
        patch.setattr(metrics, "PENALTIES", (0.0001,))
        loose, other = metrics.ridge(features, targets)
    assert np.linalg.norm(weight) < np.linalg.norm(loose)
    score = metrics.mean_cosine(fresh @ weight + bias, fresh @ truth)
    assert score > metrics.mean_cosine(fresh @ loose + other, fresh @ truth)


def test_ridge_is_the_textbooks_solution(monkeypatch):
    """For one penalty, relative to the mean feature variance; the same in blocks."""
    features, targets = some(50, 4) + 3, some(50, 2, seed=1) - 1
    monkeypatch.setattr(metrics, "PENALTIES", (10.0,))
    centred, middle = features - features.mean(0), targets - targets.mean(0)
    gram = (centred.T @ centred).astype(np.float64)
    expected = np.linalg.solve(gram + 10 * np.trace(gram) / 4 * np.eye(4), centred.T @ middle)
    for block in (8192, 7):
        monkeypatch.setattr(metrics, "RIDGE_BLOCK", block)
        weight, bias = metrics.ridge(features, targets)
        np.testing.assert_allclose(weight, expected, atol=1e-5)
        np.testing.assert_allclose(bias, targets.mean(0) - features.mean(0) @ expected, atol=1e-4)


def test_the_penalty_is_chosen_on_every_tenth_row(monkeypatch):
    """These rows alone follow another law: the penalty that suits them wins."""
    features = some(200, 3)
    targets = features @ some(3, 4, seed=1)
    targets[::10] = targets.mean(0) + 1e-3 * targets[::10]
    weight, _ = metrics.ridge(features, targets)
    plain, _ = metrics.ridge(features, features @ some(3, 4, seed=1))
    assert np.linalg.norm(weight) < 0.5 * np.linalg.norm(plain)


def test_a_blend_weighs_directions_not_lengths():
    one, other = np.array([[10.0, 0]]), np.array([[0, 0.1]])
    np.testing.assert_allclose(metrics.blend([one, other], [1, 1]), [[np.sqrt(0.5)] * 2], atol=1e-6)
    np.testing.assert_allclose(metrics.blend([one, other], [3, 4]), [[0.6, 0.8]], atol=1e-6)
    np.testing.assert_allclose(metrics.blend([one, other], [1, 0]), [[1, 0]], atol=1e-6)
    with pytest.raises(ValueError, match="longer"):
        metrics.blend([one, other], [1])


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.lists(st.floats(0.1, 3), min_size=2, max_size=4))
def test_fitted_weights_are_a_blend_that_no_single_model_surpasses(seed, noises):
    truth = some(60, 8, seed)
    guesses = [truth + noise * some(60, 8, seed + 1 + number) for number, noise in enumerate(noises)]
    weights = metrics.fit_weights(guesses, truth)
    assert weights.min() >= 0 and weights.sum() == pytest.approx(1)
    blended = metrics.mean_cosine(metrics.blend(guesses, weights), truth)
    assert blended >= max(metrics.mean_cosine(guess, truth) for guess in guesses) - 1e-6
    around = [np.abs(weights + 0.05 * step) for step in some(20, len(weights), seed)]
    assert blended >= max(metrics.mean_cosine(metrics.blend(guesses, other), truth) for other in around) - 1e-3


@pytest.mark.parametrize("noise", [0.3, 1.0, 2.0])
def test_fitted_weights_are_the_best_of_all(noise):
    truth = some(300, 8)
    guesses = [truth + 0.8 * some(300, 8, 1), truth + noise * some(300, 8, 2)]
    scores = [metrics.mean_cosine(metrics.blend(guesses, [w, 1 - w]), truth) for w in np.linspace(0, 1, 101)]
    weights = metrics.fit_weights(guesses, truth)
    assert weights[0] == pytest.approx(np.argmax(scores) / 100, abs=0.011)
    assert metrics.mean_cosine(metrics.blend(guesses, weights), truth) >= max(scores) - 1e-6


def test_no_weight_is_negative():
    """What one model knows of the other's mistakes would help if it were taken away; a blend only adds."""
    truth, mistakes = some(200, 8), some(200, 8, 1)
    weights = metrics.fit_weights([truth + mistakes, 0.1 * truth + mistakes], truth)
    np.testing.assert_allclose(weights, [1, 0], atol=1e-6)


def test_a_model_that_is_right_gets_all_the_weight():
    truth = some(50, 8)
    weights = metrics.fit_weights([some(50, 8, 1), truth, some(50, 8, 2)], truth)
    np.testing.assert_allclose(weights, [0, 1, 0], atol=0.02)


def test_the_interval_is_that_of_a_mean():
    cosines = np.random.default_rng(3).normal(0.6, 0.1, 400)
    low, high = metrics.bootstrap(cosines)
    assert low == pytest.approx(cosines.mean() - 1.96 * 0.1 / 20, abs=0.002)
    assert high == pytest.approx(cosines.mean() + 1.96 * 0.1 / 20, abs=0.002)
    assert (low, high) == metrics.bootstrap(cosines)
    assert metrics.bootstrap(np.full(5, 0.25)) == (0.25, 0.25)


def test_a_gap_is_what_a_classifier_can_tell_apart():
    rng = np.random.default_rng(0)
    mine, same, away = rng.normal(size=(40, 50)), rng.normal(size=(360, 50)), rng.normal(size=(30, 50)) + 3
    gap, likeness = metrics.domain_gap(mine, away)
    assert gap == 1 and likeness.shape == (40,) and likeness.max() < 0.5
    gap, likeness = metrics.domain_gap(mine, same)  # nine times as many of the others are no reason to be like them
    assert 0.35 < gap < 0.65 and 0.4 < likeness.mean() < 0.6
    assert likeness.min() > 0.2 and likeness.max() < 0.8  # nor is chance in many dimensions
    again = metrics.domain_gap(mine, same)
    assert again[0] == gap and np.array_equal(again[1], likeness)
    scales = np.array([1e-3] + [1e3] * 9)  # what tells them apart is the smallest of all
    small = np.eye(10)[0] * 4
    gap, _ = metrics.domain_gap(scales * rng.normal(size=(60, 10)), scales * (rng.normal(size=(60, 10)) + small))
    assert gap > 0.95
    assert [len(metrics.domain_gap(*few)[1]) for few in ((mine[:3], away), (mine, away[:3]))] == [3, 40]


@given(st.integers(0, 200))
def test_work_in_fixed_rows_sees_always_as_many_and_gives_each_its_own(rows):
    sizes = []

    def work(arrays):
        sizes.extend(len(array) for array in arrays)
        return arrays[0] + arrays[1][:, :1]

    if rows:
        one, other = some(rows), some(rows, 2, seed=1)
        np.testing.assert_array_equal(metrics.in_fixed_rows(work, [one, other]), one + other[:, :1])
        assert set(sizes) == {metrics.ROWS} and len(sizes) == 2 * -(-rows // metrics.ROWS)


class Rows:
    """Images of one number each; some cannot be read."""

    def __init__(self, values):
        self.values = values

    def __len__(self):
        return len(self.values)

    def __getitem__(self, row):
        return self.values[row], row

    @staticmethod
    def collate(items):
        good = [(value, row) for value, row in items if value is not None]
        return torch.tensor([[value] for value, _ in good]), torch.tensor([row for _, row in good])


def test_each_image_gets_its_own_features_and_a_broken_one_none():
    sizes = []

    def forward(batch):
        assert not batch.requires_grad and torch.is_inference_mode_enabled()
        sizes.append(len(batch))
        return torch.cat([batch, 2 * batch], 1)

    rows = Rows([1.0, None, 3.0, 4.0, 5.0, None])
    found = metrics.extract(forward, rows, 2, torch.device("cpu"), mixed=False)
    assert found.dtype == np.float32 and sizes == [1, 2, 1]
    np.testing.assert_array_equal(found[[0, 2, 3, 4]], [[1, 2], [3, 6], [4, 8], [5, 10]])
    assert np.isnan(found[[1, 5]]).all()
    some_ = metrics.extract(forward, rows, 4, torch.device("cpu"), only=np.array([4, 0]), mixed=False)
    np.testing.assert_array_equal(some_, found[[4, 0]])
    nothing = metrics.extract(forward, Rows([None, None]), 2, torch.device("cpu"))
    assert nothing.shape == (2, 1) and np.isnan(nothing).all()


def test_half_precision_is_used_where_it_is_asked_for(monkeypatch):
    used = []
    monkeypatch.setattr("image_to_prompts.run.devices.mixed_precision", lambda device: "bf16")
    forward = lambda batch: used.append(torch.is_autocast_enabled("cpu")) or batch  # noqa: E731
    for mixed in (True, False):
        metrics.extract(forward, Rows([1.0]), 1, torch.device("cpu"), mixed=mixed)
    metrics.extract(forward, Rows([1.0]), 1, torch.device("cpu"))
    assert used == [True, False, True]
