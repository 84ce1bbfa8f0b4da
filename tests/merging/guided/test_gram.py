"""The pure mathematics of gram_mean against dense solves, brute-force minimization, and what must hold of any mean."""

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.merging.guided.gram import InputChange, gram_mean
from utils.merging.guided.row_gram import RowChange, row_gram_mean

CLOSE = {"rtol": 1e-6, "atol": 1e-8}


def drawn(seed, count, out=5, channels=7, tokens=40):
    """Changes, Grams and weights of some experts, float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    found = []
    for _ in range(count):
        inputs = normal(tokens, channels) @ (torch.eye(channels) + 0.1 * normal(channels, channels))
        weight = float(normal(1).abs() + 0.1)
        found.append(InputChange(normal(out, channels), weight, inputs.t() @ inputs / tokens))
    return found, normal(out, channels)


def dense(experts, anchor, ridge):
    """RegMean's formula with an explicit inverse."""
    total = sum(one.weight for one in experts)
    joint = sum(one.weight / total * one.gram for one in experts)
    r = ridge * joint.diagonal().mean()
    above = sum(one.weight / total * one.change @ one.gram for one in experts) + r * anchor
    return above @ torch.linalg.inv(joint + r * torch.eye(len(joint), dtype=torch.float64))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), count=st.integers(1, 4), ridge=st.sampled_from([1e-7, 1e-3, 1.0]))
def test_it_is_the_dense_formula(seed, count, ridge):
    experts, anchor = drawn(seed, count)
    torch.testing.assert_close(gram_mean(experts, anchor, ridge=ridge), dense(experts, anchor, ridge), **CLOSE)


def test_it_minimizes_what_it_says():
    """Newton's method on the sum written as outputs of inputs; nothing of the closed form in it."""
    generator = torch.Generator().manual_seed(3)
    inputs = [torch.randn(30, 6, generator=generator, dtype=torch.float64) for _ in range(3)]
    changes = [torch.randn(4, 6, generator=generator, dtype=torch.float64) for _ in range(3)]
    anchor, weights, ridge = torch.randn(4, 6, generator=generator, dtype=torch.float64), (0.2, 0.5, 0.3), 0.05
    r = ridge * sum(w * (x * x).mean() for w, x in zip(weights, inputs, strict=True))

    def objective(flat):
        one = flat.view(4, 6)
        parts = zip(weights, inputs, changes, strict=True)
        misses = sum(w * ((x @ (one - d).t()) ** 2).sum(1).mean() for w, x, d in parts)
        return misses + r * ((one - anchor) ** 2).sum()

    start = torch.zeros(24, dtype=torch.float64)
    slope, bend = (function(objective, start) for function in (torch.autograd.functional.jacobian, torch.autograd.functional.hessian))  # fmt: skip
    best = (start - torch.linalg.solve(bend, slope)).view(4, 6)
    experts = [InputChange(d, 10 * w, x.t() @ x / len(x)) for w, x, d in zip(weights, inputs, changes, strict=True)]
    torch.testing.assert_close(gram_mean(experts, anchor, ridge=ridge), best, **CLOSE)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), count=st.integers(1, 4), scale=st.sampled_from([1e-6, 0.5, 1e6]))
def test_what_holds_of_any_mean(seed, count, scale):
    experts, anchor = drawn(seed, count)
    found = gram_mean(experts, anchor, ridge=1e-6)
    # the order of the experts does not matter, nor the unit of weights and inputs
    torch.testing.assert_close(gram_mean(experts[::-1], anchor, ridge=1e-6), found, **CLOSE)
    other = [InputChange(one.change, scale * one.weight, scale * one.gram) for one in experts]
    torch.testing.assert_close(gram_mean(other, anchor, ridge=1e-6), found, **CLOSE)
    # scaling the changes scales the answer
    larger = [InputChange(scale * one.change, one.weight, one.gram) for one in experts]
    torch.testing.assert_close(gram_mean(larger, scale * anchor, ridge=1e-6) / scale, found, **CLOSE)
    # experts that agree are what they agree on
    alike = [InputChange(anchor, one.weight, one.gram) for one in experts]
    torch.testing.assert_close(gram_mean(alike, anchor, ridge=1e-6), anchor, **CLOSE)
    # one expert of many tokens is itself
    torch.testing.assert_close(gram_mean(experts[:1], anchor, ridge=1e-12), experts[0].change, rtol=1e-4, atol=1e-4)


def test_directions_without_inputs_are_the_anchors(caplog):
    """Three tokens for seven channels: what the text spans is the expert's, all else the anchor's."""
    (expert,), anchor = drawn(5, 1, tokens=3)
    seen = torch.linalg.svd(expert.gram)[0][:, :3]
    unseen = torch.linalg.svd(expert.gram)[0][:, 3:]
    found = gram_mean([expert], anchor, ridge=1e-8)
    torch.testing.assert_close(found @ seen, expert.change @ seen, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found @ unseen, anchor @ unseen, rtol=1e-5, atol=1e-5)
    assert not caplog.records


