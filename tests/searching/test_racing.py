"""Racing on simulated losses: formulas written another way, and how rarely the best candidate is lost."""

import itertools

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from scipy import stats

from utils.searching import racing
from utils.searching.objective import Objective, gain_scales
from utils.searching.row_means import Rows

TASKS = 2


def simulate(rng, candidates: int, rows: int, spread: float, noise: float):
    """Candidates of different true quality on rows of different length and difficulty, the base's losses being known."""
    task = np.repeat(np.arange(TASKS), rows)
    tokens = rng.integers(5, 60, TASKS * rows).astype(float)
    difficulty = rng.gamma(4.0, 0.5, TASKS * rows)
    true = rng.uniform(0.0, spread, (candidates, TASKS))
    # What a candidate does to a row varies from row to row; longer rows vary less per token.
    wobble = rng.normal(0.0, noise, (candidates, TASKS * rows)) / np.sqrt(tokens)
    per_token = difficulty + true[:, task] + wobble
    base = (difficulty + 1.0 + rng.normal(0.0, noise, TASKS * rows) / np.sqrt(tokens)) * tokens
    return per_token * tokens, Rows(task, tokens), base


def interleaved(rows: int) -> np.ndarray:
    """Positions that put the first rows of all tasks first."""
    return np.arange(TASKS * rows).reshape(TASKS, rows).T.reshape(-1)


MEAN = Objective.of("mean", ("a", "b"), {})
SCALES = np.array([1.0, 1.0])


def test_gains_are_those_of_sums_over_tokens():
    rng = np.random.default_rng(0)
    nll, rows, base = simulate(rng, 3, 7, 0.5, 0.3)
    found = racing.gains(nll, rows, base, np.array([0.5, 2.0]))
    for candidate in range(3):
        for task, scale in enumerate((0.5, 2.0)):
            own = [place for place in range(14) if rows.task[place] == task]
            tokens = sum(rows.tokens[place] for place in own)
            before, after = (
                sum(base[place] for place in own) / tokens,
                sum(nll[candidate, place] for place in own) / tokens,
            )
            assert found[candidate, task] == pytest.approx((before - after) / scale)


@pytest.mark.parametrize("margin", [0.0, 0.05])
@pytest.mark.parametrize("there", [None, 18, 12 * 10**4])
def test_with_rows_of_one_length_the_test_is_students_paired_one(there, margin):
    """One task, equal lengths: the ratio of sums is a mean, and the chance that of scipy's paired t test, the margin moving
    the other's losses; of a mean of rows without replacement, the variance is smaller by the share that was drawn."""
    rng = np.random.default_rng(1)
    nll = rng.normal(2.0, 0.3, (2, 12)) * 10
    rows, objective = Rows(np.zeros(12, int), np.full(12, 10.0)), Objective.of("mean", ("a",), {})
    best, other = sorted(range(2), key=lambda one: nll[one].sum())
    score = stats.ttest_rel(nll[other] + 10 * margin, nll[best]).statistic / np.sqrt(1 - 12 / (there or np.inf))
    expected = stats.t(11).sf(score)
    for level, verdict in ((expected * 1.001, True), (expected * 0.999, False)):
        drawn_from = None if there is None else Rows(np.zeros(there, int), np.full(there, 10.0))
        found = racing.beaten(nll, rows, rng.normal(20, 3, 12), np.array([1.0]), objective, level, drawn_from, margin)
        assert list(found) == [one == other and verdict for one in range(2)]


@pytest.mark.parametrize("margin", [0.0, 0.02])
@pytest.mark.parametrize("kind", ["mean", "worst", "weighted"])
def test_the_best_is_rarely_lost_by_more_than_the_margin_and_the_bad_leave(kind, margin):
    """Over 300 races of 24 candidates: what is lost to the winner is next to nothing, and most rows are never read."""
    rng = np.random.default_rng(2)
    objective = Objective.of(kind, ("a", "b"), {"a": 3.0, "b": 1.0})
    lost, read, regret, rows = 0, 0.0, [], 64
    for _ in range(300):
        nll, whole, base = simulate(rng, 24, rows, 0.6, 0.8)
        order = interleaved(rows)
        nll, base, whole = nll[:, order], base[order], Rows(whole.task[order], whole.tokens[order])
        full = objective.figure(racing.gains(nll, whole, base, SCALES))  # what a search without races would go by
        alive, before = np.arange(24), 0
        for seen in map(sum, racing.schedule((rows, rows), 8)):
            read += len(alive) * (seen - before) / (24 * 2 * rows)
            before = seen
            own, some = nll[alive][:, :seen], whole.first(seen)
            if seen < 2 * rows:
                alive = alive[~racing.beaten(own, some, base[:seen], SCALES, objective, whole=whole, margin=margin)]
        winner = alive[full[alive].argmax()]
        lost += full.max() - full[winner] > margin
        regret.append(full.max() - full[winner])
    assert lost / 300 < 0.05
    assert np.mean(regret) < 0.002 + margin / 10
    assert read / 300 < 0.5


