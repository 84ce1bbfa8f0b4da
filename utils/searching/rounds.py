"""The search itself: ask for a batch of points, race their recipes over the validation rows, tell what they came to.

A batch's race depends on its points, on the losses and on the best of earlier batches, on nothing else. So a batch that
was killed half-way is raced again from the losses on file, and comes to what it would have come to.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from utils.errors import UserError, is_of_the_moment
from utils.evaluation.candidates import Candidate
from utils.searching import racing
from utils.searching.losses import Entrant, Losses
from utils.searching.objective import Objective
from utils.searching.points import Point
from utils.searching.recipes import Made
from utils.searching.row_means import Rows
from utils.searching.study import SearchStudy


class Maker(Protocol):
    """What makes recipes of points (`utils/searching/recipes.py`)."""

    def make(self, point: Point) -> Made:
        """The recipe of a point; raises `UserError` where there is none."""


@dataclass(frozen=True)
class Yardstick:
    """What gains are measured with, from all validation rows.

    `rows` are the numbers of the rows by task, in the order in which they are read; `base` is the base's digest. `scales`
    [tasks] is what a task's loss below the base's is divided by. `known` is what is known of each task's rows beside [rows,
    features], such as how much less the experts lose there than the base.
    """

    rows: Mapping[str, Sequence[int]]
    base: str
    scales: np.ndarray
    objective: Objective
    pareto: bool = False
    known: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def all_rows(self) -> int:
        """How many rows there are."""
        return sum(map(len, self.rows.values()))

    @property
    def whole(self) -> dict[str, list[int]]:
        """All rows of each task."""
        return self.first([len(own) for own in self.rows.values()])

    def first(self, seen: Sequence[int]) -> dict[str, list[int]]:
        """The first rows of each task."""
        return {task: list(numbers[:count]) for (task, numbers), count in zip(self.rows.items(), seen, strict=True)}


@dataclass
class Racer:
    """A recipe in a race: `gains` [tasks] and how many rows it `saw` when it left, or all; `failure` where it has none.

    The best of those that are `uniform` stays to the end: it is what the winner will be compared with.
    """

    entrant: Entrant
    uniform: bool = False
    saw: int = 0
    gains: np.ndarray | None = None
    left: "Sequence[int] | None" = None
    failure: str = ""


@dataclass(frozen=True)
class Round:
    """What one round of a race did, for who looks on; `scored` is how many losses had to be computed."""

    batch: int
    candidates: int
    beaten: int
    rows: int
    scored: int


@dataclass
class Search:
    """All that a search holds while it runs.

    `margin` is by how much of a figure a candidate has to be better than the leader to stay. `check` raises `UserError` for a
    recipe that cannot be merged, before weights are read. `on_round` is called after every round; `may_score` before each
    that has to score, with its candidates and how many losses: it raises to end the search.
    """

    study: SearchStudy
    maker: Maker
    losses: Losses
    yardstick: Yardstick
    first_rows: int
    margin: float = 0.0
    check: Callable[[Candidate], object] = lambda candidate: None
    on_round: Callable[[Round], None] = lambda done: None
    may_score: Callable[[Sequence[Candidate], int], None] = lambda candidates, losses: None

    def run_batch(self, number: int, size: int) -> None:
        """Ask for what is missing of a batch, race it, and tell every trial of it."""
        asked = self.study.batch(number)
        self.study.ask(number, size - len(asked))
        entrants: dict[int, Entrant] = {}
        distinct: dict[str, Racer] = {}
        for trial in self.study.batch(number):
            point = Point.read(trial.user_attrs["point"])
            entrant = self._entrant(trial.number, point)
            if entrant is not None:
                entrants[trial.number] = entrant
                distinct.setdefault(entrant.digest, Racer(entrant)).uniform |= point.uniform
        self._race(number, list(distinct.values()))
        for trial, entrant in entrants.items():
            self._tell(trial, distinct[entrant.digest])

    def champions(self, before: int) -> list[Racer]:
        """The best of the batches before one, of those that saw all rows: one, or the front; and the best uniform one. Their
        losses are at hand."""
        finished = [trial for trial in self.study.finished(self.yardstick.all_rows) if trial.batch < before]
        if not finished:
            return []
        gains = np.array([[trial.gains[task] for task in self.yardstick.objective.tasks] for trial in finished])
        figure = self.yardstick.objective.figure(gains)
        if self.yardstick.pareto:
            best = [place for place, own in enumerate(gains) if not _dominated(own, gains)]
        else:
            best = [int(figure.argmax())]
        uniform = [place for place, trial in enumerate(finished) if trial.point.uniform]
        best += [max(uniform, key=lambda place: figure[place])] if uniform else []
        found: dict[str, Racer] = {}
        for one in (finished[place] for place in best):
            found.setdefault(one.digest, Racer(self._again(one.point))).uniform |= one.point.uniform
        for seen in self.schedule():  # in the steps in which they are kept
            self.losses.require([racer.entrant for racer in found.values()], self.yardstick.first(seen))
        return list(found.values())

    def _again(self, point: Point) -> Entrant:
        made = self.maker.make(point)
        return Entrant(made.digest, Candidate(made.digest[:16], recipe=made.data))

    def schedule(self) -> list[tuple[int, ...]]:
        """Rows of each task seen after each round."""
        return racing.schedule([len(own) for own in self.yardstick.rows.values()], self.first_rows)

    def _entrant(self, trial: int, point: Point) -> Entrant | None:
        """The candidate of a trial; a point without a recipe is a failed trial.

        Raises:
            UserError: the system refused something just then, a read of a model's file for example.
        """
        try:
            entrant = self._again(point)
            self.check(entrant.candidate)
        except UserError as error:
            if is_of_the_moment(error):
                raise
            self.study.fail(trial, str(error))
            return None
        self.study.note(trial, entrant.digest)
        return entrant

    def _race(self, number: int, racers: list[Racer]) -> None:
        """Race all of a batch at once: in every round those that are left see the rows so far."""
        champions = self.champions(number)
        alive = list(racers)
        for seen in self.schedule():
            if not alive:
                break
            rows = self.yardstick.first(seen)
            missing = self.losses.missing([racer.entrant for racer in alive], rows)
            if missing:
                self.may_score([racer.entrant.candidate for racer in alive], missing)
            self.losses.require([racer.entrant for racer in alive], rows)
            entered = len(alive)
            alive = self._finite(alive, rows)
            alive = self._unbeaten(alive, champions, rows, seen)
            self.on_round(Round(number, entered, entered - len(alive), sum(seen), missing))
        self._settle(racers, [racer.entrant.digest for racer in champions])

    def _finite(self, racers: list[Racer], rows: Mapping[str, Sequence[int]]) -> list[Racer]:
        table = self.losses.table([racer.entrant.digest for racer in racers], rows)
        sound = np.isfinite(table).all(axis=1) if racers else []
        for racer, is_sound in zip(racers, sound, strict=True):
            if not is_sound:
                racer.failure = "the merge, or its loss on a row, is not a finite number"
        return [racer for racer in racers if not racer.failure]

    def _unbeaten(
        self, racers: list[Racer], champions: Sequence[Racer], rows: Mapping[str, list[int]], seen: Sequence[int]
    ) -> list[Racer]:
        """Those that no other one, the champions among them, beats on these rows; on all rows there is nothing to save by
        leaving. A uniform one is to be beaten by a uniform one."""
        for racer in racers:
            racer.saw, racer.left = sum(seen), None
        if sum(seen) == self.yardstick.all_rows:
            return racers
        lost = self._lost(racers, champions, rows)
        uniform, best_uniform = ([racer for racer in some if racer.uniform] for some in (racers, champions))
        lost_to_uniform = self._lost(uniform, best_uniform, rows)
        for racer in racers:
            is_lost = racer.entrant.digest in (lost_to_uniform if racer.uniform else lost)
            racer.left = tuple(seen) if is_lost else None
        return [racer for racer in racers if racer.left is None]

    def _lost(self, racers: Sequence[Racer], champions: Sequence[Racer], rows: Mapping[str, list[int]]) -> set[str]:
        """The digests of those that another one, or a champion, beats on these rows."""
        own = [racer.entrant.digest for racer in racers]
        others = [racer.entrant.digest for racer in champions if racer.entrant.digest not in own]
        if not own:
            return set()
        table, read = self.losses.table([*own, *others], rows), self._rows(rows)
        base, scales, whole = self._base(rows), self.yardstick.scales, self._rows(self.yardstick.whole)
        if self.yardstick.pareto:
            lost = racing.dominated(table, read, base, scales, whole=whole, margin=self.margin)
        else:
            objective = self.yardstick.objective
            lost = racing.beaten(table, read, base, scales, objective, whole=whole, margin=self.margin)
        return {digest for digest, is_lost in zip(own, lost, strict=False) if is_lost}

    def _settle(self, racers: Sequence[Racer], champions: Sequence[str]) -> None:
        """Gains on all rows: as they are for those that saw them, else by what they fell behind the best one."""
        rows = self.yardstick.whole
        read, scales = self._rows(rows), self.yardstick.scales
        whole = [
            racer
            for racer in racers
            if not racer.failure and (racer.left is None or racer.saw == self.yardstick.all_rows)
        ]
        digests = [*(racer.entrant.digest for racer in whole), *champions]
        if not digests:
            return
        kept = racing.gains(self.losses.table(digests, rows), read, self._base(rows), scales)
        for racer, gains in zip(whole, kept, strict=False):
            racer.gains = gains
        best = int(self.yardstick.objective.figure(kept).argmax())
        for racer in racers:
            if racer.failure or racer.gains is not None:
                continue
            seen = self.yardstick.first(racer.left)
            own, leader = self.losses.table([racer.entrant.digest, digests[best]], seen)
            some = self._rows(seen)
            racer.gains = racing.estimate(own, leader, some, kept[best], self._base(seen), scales, read)
            assert np.isfinite(racer.gains).all()

    def _rows(self, rows: Mapping[str, Sequence[int]]) -> Rows:
        """The first rows of each task, so many as are given."""
        task = np.repeat(np.arange(len(rows)), [len(own) for own in rows.values()])
        known = [self.yardstick.known[name][: len(own)] for name, own in rows.items() if self.yardstick.known]
        return Rows(task, self.losses.sizes(self.yardstick.base, rows), np.concatenate(known) if known else None)

    def _base(self, rows: Mapping[str, Sequence[int]]) -> np.ndarray:
        return self.losses.table([self.yardstick.base], rows)[0]

    def _tell(self, trial: int, racer: Racer) -> None:
        if racer.failure:
            self.study.fail(trial, racer.failure)
            return
        objective = self.yardstick.objective
        values = racer.gains if self.yardstick.pareto else [objective.figure(racer.gains)]
        gains = dict(zip(objective.tasks, map(float, racer.gains), strict=True))
        self.study.tell(trial, list(map(float, values)), gains, racer.saw, self.yardstick.all_rows)


def known_of_rows(nll: np.ndarray, base: int, own: int, others: Sequence[int]) -> np.ndarray:
    """What is known of a task's rows before a race [rows, 1 or 2]: by how much its own expert is below the base, and by how
    much the others are on average, where there are any.

    Args:
        nll: negative log-likelihoods of the pair's models [models, rows].
        base, own, others: their places.
    """
    changes = [nll[base] - nll[own]]
    changes += [nll[base] - nll[list(others)].mean(axis=0)] if others else []
    return np.stack(changes, axis=1)


def _dominated(own: np.ndarray, others: np.ndarray) -> bool:
    return bool(((others >= own).all(axis=1) & (others > own).any(axis=1)).any())
