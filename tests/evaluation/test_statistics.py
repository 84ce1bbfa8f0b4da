"""Paired statistics against formulas written another way.

python -m pytest tests/evaluation/test_statistics.py
"""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from utils.evaluation.figures import all_figures, perplexity
from utils.evaluation.statistics import (
    TaskLosses,
    holm,
    interval,
    mcnemar_exact,
    resample,
    two_sided,
)

NAMES = ("base", "expert", "one", "two")


def losses(rows: int = 30, seed: int = 0, gain: float = 3.0) -> TaskLosses:
    """Base and expert `gain` nats a row apart, two candidates in between."""
    generator = np.random.default_rng(seed)
    common = 20 + generator.normal(0, 4, rows)
    shares = np.array([0.0, 1.0, 0.6, 0.3])
    nll = common - gain * shares[:, None] + generator.normal(0, 0.3, (4, rows))
    return TaskLosses(NAMES, nll, np.tile(generator.integers(5, 9, rows), (4, 1)), "base", "expert")


def test_gain_is_0_for_the_base_1_for_the_expert_and_a_ratio_of_sums_between():
    task = losses()
    sums = {name: sum(task.of(name).tolist()) for name in NAMES}
    expected = [(sums["base"] - sums[name]) / (sums["base"] - sums["expert"]) for name in NAMES]
    assert task.gain() == pytest.approx(expected) and expected[:2] == [0.0, 1.0]
    assert task.loss()[2] == pytest.approx(sums["one"] / task.tokens[2].sum())


def test_an_expert_that_is_no_better_has_no_gain_to_keep():
    assert np.isnan(losses(gain=-3.0).gain()).all()


def test_intervals_are_those_of_a_bootstrap_row_by_row():
    tasks = {"a": losses(40, 1), "b": losses(25, 2)}
    found = resample(tasks, draws=4000, seed=5)
    generator, draws = np.random.default_rng(99), []
    for _ in range(4000):
        each = []
        for task in tasks.values():
            rows = generator.integers(0, task.rows, task.rows)
            base, expert, one, two = (sum(task.of(name)[row] for row in rows) for name in NAMES)
            each.append((two - one) / (base - expert))
        draws.append(sum(each) / 2)
    expected = np.quantile(draws, [0.025, 0.975])
    ours = found.mean_gain("one", "two")
    assert [ours.low, ours.high] == pytest.approx(expected, abs=0.01)
    assert ours.value == pytest.approx(np.mean([task.gain()[2] - task.gain()[3] for task in tasks.values()]))
    assert ours.low < ours.value < ours.high and ours.p < 0.01
    swapped = found.mean_gain("two", "one")
    assert (swapped.low, swapped.high) == pytest.approx((-ours.high, -ours.low))


def test_the_least_share_is_drawn_task_by_task():
    found = resample({"a": losses(40, 1), "b": losses(25, 2)}, draws=500)
    draws = np.minimum(found.gains["a"], found.gains["b"])
    shares = [np.minimum(found.tasks["a"].gain()[place], found.tasks["b"].gain()[place]) for place in (2, 3)]
    alone, apart = found.worst_gain("one"), found.worst_gain("one", "two")
    assert alone.value == pytest.approx(shares[0])
    assert (alone.low, alone.high) == pytest.approx(np.quantile(draws[2], [0.025, 0.975]))
    assert apart.value == pytest.approx(shares[0] - shares[1])
    assert (apart.low, apart.high) == pytest.approx(np.quantile(draws[2] - draws[3], [0.025, 0.975]))


def test_every_comparison_with_the_reference_is_corrected_for_several_candidates():
    tasks = {"a": losses(12, 1), "b": losses(9, 2)}
    drawn = resample(tasks, draws=300)
    whole = all_figures(tasks, "base", ["one", "two"], None, drawn, lambda gains: gains[0])
    found = {one.name: one for one in whole}
    for task in tasks:
        for key, raw in (("loss_difference", drawn.loss), ("gain_difference", drawn.gain)):
            p_values = holm([raw(task, name, "base").p for name in ("one", "two")])
            assert [getattr(found[name].tasks[task], key).p for name in ("one", "two")] == p_values
    for key, raw in (("difference", drawn.mean_gain), ("worst_difference", drawn.worst_gain)):
        assert [getattr(found[name], key).p for name in ("one", "two")] == holm(
            [raw(name, "base").p for name in ("one", "two")]
        )
    assert found["one"].chosen_by.value == pytest.approx(tasks["a"].gain()[2])
    assert found["base"].difference is None


def test_pairing_takes_the_noise_that_all_share_out():
    found = resample({"a": losses()}, draws=2000)
    apart, alone = found.loss("a", "one", "two"), found.loss("a", "one")
    assert apart.high - apart.low < (alone.high - alone.low) / 5


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    inside = 0
    for seed in range(200):
        generator = np.random.default_rng(seed)
        values = generator.normal(1.0, 2.0, (1, 40))
        task = TaskLosses(("base",), values, np.ones_like(values), "base", None)
        found = resample({"a": task}, draws=400, seed=seed).loss("a", "base")
        inside += found.low <= 1.0 <= found.high
    assert 0.88 <= inside / 200 <= 0.99


def test_the_same_candidate_does_not_differ_from_itself():
    found = resample({"a": losses()}, draws=100).mean_gain("one", "one")
    assert (found.value, found.low, found.high, found.p) == (0.0, 0.0, 0.0, 1.0)


def test_a_candidate_without_losses_has_no_interval():
    task = losses()
    task.nll[2] = np.nan
    found = resample({"a": task}, draws=100)
    assert math.isnan(found.mean_gain("one").value) and math.isnan(found.mean_gain("one", "two").p)
    assert math.isfinite(found.mean_gain("two").low)


def test_a_perplexity_that_float64_cannot_hold_is_infinite():
    assert perplexity(1000.0) == math.inf and math.isnan(perplexity(math.nan))
    assert perplexity(2.5) == pytest.approx(math.exp(2.5))


def test_interval_and_p_of_known_draws():
    draws = np.arange(1, 1001) / 1000
    found = interval(0.5, draws, 0.9)
    assert (found.low, found.high) == pytest.approx((0.05, 0.95), abs=0.002)
    assert two_sided(draws) == pytest.approx(2 / 1001)
    assert two_sided(np.array([-1.0, 1.0])) == 1.0


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_is_the_step_down_procedure(p_values):
    corrected = holm(p_values)
    for level in (0.01, 0.05, 0.2, 0.5):
        order, rejected = sorted(range(len(p_values)), key=lambda place: p_values[place]), set()
        for rank, place in enumerate(order):  # rejects until the first that is too large
            if p_values[place] * (len(p_values) - rank) > level:
                break
            rejected.add(place)
        assert rejected == {place for place, p in enumerate(corrected) if p <= level}


def test_holm_passes_over_what_is_not_known():
    assert holm([0.01, math.nan, 0.04])[::2] == [0.02, 0.04]


@pytest.mark.parametrize("split", [(0, 0), (0, 5), (1, 7), (4, 4), (6, 3)])
def test_mcnemar_counts_all_ways_to_split(split):
    total, least = sum(split), min(split)
    ways = [sum(signs) for signs in itertools.product((0, 1), repeat=total)]
    as_uneven = sum(min(heads, total - heads) <= least for heads in ways)
    assert mcnemar_exact(*split) == pytest.approx(min(1.0, as_uneven / len(ways)))
