"""A sample's gradient of a weight as a product of two thin factors: what is needed of its squares, without the gradient.

A linear layer that is given X [T, in] and whose outputs have the gradients D [T, out] has the gradient D' X, an embedding
S' D with the tokens S as unit rows. Over all uses of a weight in a sample, under each other (a tied weight has two),

    G = L' R,    sums of G^2 over a row i:  l_i' (R R') l_i,   over a column j:  r_j' (L L') r_j,    G' G = R' (L L') R

with l_i, r_j the columns of L and R: 4 T^2 (rows + columns) operations and T numbers a row and column, instead of
2 T rows columns and a gradient. Pure tensors in, tensors out.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from utils.exact_products import exact_products, in_float32

_AT_ONCE, _IN_CACHE = 2**22, 2**18  # entries of a factor in float32 together; those that a CPU keeps at hand


@dataclass
class Factor:
    """Vectors of one use of a weight: [T, n], or [T] integers, the places of the ones in unit vectors."""

    values: Tensor
    _products: Tensor | None = field(default=None, repr=False)

    @property
    def is_units(self) -> bool:
        """Whether they are unit vectors."""
        return not self.values.is_floating_point()

    def products(self) -> Tensor:
        """Those of all vectors with each other, [T, T] float32; kept, since several weights may share a factor."""
        if self._products is None:
            self._products = _products(self, self)
        return self._products


@dataclass(frozen=True)
class Use:
    """One use of a weight [rows, columns] in a sample: its part of the gradient is `left`' `right`.

    `left` has vectors of length rows or is units, `right` has vectors of length columns.
    """

    left: Factor
    right: Factor


def factors_pay(tokens: int, rows: int, columns: int, *, with_gram: bool = False) -> bool:
    """Whether sums over axes (and the Gram matrix of rows) take fewer operations by factors than by the gradient.

    Args:
        tokens: vectors of all uses together.
        rows, columns: of the weight.
        with_gram: whether the Gram matrix is wanted, too.
    """
    by_factors = 4 * tokens**2 * (rows + columns) + with_gram * 2 * tokens * columns**2
    by_gradient = 2 * tokens * rows * columns + with_gram * 2 * rows * columns**2
    return by_factors < by_gradient


def axis_squares(uses: Sequence[Use], rows: int) -> tuple[Tensor, Tensor]:
    """The sums of G^2 over each row [rows] and each column, float32, at least 0.

    Args:
        uses: of one weight in one sample, at least one; any floating-point dtype.
        rows: of the weight.
    """
    right = uses[0].right.values
    down = torch.zeros(rows, dtype=torch.float32, device=right.device)
    across = torch.zeros(right.shape[1], dtype=torch.float32, device=right.device)
    for place, one in enumerate(uses):
        for other in uses[: place + 1]:
            times = 1 if one is other else 2
            _add_forms(down, one.left, other.left, times * _pair_products(one.right, other.right))
            _add_forms(across, one.right, other.right, times * _pair_products(one.left, other.left))
    return down.clamp_(min=0), across.clamp_(min=0)


def row_gram(uses: Sequence[Use]) -> Tensor:
    """G' G [columns, columns], float32: the sum of g g' over the rows g of a gradient."""
    right = torch.cat([use.right.values for use in uses]).float()
    inner = [torch.cat([_pair_products(one.left, other.left) for other in uses], dim=1) for one in uses]
    return right.t() @ (torch.cat(inner) @ right)


def _pair_products(one: Factor, other: Factor) -> Tensor:
    return one.products() if one is other else _products(one, other)


def _products(one: Factor, other: Factor) -> Tensor:
    """Those of each vector of one with each of another, [T, T'] float32."""
    if one.is_units and other.is_units:
        return (one.values[:, None] == other.values[None, :]).float()
    if one.is_units:
        return _products(other, one).t()
    if other.is_units:
        return one.values[:, other.values].float()
    at_once, total = max(1, _AT_ONCE // max(len(one.values), len(other.values))), 0
    with exact_products(one.values, other.values) as used:
        for mine, theirs in zip(one.values.split(at_once, dim=1), other.values.split(at_once, dim=1), strict=True):
            mine = in_float32(mine, used)
            total = total + mine @ (mine if one is other else in_float32(theirs, used)).t()
    return total[: len(one.values), : len(other.values)]


def _add_forms(sums: Tensor, one: Factor, other: Factor, inner: Tensor) -> None:
    """Add a_i' K b_i to sums [n], for the columns a_i, b_i of two factors and K [T, T'] float32."""
    if one.is_units and other.is_units:
        same = one.values[:, None] == other.values[None, :]
        sums.index_add_(0, one.values, (inner * same).sum(1))
    elif one.is_units:
        _add_forms(sums, other, one, inner.t())
    elif other.is_units:
        sums.index_add_(0, other.values, (one.values[:, other.values].float() * inner).sum(0))
    else:
        entries = _IN_CACHE if inner.device.type == "cpu" else _AT_ONCE
        at_once = max(1, entries // max(inner.shape))
        for start in range(0, len(sums), at_once):
            part = slice(start, start + at_once)
            mine = one.values[:, part].float()
            theirs = mine if one is other else other.values[:, part].float()
            sums[part] += (mine * (inner @ theirs)).sum(0)
