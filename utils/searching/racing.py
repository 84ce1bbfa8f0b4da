"""Racing: many candidates over a few rows; those that a paired test shows to be beaten leave, the rest see more rows.

Candidates read the very same rows, so the test is one of differences row by row. A figure is linear in what a candidate's
loss is below the base's (`objective.py`), and a loss per token is a ratio of sums, so that with d_i the difference of two
candidates' nll on row i, in nats,

    D     = sum_t slope_t / scale_t * d_t,   d_t = sum_i d_i / sum_i tokens_i                   over the rows i of task t
    var D = sum_t (1 - n_t / N_t) n_t / (n_t - 1) * sum_i ( slope_t / scale_t * (d_i - tokens_i * d_t) / sum_i tokens_i )^2

and D / sqrt(var D) is held against Student's t. The n_t rows are drawn without replacement from the N_t of the race, and
what is asked is who is ahead on all of those: the more of them have been read, the less is open (Cochran, Sampling
Techniques, 1977, section 2.6). Each candidate is tested at `LEVEL` on its own: that a worse one stays
costs rows, that an equal one leaves costs nothing, and what must not leave is the best, which is one. Holm's correction
over all of them, at twice the level, reads more rows and loses the best more often, being strict with those far
behind and lenient with the last, which are the nearest. That the leader was chosen by the same rows favors it;
`tests/searching/test_racing.py` measures how rarely the best is lost.

With a margin m, what is tested is D + m: a candidate that is not better than the leader by more than m leaves as well. What
is nearly the leader's equal differs from it by little on every row and leaves at once, where without a margin it would stay
to the end; what it can cost is m, once a round at most, since a leader may be overtaken later (an indifference zone:
Bechhofer, 1954). `benchmarks/race_rules.py` replays races on tables of losses under several rules.
(Optuna's WilcoxonPruner tests one trial at a time, by ranks; losses here are weighed by tokens, the worst task is no mean
of rows, and a Pareto front has no single best.)
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtr

from utils.searching.objective import Objective

LEVEL = 0.01  # lower reads more rows, higher loses the best more often
_FEWEST_ROWS = 4  # of a task, for a variance worth its name


@dataclass(frozen=True)
class Rows:
    """The rows that losses stand for: `task` [rows] is each one's task by position, `tokens` [rows] its size."""

    task: np.ndarray
    tokens: np.ndarray

    def first(self, count: int) -> "Rows":
        """The first `count` of them."""
        return Rows(self.task[:count], self.tokens[:count])


def losses(nll: np.ndarray, rows: Rows, tasks: int) -> np.ndarray:
    """Sum over rows per token [candidates, tasks] of negative log-likelihoods [candidates, rows], both float64."""
    member = _members(rows, tasks)
    return (nll @ member) / (rows.tokens @ member)


