"""Cuts found span by span select what whole-tensor selection by a sort selects."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from utils.merging.pieces.cuts import Cut, CutSearch, OpenCut, magnitude

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
LENGTH = 7  # of a span


def found_cuts(values: torch.Tensor, ranks: list[int]) -> list[Cut]:
    """Count all spans in turn, as often as asked, and close what is open."""
    spans = list(values.split(LENGTH))
    search = CutSearch(values.dtype, values.numel(), len(spans), ranks)

    def patterns(piece: torch.Tensor) -> torch.Tensor:
        return search.patterns(piece, torch.empty(piece.shape, dtype=search.kind.integer))

    again = True
    while again:
        for number, span in enumerate(spans):
            for piece in span.split(3):
                search.count(number, patterns(piece))
        again = search.end_round()
    for place, cut in enumerate(search.cuts):
        if isinstance(cut, OpenCut):
            first = cut.span * LENGTH
            pieces = [(first + 3 * number, patterns(piece)) for number, piece in enumerate(spans[cut.span].split(3))]
            search.close(place, pieces)
    assert search.finite == bool(values.isfinite().all())
    return search.cuts


def selected(values: torch.Tensor, cut: Cut) -> set[int]:
    """The indices that a cut selects."""
    found = set()
    for index, value in enumerate(values):
        floor = cut.floor(index)
        if floor < 0 or abs(value.item()) > magnitude(floor, values.dtype):
            found.add(index)
    return found


@given(data=st.data(), dtype=DTYPES)
def test_cuts_select_the_largest_and_of_ties_the_first(data, dtype):
    numbers = st.one_of(st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, 1e-7]), st.floats(-60, 60, width=16))
    values = torch.tensor(data.draw(st.lists(numbers, min_size=1, max_size=60))).to(dtype)
    ranks = data.draw(st.lists(st.integers(1, values.numel()), min_size=1, max_size=3))
    order = torch.sort(values.double().abs(), descending=True, stable=True).indices.tolist()
    for rank, cut in zip(ranks, found_cuts(values, ranks), strict=True):
        assert selected(values, cut) == set(order[:rank])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_not_finite_is_noticed(dtype, value):
    values = torch.arange(20.0).to(dtype)
    values[13] = value
    found_cuts(values, [5])  # asserts the flag


def test_the_floor_changes_at_the_place():
    cut = Cut(pattern=300, place=40)
    assert [cut.floor(0), cut.floor(39), cut.floor(40), cut.floor(90)] == [299, 299, 300, 300]
