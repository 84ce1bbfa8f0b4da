"""The Cholesky factor of a Gram matrix that rounding, or too little text, may have left without one."""

import torch
from torch import Tensor

_MOST_RIDGE = 1e-1  # beyond the ridge that was asked for


def require_finite(gram: Tensor) -> None:
    """Raise ValueError if a Gram matrix holds NaN or infinity."""
    if not bool(gram.isfinite().all()):
        raise ValueError("a Gram matrix holds numbers that are not finite")


def definite_factor(gram: Tensor, scale: float, ridge: float) -> tuple[Tensor, float]:
    """The factor L of L L' = C + r 1, r = ridge times scale; where there is none, r is raised tenfold until there is one.

    Args:
        gram: C [n, n] float64, symmetric and without negative eigenvalues but for rounding.
        scale: above 0; the unit of the ridge, C's mean diagonal.
        ridge: above 0.

    Returns:
        L, lower triangular, and the ridge that was taken.

    Raises:
        ValueError: there is none with a ridge of 0.1 either.
    """
    while True:
        regular = gram.clone()
        regular.diagonal().add_(ridge * scale)
        factor, failed = torch.linalg.cholesky_ex(regular)
        if not int(failed):
            return factor, ridge
        ridge *= 10
        if ridge > _MOST_RIDGE:
            raise ValueError("a Gram matrix is far from definite; was it measured on this model?")