def gains(nll: np.ndarray, rows: Rows, base: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Gain kept [candidates, tasks]; `base` [rows] is the base's negative log-likelihood of the same rows."""
    return losses(base - nll, rows, len(scales)) / scales


def schedule(per_task: Sequence[int], first: int, growth: int = 2) -> list[tuple[int, ...]]:
    """How many rows of each task have been seen after each round.

    Args:
        per_task: rows there are, by task.
        first: rows of each task in the first round.
        growth: each round's factor on the rows seen.

    Returns:
        At least one round; the last one sees every row.
    """
    seen, found = max(1, first), []
    while not found or found[-1] != tuple(per_task):
        found.append(tuple(min(count, seen) for count in per_task))
        seen *= growth
    return found


def beaten(
    nll: np.ndarray,
    rows: Rows,
    base: np.ndarray,
    scales: np.ndarray,
    objective: Objective,
    level: float = LEVEL,
    there: Sequence[int] | None = None,
    margin: float = 0.0,
) -> np.ndarray:
    """Which candidates are beyond doubt no better than the best one by more than the margin (bool [candidates]); the best
    itself never is.

    Args:
        nll: negative log-likelihoods [candidates, rows], all finite.
        rows: what they stand for.
        base: the base's negative log-likelihoods [rows].
        scales: what gains are divided by [tasks].
        objective: what is compared.
        level: the chance that one which is better by the margin is taken for beaten.
        there: rows of each task that these were drawn from; None for more than can be counted.
        margin: how much better counts as no better, as a figure.
    """
    if len(nll) < 2 or _counts(rows, len(scales)).min() < _FEWEST_ROWS:
        return np.zeros(len(nll), bool)
    kept = gains(nll, rows, base, scales)
    figure, effect = objective.figure(kept), _effects(nll, rows, base, scales, objective.slopes(kept))
    best = int(figure.argmax())
    ahead = [(figure[best], effect[best])]
    if objective.worst:  # whichever task is the best one's worst, it has to be above the other's worst
        each = [_effects(nll[[best]], rows, base, scales, way[None])[0] for way in np.eye(len(scales))]
        ahead = list(zip(kept[best], each, strict=True))
    chances = [_chances(gain - figure + margin, own - effect, rows, len(scales), there) for gain, own in ahead]
    chance = np.max(chances, axis=0)
    return (chance <= level) & (np.arange(len(nll)) != best)


def dominated(
    nll: np.ndarray,
    rows: Rows,
    base: np.ndarray,
    scales: np.ndarray,
    level: float = LEVEL,
    there: Sequence[int] | None = None,
    margin: float = 0.0,
) -> np.ndarray:
    """Which candidates are beyond doubt on no task better than another one by more than the margin (bool [candidates]);
    for a Pareto front.

    The chance that one is not better on all tasks is at most the largest of the tasks' chances; of the many that might
    be better, each gets its share of the level (Bonferroni). Within the margin two may beat each other: only what stays
    itself beats others, and the larger sum of gains is asked first.
    """
    count, tasks = len(nll), len(scales)
    if count < 2 or _counts(rows, tasks).min() < _FEWEST_ROWS:
        return np.zeros(count, bool)
    kept = gains(nll, rows, base, scales)
    worst = np.zeros((count, count))
    for task in range(tasks):
        effect = _effects(nll, rows, base, scales, np.broadcast_to(np.eye(tasks)[task], kept.shape))
        for other in range(count):
            ahead = kept[other, task] - kept[:, task] + margin
            chance = _chances(ahead, effect[other] - effect, rows, tasks, there, only=task)
            worst[other] = np.maximum(worst[other], chance)
    beats = worst <= level / (count - 1)
    staying: list[int] = []
    for own in np.argsort(-kept.sum(axis=1), kind="stable"):
        if not beats[staying, own].any():
            staying.append(own)
    return ~np.isin(np.arange(count), staying)


def _members(rows: Rows, tasks: int) -> np.ndarray:
    return np.eye(tasks)[rows.task]


def _counts(rows: Rows, tasks: int) -> np.ndarray:
    return np.bincount(rows.task, minlength=tasks)


def _effects(nll: np.ndarray, rows: Rows, base: np.ndarray, scales: np.ndarray, slopes: np.ndarray) -> np.ndarray:
    """What each row moves a candidate's figure by, around its mean [candidates, rows]."""
    ahead = base - nll
    gain = losses(ahead, rows, len(scales))
    residual = ahead - gain[:, rows.task] * rows.tokens
    share = (slopes / scales)[:, rows.task] / (rows.tokens @ _members(rows, len(scales)))[rows.task]
    return share * residual


def _chances(
    difference: np.ndarray,
    effect: np.ndarray,
    rows: Rows,
    tasks: int,
    there: Sequence[int] | None,
    only: int | None = None,
) -> np.ndarray:
    """One-sided p-values [candidates] of differences that should be above 0, from their rows' effects."""
    member, counts = _members(rows, tasks), _counts(rows, tasks)
    unread = 1.0 if there is None else 1 - counts / np.asarray(there)
    variance = (effect**2 @ member) @ (unread * counts / (counts - 1))
    freedom = (counts.sum() - tasks) if only is None else counts[only] - 1
    with np.errstate(divide="ignore", invalid="ignore"):
        score = np.where(variance > 0, difference / np.sqrt(variance), np.where(difference > 0, np.inf, 0.0))
    return stdtr(freedom, -score)


def estimate(
    own: np.ndarray,
    leader: np.ndarray,
    rows: Rows,
    leader_figures: np.ndarray,
    base: np.ndarray,
    scales: np.ndarray,
) -> np.ndarray:
    """A beaten candidate's gains [tasks] on all rows, as far as the rows it saw tell: the leader's, less what it fell
    behind on those rows (the leader's gains on all rows as control variate).

    Args:
        own, leader: negative log-likelihoods [rows] on the rows that the candidate saw.
        rows: those rows.
        leader_figures: the leader's gains on all rows [tasks].
        base: the base's on those rows [rows].
        scales: what gains are divided by [tasks].
    """
    seen = gains(np.stack([own, leader]), rows, base, scales)
    return leader_figures + seen[0] - seen[1]
