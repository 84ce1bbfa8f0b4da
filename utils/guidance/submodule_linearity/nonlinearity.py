"""How far a part of a network is from linear in its own parameters, between a base and a fine-tune of it.

    NL = mean over a, b of [ D(f(theta_0 + a delta), f(theta_0 + b delta)) / D(f(theta_0 + delta), f(theta_0)) - |a - b| ]^2

with D the mean over tokens of the L2 distance, and a, b on a grid over [0, 1]. 0: linear (arXiv 2504.10902).
"""

from collections.abc import Sequence

import torch

GRID = (0.0, 0.25, 0.5, 0.75, 1.0)


PAIRS = tuple((first, second) for first in range(len(GRID)) for second in range(first))  # the others mirror these


def distance_sums(outputs: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sums over rows of the L2 distances of `PAIRS`, of some text; those of more text are added to them.

    Args:
        outputs: f(theta_0 + a delta) for each a of `GRID`, [rows, features] float32; rows of pads are equal in all.

    Returns:
        [pairs] float64, on the same device.
    """
    distances = [torch.linalg.vector_norm(outputs[one] - outputs[other], dim=1) for one, other in PAIRS]
    return torch.stack([distance.sum(dtype=torch.float64) for distance in distances])


def nonlinearity(sums: torch.Tensor) -> float:
    """The score of one part, from `distance_sums` over all text; 0 where the fine-tune changes nothing.

    D is a mean over tokens, but only ratios of D count.
    """
    found = dict(zip(PAIRS, sums.tolist(), strict=True))
    whole = found[len(GRID) - 1, 0]
    if whole == 0:
        return 0.0
    gaps = [distance / whole - (GRID[one] - GRID[other]) for (one, other), distance in found.items()]
    return 2 * sum(gap**2 for gap in gaps) / len(GRID) ** 2  # each pair in both orders; the diagonal is 0
