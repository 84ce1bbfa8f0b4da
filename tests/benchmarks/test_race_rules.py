"""Races replayed on tables of losses: what they read, and what is said of their winner."""

import numpy as np

from benchmarks.race_rules import Table, race, replay
from utils.searching.objective import Objective
from utils.searching.row_means import Rows

MEAN = Objective.of("mean", ("a", "b"), {})


def table(levels, noise: float = 0.001) -> Table:
    """Candidates of so many nats per token on 32 rows of two tasks, of equal length; the base has 3."""
    rng = np.random.default_rng(0)
    rows = Rows(np.repeat([0, 1], 32), np.full(64, 10.0))
    nll = (np.array(levels, float)[:, None] + rng.normal(0, noise, (len(levels), 64))) * 10
    return Table(nll, np.full(64, 30.0), rows, np.array([1.0, 1.0]))


def test_the_rest_leaves_after_the_first_round():
    found = table([1.5, 1.0, 2.0, 2.5])
    order = [np.arange(32), np.arange(32, 64)]
    assert race(found, order, MEAN, 4, 0.0) == (1, 4 * 8 + 56, 4 + 3)  # rounds of 4, 8, 16, 32 rows a task
    line = replay("made", found, "mean", 4, 0.0)
    assert (line.losses_read, line.of, line.rounds, line.behind, line.tied) == (88.0, 256, 7.0, 0.0, 1.0)


def test_near_equals_leave_within_a_margin_and_are_tied(tmp_path):
    found = table([1.0, 1.0, 1.0, 2.0])
    found.save(tmp_path / "made.npz")
    found = Table.read(tmp_path / "made.npz")
    strict, within = (replay("made", found, "mean", 4, margin) for margin in (0.0, 0.5))
    assert within.losses_read == 88.0 < strict.losses_read
    assert 0 < within.most_behind < 0.5
    best = int(found.figure(MEAN).argmax())
    assert found.tied(best, MEAN) and not found.tied(3, MEAN)
