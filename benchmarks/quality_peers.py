"""What others make of changes without text, written plainly from their formulas: tensors in, a tensor out, float64.

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


def _polar(matrix: Tensor) -> Tensor:
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    return left @ right
