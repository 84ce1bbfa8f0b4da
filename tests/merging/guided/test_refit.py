"""Kept entries fitted anew, against a least-squares solve of each row, and what must hold of any such fit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.merging.guided.refit import refitted


def drawn(seed, rows=6, channels=8, tokens=30, share=0.4):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(tokens, channels, generator=generator, dtype=torch.float64)
    inputs = inputs @ (torch.eye(channels) + 0.3 * torch.randn(channels, channels, generator=generator)).double()
    change = torch.randn(rows, channels, generator=generator, dtype=torch.float64)
    return change, torch.rand(rows, channels, generator=generator) < share, inputs


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), share=st.floats(0, 1), ridge=st.sampled_from([1e-6, 1e-3, 10.0]))
def test_each_row_is_a_least_squares_solve(seed, share, ridge):
    """Outputs of the whole row from the kept inputs, with the ridge as further equations."""
    change, kept, inputs = drawn(seed, share=share)
    gram = inputs.T @ inputs / len(inputs)
    found = refitted(change, kept, gram, ridge, entries_at_once=40)
    root = (ridge * gram.diagonal().mean()).sqrt()
    for row in range(len(change)):
        chosen = kept[row]
        assert not found[row, ~chosen].any()
        if chosen.any():
            own = torch.eye(int(chosen.sum()), dtype=torch.float64)
            left = torch.cat([inputs[:, chosen] / len(inputs) ** 0.5, root * own])
            right = torch.cat([inputs @ change[row] / len(inputs) ** 0.5, root * change[row, chosen]])
            expected = torch.linalg.lstsq(left, right[:, None]).solution[:, 0]
            torch.testing.assert_close(found[row, chosen], expected, rtol=1e-6, atol=1e-7)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_it_answers_no_worse_than_the_mask_and_keeps_what_is_whole(seed):
    change, kept, inputs = drawn(seed)
    gram = inputs.T @ inputs / len(inputs)
    fitted = refitted(change, kept, gram, 1e-9)
    misses = [float(((change - one) @ inputs.T).norm()) for one in (fitted, change * kept)]
    assert misses[0] <= misses[1] * (1 + 1e-9)
    torch.testing.assert_close(refitted(change, torch.ones_like(kept), gram, 1e-3), change)
    assert torch.equal(refitted(change, kept, torch.zeros_like(gram), 1e-3), change * kept)
    assert not refitted(change, torch.zeros_like(kept), gram, 1e-3).any()


def test_what_does_not_fit_is_refused():
    change, kept, inputs = drawn(1)
    gram = inputs.T @ inputs
    with pytest.raises(ValueError, match="fit together"):
        refitted(change, kept, gram[:5, :5], 1e-3)
    with pytest.raises(ValueError, match="not finite"):
        refitted(change, kept, gram * float("nan"), 1e-3)
    with pytest.raises(ValueError, match="far from definite"):
        refitted(change, kept, 1.5 * torch.eye(8, dtype=torch.float64) - 1, 1e-3)
