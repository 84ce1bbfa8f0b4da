"""Where values lie: linear, inside the picture, with ticks at round numbers that stand where they say."""

import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from utils.reports.scale import Scale, scale_for

NUMBERS = st.floats(-1e4, 1e4)


@given(NUMBERS, st.floats(1e-3, 1e4), st.floats(0, 1))
def test_places_are_linear(low, span, share):
    scale = Scale(low, low + span, 10.0, 90.0)
    assert scale.place(low + share * span) == pytest.approx(10 + 80 * share, abs=1e-6)


def test_what_lies_outside_is_put_on_the_edge_and_known_to_be_there():
    scale = Scale(0.0, 1.0, 0.0, 100.0)
    assert (scale.place(2.0), scale.beyond(2.0)) == (100.0, 1)
    assert (scale.place(-5.0), scale.beyond(-5.0)) == (0.0, -1)
    assert scale.beyond(1.0) == 0


def test_a_scale_may_run_backwards():
    assert Scale(0.0, 1.0, 100.0, 0.0).place(0.25) == 75.0


@given(NUMBERS, st.floats(1e-3, 1e4), st.integers(3, 7))
def test_ticks_are_round_few_and_say_their_value(low, span, most):
    scale = Scale(low, low + span)
    ticks = scale.ticks(most)
    assert 1 <= len(ticks) <= most
    for value, label in ticks:
        assert low - 1e-6 * span <= value <= low + span * (1 + 1e-6)
        assert math.isclose(float(label.replace("\N{MINUS SIGN}", "-")), value, rel_tol=1e-9, abs_tol=1e-9 * span)
    assert len({label for _, label in ticks}) == len(ticks)


@given(st.lists(st.one_of(NUMBERS, st.just(math.nan), st.just(math.inf), st.none())))
def test_a_scale_holds_every_finite_value(values):
    scale = scale_for(values)
    finite = [value for value in values if value is not None and math.isfinite(value)]
    assert scale.low < scale.high
    assert all(scale.beyond(value) == 0 for value in finite)


@given(st.lists(NUMBERS, min_size=2), st.lists(NUMBERS, max_size=5))
def test_what_must_be_distinguished_takes_a_fifth_of_the_width_at_least(keep, others):
    span = max(keep) - min(keep)
    assume(span > 1e-3)
    scale = scale_for(others, keep)
    assert all(scale.beyond(value) == 0 for value in keep)
    assert span / (scale.high - scale.low) > 0.2
