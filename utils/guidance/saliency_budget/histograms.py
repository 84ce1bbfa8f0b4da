"""Histograms of the saliency of a weight matrix: pure tensors in, counts out.

    saliency_ij = (expert_ij - base_ij)^2 F_ij^power,      F_ij = sum over samples of (dL/dW_ij)^2

Roots of saliencies are counted in the bins of `utils/guidance/saliency_budget/bins.py`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from utils.guidance.saliency_budget.bins import BINS, SHIFT

ENTRIES_AT_ONCE = 2**22  # in temporaries together


@dataclass(frozen=True)
class SaliencyHistogram:
    """The saliencies of one tensor.

    `counts` (int64 [BINS], CPU) are its entries by bin without those of saliency 0, which are `zeros`; `changed` are the
    entries in which expert and base differ; `norm` is the Euclidean norm of the change.
    """

    counts: Tensor
    zeros: int
    changed: int
    norm: float


def saliency_histogram(
    base: Tensor, expert: Tensor, squares: Tensor, power: float = 1.0, *, at_once: int = ENTRIES_AT_ONCE
) -> SaliencyHistogram:
    """Count the saliencies of a tensor; temporaries are bounded, whatever its size.

    Args:
        base, expert: the weights, of one shape, any floating-point dtype; the change is taken in float32.
        squares: F, float32, of that shape and on that device.
        power: the exponent of F, above 0.
        at_once: entries in temporaries together.

    Raises:
        ValueError: a saliency is not finite.
    """
    parts = [tensor.reshape(-1).split(at_once) for tensor in (base, expert, squares)]
    counts = torch.zeros(BINS, dtype=torch.int64, device=squares.device)
    changed = torch.zeros((), dtype=torch.int64, device=squares.device)
    norm = torch.zeros((), dtype=torch.float64, device=squares.device)
    zeros = torch.zeros_like(changed)
    for before, after, fisher in zip(*parts, strict=True):
        change = after.float().sub(before)
        changed += change.count_nonzero()
        norm += torch.linalg.vector_norm(change, dtype=torch.float64) ** 2
        root = change.mul_(fisher.pow(power / 2)).abs_()  # last: what is no number has a sign, too
        zeros += len(root) - root.count_nonzero()
        found = torch.bincount(root.view(torch.int32) >> SHIFT, minlength=BINS)
        if len(found) > BINS:  # infinity's bin, and those of what is no number
            raise ValueError("a change or a gradient is not finite")
        counts += found
    counts[0] -= zeros
    return SaliencyHistogram(counts.cpu(), int(zeros), int(changed), float(norm.sqrt()))
