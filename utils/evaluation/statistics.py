"""Paired statistics over rows, in numpy: share of a gain kept, bootstrap intervals, Holm, exact McNemar.

All candidates see the same rows, so every comparison is paired. What intervals and p-values speak of is the noise of the
text: other rows of the same kind. They say nothing of other trainings of the experts, nor of other seeds.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

Figure = Callable[[np.ndarray], np.ndarray]  # of gains [tasks, ...], one number for all tasks [...]
DRAWS = 10_000
LEVEL = 0.95
_AT_ONCE = 2**22  # entries of a matrix of counts


@dataclass(frozen=True)
class TaskLosses:
    """Losses of candidates on the rows of one task.

    `nll` [candidates, rows] is the summed negative log-likelihood of a row's scored tokens in nats (float64, NaN for a
    candidate that has none), `tokens` [candidates, rows] how many these are. `base` and `expert` are the candidates
    between which a gain is measured; `expert` is None for a text of no expert's kind.
    """

    names: tuple[str, ...]
    nll: np.ndarray = field(repr=False)
    tokens: np.ndarray = field(repr=False)
    base: str
    expert: str | None

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return self.nll.shape[1]

    def of(self, name: str) -> np.ndarray:
        """One candidate's losses, [rows]."""
        return self.nll[self.names.index(name)]

    def loss(self) -> np.ndarray:
        """Nats per token, [candidates]; every token counts alike."""
        return self.nll.sum(axis=1) / self.tokens.sum(axis=1)

    @property
    def has_gain(self) -> bool:
        """Whether the expert is better than the base, so that there is a gain to keep a share of."""
        return self.expert is not None and bool(self.of(self.base).sum() > self.of(self.expert).sum())

    def gain(self) -> np.ndarray:
        """The share of the expert's gain over the base that each candidate keeps, [candidates]: base 0, expert 1.

        NaN where the expert is no better than the base, so that there is no gain to keep a share of.
        """
        return _gain(self, self.nll.sum(axis=1, keepdims=True))[:, 0]


@dataclass(frozen=True)
class Interval:
    """An estimate with the ends of its interval, and where it is a difference its two-sided p-value."""

    value: float
    low: float
    high: float
    p: float = math.nan


@dataclass(frozen=True)
class Resampled:
    """The figures of many resamples of the rows, the same ones for all candidates.

    `gains` [tasks, candidates, draws] (tasks with an expert), `losses` [tasks, candidates, draws] (all tasks): nats per
    token.
    """

    names: tuple[str, ...]
    tasks: Mapping[str, TaskLosses] = field(repr=False)
    gains: Mapping[str, np.ndarray] = field(repr=False)
    losses: Mapping[str, np.ndarray] = field(repr=False)

    @property
    def measured(self) -> tuple[str, ...]:
        """The tasks with a gain to keep a share of."""
        return tuple(key for key, task in self.tasks.items() if task.has_gain)

    def over_tasks(self, figure: "Figure", name: str, against: str | None = None) -> Interval:
        """A figure of the shares of gain of the tasks `measured`, or how much larger it is than another candidate's.

        `figure` makes one number of gains [tasks, ...], in the order of `measured`: their mean, the least of them.
        """
        if not self.measured:
            return Interval(math.nan, math.nan, math.nan)
        points = figure(np.stack([self.tasks[key].gain() for key in self.measured]))
        return self._interval(points, figure(np.stack([self.gains[key] for key in self.measured])), name, against)

    def mean_gain(self, name: str, against: str | None = None) -> Interval:
        """The mean share of gain over the tasks that have one, or how much larger it is than another candidate's."""
        return self.over_tasks(mean, name, against)

    def worst_gain(self, name: str, against: str | None = None) -> Interval:
        """The same of the least share."""
        return self.over_tasks(least, name, against)

    def gain(self, task: str, name: str, against: str | None = None) -> Interval:
        """The same of one task."""
        return self._interval(self.tasks[task].gain(), self.gains[task], name, against)

    def loss(self, task: str, name: str, against: str | None = None) -> Interval:
        """Nats per token on one task, or how much larger they are than another candidate's."""
        return self._interval(self.tasks[task].loss(), self.losses[task], name, against)

    def _interval(self, points: np.ndarray, draws: np.ndarray, name: str, against: str | None) -> Interval:
        place = self.names.index(name)
        if against is None:
            return interval(points[place], draws[place])
        other = self.names.index(against)
        if other == place:
            return Interval(0.0, 0.0, 0.0, 1.0)
        difference = draws[place] - draws[other]
        found = interval(points[place] - points[other], difference)
        return Interval(found.value, found.low, found.high, two_sided(difference))


