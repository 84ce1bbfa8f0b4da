"""Histograms of saliency against NumPy, and where float32 would underflow."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from utils.guidance.saliency_budget.bins import BINS
from utils.guidance.saliency_budget.histograms import saliency_histogram


def bin_edges() -> torch.Tensor:
    """The roots at which bins begin and end, e(0) to e(BINS), from the definition: the floats of patterns b 2^19."""
    return (torch.arange(BINS + 1, dtype=torch.int32) * 2**19).view(torch.float32)


def drawn(seed: int, shape: tuple[int, ...], zeros: float = 0.2) -> tuple[torch.Tensor, ...]:
    """base, expert and F; the change of some entries is 0, the F of others."""
    generator = torch.Generator().manual_seed(seed)
    base, change, logs = (torch.randn(shape, generator=generator) for _ in range(3))
    drop, silent = (torch.rand(shape, generator=generator) < zeros for _ in range(2))
    squares = torch.where(silent, 0.0, (logs * 6 - 20).exp())
    return base, torch.where(drop, base, base + 1e-3 * change), squares


@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 40),
    at_once=st.sampled_from([1, 7, 2**22]),
    power=st.sampled_from([1.0, 0.5, 0.3]),
)
def test_bins_are_those_of_the_sorted_roots(seed, rows, at_once, power):
    base, expert, squares = drawn(seed, (rows, 9))
    found = saliency_histogram(base, expert, squares, power, at_once=at_once)
    change = expert.numpy() - base.numpy()
    factors = np.sqrt(squares.numpy()) if power == 1 else squares.pow(power / 2).numpy()  # as rounded
    roots = (np.abs(change) * factors).ravel()
    saliency = (change.astype("float64") ** 2 * squares.numpy().astype("float64") ** power).ravel()
    edges = bin_edges().numpy().astype("float64")
    there = roots[roots > 0]
    expected = np.bincount(np.searchsorted(edges, there, side="right") - 1, minlength=BINS)
    assert np.array_equal(found.counts.numpy(), expected)
    assert found.zeros == (saliency == 0).sum() and found.changed == (change != 0).sum()
    assert found.norm == pytest.approx(np.linalg.norm(change.astype("float64")))
    assert np.allclose(np.sort(there.astype("float64") ** 2), np.sort(saliency[saliency > 0]), rtol=1e-6)


def test_a_bin_is_an_eighth_of_a_doubling_of_saliency_or_less():
    edges = bin_edges().double()
    assert len(edges) == BINS + 1 and edges[0] == 0 and torch.isinf(edges[-1]) and bool((edges.diff() > 0).all())
    normal = edges[(edges >= 2.0**-126) & torch.isfinite(edges)]
    doublings = normal.square().log2().diff()
    assert doublings.max() < 0.18 and doublings.min() > 0.08
    steps = [int(((edges >= 2.0**n) & (edges < 2.0 ** (n + 1))).sum()) for n in (-120, -20, 0, 100)]
    assert steps == [16] * 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_saliencies_far_below_float32_are_distinguished(dtype):
    base = torch.zeros(1, 3, dtype=dtype)
    expert = torch.tensor([[2.0**-14, 2.0**-13, 0.0]], dtype=dtype)
    squares = torch.full((1, 3), 1e-36)  # times 2^-28: 3.7e-45, which float32 rounds to 4.2e-45 or 2.8e-45
    found = saliency_histogram(base, expert, squares)
    first, second = found.counts.nonzero().flatten().tolist()
    assert second - first == 16 and found.zeros == 1 and found.changed == 2
    edges = bin_edges().double()
    assert edges[first] ** 2 <= 2.0**-28 * 1e-36 < edges[first + 1] ** 2


def test_an_unchanged_tensor_has_only_zeros():
    base, _, squares = drawn(1, (4, 5))
    found = saliency_histogram(base, base.clone(), squares)
    assert (found.zeros, found.changed, found.norm, int(found.counts.sum())) == (20, 0, 0.0, 0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("nan")])
@pytest.mark.parametrize("where", [1, 2])
def test_what_is_not_finite_is_refused(value, where):
    tensors = list(drawn(2, (4, 5), zeros=0))
    tensors[where][1, 2] = value
    with pytest.raises(ValueError, match="finite"):
        saliency_histogram(*tensors)