def test_rounding_that_makes_a_gram_indefinite_raises_the_ridge_and_says_so(caplog):
    (expert,), anchor = drawn(5, 1, tokens=3)
    bent = expert.gram - 3e-6 * expert.gram.diagonal().mean() * torch.eye(7, dtype=torch.float64)
    with caplog.at_level(logging.WARNING):
        found = gram_mean([InputChange(expert.change, 1.0, bent)], anchor, ridge=1e-7, label="layer 1")
    assert bool(found.isfinite().all()) and float((found - anchor).abs().max()) < 10
    assert "layer 1" in caplog.text and "1e-05" in caplog.text
    with pytest.raises(ValueError, match="far from definite"):
        gram_mean([InputChange(expert.change, 1.0, 2 * torch.eye(7).double() - 1)], anchor, ridge=1e-7)


def test_no_inputs_at_all_leave_the_anchor():
    (expert,), anchor = drawn(5, 1)
    nothing = InputChange(expert.change, 1.0, torch.zeros(7, 7))
    assert torch.equal(gram_mean([nothing], anchor, ridge=1e-7), anchor)


def test_without_what_is_beside_the_diagonal_channels_are_averaged_alone():
    experts, anchor = drawn(8, 2)
    found = gram_mean(experts, anchor, ridge=1e-12, off_diagonal=0)
    pulls = [one.weight * one.gram.diagonal() for one in experts]
    expected = sum(pull * one.change for pull, one in zip(pulls, experts, strict=True)) / sum(pulls)
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("spoil", ["shape", "nan"])
def test_what_does_not_fit_is_refused(spoil):
    (expert,), anchor = drawn(1, 1)
    gram = expert.gram[:6, :6] if spoil == "shape" else expert.gram * float("nan")
    with pytest.raises(ValueError, match="fit together" if spoil == "shape" else "not finite"):
        gram_mean([InputChange(expert.change, 1.0, gram)], anchor, ridge=1e-7)


# --- rows -------------------------------------------------------------------------------------------------------------


def drawn_rows(seed, count, rows=6, width=5, silent=False):
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        gradients = torch.randn(9, width, generator=generator, dtype=torch.float64) * torch.logspace(0, 3, width)
        worth = torch.rand(rows, generator=generator, dtype=torch.float64) ** 4
        change = torch.randn(rows, width, generator=generator, dtype=torch.float64)
        weight = float(torch.rand(1, generator=generator) + 0.1)
        found.append(RowChange(change, weight, worth * (not silent), gradients.t() @ gradients))
    return found


def solved_row_by_row(experts):
    total, rows = sum(one.weight for one in experts), []
    for row in range(len(experts[0].change)):
        matrix, right = 0, 0
        for one in experts:
            metric = one.gram / one.gram.diagonal().mean() + 0.1 * torch.eye(len(one.gram), dtype=torch.float64)
            mean = one.rows.mean()
            pull = one.weight / total * ((one.rows[row] / mean if mean > 0 else 0) + 0.1) * metric
            matrix, right = matrix + pull, right + pull @ one.change[row]
        rows.append(torch.linalg.solve(matrix, right))
    return torch.stack(rows)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), count=st.integers(1, 4), silent=st.booleans())
def test_rows_are_those_of_a_solve_each(seed, count, silent):
    experts = drawn_rows(seed, count, silent=silent)
    torch.testing.assert_close(row_gram_mean(experts), solved_row_by_row(experts), **CLOSE)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), count=st.integers(1, 4), scale=st.sampled_from([1e-9, 1e9]))
def test_what_holds_of_any_mean_of_rows(seed, count, scale):
    experts = drawn_rows(seed, count)
    found = row_gram_mean(experts)
    torch.testing.assert_close(row_gram_mean(experts[::-1]), found, **CLOSE)
    other = [RowChange(one.change, scale * one.weight, scale * one.rows, scale * one.gram) for one in experts]
    torch.testing.assert_close(row_gram_mean(other), found, **CLOSE)
    alike = [RowChange(experts[0].change, one.weight, one.rows, one.gram) for one in experts]
    torch.testing.assert_close(row_gram_mean(alike), experts[0].change, **CLOSE)
    still = [RowChange(0 * one.change, one.weight, one.rows, one.gram) for one in experts]
    assert not row_gram_mean(still).any()


def test_pieces_do_not_change_rows():
    experts = drawn_rows(2, 3, rows=11)
    torch.testing.assert_close(row_gram_mean(experts, entries_at_once=10), row_gram_mean(experts), **CLOSE)


@pytest.mark.parametrize("spoil", ["shape", "nan"])
def test_rows_that_do_not_fit_are_refused(spoil):
    (one,) = drawn_rows(1, 1)
    rows = one.rows[:3] if spoil == "shape" else one.rows * float("inf")
    with pytest.raises(ValueError, match="fit together" if spoil == "shape" else "not finite"):
        row_gram_mean([RowChange(one.change, 1.0, rows, one.gram)])
