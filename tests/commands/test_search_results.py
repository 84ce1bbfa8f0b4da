"""What a search's winners are judged by on test rows.

python -m pytest tests/commands/test_search_results.py
"""

import numpy as np
import pytest

pytest.importorskip("optuna")

from utils.commands.evaluated import Evaluated
from utils.commands.search_results import figure_of_gains
from utils.evaluation.figures import all_figures
from utils.evaluation.statistics import TaskLosses
from utils.searching.objective import Objective

NAMES = ("base", "expert", "one", "two")


def task(gain: float) -> TaskLosses:
    """Four rows; the expert is `gain` nats a row better than the base, the candidates 1 and 2."""
    below = np.array([0.0, gain, 1.0, 2.0])
    nll = 20 - below[:, None] + np.linspace(0, 1, 4)
    return TaskLosses(NAMES, nll, np.full((4, 4), 5), "base", "expert")


@pytest.mark.parametrize(
    ("kind", "expected"), [("worst", [0.25, 0.5]), ("weighted", [0.25 / 4 + 3 * 0.5 / 4, 0.5 / 4 + 3 / 4])]
)
def test_the_figure_is_that_of_the_tasks_with_a_gain(kind, expected):
    """The third task, of the largest weight, has none on test rows."""
    own = Objective.of(kind, ("code", "math", "law"), {"code": 1, "math": 3, "law": 9})
    losses = {"code": task(4.0), "math": task(2.0), "law": task(-1.0)}
    gains = np.stack([losses[name].gain() for name in ("code", "math")])
    assert figure_of_gains(own, losses)(gains)[2:] == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["worst", "weighted"])
@pytest.mark.parametrize("there", [True, False])
def test_without_a_gain_on_what_it_goes_by_there_is_no_figure(kind, there):
    """`there`: a task without a weight has a gain; the least gain counts that one, too."""
    own = Objective.of(kind, ("code", "math"), {"code": 1, "math": 0})
    losses = {"code": task(-1.0), "math": task(2.0 if there else -1.0)}
    figure = figure_of_gains(own, losses)
    assert (figure is None) == (kind == "weighted" or not there)
    figures = {one.name: one for one in all_figures(losses, "one", ("two",), None, chosen_by=figure)}
    found = Evaluated((), figures, None, "one", "", "two", None, 0, 0.0)
    assert found.by_objective == (figure is not None)


def test_a_figure_of_no_task_is_none_that_is_known():
    figures = {one.name: one for one in all_figures({"code": task(-1.0)}, "one", ("two",), None, chosen_by=np.sum)}
    assert not Evaluated((), figures, None, "one", "", "two", None, 0, 0.0).by_objective
