"""Intervals of weights: they hold the true weight as often as they say, and shrink with samples."""

import numpy as np
import pytest

from utils.guidance.submodule_linearity.folds import FOLDS
from utils.guidance.submodule_linearity.intervals import half_widths
from utils.guidance.submodule_linearity.weights import merging_weights, misfit


def sampled(random, samples, width=6):
    """Sums of Gram matrices by fold: two experts whose changes vary from sample to sample, each sample of some tokens."""
    sums, tokens = np.zeros((2, FOLDS, 2, 2)), np.zeros((2, FOLDS))
    for task in range(2):
        for sample in range(samples):
            count = int(random.integers(3, 20))
            common = random.normal(size=(1, count, width))
            loud = np.exp(0.3 * random.normal(size=(2, 1, 1)))
            loud[task] *= 1.5
            changes = loud * (common + random.normal(size=(2, count, width)))
            sums[task, sample % FOLDS] += np.einsum("mnw,snw->ms", changes, changes)
            tokens[task, sample % FOLDS] += count
    return sums, tokens


def solved(sums, tokens):
    means = sums.sum(axis=1) / tokens.sum(axis=1)[:, None, None]
    return merging_weights(misfit([means], "equal"), 0.1)


@pytest.mark.parametrize("samples", [12, 60])
def test_they_hold_the_true_weight_about_as_often_as_they_say(samples):
    random = np.random.default_rng(0)
    truth = solved(*sampled(random, 20_000))
    hits = []
    for _ in range(300):
        sums, tokens = sampled(random, samples)
        half = half_widths([sums], tokens, [0, 1], "equal", 0.1)
        hits.append(np.abs(solved(sums, tokens) - truth) <= half)
    assert 0.90 <= np.mean(hits) <= 0.985


def test_more_samples_make_them_narrower():
    random = np.random.default_rng(1)
    few, many = (
        half_widths([own], tokens, [0, 1], "equal", 0.1) for own, tokens in (sampled(random, 8), sampled(random, 400))
    )
    assert (many < 0.4 * few).all() and (few > 0).all()


def test_they_are_those_of_weights_solved_again_without_each_fold():
    sums, tokens = sampled(np.random.default_rng(2), 5)
    variance = 0.0
    for task in range(2):
        again = []
        for fold in range(5):
            kept, count = sums.copy(), tokens.copy()
            kept[task, fold], count[task, fold] = 0, 0
            again.append(solved(kept, count))
        variance += 4 / 5 * np.square(np.array(again) - np.mean(again, axis=0)).sum(axis=0)
    expected = 2.306004135204166 * np.sqrt(variance)  # Student's t, 97.5 %, 8 degrees of freedom
    assert half_widths([sums], tokens, [0, 1], "equal", 0.1) == pytest.approx(expected, rel=1e-9)


def test_experts_of_one_text_lose_its_folds_together():
    sums, tokens = sampled(np.random.default_rng(3), 6)
    sums[1], tokens[1] = sums[0], tokens[0]
    again = []
    for fold in range(6):
        kept, count = sums.copy(), tokens.copy()
        kept[:, fold], count[:, fold] = 0, 0
        again.append(solved(kept, count))
    expected = 2.570581835636314 * np.sqrt(5 / 6 * np.square(np.array(again) - np.mean(again, axis=0)).sum(axis=0))
    assert half_widths([sums], tokens, [0, 0], "equal", 0.1) == pytest.approx(expected, rel=1e-9)


def test_one_sample_says_nothing_and_one_expert_is_sure():
    sums, tokens = sampled(np.random.default_rng(4), 1)
    assert np.isinf(half_widths([sums], tokens, [0, 1], "equal", 0.1)).all()
    sums, tokens = sampled(np.random.default_rng(4), 9)
    assert half_widths([sums[:1, :, :1, :1]], tokens[:1], [0], "equal", 0.1) == pytest.approx([0.0], abs=1e-12)