def mean(gains: np.ndarray) -> np.ndarray:
    """The mean over tasks of gains [tasks, ...]."""
    return gains.mean(axis=0)


def least(gains: np.ndarray) -> np.ndarray:
    """The least of the tasks' gains [tasks, ...]."""
    return gains.min(axis=0)


def resample(tasks: Mapping[str, TaskLosses], draws: int = DRAWS, seed: int = 0) -> Resampled:
    """Draw the rows of each task anew, with replacement, again and again: the paired bootstrap.

    Args:
        tasks: losses by task, all of the same candidates in the same order.
        draws: how often.
        seed: of numpy's generator.
    """
    names = next(iter(tasks.values())).names
    if any(task.names != names for task in tasks.values()):
        raise ValueError("all tasks need the same candidates in the same order")
    generator = np.random.default_rng(seed)
    gains, losses = {}, {}
    for key, task in tasks.items():
        sums, tokens = _resampled_sums(task, draws, generator)
        with np.errstate(divide="ignore", invalid="ignore"):
            losses[key] = sums / tokens
        if task.expert:
            gains[key] = _gain(task, sums)
    return Resampled(names, tasks, gains, losses)


def interval(value: float, draws: np.ndarray, level: float = LEVEL) -> Interval:
    """A value with the percentile interval of its draws; draws that are no number are left out."""
    known = draws[np.isfinite(draws)]
    if not known.size or not np.isfinite(value):
        return Interval(float(value), math.nan, math.nan)
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(value), float(low), float(high))


def two_sided(differences: np.ndarray) -> float:
    """The bootstrap's p-value that a difference is 0: twice the share of draws on the rarer side of it, at most 1."""
    known = differences[np.isfinite(differences)]
    if not known.size:
        return math.nan
    rarer = min((known <= 0).sum(), (known >= 0).sum())
    return float(min(1.0, 2 * (1 + rarer) / (1 + known.size)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's (1979) correction for several comparisons; NaN stays NaN and does not count as one."""
    known = sorted((p, place) for place, p in enumerate(p_values) if not math.isnan(p))
    found, floor = [math.nan] * len(p_values), 0.0
    for rank, (p, place) in enumerate(known):
        floor = max(floor, min(1.0, (len(known) - rank) * p))
        found[place] = floor
    return found


def mcnemar_exact(only_first: int, only_second: int) -> float:
    """Two-sided exact McNemar test of two candidates' right answers to the same questions.

    Args:
        only_first, only_second: how many questions only the first, and only the second, answered rightly.

    Returns:
        The probability, if each of those were as likely to be either's, of a split at least as uneven.
    """
    total = only_first + only_second
    tail = sum(math.comb(total, k) for k in range(min(only_first, only_second) + 1))
    return min(1.0, 2 * tail / 2**total)


def _gain(task: TaskLosses, sums: np.ndarray) -> np.ndarray:
    """Shares of gain from summed losses, [candidates, draws]."""
    base, expert = sums[task.names.index(task.base)], sums[task.names.index(task.expert)]
    whole = np.where(base > expert, base - expert, np.nan)
    return (base - sums) / whole


def _resampled_sums(task: TaskLosses, draws: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Sums of losses and of tokens over resampled rows, [candidates, draws] each.

    Summed by numpy itself: the last digits of a product of matrices are those of the BLAS, its threads and its blocks.
    """
    rows = task.rows
    sums, tokens = np.empty((2, len(task.names), draws))
    for start in range(0, draws, at_once := max(1, _AT_ONCE // rows)):
        stop = min(start + at_once, draws)
        picked = generator.integers(0, rows, (stop - start, rows))
        for place in range(len(task.names)):
            sums[place, start:stop] = task.nll[place][picked].sum(axis=1)
            tokens[place, start:stop] = task.tokens[place][picked].sum(axis=1)
    return sums, tokens
