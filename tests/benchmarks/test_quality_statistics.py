"""The quality benchmark's intervals and words, against numerical integration and by hand."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.quality_statistics import Interval, by_seed, paired_interval, t_cdf, t_quantile, verdict


def integrated_cdf(value: float, freedom: int, steps: int = 20_000) -> float:
    """Simpson's rule over the density: an oracle that shares no formula with the code."""
    scale = math.gamma((freedom + 1) / 2) / math.sqrt(freedom * math.pi) / math.gamma(freedom / 2)
    width = value / steps
    total = 0.0
    for index in range(steps + 1):
        factor = 1 if index in (0, steps) else 4 if index % 2 else 2
        total += factor * (1 + (index * width) ** 2 / freedom) ** (-(freedom + 1) / 2)
    return 0.5 + scale * total * width / 3


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 7, 12, 31])
@pytest.mark.parametrize("value", [0.3, 1.0, 2.5, 6.0])
def test_distribution_is_the_integral_of_the_density(value, freedom):
    assert t_cdf(value, freedom) == pytest.approx(integrated_cdf(value, freedom), abs=1e-10)


@pytest.mark.parametrize(("freedom", "expected"), [(1, 12.7062), (2, 4.3027), (4, 2.7764), (7, 2.3646), (30, 2.0423)])
def test_quantiles_of_printed_tables(freedom, expected):
    assert t_quantile(0.975, freedom) == pytest.approx(expected, abs=5e-5)
    assert t_quantile(0.025, freedom) == pytest.approx(-expected, abs=5e-5)


@given(st.floats(0.01, 0.99), st.integers(1, 60))
def test_quantile_inverts_the_distribution(probability, freedom):
    assert t_cdf(t_quantile(probability, freedom), freedom) == pytest.approx(probability, abs=1e-9)


def test_an_interval_worked_out_by_hand():
    ours, control = {0: 0.7, 1: 0.8, 2: 0.9}, {2: 0.6, 0: 0.6, 1: 0.6}
    interval = paired_interval(ours, control)  # differences 0.1, 0.2, 0.3: mean 0.2, s 0.1
    half = 4.302652729 * 0.1 / math.sqrt(3)
    assert (interval.mean, interval.seeds) == (pytest.approx(0.2), 3)
    assert (interval.low, interval.high) == (pytest.approx(0.2 - half), pytest.approx(0.2 + half))
    assert not interval.excludes_zero


@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5)), min_size=2, max_size=8), st.floats(-3, 3))
def test_what_both_share_cancels(pairs, shift):
    ours, control = ({seed: pair[side] for seed, pair in enumerate(pairs)} for side in (0, 1))
    plain = paired_interval(ours, control)
    moved = paired_interval({s: v + shift for s, v in ours.items()}, {s: v + shift for s, v in control.items()})
    assert (moved.mean, moved.low, moved.high) == pytest.approx((plain.mean, plain.low, plain.high), abs=1e-9)


def test_other_seeds_are_refused():
    with pytest.raises(ValueError, match="keys"):
        paired_interval({0: 1.0, 1: 1.0}, {0: 1.0, 2: 1.0})
    with pytest.raises(ValueError, match="keys"):
        paired_interval({}, {})


def test_one_seed_gives_no_verdict():
    interval = paired_interval({3: 0.5}, {3: 0.4})
    assert math.isinf(interval.high) and not interval.excludes_zero
    assert verdict(interval).startswith("one seed says nothing certain: +10.0 points")


@pytest.mark.parametrize(
    ("interval", "words"),
    [
        (Interval(0.08, 0.05, 0.11, 5), "helps: +8.0 points, 95 % interval +5.0 to +11.0, 5 seeds"),
        (Interval(-0.08, -0.11, -0.05, 5), "hurts: -8.0 points, 95 % interval -11.0 to -5.0, 5 seeds"),
        (Interval(0.01, -0.02, 0.04, 3), "no difference seen: +1.0 points, 95 % interval -2.0 to +4.0, 3 seeds"),
    ],
)
def test_words(interval, words):
    assert verdict(interval) == words


def test_a_seed_counts_once():
    assert by_seed([{"seed": 1, "kept": 0.5}, {"seed": 0, "kept": 0.25}], "kept") == {1: 0.5, 0: 0.25}
    with pytest.raises(ValueError, match="twice"):
        by_seed([{"seed": 1, "kept": 0.5}, {"seed": 1, "kept": 0.25}], "kept")
