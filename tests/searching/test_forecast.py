"""Forecasts are sums of what rounds take."""

import pytest

from utils.searching.forecast import Pace, duration, forecast


def test_a_forecast_is_the_sum_of_its_rounds():
    """10 candidates in 2 batches, rounds of 8 and 16 and 64 rows; 3 at the end on 100 rows."""
    pace = Pace.measured(weights=5.0, forward=8.0, candidates=5, losses=40)
    assert (pace.weights, pace.row) == (1.0, 0.2)
    found = forecast(pace, 10, 2, [8, 16, 64], 3, 100)
    end = 3 * 1.0 + 300 * 0.2
    assert found.low == pytest.approx(end + 10 + 80 * 0.2 + (2 + 16 * 0.2) + (2 + 96 * 0.2))
    assert found.high == pytest.approx(end + 30 + 640 * 0.2)


@pytest.mark.parametrize(("seconds", "shown"), [(42.4, "42 s"), (600, "10 min"), (9000, "2.5 h")])
def test_durations_for_people(seconds, shown):
    assert duration(seconds) == shown
