"""Means over rows of which some were read: formulas written another way, and how near they come."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from utils.searching.row_means import Rows, row_means

TASKS = 2


def drawn(seed: int, there: int = 40, features: int = 2, noise: float = 0.3):
    """All rows of two tasks, and values of three candidates that are a mixture of the features and noise."""
    rng = np.random.default_rng(seed)
    task, tokens = np.repeat([0, 1], there), rng.integers(5, 60, TASKS * there).astype(float)
    known = rng.normal(0.5, 0.4, (TASKS * there, features)) * tokens[:, None]
    values = rng.normal(0.5, 0.5, (3, features)) @ known.T + rng.normal(0, noise, (3, TASKS * there)) * np.sqrt(tokens)
    return Rows(task, tokens, known), values, rng


def some(rng, there: int, count: int) -> np.ndarray:
    return np.concatenate([task * there + rng.permutation(there)[:count] for task in range(TASKS)])


def ratio(values, rows):
    """Sums over sums [candidates, tasks]."""
    own = [rows.task == task for task in range(TASKS)]
    return np.stack([values[:, each].sum(axis=1) / rows.tokens[each].sum() for each in own], axis=1)


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1), st.integers(0, 2), st.integers(6, 30))
def test_a_mean_is_what_the_fitted_line_predicts_of_all_rows(seed, features, count):
    """The same by a fit of values to tokens and features as they are, added up over all rows."""
    whole, values, rng = drawn(seed, features=features)
    places = some(rng, 40, count)
    means = row_means(values[:, places], whole.part(places), TASKS, whole)
    for task in range(TASKS):
        own, all_of_it = places[whole.task[places] == task], whole.task == task
        columns = np.column_stack([whole.tokens, whole.known])
        root = np.sqrt(whole.tokens[own])
        fitted, *_ = np.linalg.lstsq(columns[own] / root[:, None], (values[:, own] / root).T, rcond=None)
        expected = columns[all_of_it].sum(axis=0) @ fitted / whole.tokens[all_of_it].sum()
        assert means.value[:, task] == pytest.approx(expected, rel=1e-9, abs=1e-9)
        assert means.freedom[task] == count - 1 - features
    if not features:
        assert means.value == pytest.approx(ratio(values[:, places], whole.part(places)))


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1))
def test_of_all_rows_the_mean_is_the_plain_one_and_nothing_is_open(seed):
    whole, values, _ = drawn(seed)
    means = row_means(values, whole, TASKS, whole)
    assert means.value == pytest.approx(ratio(values, whole))
    assert not means.spread.any()


def test_the_mean_is_much_nearer_and_its_interval_holds():
    """Over 600 draws of 10 of 40 rows a task: half the error of sums over sums, and a 95 % interval that is one."""
    plain, fitted, outside, asked = [], [], 0, 0
    for seed in range(600):
        whole, values, rng = drawn(seed)
        places, truth = some(rng, 40, 10), ratio(values, whole)
        rows = whole.part(places)
        means = row_means(values[:, places], rows, TASKS, whole)
        plain.append(np.abs(ratio(values[:, places], rows) - truth).mean())
        fitted.append(np.abs(means.value - truth).mean())
        variance = (means.moved**2 @ np.eye(TASKS)[rows.task]) * means.spread
        outside += (np.abs(means.value - truth) > stats.t(means.freedom).ppf(0.975) * np.sqrt(variance)).sum()
        asked += truth.size
    assert np.mean(fitted) < 0.5 * np.mean(plain)
    assert 0.03 < outside / asked < 0.09


@pytest.mark.parametrize("count, freedom", [(3, 2), (4, 2), (5, 2), (6, 3)])
def test_with_few_rows_less_is_fitted(count, freedom):
    whole, values, rng = drawn(0)
    places = some(rng, 40, count)
    assert list(row_means(values[:, places], whole.part(places), TASKS, whole).freedom) == [freedom, freedom]


def test_what_says_nothing_is_not_fitted():
    """A feature that is the same per token for every row, and one that another one repeats on the rows read."""
    whole, values, rng = drawn(1)
    places = some(rng, 40, 8)
    even = Rows(whole.task, whole.tokens, 0.3 * whole.tokens[:, None])
    expected = ratio(values[:, places], whole.part(places))
    assert row_means(values[:, places], even.part(places), TASKS, even).value == pytest.approx(expected)
    twice = Rows(whole.task, whole.tokens, whole.known[:, [0, 0]])
    assert np.isfinite(row_means(values[:, places], twice.part(places), TASKS, twice).value).all()


def test_equal_candidates_come_to_equal_numbers():
    whole, values, rng = drawn(2)
    places = some(rng, 40, 9)
    means = row_means(np.repeat(values[:1, places], 7, axis=0), whole.part(places), TASKS, whole)
    assert (means.value == means.value[0]).all() and (means.moved == means.moved[0]).all()
