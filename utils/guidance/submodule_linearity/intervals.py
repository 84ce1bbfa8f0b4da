"""How sure merging weights are: delete-one-fold jackknife over the samples of every text.

Each task's samples are in folds. With one fold of one text left out, the weights are solved again; with n_u folds of text
u, the variance of a weight is

    sum over texts u of (n_u - 1) / n_u * sum over folds of ( a without the fold - their mean )^2

and the interval is Student's, with sum of (n_u - 1) degrees of freedom. Tasks that share a text lose its fold together. It
holds the noise of the calibration text alone.
"""

from collections.abc import Sequence

import numpy as np

from utils.guidance.submodule_linearity.weights import merging_weights, misfit

CONFIDENCE = 0.95


def half_widths(
    uses: Sequence[np.ndarray],
    tokens: np.ndarray,
    texts: Sequence[int],
    weighting: str,
    ridge: float,
    clip: float | None = None,
) -> np.ndarray:
    """Half the width of the 95 % interval of each expert's weight in one part.

    Args:
        uses: for each use of the part, Gram matrices summed over the tokens of a fold, [tasks, folds, T, T] float64.
        tokens: [tasks, folds], 0 where a task has no such fold.
        texts: for each task which text it has; tasks of one text have equal folds.
        weighting, ridge, clip: as the weights are solved with (`weights.py`).

    Returns:
        [T] float64; infinite where a text has one fold only.
    """
    from scipy.stats import t as student

    experts = len(texts)
    variance, freedom = np.zeros(experts), 0
    for text in dict.fromkeys(texts):
        tasks = [task for task, own in enumerate(texts) if own == text]
        folds = np.flatnonzero(tokens[tasks[0]] > 0)
        if len(folds) < 2:
            return np.full(experts, np.inf)
        deleted = [_without(own, tokens, tasks, folds) for own in uses]
        weights = merging_weights(misfit(deleted, weighting), ridge, clip)
        variance += (len(folds) - 1) / len(folds) * np.square(weights - weights.mean(axis=0)).sum(axis=0)
        freedom += len(folds) - 1
    return student.ppf((1 + CONFIDENCE) / 2, freedom) * np.sqrt(variance)


def _without(sums: np.ndarray, tokens: np.ndarray, tasks: Sequence[int], folds: np.ndarray) -> np.ndarray:
    """Mean Gram matrices [folds, tasks, T, T] with one fold of some tasks' text left out each."""
    whole, counts = sums.sum(axis=1), tokens.sum(axis=1)
    found = np.repeat((whole / counts[:, None, None])[None], len(folds), axis=0)
    for task in tasks:
        left = counts[task] - tokens[task, folds]
        found[:, task] = (whole[task] - sums[task, folds]) / left[:, None, None]
    return found
