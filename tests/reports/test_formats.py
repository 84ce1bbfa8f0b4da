"""Numbers as people read them."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from utils.reports.formats import count, decimals_for, duration, interval, number, p_value, percent
from utils.reports.values import Estimate

MINUS = "\N{MINUS SIGN}"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.5, "0.50"),
        (-0.5, f"{MINUS}0.50"),
        (-0.001, "0.00"),
        (None, "\N{EN DASH}"),
        (math.nan, "\N{EN DASH}"),
        (math.inf, "\N{INFINITY}"),
    ],
)
def test_number(value, shown):
    assert number(value, 2) == shown


def test_signs():
    assert number(0.5, 1, signed=True) == "+0.5" and number(0.0, 1, signed=True) == "0.0"
    assert number(-math.inf, 1, signed=True) == f"{MINUS}\N{INFINITY}"
    assert percent(-0.2, 1) == f"{MINUS}20.0%" and percent(None) == "\N{EN DASH}"
    assert interval(Estimate(0.0, -0.1, 0.2), 1, scale=100, signed=True) == f"{MINUS}10.0 to +20.0"
    assert interval(Estimate(0.0, None, 0.2), 1) == ""


@given(st.floats(-1e6, 1e6), st.integers(0, 6))
def test_a_shown_number_reads_back(value, decimals):
    assert math.isclose(
        float(number(value, decimals).replace(MINUS, "-")), value, abs_tol=0.5001 * 10**-decimals, rel_tol=0
    )


@given(st.floats(1e-4, 1e4), st.floats(-10, 10))
def test_decimals_distinguishes_values(spread, middle):
    decimals = decimals_for([middle, middle + spread])
    apart = abs(float(f"{middle + spread:.{decimals}f}") - float(f"{middle:.{decimals}f}"))
    assert apart == pytest.approx(spread, rel=0.05 if decimals < 6 else 0.5)


def test_durations_counts_and_p():
    assert [duration(seconds) for seconds in (1.26, 59.4, 60, 3725, None)] == [
        "1.3 s",
        "59 s",
        "1 min 0 s",
        "1 h 2 min",
        "",
    ]
    assert count(38400) == "38\N{NARROW NO-BREAK SPACE}400" and count(7) == "7"
    assert p_value(0.0001) == "p\N{NO-BREAK SPACE}<\N{NO-BREAK SPACE}0.001" and p_value(0.0204).endswith("0.020")
