"""A search without models: recipes are their own numbers, losses a formula with noise row by row, the same every time."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from utils.evaluation.candidates import Candidate
from utils.evaluation.score_settings import ScoreSettings
from utils.evaluation.store import LossStore, score_new
from utils.evaluation.tasks import Task
from utils.pair.search import SearchSettings
from utils.searching.knowns import Known
from utils.searching.losses import Entrant, Losses
from utils.searching.objective import Objective
from utils.searching.points import DENSITY, LAMBDA, Point, Way
from utils.searching.recipes import Made
from utils.searching.rounds import Search, Yardstick
from utils.searching.space import Space
from utils.searching.study import SearchStudy

TASKS = ("code", "math")
BASE = Entrant("base", Candidate("base", model="base"))
BEST = {"task_arithmetic": 0.45, "ties": 0.9}  # the best lambda of each method
KNOWNS = [
    Known("uniform 0.3", Point("task_arithmetic", "uniform", {LAMBDA: 0.3})),
    Known("uniform 1.0", Point("task_arithmetic", "uniform", {LAMBDA: 1.0})),
    Known("outside", Point("task_arithmetic", "uniform", {LAMBDA: 5.0})),
]


class Formula:
    """In place of a scorer: nats per token rise with the distance from the best lambda. Counts its work.

    `stop_after` calls it is killed.
    """

    tasks = tuple(Task(name, 32 + place, (), (name,)) for place, name in enumerate(TASKS))  # digests differ
    settings = ScoreSettings()

    def __init__(self, stop_after: int | None = None) -> None:
        self.scored: list[tuple[str, str, int]] = []
        self.calls, self.stop_after = 0, stop_after

    def fingerprint(self, candidate: Candidate) -> str:
        return candidate.digest

    def score(self, candidates: Sequence[Candidate], rows: Mapping[str, Sequence[int]], keep=lambda table: None):
        self.calls += 1
        if self.stop_after is not None and self.calls > self.stop_after:
            raise KeyboardInterrupt
        found = []
        for one in candidates:
            key = one.model or str(one.recipe["number"])
            for task, numbers in rows.items():
                for row in numbers:
                    self.scored.append((one.name, task, row))
                    found.append((one.name, task, row, 20 * self.loss(one, key, task, row), 20))
        frame = pd.DataFrame(found, columns=["candidate", "task", "row", "nll", "tokens"])
        keep(frame)
        return frame

    def loss(self, one: Candidate, key: str, task: str, row: int) -> float:
        shared = _noise(task, row) + 2.0
        if one.model is not None:
            return shared + (0.5 if key == "base" else 0.0)
        if one.recipe["number"] > 0.95 and one.recipe["method"] == "ties":
            return float("nan")
        distance = one.recipe["number"] - BEST[one.recipe["method"]]
        return shared + 0.1 + 0.6 * distance**2 + 0.05 * _noise(one.name, task, row)


class FormulaMaker:
    """Makes "recipes" of points."""

    def make(self, point: Point) -> Made:
        return Made({"method": point.merge_method, "number": point.numbers[LAMBDA]}, stock=True)


def space(**settings) -> Space:
    ways = (Way("task_arithmetic", "uniform", (LAMBDA,)), Way("ties", "uniform", (LAMBDA, DENSITY)))
    return Space(SearchSettings(**settings), ways, ("code", "math"), blocks=1)


def a_search(
    folder: Path, score: Formula, *, pareto: bool = False, seed: int = 1, sampler="tpe", knowns=KNOWNS, **settings
) -> Search:
    folder.mkdir(exist_ok=True)
    identity = {"pair": "simulated", "space": space(**settings).plain(), "pareto": pareto}
    tasks = TASKS if pareto else ("mean gain kept",)
    study = SearchStudy(folder, space(**settings), identity, sampler=sampler, seed=seed, tasks=tasks)
    store = LossStore(folder / "losses")
    losses = Losses(lambda candidates, rows: score_new(score, store, candidates, rows)[0])
    rows = {task: list(range(24)) for task in TASKS}
    expert = Entrant("expert", Candidate("expert", model="expert"))
    losses.require([BASE, expert], rows)
    yardstick = Yardstick(rows, "base", np.array([0.5, 0.5]), Objective.of("mean", TASKS, {}), pareto)
    study.queue(knowns)
    return Search(study, FormulaMaker(), losses, yardstick, first_rows=4)


def run(search: Search, trials: int, batch: int = 5) -> None:
    """As the command does: what is unfinished, then batch after batch."""
    while (following := search.study.next_batch(trials, batch)) is not None:
        search.run_batch(*following)


def outcome(search: Search) -> list[tuple]:
    """All that a search came to: point, state, value, and how many rows were seen, trial by trial."""
    return [
        (
            repr(trial.user_attrs["point"]),
            trial.state.name,
            None if trial.values is None else tuple(trial.values),
            tuple(trial.user_attrs.get("rows", ())),
        )
        for trial in search.study.trials
    ]


def _noise(*key) -> float:
    """A number like a standard normal one, always the same for a key."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return sum(byte / 255 - 0.5 for byte in digest[:12])
