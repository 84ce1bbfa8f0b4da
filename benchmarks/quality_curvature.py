"""What others make of changes by K-FAC, the Fisher information of a layer as inputs times output gradients: tensors only.

    F_t ~ G_t (x) C_t        C_t: mean of x x' over a layer's inputs,  G_t: mean of g g' over the gradients of its outputs

(arXiv 1503.05671). Matrices are the changes [out, in] of linear layers; everything is dense, float64, for the small models
of the quality benchmark.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_ACCURACY = 1e-8  # of the residual of conjugate gradients, relative to the right side
_MOST_STEPS = 2000


@dataclass(frozen=True)
class Curvature:
    """K-FAC's two factors of one layer on one text: `outputs` G [out, out] and `inputs` C [in, in], symmetric."""

    outputs: Tensor
    inputs: Tensor

    def damped(self, damping: float) -> "Curvature":
        """Both with `damping` times their mean diagonal added to the diagonal; float64."""
        return Curvature(_damped(self.outputs, damping), _damped(self.inputs, damping))


def curvature_mean(
    changes: Sequence[Tensor], curvatures: Sequence[Curvature], weights: Sequence[float], damping: float
) -> Tensor:
    """The change that loses least where each expert's loss is a quadratic form: Kronecker-factored Fisher merging.

        minimize over W    sum_t w_t tr((W - D_t)' G_t (W - D_t) C_t)

    Solved by conjugate gradients in the basis in which the sums of the G_t and of the C_t are the identity.

    Args:
        changes: D_t [out, in].
        curvatures: G_t and C_t.
        weights: w_t; only ratios matter.
        damping: what is added to each factor's diagonal, in units of its mean.

    Raises:
        ValueError: the steps do not come to an end; the damping is too small.
    """
    total = sum(weights)
    damped = [one.damped(damping) for one in curvatures]
    outputs = torch.linalg.cholesky(sum(one.outputs for one in damped))
    inputs = torch.linalg.cholesky(sum(one.inputs for one in damped))
    metrics = [
        (weight / total, _whitened(one.outputs, outputs), _whitened(one.inputs, inputs))
        for weight, one in zip(weights, damped, strict=True)
    ]

    def applied(matrices: Sequence[Tensor]) -> Tensor:
        return sum(w * G @ X @ C for (w, G, C), X in zip(metrics, matrices, strict=True))

    right = applied([outputs.t() @ change.double() @ inputs for change in changes])
    merged = _conjugate_gradients(lambda X: applied([X] * len(metrics)), right)
    return _unwhitened(merged, outputs, inputs)


def curvature_svd(
    changes: Sequence[Tensor], curvatures: Sequence[Curvature], density: float, damping: float
) -> list[Tensor]:
    """One expert's changes to all layers as factors of low rank that lose least by K-FAC, ranks shared out among layers.

    A rank of a layer costs out + in numbers and saves its squared singular value in the metric (G, C); those that save most
    for a number are taken while they fit a share `density` of all layers' numbers.
    """
    parts, gains, costs = [], [], []
    for change, one in zip(changes, (one.damped(damping) for one in curvatures), strict=True):
        outputs, inputs = torch.linalg.cholesky(one.outputs), torch.linalg.cholesky(one.inputs)
        left, values, right = torch.linalg.svd(outputs.t() @ change.double() @ inputs, full_matrices=False)
        parts.append((outputs, inputs, left, values, right))
        gains.append(values.square())
        costs.append(sum(change.shape))
    ranks = shared_ranks(gains, costs, density * sum(change.numel() for change in changes))
    return [
        _unwhitened(left[:, :rank] * values[:rank] @ right[:rank], outputs, inputs)
        for rank, (outputs, inputs, left, values, right) in zip(ranks, parts, strict=True)
    ]


def shared_ranks(gains: Sequence[Tensor], costs: Sequence[int], budget: float) -> list[int]:
    """How many ranks each layer gets: the largest gains for their cost first, until one does not fit the budget.

    `gains` fall within a layer; `costs` are a rank's, by layer.
    """
    offers = [
        (float(gain) / cost, layer, cost)
        for layer, (own, cost) in enumerate(zip(gains, costs, strict=True))
        for gain in own
    ]
    ranks, left = [0] * len(costs), budget
    for _, layer, cost in sorted(offers, key=lambda offer: -offer[0]):
        if cost > left:
            break
        ranks[layer] += 1
        left -= cost
    return ranks


def _damped(factor: Tensor, damping: float) -> Tensor:
    found = factor.double().clone()
    found.diagonal().add_(damping * float(found.diagonal().mean()))
    return found


def _whitened(matrix: Tensor, lower: Tensor) -> Tensor:
    """L^-1 M L^-T."""
    half = torch.linalg.solve_triangular(lower, matrix, upper=False)
    return torch.linalg.solve_triangular(lower, half.t(), upper=False)


def _unwhitened(matrix: Tensor, outputs: Tensor, inputs: Tensor) -> Tensor:
    """Lo^-T X Li^-1."""
    half = torch.linalg.solve_triangular(outputs.t(), matrix, upper=True)
    return torch.linalg.solve_triangular(inputs.t(), half.t(), upper=True).t()


def _conjugate_gradients(applied, right: Tensor) -> Tensor:
    found, residual = torch.zeros_like(right), right
    direction, energy = residual, residual.square().sum()
    enough = (_ACCURACY * right.norm()) ** 2
    for _ in range(_MOST_STEPS):
        if bool(energy <= enough):
            return found
        image = applied(direction)
        step = energy / (direction * image).sum()
        found, residual = found + step * direction, residual - step * image
        energy, before = residual.square().sum(), energy
        direction = residual + energy / before * direction
    raise ValueError("curvatures that cannot be solved for; a larger damping could be")
