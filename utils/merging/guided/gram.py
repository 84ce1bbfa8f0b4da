"""The one change to a linear layer that answers as each expert does, on each expert's own inputs: tensors in, a tensor out.

    minimize over W    sum_t w_t tr((W - D_t) C_t (W - D_t)')  +  r |W - A|^2
    W = A + sum_t w_t (D_t - A) C_t S^-1,      S = sum_t w_t C_t + r 1

D_t is what expert t changes about the weight [out, in], C_t the mean of x x' over the inputs x of its own text, w_t its
share (they sum up to 1), r = ridge times the mean diagonal of sum_t w_t C_t. Without the anchor A this is the regression
mean of RegMean (arXiv 2212.09849), of changes instead of weights. Directions that no text has inputs in (fewer tokens than
channels leave some) are A's alone: there S is r 1, and what is left of the sum is nothing.

All in float64: S has eigenvalues from r to the number of channels, and what is stored of C_t in float32 is its whole
spectrum, not its condition. Where rounding leaves S without a Cholesky factor, r is raised tenfold until it has one.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from utils.merging.guided.definite import definite_factor, require_finite

AT_ONCE = 2**22  # entries of a change that are solved for together
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class InputChange:
    """What one expert changes about a linear layer, and the inputs it is asked for.

    `change` D_t [out, in], any floating-point dtype; `weight` w_t, above 0, only ratios matter; `gram` C_t [in, in],
    symmetric and without negative eigenvalues but for rounding.
    """

    change: Tensor
    weight: float
    gram: Tensor


def gram_mean(
    experts: Sequence[InputChange], anchor: Tensor, *, ridge: float, off_diagonal: float = 1.0, label: str = ""
) -> Tensor:
    """The change that minimizes the sum above.

    Args:
        experts: one or more, changes of one shape.
        anchor: A, of the changes' shape, whose directions without inputs are kept.
        ridge: above 0; r in units of the mean diagonal.
        off_diagonal: factor on the entries of C_t beside its diagonal, 0 to 1; below 1 it makes channels count more
            alone.
        label: what to call the layer in the log where r had to be raised.

    Returns:
        float64 [out, in] on the changes' device. The anchor where every C_t is 0.

    Raises:
        ValueError: shapes that do not fit together; Grams that are not finite, or that no ridge makes definite.
    """
    _check(experts, anchor)
    total = sum(one.weight for one in experts)
    shares = [one.weight / total for one in experts]
    grams = [_shrunk(one.gram.to(anchor.device, torch.float64), off_diagonal) for one in experts]
    joint = sum(share * gram for share, gram in zip(shares, grams, strict=True))
    scale = float(joint.diagonal().mean())
    if not scale > 0:
        return anchor.double()
    factor, taken = definite_factor(joint, scale, ridge)
    if taken != ridge:
        _LOG.warning("%s: inputs of too few directions for ridge %g; %g was taken", label, ridge, taken)
    del joint
    merged = torch.empty(anchor.shape, dtype=torch.float64, device=anchor.device)
    at_once = max(1, AT_ONCE // anchor.shape[1])
    for start in range(0, len(anchor), at_once):
        rows = slice(start, start + at_once)
        middle = anchor[rows].double()
        pulled = sum(
            share * (one.change[rows].double() - middle) @ gram
            for share, one, gram in zip(shares, experts, grams, strict=True)
        )
        merged[rows] = middle + torch.cholesky_solve(pulled.t(), factor).t()
    return merged


def _check(experts: Sequence[InputChange], anchor: Tensor) -> None:
    for one in experts:
        if one.change.shape != anchor.shape or one.gram.shape != (anchor.shape[1],) * 2:
            shapes = [list(tensor.shape) for tensor in (anchor, one.change, one.gram)]
            raise ValueError(f"anchor, change and Gram matrix do not fit together: {shapes}")
        require_finite(one.gram)


def _shrunk(gram: Tensor, off_diagonal: float) -> Tensor:
    if off_diagonal == 1:
        return gram
    return off_diagonal * gram + (1 - off_diagonal) * gram.diagonal().diag()
