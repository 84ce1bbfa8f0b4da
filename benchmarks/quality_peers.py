"""What others make of changes, written plainly from their formulas: tensors in, a tensor out, float64.

Matrices are the changes [out, in] of linear layers. Everything is dense: for the small models of the quality benchmark.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def truncated_svd(change: Tensor, density: float) -> Tensor:
    """The best approximation of a change by two factors that hold, together, a share of its numbers.

    Rank k = round(density out in / (out + in)), at least 1.
    """
    out, width = change.shape
    rank = max(1, round(density * out * width / (out + width)))
    left, values, right = torch.linalg.svd(change.double(), full_matrices=False)
    return left[:, :rank] * values[:rank] @ right[:rank]


def task_singular_vectors(changes: Sequence[Tensor]) -> Tensor:
    """TSV-M (arXiv 2412.00081): each change cut to a T-th of its rank, the bases side by side made orthogonal, summed up.

    With U = [U_1 .. U_T] and V likewise, what is orthogonal and nearest to U is its polar factor, P Q' of the SVD P S Q'.
    """
    parts = [torch.linalg.svd(change.double(), full_matrices=False) for change in changes]
    rank = max(1, min(changes[0].shape) // len(changes))
    left, right = (
        _polar(torch.cat([side(part)[:, :rank] for part in parts], dim=1))
        for side in (lambda part: part[0], lambda part: part[2].t())
    )
    return left * torch.cat([part[1][:rank] for part in parts]) @ right.t()


def isotropic(changes: Sequence[Tensor]) -> Tensor:
    """Iso-C (arXiv 2502.04959): the sum of the changes with all its singular values set to their mean."""
    left, values, right = torch.linalg.svd(sum(change.double() for change in changes), full_matrices=False)
    return values.mean() * left @ right


def redundancy_free(changes: Sequence[Tensor], steps: int = 300, rate: float = 1e-5) -> Tensor:
    """WUDI (arXiv 2503.08099): steps of Adam from the sum of the changes, down what it does to each task's own rows.

    minimize over tau    sum_t |(tau - d_t) d_t'|^2 / |d_t|^2
    """
    own = [change.double() for change in changes]
    grams = [change.t() @ change / change.square().sum().clamp(min=1e-300) for change in own]
    joint, wanted = sum(grams), sum(change @ gram for change, gram in zip(own, grams, strict=True))
    merged = sum(own)
    optimizer = torch.optim.Adam([merged], lr=rate)
    for _ in range(steps):
        merged.grad = 2 * (merged @ joint - wanted)
        optimizer.step()
    return merged


def fisher_average(changes: Sequence[Tensor], squares: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Fisher averaging (arXiv 2111.09832) of changes: sum_t w_t F_t d_t / sum_t w_t F_t, each F_t divided by its mean.

    `squares` F_t, sums of squared gradients, of the changes' shape. Where all are 0 the mean by the weights is taken.
    """
    total = sum(weights)
    relative = [F.double() / max(float(F.double().mean()), 1e-300) for F in squares]
    shares = [weight / total * F for weight, F in zip(weights, relative, strict=True)]
    below = sum(shares)
    above = sum(share * change.double() for share, change in zip(shares, changes, strict=True))
    plain = sum(weight / total * change.double() for weight, change in zip(weights, changes, strict=True))
    return torch.where(below > 0, above / torch.where(below > 0, below, 1.0), plain)


def regression_mean(
    changes: Sequence[Tensor], grams: Sequence[Tensor], weights: Sequence[float], off_diagonal: float = 1.0
) -> Tensor:
    """RegMean (arXiv 2212.09849) of changes: (sum_t w_t d_t C_t) (sum_t w_t C_t)^-1.

    `grams` C_t, the mean of x x' over the inputs, whose entries beside the diagonal are multiplied by `off_diagonal`.
    Directions without inputs get nothing (the pseudo-inverse).
    """
    shrunk = [
        weight * (off_diagonal * C + (1 - off_diagonal) * C.diagonal().diag())
        for weight, C in zip(weights, grams, strict=True)
    ]
    right = sum(change.double() @ C for change, C in zip(changes, shrunk, strict=True))
    return right @ torch.linalg.pinv(sum(shrunk), hermitian=True)


def wanda(change: Tensor, second_moments: Tensor, density: float) -> Tensor:
    """Wanda's metric (arXiv 2306.11695) on a change: in each row a share of the entries of largest |d| sqrt(s) is kept.

    `second_moments` s [in], the mean of x^2 over a layer's inputs.
    """
    metric = change.abs() * second_moments.sqrt()
    kept = metric.topk(max(1, round(density * change.shape[1])), dim=1).indices
    return torch.zeros_like(change).scatter(1, kept, change.gather(1, kept))


def _polar(matrix: Tensor) -> Tensor:
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    return left @ right
