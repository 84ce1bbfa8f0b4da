"""Gram matrices of the rows of gradients: R = sum over samples and rows of g g', for embeddings and heads."""

from collections.abc import Sequence

import torch
from torch import Tensor

from utils.passes.gradient_factors import Use, row_gram

_AT_ONCE = 2**22  # entries of a gradient in float32 together


class RowGrams:
    """Sums up g g' over the rows g of per-sample gradients, float64 on the device, in products of float32.

    Rows of zeros (tokens that a sample does not hold) cost nothing; a head's gradient, which has all its rows, 2 v d^2
    operations for a vocabulary of v, by its factors 2 T^2 v for T tokens.
    """

    def __init__(self, names: frozenset[str]) -> None:
        """`names` are the parameters to sum up for."""
        self.names = names
        self._sums: dict[str, Tensor] = {}

    def add(self, name: str, gradient: Tensor) -> None:
        """Add one sample's gradient [v, d]; of a parameter that was not asked for, nothing."""
        if name in self.names:
            total = self._total(name, gradient)
            for rows in gradient.split(max(1, _AT_ONCE // gradient.shape[1])):
                there = rows[rows.ne(0).any(1)].float()
                total += there.t() @ there

    def add_uses(self, name: str, uses: Sequence[Use]) -> None:
        """The same by the factors of that gradient."""
        if name in self.names:
            self._total(name, uses[0].right.values).add_(row_gram(uses))

    def take(self, name: str) -> Tensor | None:
        """The sum of a parameter, which is let go of; None where none came."""
        return self._sums.pop(name, None)

    def _total(self, name: str, rows: Tensor) -> Tensor:
        if name not in self._sums:
            width = rows.shape[1]
            self._sums[name] = torch.zeros(width, width, dtype=torch.float64, device=rows.device)
        return self._sums[name]