def test_what_the_experts_do_to_each_row_spares_rows():
    """Candidates that are mixtures of two experts, and a little of their own: of the losses that a race reads beyond its first
    round and its winner's, less than half where it is known what the experts do to each row; the best is lost no more often."""
    rng, rows, races = np.random.default_rng(6), 64, 60
    least = 16 * 16 + 2 * (rows - 8)
    read, lost = {True: -races * least, False: -races * least}, {True: 0, False: 0}
    for _ in range(races):
        task, tokens = np.repeat([0, 1], rows), rng.integers(5, 60, 2 * rows).astype(float)
        experts = np.abs(rng.normal(0.6, 0.5, (2 * rows, 2))) * tokens[:, None]
        share = rng.uniform(0.2, 1.0, (16, 2))
        ahead = share @ experts.T + rng.normal(0, 0.03, (16, 2 * rows)) * np.sqrt(tokens)
        order = interleaved(rows)
        nll, base = -ahead[:, order], np.zeros(2 * rows)
        for is_known in (True, False):
            whole = Rows(task[order], tokens[order], experts[order] if is_known else None)
            figure, alive, before = racing.gains(nll, whole, base, SCALES).mean(axis=1), np.arange(16), 0
            for seen in map(sum, racing.schedule((rows, rows), 8)):
                read[is_known] += len(alive) * (seen - before)
                before = seen
                if seen < 2 * rows:
                    own, some = nll[alive][:, :seen], whole.first(seen)
                    alive = alive[~racing.beaten(own, some, base[:seen], SCALES, MEAN, whole=whole)]
            lost[is_known] += figure.argmax() not in alive
    assert 0 <= read[True] < 0.5 * read[False]
    assert lost[True] <= lost[False] + 1


def test_of_two_equal_candidates_seldom_one_is_dropped():
    rng = np.random.default_rng(3)
    dropped = 0
    for _ in range(2000):
        nll, rows, base = simulate(rng, 2, 16, 0.0, 0.8)
        dropped += racing.beaten(nll, rows, base, SCALES, MEAN).any()
    # either may lead, so twice as often as the level says
    assert racing.LEVEL < dropped / 2000 < 3 * racing.LEVEL


def test_too_few_rows_beat_nobody():
    nll = np.array([[1.0, 1.0, 1.0, 1.0], [9.0, 9.1, 9.2, 9.3]])
    rows = Rows(np.array([0, 0, 1, 1]), np.ones(4))
    assert not racing.beaten(nll, rows, np.zeros(nll.shape[1]), SCALES, MEAN).any()


def test_a_candidate_with_the_very_same_losses_is_not_beaten():
    nll = np.tile(np.linspace(1.0, 2.0, 10), (3, 1))
    rows = Rows(np.repeat([0, 1], 5), np.ones(10))
    assert not racing.beaten(nll, rows, np.zeros(nll.shape[1]), SCALES, MEAN).any()
    assert not racing.dominated(nll, rows, np.zeros(nll.shape[1]), SCALES).any()


@settings(max_examples=60)
@given(st.integers(0, 2**32 - 1))
def test_of_near_equals_one_stays_within_the_margin(seed):
    """Merges that do nearly the same to every row: a race ends with one of them, a front with those that are apart."""
    rng, margin = np.random.default_rng(seed), 0.05
    task, tokens = np.repeat([0, 1], 8), rng.integers(5, 60, 16).astype(float)
    nll = (rng.gamma(4.0, 0.5, 16) + rng.uniform(0, 0.15, (6, 2))[:, task] + rng.normal(0, 1e-4, (6, 16))) * tokens
    rows, base = Rows(task, tokens), np.zeros(16)
    gains = racing.gains(nll, rows, base, SCALES)
    figure = gains.mean(axis=1)
    left = racing.beaten(nll, rows, base, SCALES, MEAN, margin=margin)
    assert list(left) == [place != figure.argmax() for place in range(6)]
    front = ~racing.dominated(nll, rows, base, SCALES, margin=margin)
    assert front.any()
    for own in np.flatnonzero(~front):
        assert any((gains[own] < gains[other] + margin + 1e-3).all() for other in np.flatnonzero(front))
    assert front[figure.argmax()]


