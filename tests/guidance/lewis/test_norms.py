"""The Wanda metric against its definition, entry by entry."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.guidance.lewis import norms as wanda
from utils.passes import second_moments
from utils.passes.second_moments import column_square_sums


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_norm_of_one_linear_in_closed_form(dtype):
    weight = torch.tensor([[1.0, -2.0], [0.5, 4.0]], dtype=dtype)
    moment = torch.tensor([9.0, 0.25], dtype=torch.float64)
    expected = ((1 + 0.25) * 9 + (4 + 16) * 0.25) ** 0.5
    assert float(wanda.metric_norm(weight, moment)) == pytest.approx(expected, rel=1e-12)


def test_norm_does_not_depend_on_the_chunks(monkeypatch):
    weight = torch.randn(37, 11, generator=torch.Generator().manual_seed(0))
    moment = torch.rand(11, dtype=torch.float64)
    whole = float(wanda.metric_norm(weight, moment))
    monkeypatch.setitem(second_moments.ENTRIES_AT_ONCE, "cpu", 23)
    assert float(wanda.metric_norm(weight, moment)) == pytest.approx(whole, rel=1e-6)
    oracle = (weight.double().abs() * moment.sqrt()).norm()
    assert whole == pytest.approx(float(oracle), rel=1e-6)


def test_bfloat16_weights_are_squared_in_float32():
    weight = torch.full((64, 64), 1.01, dtype=torch.bfloat16)
    exact = float(weight[0, 0].double()) ** 2 * 64 * 64
    assert float(wanda.metric_norm(weight, torch.ones(64))) ** 2 == pytest.approx(exact, rel=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 7),
    columns=st.integers(1, 19),
    ratio=st.floats(0, 0.99),
    seed=st.integers(0, 10_000),
    levels=st.sampled_from([2, 5, 10_000]),
)
def test_pruning_is_what_a_stable_sort_prunes(rows, columns, ratio, seed, levels):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-levels, levels + 1, (rows, columns), generator=generator).float()
    moment = torch.randint(0, 3, (columns,), generator=generator).float()
    before = weight.clone()
    result = wanda.pruned(weight, moment, ratio)
    assert torch.equal(weight, before)  # the original may be a page of a file
    expected = before.clone()
    metric = before.abs() * moment.sqrt()
    order = metric.sort(dim=1, stable=True).indices[:, : int(columns * ratio)]
    expected.scatter_(1, order, 0)
    assert torch.equal(result, expected)


def test_column_sums_accumulate_beyond_bfloat16():
    x = torch.full((4096, 3), 1.0078125, dtype=torch.bfloat16)
    expected = 4096 * float(x[0, 0].double()) ** 2
    assert column_square_sums(x).tolist() == pytest.approx([expected] * 3, rel=1e-6)
