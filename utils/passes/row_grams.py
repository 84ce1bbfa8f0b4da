"""Gram matrices of the rows of gradients: R = sum over samples and rows of g g', for embeddings and heads."""

import torch
from torch import Tensor

from utils.passes.row_factors import RowFactors

_AT_ONCE = 2**22  # entries of a gradient in float32 together


class RowGrams:
    """Sums up g g' over the rows g of per-sample gradients, float64 on the device, in products of float32.

    By the factors of a gradient, where `factors` watches the model and knows them. Otherwise rows of zeros (tokens that a
    sample does not hold) cost nothing, and a head's gradient, which has all its rows, 2 v d^2 operations for a vocabulary
    of v.
    """

    def __init__(self, names: frozenset[str]) -> None:
        """`names` are the parameters to sum up for."""
        self.names = names
        self.factors = RowFactors()
        self._sums: dict[str, Tensor] = {}

    def add(self, name: str, gradient: Tensor) -> None:
        """Add one sample's gradient [v, d]; of a parameter that was not asked for, nothing."""
        if name not in self.names:
            return
        width = gradient.shape[1]
        total = self._sums.get(name)
        if total is None:
            total = self._sums[name] = torch.zeros(width, width, dtype=torch.float64, device=gradient.device)
        if (gram := self.factors.gram(name, gradient)) is not None:
            total += gram
            return
        for rows in gradient.split(max(1, _AT_ONCE // width)):
            there = rows[rows.ne(0).any(1)].float()
            total += there.t() @ there

    def take(self, name: str) -> Tensor | None:
        """The sum of a parameter, which is let go of; None where none came."""
        return self._sums.pop(name, None)
