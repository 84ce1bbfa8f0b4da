"""Racing: many candidates over a few rows; those that a paired test shows to be beaten leave, the rest see more rows.

Candidates read the very same rows, so the test is one of differences row by row. A figure is linear in what a candidate's
loss is below the base's (`objective.py`), and a loss per token is a ratio of sums, so that with d_i the difference of two
candidates' nll on row i, in nats,

    D     = sum_t slope_t / scale_t * d_t,   d_t the mean per token of the d_i over the rows i of task t (`row_means.py`)
    var D = sum_t (1 - n_t / N_t) n_t / f_t * sum_i ( slope_t / scale_t * what row i moves d_t by )^2

and D / sqrt(var D) is held against Student's t, f_t being degrees of freedom. The n_t rows are drawn without replacement from
the N_t of the race, and what is asked is who is ahead on all of those: the more of them have been read, the less is open
(Cochran, Sampling Techniques, 1977, section 2.6). The means make use of what the base and the experts lose on every row.
Each candidate is tested at `LEVEL` on its own: that a worse one stays
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

import numpy as np
from scipy.special import stdtr

from utils.searching.objective import Objective
from utils.searching.row_means import Means, Rows, row_means

LEVEL = 0.01  # lower reads more rows, higher loses the best more often
_FEWEST_ROWS = 4  # of a task, for a variance worth its name


def losses(nll: np.ndarray, rows: Rows, tasks: int) -> np.ndarray:
    """Sum over rows per token [candidates, tasks] of negative log-likelihoods [candidates, rows], both float64."""
    member = np.eye(tasks)[rows.task]
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
    whole: Rows | None = None,
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
        whole: the rows that these were drawn from; None for more than can be counted.
        margin: how much better counts as no better, as a figure.
    """
    if len(nll) < 2 or rows.counts(len(scales)).min() < _FEWEST_ROWS:
        return np.zeros(len(nll), bool)
    means = row_means(base - nll, rows, len(scales), whole)
    kept = means.value / scales
    figure, effect = objective.figure(kept), _effects(means, rows, objective.slopes(kept) / scales)
    best = int(figure.argmax())
    ahead = [(figure[best], effect[best])]
    if objective.worst:  # whichever task is the best one's worst, it has to be above the other's worst
        each = [_effects(means, rows, way[None] / scales)[best] for way in np.eye(len(scales))]
        ahead = list(zip(kept[best], each, strict=True))
    chances = [_chances(gain - figure + margin, own - effect, rows, means) for gain, own in ahead]
    chance = np.max(chances, axis=0)
    return (chance <= level) & (np.arange(len(nll)) != best)


def dominated(
    nll: np.ndarray,
    rows: Rows,
    base: np.ndarray,
    scales: np.ndarray,
    level: float = LEVEL,
    whole: Rows | None = None,
    margin: float = 0.0,
) -> np.ndarray:
    """Which candidates are beyond doubt on no task better than another one by more than the margin (bool [candidates]);
    for a Pareto front.

    The chance that one is not better on all tasks is at most the largest of the tasks' chances; of the many that might
    be better, each gets its share of the level (Bonferroni). Within the margin two may beat each other: only what stays
    itself beats others, and the larger sum of gains is asked first.
    """
    count, tasks = len(nll), len(scales)
    if count < 2 or rows.counts(tasks).min() < _FEWEST_ROWS:
        return np.zeros(count, bool)
    means = row_means(base - nll, rows, tasks, whole)
    kept = means.value / scales
    worst = np.zeros((count, count))
    for task in range(tasks):
        effect = _effects(means, rows, np.eye(tasks)[[task]] / scales)
        for other in range(count):
            ahead = kept[other, task] - kept[:, task] + margin
            chance = _chances(ahead, effect[other] - effect, rows, means, only=task)
            worst[other] = np.maximum(worst[other], chance)
    beats = worst <= level / (count - 1)
    staying: list[int] = []
    for own in np.argsort(-kept.sum(axis=1), kind="stable"):
        if not beats[staying, own].any():
            staying.append(own)
    return ~np.isin(np.arange(count), staying)


def _effects(means: Means, rows: Rows, slopes: np.ndarray) -> np.ndarray:
    """What each row moves a candidate's figure by [candidates, rows]; the figure changes with each task's mean by `slopes`
    [candidates or 1, tasks]."""
    return slopes[:, rows.task] * means.moved


def _chances(
    difference: np.ndarray, effect: np.ndarray, rows: Rows, means: Means, only: int | None = None
) -> np.ndarray:
    """One-sided p-values [candidates] of differences that should be above 0, from their rows' effects."""
    variance = (effect**2 @ np.eye(len(means.freedom))[rows.task]) @ means.spread
    freedom = means.freedom.sum() if only is None else means.freedom[only]
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
    whole: Rows | None = None,
) -> np.ndarray:
    """A beaten candidate's gains [tasks] on all rows, as far as the rows it saw tell: the leader's, less what it fell
    behind on those rows (the leader's gains on all rows as control variate).

    Args:
        own, leader: negative log-likelihoods [rows] on the rows that the candidate saw.
        rows: those rows.
        leader_figures: the leader's gains on all rows [tasks].
        base: the base's on those rows [rows].
        scales: what gains are divided by [tasks].
        whole: all rows.
    """
    seen = row_means(base - np.stack([own, leader]), rows, len(scales), whole).value / scales
    return leader_figures + seen[0] - seen[1]
