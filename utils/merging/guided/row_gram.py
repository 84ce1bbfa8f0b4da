"""The mean of what experts change about an embedding or a head, row by row, in each one's own metric: tensors in, one out.

    minimize over w    sum_t a_tv (w - d_tv)' R_t (w - d_tv),      a_tv = w_t (b_tv / mean b_t + 0.1)
    w_v = (sum_t a_tv R_t)^-1 sum_t a_tv R_t d_tv

for each row v (a token). d_tv [d] is expert t's change, b_tv the row's sum of squared gradients on the expert's own text,
R_t = sum of g g' over rows and samples of these gradients, divided by its mean diagonal, plus 0.1 on the diagonal: the
Fisher information of the matrix as a Kronecker product, its rows independent of each other.

Two experts have a closed form, since one basis makes R_1 and R_2 diagonal; more are solved for by conjugate gradients,
all rows of a piece together, in the basis and with the diagonal of the mean of the R_t. All in float64.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

AT_ONCE = 2**21  # entries of a change that are solved for together
_FLOOR = 0.1  # of a row's weight and of R's diagonal, in units of their means; measured by benchmarks/quality.py
_ACCURACY = 1e-9  # of a row's residual by conjugate gradients, relative to its right side
_MOST_STEPS = 500


@dataclass(frozen=True)
class RowChange:
    """What one expert changes about a matrix of rows, and how much each row and direction matters to it.

    `change` [v, d], any floating-point dtype; `weight` above 0, only ratios matter; `rows` b_t [v], at least 0; `gram`
    [d, d], R_t before it is scaled, symmetric and without negative eigenvalues but for rounding.
    """

    change: Tensor
    weight: float
    rows: Tensor
    gram: Tensor


def row_gram_mean(experts: Sequence[RowChange], entries_at_once: int = AT_ONCE) -> Tensor:
    """The rows that minimize the sum above; those of a piece of so many entries are solved for together.

    Returns:
        float64 [v, d] on the changes' device.

    Raises:
        ValueError: shapes that do not fit together; sums that are not finite.
    """
    _check(experts)
    device, total = experts[0].change.device, sum(one.weight for one in experts)
    weights = [one.weight / total * _relative(one.rows.to(device, torch.float64)) for one in experts]
    metrics = [_metric(one.gram.to(device, torch.float64)) for one in experts]
    solve = _Joint(*metrics) if len(experts) == 2 else _Iterated(metrics)
    merged = torch.empty(experts[0].change.shape, dtype=torch.float64, device=device)
    at_once = max(1, entries_at_once // merged.shape[1])
    for start in range(0, len(merged), at_once):
        rows = slice(start, start + at_once)
        changes = [one.change[rows].double() for one in experts]
        merged[rows] = solve(changes, [weight[rows, None] for weight in weights])
    return merged


def _check(experts: Sequence[RowChange]) -> None:
    shape = experts[0].change.shape
    for one in experts:
        if one.change.shape != shape or one.rows.shape != shape[:1] or one.gram.shape != (shape[1],) * 2:
            shapes = [list(tensor.shape) for tensor in (one.change, one.rows, one.gram)]
            raise ValueError(f"changes, rows and Gram matrix do not fit together: {shapes}")
        if not bool(one.gram.isfinite().all()) or not bool(one.rows.isfinite().all()):
            raise ValueError("sums of squared gradients of an embedding are not finite")


def _relative(rows: Tensor) -> Tensor:
    mean = rows.mean()
    return (rows / mean if float(mean) > 0 else rows) + _FLOOR


def _metric(gram: Tensor) -> Tensor:
    """R_t: the Gram matrix with mean diagonal 1, and the floor on its diagonal."""
    mean = float(gram.diagonal().mean())
    metric = gram / mean if mean > 0 else gram.clone()
    metric.diagonal().add_(_FLOOR)
    return metric


class _Joint:
    """Two experts: R_1 = P P', R_2 = P diag(values) P'."""

    def __init__(self, first: Tensor, second: Tensor) -> None:
        lower = torch.linalg.cholesky(first)
        inner = torch.linalg.solve_triangular(lower, second, upper=False)
        inner = torch.linalg.solve_triangular(lower, inner.t(), upper=False)
        self.values, vectors = torch.linalg.eigh((inner + inner.t()) / 2)
        self.into = lower @ vectors  # P
        self.back = torch.linalg.solve_triangular(lower.t(), vectors, upper=True).t()  # P^-1

    def __call__(self, changes: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
        pulls = (weights[0], weights[1] * self.values)
        above = sum(pull * (change @ self.into) for pull, change in zip(pulls, changes, strict=True))
        return above / (pulls[0] + pulls[1]) @ self.back


class _Iterated:
    """Any number of experts, by preconditioned conjugate gradients."""

    def __init__(self, metrics: Sequence[Tensor]) -> None:
        _, self.basis = torch.linalg.eigh(sum(metrics))
        self.metrics = [self.basis.t() @ metric @ self.basis for metric in metrics]
        self.diagonals = [metric.diagonal() for metric in self.metrics]

    def __call__(self, changes: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
        def applied(rows: Sequence[Tensor]) -> Tensor:
            found = zip(weights, rows, self.metrics, strict=True)
            return sum(weight * (row @ metric) for weight, row, metric in found)

        right = applied([change @ self.basis for change in changes])
        diagonal = sum(weight * values for weight, values in zip(weights, self.diagonals, strict=True))
        merged = right / diagonal
        residual = right - applied([merged] * len(weights))
        direction = scaled = residual / diagonal
        energy = (residual * scaled).sum(1, keepdim=True)
        enough = _ACCURACY * right.norm(dim=1)
        for _ in range(_MOST_STEPS):
            if bool((residual.norm(dim=1) <= enough).all()):
                return merged @ self.basis.t()
            image = applied([direction] * len(weights))
            step = _ratio(energy, (direction * image).sum(1, keepdim=True))
            merged = merged + step * direction
            residual = residual - step * image
            scaled = residual / diagonal
            energy, before = (residual * scaled).sum(1, keepdim=True), energy
            direction = scaled + _ratio(energy, before) * direction
        raise ValueError("the rows of an embedding cannot be solved for; were its sums measured on this model?")


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    """Above over below; 0 for a row that is solved exactly."""
    return torch.where(below > 0, above / torch.where(below > 0, below, 1.0), 0.0)