def test_with_a_margin_the_very_same_losses_are_read_once():
    nll = np.tile(np.linspace(1.0, 2.0, 10), (3, 1))
    rows = Rows(np.repeat([0, 1], 5), np.ones(10))
    assert list(racing.beaten(nll, rows, np.zeros(10), SCALES, MEAN, margin=0.01)) == [False, True, True]
    assert list(racing.dominated(nll, rows, np.zeros(10), SCALES, margin=0.01)) == [False, True, True]


def test_on_a_front_each_task_has_its_best():
    """One is best at a, one at b, one between them, one worse than the middle at both: that one alone leaves."""
    rng = np.random.default_rng(4)
    task, tokens = np.repeat([0, 1], 40), np.full(80, 20.0)
    level = np.array([[1.0, 2.0], [2.0, 1.0], [1.4, 1.4], [1.7, 1.7]])
    nll = (level[:, task] + rng.normal(0, 0.02, (4, 80))) * tokens
    rows = Rows(task, tokens)
    assert list(racing.dominated(nll, rows, np.zeros(nll.shape[1]), SCALES)) == [False, False, False, True]
    assert racing.beaten(nll, rows, np.zeros(nll.shape[1]), SCALES, MEAN)[3]


@given(st.lists(st.integers(1, 200), min_size=1, max_size=4), st.integers(1, 300))
def test_the_schedule_grows_and_ends_with_every_row(per_task, first):
    rounds = racing.schedule(per_task, first)
    assert rounds[-1] == tuple(per_task)
    for before, after in itertools.pairwise(rounds):
        assert all(one <= two for one, two in zip(before, after, strict=True)) and before != after
    assert all(seen <= there for each in rounds for seen, there in zip(each, per_task, strict=True))


def test_the_estimate_of_a_beaten_one_is_nearer_than_its_own_rows_say():
    """What merges of the same models do to a row is alike; against the leader's figure on all rows, that cancels."""
    rng = np.random.default_rng(5)
    naive, paired = [], []
    for _ in range(200):
        nll, rows, base = simulate(rng, 2, 48, 0.5, 0.1)
        nll = nll + rng.normal(0.0, 0.8, 96) * np.sqrt(rows.tokens)
        order = interleaved(48)
        nll, base, rows = nll[:, order], base[order], Rows(rows.task[order], rows.tokens[order])
        some = rows.first(16)
        truth = racing.gains(nll, rows, base, SCALES)
        estimate = racing.estimate(nll[0, :16], nll[1, :16], some, truth[1], base[:16], SCALES)
        paired.append(np.abs(estimate - truth[0]).mean())
        naive.append(np.abs(racing.gains(nll[:1, :16], some, base[:16], SCALES)[0] - truth[0]).mean())
    assert np.mean(paired) < np.mean(naive) / 3


@settings(max_examples=60)
@given(st.integers(0, 2**32 - 1))
def test_slopes_are_the_figures_derivative(seed):
    rng = np.random.default_rng(seed)
    gains = rng.uniform(-1, 1, (1, 3))
    for kind in ("mean", "worst", "weighted"):
        objective = Objective.of(kind, ("a", "b", "c"), {"a": 1, "b": 2, "c": 0.5})
        step = 1e-7 * rng.choice([-1.0, 1.0], 3)
        moved = objective.figure(gains + step) - objective.figure(gains)
        assert moved == pytest.approx(objective.slopes(gains)[0] @ step, abs=1e-12)


def test_a_task_whose_expert_gains_nothing_is_scaled_by_its_loss():
    scales, without = gain_scales(np.array([2.0, 4.0, 3.0]), np.array([1.5, 4.1, np.nan]))
    assert list(scales) == [0.5, 4.0, 3.0]
    assert without == [1, 2]
