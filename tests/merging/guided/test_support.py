"""The entries kept for a fit, against all sets of as many entries, and what must hold of any such choice.

python -m pytest tests/merging/guided/test_support.py
"""

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.merging.guided.mask import saliency_mask
from utils.merging.guided.refit import refitted
from utils.merging.guided.support import joint_support

RIDGE = 1e-3


def drawn(seed, rows=1, channels=6, tokens=40):
    """A change, the inputs' second moments with much in common between channels, and what errors of each output cost."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(tokens, channels, generator=generator, dtype=torch.float64)
    inputs = inputs @ torch.randn(channels, channels, generator=generator, dtype=torch.float64)
    change = torch.randn(rows, channels, generator=generator, dtype=torch.float64)
    return change, inputs.T @ inputs / tokens, torch.rand(rows, generator=generator) + 0.05


def least_misses(change, gram, outputs, chosen):
    """The weighed squares that the best fit of some entries leaves, all rows as one least-squares problem."""
    root = torch.linalg.cholesky(gram + RIDGE * gram.diagonal().mean() * torch.eye(len(gram)))
    left = torch.block_diag(*[weight.double().sqrt() * root.T for weight in outputs])
    kept = left[:, list(chosen)]
    wanted = left @ change.flatten()
    return float((wanted - kept @ torch.linalg.lstsq(kept, wanted[:, None]).solution[:, 0]).square().sum())


@pytest.mark.parametrize(("rows", "channels", "k"), [(1, 6, 3), (2, 4, 3)])
def test_nearly_the_best_of_all_sets(rows, channels, k):
    """Of all rows' entries together. Of what entries chosen by themselves miss beyond the best set, over half is found."""
    found, best, separate = 0.0, 0.0, 0.0
    for seed in range(20):
        change, gram, outputs = drawn(seed, rows, channels)
        total = float((outputs * ((change @ gram) * change).sum(1)).sum())
        sets = [
            mask.flatten().nonzero()[:, 0].tolist()
            for mask in (
                joint_support(change, k, gram, outputs, RIDGE),
                saliency_mask(change, k, outputs, gram.diagonal()),
            )
        ]
        assert len(sets[0]) == k
        misses = [least_misses(change, gram, outputs, one) / total for one in sets]
        found, separate = found + misses[0], separate + misses[1]
        best += min(least_misses(change, gram, outputs, one) for one in combinations(range(change.numel()), k)) / total
    assert found < best + 0.5 * (separate - best)


@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 2**31), exponents=st.tuples(st.integers(-12, 12), st.integers(-12, 12)))
def test_units_of_inputs_and_of_changes_do_not_matter(seed, exponents):
    change, gram, outputs = drawn(seed, 4, 8)
    expected = joint_support(change, 9, gram, outputs, RIDGE)
    scaled = [one * 2.0**power for one, power in zip((change, gram), exponents, strict=True)]
    assert torch.equal(joint_support(*scaled[:1], 9, scaled[1], 7 * outputs, RIDGE), expected)


def left(mask, change, gram, outputs):
    """The weighed squares that a mask leaves after the fit."""
    apart = refitted(change, mask, gram, RIDGE) - change
    return float((outputs * ((apart @ gram) * apart).sum(1)).sum())


def test_what_is_fitted_answers_better_than_entries_chosen_by_themselves():
    found, separate = 0.0, 0.0
    for seed in range(10):
        change, gram, outputs = drawn(seed, 40, 32, 200)
        found += left(joint_support(change, 128, gram, outputs, RIDGE), change, gram, outputs)
        separate += left(saliency_mask(change, 128, outputs, gram.diagonal()), change, gram, outputs)
    assert found < 0.8 * separate


def alternating(change, k, gram, outputs, steps):
    """The alternating directions step by step in float64, each with a solve of its own."""
    gram = gram + RIDGE * gram.diagonal().mean() * torch.eye(len(gram))
    lengths = gram.diagonal().sqrt()
    metric, whole = gram / lengths[:, None] / lengths, change * lengths
    roots, x, u = outputs.double().sqrt()[:, None], whole, torch.zeros_like(whole)
    for step in range(1, steps + 1):
        kept = k + int((x.numel() - k) * max(0.0, 1 - 2 * step / steps) ** 7)
        order = (roots * (x + u)).abs().flatten().argsort(descending=True)[:kept]
        mask = torch.zeros(x.numel(), dtype=torch.bool).index_fill_(0, order, True).view_as(x)
        z = torch.where(mask, x + u, 0.0)
        u = u + x - z
        right = whole @ metric + 0.5 * (z - u)
        x = 1.5 * torch.linalg.solve(metric + 0.5 * torch.eye(len(gram)), right, left=False) - 0.5 * z
    return mask


def test_float32_chooses_as_float64_does():
    same, missed = 0, [0.0, 0.0]
    for seed in range(3):
        change, gram, outputs = drawn(seed, 96, 48, 400)
        masks = joint_support(change, 460, gram, outputs, RIDGE, 15), alternating(change, 460, gram, outputs, 15)
        same += int((masks[0] & masks[1]).sum())
        missed = [total + left(mask, change, gram, outputs) for total, mask in zip(missed, masks, strict=True)]
    assert same > 0.99 * 3 * 460
    assert missed[0] < 1.001 * missed[1]


def test_all_none_and_no_inputs():
    change, gram, outputs = drawn(7, 3)
    assert (
        joint_support(change, 18, gram, outputs, RIDGE).all() and joint_support(change, 99, gram, outputs, RIDGE).all()
    )
    assert not joint_support(change, 0, gram, outputs, RIDGE).any()
    without = joint_support(change, 4, torch.zeros_like(gram), outputs, RIDGE)
    assert torch.equal(without, saliency_mask(change, 4, outputs, torch.ones(6)))
    one = joint_support(change, 4, gram, torch.zeros(3), RIDGE)
    assert torch.equal(one, joint_support(change, 4, gram, torch.ones(3), RIDGE))


def test_what_does_not_fit_is_refused():
    change, gram, outputs = drawn(1, 3)
    for wrong in ((change, 4, gram[:5, :5], outputs), (change, 4, gram, outputs[:2])):
        with pytest.raises(ValueError, match="fit together"):
            joint_support(*wrong, RIDGE)
    with pytest.raises(ValueError, match="not finite"):
        joint_support(change, 4, gram * float("nan"), outputs, RIDGE)
    with pytest.raises(ValueError, match="far from definite"):
        joint_support(change, 4, 3 * torch.eye(6, dtype=torch.float64) - 2, outputs, RIDGE)
