"""How far a part of a network is from linear in its own parameters, between a base and a fine-tune of it.

    NL = mean over a, b of [ D(f(theta_0 + a delta), f(theta_0 + b delta)) / D(f(theta_0 + delta), f(theta_0)) - |a - b| ]^2

with D the mean over tokens of the L2 distance, and a, b on a grid over [0, 1]. 0: linear (arXiv 2504.10902).
"""

from collections.abc import Sequence

import torch

GRID = (0.0, 0.25, 0.5, 0.75, 1.0)


def nonlinearity(outputs: Sequence[torch.Tensor], tokens: int) -> torch.Tensor:
    """The score of one part.

    Args:
        outputs: f(theta_0 + a delta) for each a of `GRID`, [rows, features] float32; rows of pads are equal in all.
        tokens: how many rows are no pads.

    Returns:
        A float64 scalar on the same device, 0 where the fine-tune changes nothing.
    """
    whole = _distance(outputs[-1], outputs[0], tokens)
    total = torch.zeros_like(whole)
    for first in range(len(GRID)):
        for second in range(first):  # the other half is the same, the diagonal 0
            share = _distance(outputs[first], outputs[second], tokens) / whole - (GRID[first] - GRID[second])
            total += 2 * share.square()
    return torch.where(whole > 0, total / len(GRID) ** 2, 0.0)


def _distance(one: torch.Tensor, other: torch.Tensor, tokens: int) -> torch.Tensor:
    return torch.linalg.vector_norm(one - other, dim=1).sum(dtype=torch.float64) / tokens
