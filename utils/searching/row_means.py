"""Means over all rows from those that were read, with the help of what is known of every row beside.

The base and the experts have read every row. What a merge does to a row has much to do with what the experts do to it, so
of a merge's mean the part that this explains is known exactly, and only the rest is guessed from the rows it has read (a
regression estimate: Cochran, Sampling Techniques, 1977, chapter 7). With tokens w_i, values y_i and x_i, what is known of row
i less w_i times its mean per token over all rows,

    minimise sum_i (y_i - a w_i - b x_i)^2 / w_i over the rows read;  a is the mean per token over all rows

Without an x_i that is the ratio of sums sum y_i / sum w_i; when all rows have been read it is that whatever the x_i.
"""

from dataclasses import dataclass

import numpy as np

_SPARE = 2  # rows of a task beyond what is fitted to them: with fewer, less is fitted


@dataclass(frozen=True)
class Rows:
    """The rows that values stand for: `task` [rows] is each one's task by position, `tokens` [rows] its size, `known` [rows,
    features] what is known of it beside."""

    task: np.ndarray
    tokens: np.ndarray
    known: np.ndarray | None = None

    def first(self, count: int) -> "Rows":
        """The first `count` of them."""
        return self.part(np.arange(count))

    def part(self, places: np.ndarray) -> "Rows":
        """Those at some places."""
        known = None if self.known is None else self.known[places]
        return Rows(self.task[places], self.tokens[places], known)

    def counts(self, tasks: int) -> np.ndarray:
        """Rows of each task."""
        return np.bincount(self.task, minlength=tasks)


@dataclass(frozen=True)
class Means:
    """Means per token over all rows, as the rows read tell.

    `value` [candidates, tasks]; `moved` [candidates, rows] is what each row moves its task's mean by, so that the variance of
    a mean is the sum of its rows' squares times `spread` [tasks]; `freedom` [tasks] are the degrees of freedom.
    """

    value: np.ndarray
    moved: np.ndarray
    spread: np.ndarray
    freedom: np.ndarray


def row_means(values: np.ndarray, rows: Rows, tasks: int, whole: Rows | None = None) -> Means:
    """Means of values [candidates, rows], float64, over all rows.

    Args:
        values: one for each candidate and row that was read.
        rows: those rows.
        tasks: how many tasks there are.
        whole: the rows that these were drawn from, without replacement; None for more than can be counted, of which nothing
            is known beside.
    """
    counts = rows.counts(tasks)
    value, moved, freedom = np.empty((len(values), tasks)), np.zeros(values.shape), np.empty(tasks)
    for task in range(tasks):
        own = np.flatnonzero(rows.task == task)
        root = np.sqrt(rows.tokens[own])
        design = _design(rows, whole, task, own) / root[:, None]
        solution = np.linalg.pinv(design)
        scaled = values[:, own] / root
        # sums one candidate at a time, so that equal candidates come to equal numbers
        found = (scaled[:, None, :] * solution).sum(axis=2)
        residual = scaled - (found[:, None, :] * design).sum(axis=2)
        value[:, task], moved[:, own] = found[:, 0], residual * solution[0]
        freedom[task] = len(own) - design.shape[1]
    unread = 1.0 if whole is None else 1 - counts / whole.counts(tasks)
    with np.errstate(divide="ignore", invalid="ignore"):
        return Means(value, moved, unread * counts / freedom, freedom)


def _design(rows: Rows, whole: Rows | None, task: int, own: np.ndarray) -> np.ndarray:
    """What is fitted to a task's rows [rows, 1 + features]: tokens first, then what is known beside, as far as the rows are
    enough for it."""
    tokens = rows.tokens[own][:, None]
    if whole is None or whole.known is None:
        return tokens
    there = whole.task == task
    mean = whole.known[there].sum(axis=0) / whole.tokens[there].sum()
    beside = (rows.known[own] - tokens * mean)[:, : max(0, len(own) - 1 - _SPARE)]
    size = np.linalg.norm(beside, axis=0)
    beside = beside[:, size > 1e-9 * np.linalg.norm(tokens)] / size[size > 1e-9 * np.linalg.norm(tokens)]
    design = np.hstack([tokens, beside])
    return design if np.linalg.matrix_rank(design) == design.shape[1] else tokens
