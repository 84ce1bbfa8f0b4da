"""Budgets solved from histograms, against sorting all saliencies."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from utils.guidance.saliency_budget.histograms import saliency_histogram
from utils.guidance.saliency_budget.shares import shares_of_budget

histograms = st.integers(1, 5).flatmap(
    lambda bins: st.lists(
        st.tuples(st.lists(st.integers(0, 50), min_size=bins, max_size=bins), st.integers(0, 30)).filter(
            lambda one: sum(one[0]) + one[1] > 0
        ),
        min_size=1,
        max_size=6,
    )
)


def arrays(tensors):
    return np.array([counts for counts, _ in tensors]), np.array([zeros for _, zeros in tensors])


@given(tensors=histograms, budgets=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_the_mean_is_the_budget_and_more_budget_never_means_less(tensors, budgets):
    counts, zeros = arrays(tensors)
    sizes = counts.sum(axis=1) + zeros
    low, high = (shares_of_budget(counts, zeros, budget) for budget in sorted(budgets))
    for shares, budget in ((low, min(budgets)), (high, max(budgets))):
        assert ((shares >= 0) & (shares <= 1)).all()
        assert np.average(shares, weights=sizes) == pytest.approx(budget, abs=1e-12)
    assert (high >= low - 1e-12).all()
    assert (shares_of_budget(counts, zeros, 1.0) == 1).all() and (shares_of_budget(counts, zeros, 0.0) == 0).all()


@given(tensors=histograms, budget=st.floats(0, 1))
def test_nothing_is_taken_from_a_bin_before_all_above_it(tensors, budget):
    counts, zeros = arrays(tensors)
    sizes = counts.sum(axis=1) + zeros
    kept = shares_of_budget(counts, zeros, budget) * sizes
    falling = np.concatenate([zeros[:, None], counts], axis=1)[:, ::-1]
    ends = np.cumsum(falling, axis=1)
    taken = np.minimum(falling, np.maximum(0, kept[:, None] - (ends - falling)))
    part = np.divide(taken.sum(axis=0), falling.sum(axis=0), out=np.ones(falling.shape[1]), where=falling.any(axis=0))
    open_bins = (part > 1e-9) & (part < 1 - 1e-9) & falling.any(axis=0)
    assert open_bins.sum() <= 1
    assert (np.diff(part[falling.any(axis=0)]) <= 1e-9).all()


def test_by_hand():
    counts, zeros = np.array([[0, 4, 1], [2, 0, 3]]), np.array([5, 0])
    assert shares_of_budget(counts, zeros, 4 / 15) == pytest.approx([1 / 10, 3 / 5])  # the top bin
    assert shares_of_budget(counts, zeros, 6 / 15) == pytest.approx([3 / 10, 3 / 5])  # half of the next
    assert shares_of_budget(counts, zeros, 9 / 15) == pytest.approx([5 / 10, 4 / 5])  # half of the lowest
    assert shares_of_budget(counts, zeros, 12.5 / 15) == pytest.approx([7.5 / 10, 1])  # half of the zeros


def test_tensors_without_saliency_share_the_budget_alike():
    shares = shares_of_budget(np.zeros((2, 7), dtype=np.int64), np.array([10, 90]), 0.3)
    assert shares == pytest.approx([0.3, 0.3])


@pytest.mark.parametrize("budget", [0.01, 0.05, 0.1, 0.4, 0.8, 0.97])
def test_densities_are_those_of_sorting_all_saliencies(budget):
    generator = torch.Generator().manual_seed(0)
    counts, zeros, saliencies = [], [], []
    for scale, spread in ((1e-3, 1.0), (3e-3, 2.0), (1e-4, 0.5), (1e-3, 3.0)):
        base = torch.randn(200, 100, generator=generator)
        expert = base + scale * torch.randn(200, 100, generator=generator)
        squares = (torch.randn(200, 100, generator=generator) * spread - 25).exp()
        found = saliency_histogram(base, expert, squares)
        counts.append(found.counts.numpy())
        zeros.append(found.zeros)
        saliencies.append(((expert - base).double() ** 2 * squares.double()).numpy().ravel())
    shares = shares_of_budget(np.array(counts), np.array(zeros), budget)
    everything = np.sort(np.concatenate(saliencies))[::-1]
    threshold = everything[round(budget * len(everything)) - 1]
    expected = np.array([(values >= threshold).mean() for values in saliencies])
    assert shares.mean() == pytest.approx(budget, abs=1e-12)
    assert np.abs(shares - expected).max() < 0.002  # a bin holds up to 0.05 of a tensor
