"""Which entries are kept: against a sort of exact saliencies, and where float32 would lose them."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from utils.merging.guided.mask import kept_entries, magnitude_mask, saliency_mask

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def exact(change, k, axis0, axis1):
    """The mask by sorting delta^2 F in float64, or None where the k-th and the next are too close to call."""
    worth = (change.double() ** 2 * axis0.double()[:, None] * axis1.double()).flatten()
    values, order = worth.sort(descending=True, stable=True)
    if 0 < k < len(values) and values[k - 1] - values[k] <= 1e-5 * values[k - 1]:
        return None
    mask = torch.zeros(worth.numel(), dtype=torch.bool)
    mask[order[:k]] = True
    return mask.view(change.shape)


shapes = st.tuples(st.integers(1, 12), st.integers(1, 12))


@given(st.integers(0, 2**32 - 1), shapes, st.floats(0, 1), st.sampled_from(DTYPES))
def test_the_largest_saliencies_are_kept(seed, shape, share, dtype):
    generator = torch.Generator().manual_seed(seed)
    change = torch.randn(shape, generator=generator).to(dtype)
    axis0, axis1 = (torch.rand(n, generator=generator) ** 4 for n in shape)
    k = int(share * change.numel())
    mask = saliency_mask(change, k, axis0, axis1)
    assert mask.dtype == torch.bool and mask.shape == change.shape and int(mask.sum()) == k
    expected = exact(change, k, axis0, axis1)
    if expected is not None:
        assert torch.equal(mask, expected)


@pytest.mark.parametrize("scales", [(1e-12, 1.0), (1e-30, 1e-8), (1e30, 1e8), (1e-38, 1e-38)])
@pytest.mark.parametrize("size", [1.0, 1e-6, 1e-12])
def test_no_scale_loses_an_entry(scales, size):
    generator = torch.Generator().manual_seed(3)
    change = torch.randn((40, 50), generator=generator)
    axis0, axis1 = (torch.rand(n, generator=generator) + 0.01 for n in change.shape)
    change, axis0, axis1 = change * size, axis0 * scales[0], axis1 * scales[1]
    expected = exact(change, 200, axis0, axis1)
    assert expected is not None
    assert torch.equal(saliency_mask(change, 200, axis0, axis1), expected)


def test_neighboring_saliencies_far_below_float32():
    """delta^2 F of 1e-47 and less: as a product in float32 all are zero."""
    change = torch.tensor([[1e-12, 2e-12], [3e-12, 4e-12]])
    axis0, axis1 = torch.tensor([1e-12, 2e-12]), torch.tensor([1e-12, 1e-12])
    assert float((change**2 * axis0[:, None] * axis1).max()) == 0
    assert saliency_mask(change, 2, axis0, axis1).tolist() == [[False, False], [True, True]]
    assert saliency_mask(change, 1, axis0, axis1).tolist() == [[False, False], [False, True]]


@given(st.integers(0, 2**32 - 1), st.integers(0, 60), st.sampled_from(DTYPES), st.floats(1e-20, 1e20))
def test_constant_vectors_rank_by_magnitude(seed, k, dtype, value):
    """Many ties: bit for bit the same entries, whatever the constant."""
    change = torch.randint(-3, 4, (6, 9), generator=torch.Generator().manual_seed(seed)).to(dtype)
    constant = torch.full((6,), value), torch.full((9,), value)
    assert torch.equal(saliency_mask(change, k, *constant), magnitude_mask(change, k))


def test_ties_go_to_the_lowest_index():
    change = torch.tensor([[1.0, -2.0, 2.0], [2.0, 0.0, 4.0]])
    axis0, axis1 = torch.tensor([4.0, 1.0]), torch.tensor([1.0, 1.0, 1.0])
    # ranks 2 4 4 / 2 0 4
    for k, kept in enumerate([[], [1], [1, 2], [1, 2, 5], [0, 1, 2, 5], [0, 1, 2, 3, 5], [0, 1, 2, 3, 4, 5]]):
        assert saliency_mask(change, k, axis0, axis1).flatten().nonzero().flatten().tolist() == kept


def test_a_vector_of_zeros_ranks_nothing():
    change = torch.tensor([[1.0, 5.0], [3.0, 2.0]])
    zeros, axis0 = torch.zeros(2), torch.tensor([100.0, 1.0])
    assert torch.equal(saliency_mask(change, 2, zeros, zeros), magnitude_mask(change, 2))
    assert saliency_mask(change, 2, axis0, zeros).tolist() == [[True, True], [False, False]]
    # one zero among others does rank: that entry comes last
    assert saliency_mask(change, 2, torch.ones(2), torch.tensor([1.0, 0.0])).tolist() == [[True, False], [True, False]]


def test_strided_changes_and_their_inputs_are_left_alone():
    whole = torch.randn(8, 10, generator=torch.Generator().manual_seed(0))
    change, before = whole.t()[::2], whole.clone()
    axis0, axis1 = torch.rand(5), torch.rand(8)
    kept = axis0.clone(), axis1.clone()
    assert torch.equal(saliency_mask(change, 7, axis0, axis1), saliency_mask(change.contiguous(), 7, axis0, axis1))
    assert torch.equal(whole, before) and torch.equal(axis0, kept[0]) and torch.equal(axis1, kept[1])


def test_shapes_must_fit():
    with pytest.raises(ValueError, match=r"2 and 3 do not fit a tensor \[3, 2\]"):
        saliency_mask(torch.ones(3, 2), 1, torch.ones(2), torch.ones(3))
    with pytest.raises(ValueError, match="do not fit"):
        saliency_mask(torch.ones(6), 1, torch.ones(2), torch.ones(3))


@given(st.integers(0, 10**6), st.floats(-1, 2))
def test_kept_entries_are_mergekits(numel, density):
    k = kept_entries(numel, density)
    if density <= 0 or not numel:
        assert k == 0
    elif density >= 1:
        assert k == numel
    else:
        assert k == max(1, math.floor(density * numel))


def test_nan_is_kept_so_that_it_is_noticed():
    change = torch.tensor([[1.0, float("nan")], [2.0, 3.0]])
    mask = saliency_mask(change, 1, torch.ones(2), torch.tensor([1.0, 1e-6]))
    assert mask.tolist() == [[False, True], [False, False]]


@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.floats(0, 1))
def test_a_tensor_of_one_axis_is_ranked_by_its_vector(seed, length, share):
    generator = torch.Generator().manual_seed(seed)
    change, squares = torch.randn(length, generator=generator), torch.rand(length, generator=generator) ** 4
    k = int(share * length)
    mask = saliency_mask(change, k, squares)
    assert mask.shape == change.shape and int(mask.sum()) == k
    expected = exact(change[:, None], k, squares, torch.ones(1))
    if expected is not None:
        assert torch.equal(mask, expected.flatten())
