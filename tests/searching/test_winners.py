"""Whom a search ends with."""

from utils.searching.objective import Objective
from utils.searching.points import Point
from utils.searching.study import Finished
from utils.searching.winners import choose

OBJECTIVE = Objective.of("mean", ("a", "b"), {})


def trial(number: int, a: float, b: float, method: str = "ties", guidance: str = "uniform", **more) -> Finished:
    return Finished(number, 0, f"digest {number}", "", Point(method, guidance, {}, **more), {"a": a, "b": b}, True)


def test_the_best_the_best_for_any_mergekit_and_the_uniform_ones():
    trials = [
        trial(0, 0.2, 0.2),
        trial(1, 0.5, 0.5),
        trial(2, 0.9, 0.7, "guided_mean", "saliency_budget"),
        trial(3, 0.6, 0.6, weights={"x": 1.1, "y": 0.9}),
    ]
    found = choose(trials, OBJECTIVE, pareto=False)
    assert (found.best.number, found.stock.number) == (2, 3)
    assert [one.number for one in found.uniform] == [1, 0]
    assert [one.number for one in found.all] == [2, 3, 1, 0]


def test_a_uniform_winner_stands_first_and_once():
    found = choose([trial(0, 0.2, 0.2), trial(1, 0.9, 0.9)], OBJECTIVE, pareto=False)
    assert [one.number for one in found.all] == [1, 0] and found.other is None


def test_beside_a_uniform_winner_stands_the_best_that_is_none():
    trials = [trial(0, 0.9, 0.9), trial(1, 0.3, 0.3, guidance="lewis"), trial(2, 0.5, 0.5, guidance="lewis")]
    found = choose(trials, OBJECTIVE, pareto=False)
    assert [one.number for one in found.all] == [0, 2]


def test_the_front_is_whom_nobody_beats_on_both():
    trials = [trial(0, 0.9, 0.1), trial(1, 0.1, 0.9), trial(2, 0.5, 0.5), trial(3, 0.4, 0.4), trial(4, 0.9, 0.05)]
    found = choose(trials, OBJECTIVE, pareto=True)
    assert sorted(one.number for one in found.front) == [0, 1, 2]
