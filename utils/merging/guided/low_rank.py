"""The best change of a given rank to a linear layer, judged by what it answers on the layer's inputs: tensors in, factors out.

    minimize over X of rank k    tr((X - D) C (X - D)')  +  r |X - D|^2  =  |(X - D) L|^2,      L L' = C + r 1
    X = (U_k S_k) (V_k' L^-1),      U S V' = D L

for a change D [out, in] and C the mean of x x' over the inputs x (Eckart and Young's theorem in the metric of the inputs, as
low-rank compression by activations does it). Without inputs it is the truncated SVD of D.

In float64. The factorization of an [out, in] matrix takes about 20 out in min(out, in) operations.
"""

import torch
from torch import Tensor

from utils.merging.guided.definite import definite_factor, require_finite


def rank_of(shape: tuple[int, ...], density: float) -> int:
    """The rank at which two factors hold, together, a share of a matrix's numbers; at least 1, at most what it can have."""
    out, width = shape
    return min(out, width, max(1, round(density * out * width / (out + width))))


def low_rank_factors(
    change: Tensor, rank: int, gram: Tensor | None = None, ridge: float = 1e-3
) -> tuple[Tensor, Tensor]:
    """The factors of the change that minimizes the sum above.

    Args:
        change: [out, in], any floating-point dtype.
        rank: k, at least 1.
        gram: C [in, in], symmetric and without negative eigenvalues but for rounding; None: no inputs were measured.
        ridge: above 0; r in units of C's mean diagonal, raised tenfold where rounding asks for it.

    Returns:
        float64 [out, k] and [k, in] on the change's device; the columns of the first are orthogonal.

    Raises:
        ValueError: shapes that do not fit together; a Gram matrix that is not finite, or far from definite.
    """
    if gram is not None and gram.shape != (change.shape[1],) * 2:
        raise ValueError(f"change and Gram matrix do not fit together: {[list(change.shape), list(gram.shape)]}")
    exact = change.double()
    root = None if gram is None else _root(gram.to(change.device, torch.float64), ridge)
    left, values, right = torch.linalg.svd(exact if root is None else exact @ root, full_matrices=False)
    left, right = left[:, :rank] * values[:rank], right[:rank]
    if root is not None:
        right = torch.linalg.solve_triangular(root, right, upper=False, left=False)
    return left, right


def _root(gram: Tensor, ridge: float) -> Tensor | None:
    """L, or None where there are no inputs at all."""
    require_finite(gram)
    scale = float(gram.diagonal().mean())
    return definite_factor(gram, scale, ridge)[0] if scale > 0 else None
