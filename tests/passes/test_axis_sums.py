"""Outer products for squared gradients: sums, the divergence they minimize, and how much they explain."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from utils.passes.axis_sums import AxisSums, explained_share, row_column_factors


def drawn(seed: int, shape: tuple[int, int], noise: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    down, across, rest = (torch.randn(n, generator=generator) for n in ((shape[0], 1), (1, shape[1]), shape))
    return (2 * down + 2 * across + noise * rest - 27).exp()


@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.tuples(st.integers(1, 30), st.integers(1, 30)),
    noise=st.sampled_from([0.0, 1.0, 3.0]),
    at_once=st.sampled_from([1, 50, 2**22]),
    holes=st.booleans(),
)
def test_factors_and_what_they_explain_against_numpy(seed, shape, noise, at_once, holes):
    squares = drawn(seed, shape, noise)
    if holes:
        squares[torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.3] = 0
    rows, columns = row_column_factors(squares, at_once)
    share = explained_share(squares, rows, columns, at_once)
    dense = squares.double().numpy()
    assert rows.numpy() == pytest.approx(dense.sum(axis=1), rel=1e-12)
    total = dense.sum()
    assert columns.numpy() == pytest.approx(dense.sum(axis=0) / (total or 1), rel=1e-12)
    there = dense > 0
    logs, fit = np.log(dense[there]), np.log(np.outer(rows, columns)[there])
    if len(logs) > 1 and logs.std() > 1e-2:
        assert share == pytest.approx(1 - (logs - fit).var() / logs.var(), abs=1e-3)
    else:
        assert share == pytest.approx(1, abs=1e-3) or len(logs) > 1


def test_an_outer_product_is_found_and_explains_everything():
    squares = drawn(3, (20, 30), noise=0.0)
    rows, columns = row_column_factors(squares)
    assert torch.outer(rows, columns).float().numpy() == pytest.approx(squares.numpy(), rel=1e-5)
    assert explained_share(squares, rows, columns) == pytest.approx(1, abs=1e-6)
    assert explained_share(squares, columns.new_ones(20), columns.new_ones(30)) == pytest.approx(0, abs=1e-6)


@given(seed=st.integers(0, 2**32 - 1))
def test_no_other_outer_product_is_nearer_in_divergence(seed):
    squares = drawn(seed, (6, 5), noise=2.0).double() * 1e10

    def divergence(rows, columns):
        fit = torch.outer(rows, columns)
        return float((squares * (squares / fit).log() - squares + fit).sum() / squares.sum())

    best = row_column_factors(squares.float())
    generator = torch.Generator().manual_seed(seed)
    for size in (1e-2, 0.3):
        other = [axis * (size * torch.randn(len(axis), generator=generator)).exp() for axis in best]
        assert divergence(*other) >= divergence(*best) - 1e-9


@pytest.mark.parametrize("value", [0.0, 1e-30, 7.0])
def test_constants(value):
    rows, columns = row_column_factors(torch.full((3, 4), value))
    assert rows.tolist() == pytest.approx([4 * value] * 3) and columns.tolist() == pytest.approx(
        [0.25 * (value > 0)] * 4
    )
    assert explained_share(torch.full((3, 4), value), rows, columns) == 1


@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.one_of(st.just(()), st.tuples(st.integers(1, 30)), st.tuples(st.integers(1, 30), st.integers(1, 30))),
    count=st.integers(1, 4),
    at_once=st.sampled_from([1, 50, 2**22]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_sums_of_squares_that_come_in_parts(seed, shape, count, at_once, dtype):
    gradients = torch.randn((count, *shape), generator=torch.Generator().manual_seed(seed)).to(dtype)
    sums = AxisSums(shape, torch.device("cpu"), at_once)
    for gradient in gradients:
        sums.add_squares(gradient)
    dense = (gradients.double().numpy() ** 2).sum(axis=0)
    found = [axis.numpy() for axis in sums.factors()]
    if len(shape) < 2:
        assert len(found) == 1 and found[0] == pytest.approx(dense.reshape(-1), rel=1e-6)
        return
    assert found[0] == pytest.approx(dense.sum(axis=1), rel=1e-6)
    assert found[1] == pytest.approx(dense.sum(axis=0) / dense.sum(), rel=1e-6)


def test_rows_may_come_to_be_more():
    sums = AxisSums((2, 3), torch.device("cpu"))
    for squares in (torch.ones(2, 3), torch.ones(4, 3), torch.ones(3, 3)):
        sums.add(squares)
    rows, columns = sums.factors()
    assert rows.tolist() == [9, 9, 6, 3] and columns.tolist() == pytest.approx([1 / 3] * 3)
