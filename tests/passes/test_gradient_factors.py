"""Sums over axes and Gram matrices by factors, against the gradient itself in float64.

python -m pytest tests/passes/test_gradient_factors.py
"""

import pytest
import torch

from utils.exact_products import alone_in_process
from utils.passes.gradient_factors import Factor, Use, axis_squares, factors_pay, row_gram

ROWS, COLUMNS = 50, 40


def drawn(seed, tokens, width, dtype):
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


def numbers(seed, tokens):
    return torch.randint(ROWS // 5, (tokens,), generator=torch.Generator().manual_seed(seed))  # some more than once


def uses_of(kinds, dtype):
    """Uses of a weight: dense ones, and those of an embedding."""
    lefts = [
        drawn(seed, 7 + seed, ROWS, dtype) if kind == "dense" else numbers(seed, 7 + seed)
        for seed, kind in enumerate(kinds)
    ]
    return [Use(Factor(left), Factor(drawn(9 + at, 7 + at, COLUMNS, dtype))) for at, left in enumerate(lefts)]


def dense(uses):
    gradient = torch.zeros(ROWS, COLUMNS, dtype=torch.float64)
    for use in uses:
        left = torch.eye(ROWS)[use.left.values] if use.left.is_units else use.left.values
        gradient += left.double().t() @ use.right.values.double()
    return gradient


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "kinds",
    [("dense",), ("units",), ("dense", "units"), ("units", "dense"), ("dense", "dense", "units", "units")],
    ids="-".join,
)
def test_the_squares_of_the_gradient_itself(kinds, dtype):
    uses = uses_of(kinds, dtype)
    gradient = dense(uses)
    with alone_in_process():  # exact products on processors that have them
        rows, columns = axis_squares(uses, ROWS)
        gram = row_gram(uses)
    assert rows.dtype == columns.dtype == gram.dtype == torch.float32
    scale = float(gradient.square().sum())
    torch.testing.assert_close(rows.double(), gradient.square().sum(1), rtol=1e-5, atol=1e-7 * scale)
    torch.testing.assert_close(columns.double(), gradient.square().sum(0), rtol=1e-5, atol=1e-7 * scale)
    torch.testing.assert_close(gram.double(), gradient.t() @ gradient, rtol=1e-5, atol=1e-7 * scale)


def test_rows_without_a_gradient_are_zero_and_none_is_below():
    left = drawn(1, 6, ROWS, torch.float32)
    left[:, 3] = 0
    right = drawn(2, 6, 1, torch.float32).expand(6, COLUMNS).contiguous()
    right -= right.mean(0)  # with a constant left factor all products cancel
    left[:, 5] = 1e3
    rows, columns = axis_squares([Use(Factor(left), Factor(right))], ROWS)
    assert rows[3] == 0 and float(rows.min()) >= 0 and float(columns.min()) >= 0


def test_factors_of_wide_weights_are_taken_in_parts():
    left, right = drawn(1, 900, 700, torch.bfloat16), drawn(2, 900, 300, torch.bfloat16)
    rows, columns = axis_squares([Use(Factor(left), Factor(right))], 700)
    squares = (left.double().t() @ right.double()).square()
    torch.testing.assert_close(rows.double(), squares.sum(1), rtol=1e-4, atol=0)
    torch.testing.assert_close(columns.double(), squares.sum(0), rtol=1e-4, atol=0)


def test_few_tokens_pay_and_many_do_not():
    assert factors_pay(256, 1024, 1024) is False and factors_pay(255, 1024, 1024) is True
    assert factors_pay(600, 32000, 1024) is False
    assert factors_pay(600, 32000, 1024, with_gram=True) is True  # the gradient's own costs 32000 x 1024^2
