"""Merging weights in closed form, from Gram matrices of changes.

One part of a network, T experts, task t being the text of expert t, and G^t[m,s] the mean over the tokens of task t of
the inner product of what experts m and s change about the part's output. If the part is linear in its parameters, what
a merge with weights a misses of the changes that each expert makes on its own text is

    sum_t w_t E || sum_s a_s Delta_s - Delta_t ||^2  =  a^T A a - 2 a^T b + c
    A = sum_t w_t G^t,   b_m = sum_t w_t G^t[m,t],   c = sum_t w_t G^t[t,t],   least where  A a = b

(follows from arXiv 2504.10902, which states a = A^-1 b). A part may have several uses in the network (an embedding that
is also the head): all count alike, whatever the scales of their outputs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Misfit:
    """a -> a^T A a - 2 a^T b + c, with `a` over T experts; float64. `missed` of no merge at all (a = 0) is 1.

    A [..., T, T] and b [..., T] may be of several misfits, for all of which weights are solved together.
    """

    A: np.ndarray
    b: np.ndarray
    c: float

    def missed(self, weights: np.ndarray) -> float:
        """The share of the experts' changes that a merge with these weights misses; 0 where nothing changes."""
        if self.c == 0:
            return 0.0
        return float((weights @ self.A @ weights - 2 * weights @ self.b + self.c) / self.c)


def misfit(uses: Sequence[np.ndarray], weighting: str) -> Misfit:
    """The misfit of one part.

    A task on whose text its own expert changes nothing says nothing about the others and is left out.

    Args:
        uses: for each use of the part, G [T tasks, T, T], or [..., T tasks, T, T] for several misfits at once.
        weighting: `equal`: w_t = 1 / G^t[t,t], so that each task counts alike; `raw`: w_t = 1. Either way a use is
            scaled so that its c is the number of its tasks.
    """
    A, b, c = 0.0, 0.0, 0.0
    for grams in uses:
        own = np.einsum("...ttt->...t", grams)
        moved = own > 0
        size = own
        if weighting == "raw":
            size = own.sum(axis=-1, keepdims=True) / np.maximum(moved.sum(axis=-1, keepdims=True), 1)
        shares = np.divide(1.0, size, out=np.zeros_like(own), where=moved)  # of a task, beside the others
        A = A + np.einsum("...t,...tms->...ms", shares, grams)
        b = b + np.einsum("...t,...tmt->...m", shares, grams)
        c = c + (shares * own).sum(axis=-1)
    return Misfit(A, b, c)


def merging_weights(fit: Misfit, ridge: float, clip: float | None = None) -> np.ndarray:
    """The weights of least misfit, kept near equal shares by a ridge.

        (A + r I) a = b + r u,   r = ridge tr(A) / n,   u = 1/n for each of the n experts that change anything

    so that one expert gets 1 and identical ones 1/n, whatever the ridge; a ridge that grows without bounds gives u. Where
    A is singular without a ridge, the solution nearest to u is taken. An expert that changes nothing (it is equal to the
    base here) gets 0.

    Args:
        fit: from `misfit`.
        ridge: at least 0.
        clip: weights are clipped to [0, clip]; None: not at all.

    Returns:
        [..., T] float64, finite.
    """
    own = np.einsum("...tt->...t", fit.A)
    there = own > 0
    count = np.maximum(there.sum(axis=-1, keepdims=True), 1)
    shares = there / count
    pull = ridge * own.sum(axis=-1, keepdims=True) / count * there
    system = fit.A + pull[..., None] * np.eye(own.shape[-1])
    # experts of very different sizes are no reason to call A singular
    unit = np.divide(1.0, np.sqrt(own + pull), out=np.zeros_like(own), where=there)
    inverse = np.linalg.pinv(
        unit[..., None] * system * unit[..., None, :], rcond=_SINGULAR * own.shape[-1], hermitian=True
    )
    gap = unit * (fit.b - np.einsum("...ms,...s->...m", fit.A, shares))
    weights = shares + unit * np.einsum("...ms,...s->...m", inverse, gap)
    return weights if clip is None else np.clip(weights, 0.0, clip)


_SINGULAR = 2.3e-16  # of the largest eigenvalue, for each expert: what float64 can tell from 0


def best_uniform_weight(fits: Sequence[Misfit]) -> float:
    """The one weight for all experts and parts that misses least, in the mean of `missed` over the parts."""
    moved = [fit for fit in fits if fit.c > 0]
    square = sum(fit.A.sum() / fit.c for fit in moved)
    return float(sum(fit.b.sum() / fit.c for fit in moved) / square) if square > 0 else 0.0
