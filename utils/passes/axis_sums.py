"""A matrix of squared gradients as the outer product of one vector per axis: pure tensors in, tensors out.

    F_ij ~ r_i c_j / sum of F,       r, c: the sums of F over its rows and columns

the factors of Adafactor (arXiv 1804.04235), which have the smallest generalized Kullback-Leibler divergence from F of all
outer products. Axes are those of the matrix as it is stored.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

ENTRIES_AT_ONCE = 2**22  # in temporaries together
_IN_CACHE = 2**18  # entries that a CPU sums several times as fast, because it keeps them at hand


def row_column_factors(squares: Tensor, at_once: int = ENTRIES_AT_ONCE) -> tuple[Tensor, Tensor]:
    """The two vectors whose outer product stands for F: r, and c divided by the sum of F.

    Args:
        squares: F [a, b], float32, at least 0, any device.
        at_once: entries in temporaries together.

    Returns:
        float64 [a] and [b] on the CPU; all zeros where F is.
    """
    sums = AxisSums(squares.shape, squares.device, at_once)
    sums.add(squares)
    rows, columns = sums.factors()
    return rows, columns


class AxisSums:
    """Sums of F over the axes of a parameter, for an F that comes in parts and is never whole.

    Args:
        shape: of the parameter, two axes; one or none has F itself summed up.
        device: where F comes.
        at_once: entries in temporaries together.
    """

    def __init__(self, shape: Sequence[int], device: torch.device, at_once: int = ENTRIES_AT_ONCE) -> None:
        self.at_once = at_once
        self.dimensions = len(shape)
        size = (shape[0] if shape else 1, shape[1] if len(shape) == 2 else 1)
        self.rows, self.columns = (torch.zeros(length, dtype=torch.float64, device=device) for length in size)

    def add(self, squares: Tensor) -> None:
        """Add one part of F, of the parameter's shape and float32; it may have more rows than those before."""
        for start, part in self._parts(squares):
            self._add_rows(start, part)

    def add_squares(self, gradient: Tensor) -> None:
        """Add the squares of a gradient, taken in float32."""
        for start, part in self._parts(gradient):
            self._add_rows(start, part.float().square())

    def add_sums(self, rows: Tensor, columns: Tensor) -> None:
        """Add what one part of F of a matrix sums up to over its columns, [a], and over its rows, [b]."""
        self._extend(len(rows))
        self.rows[: len(rows)] += rows
        self.columns += columns

    def factors(self) -> tuple[Tensor, ...]:
        """r, and c divided by the sum of F; F itself for a parameter without a second axis. float64 on the CPU."""
        if self.dimensions < 2:
            return (self.rows.cpu(),)
        total = self.rows.sum()
        return self.rows.cpu(), torch.where(total > 0, self.columns / total, self.columns).cpu()

    def _extend(self, rows: int) -> None:
        """Make room for rows that are new (a vocabulary that an expert has extended)."""
        if (more := rows - len(self.rows)) > 0:
            self.rows = torch.cat([self.rows, self.rows.new_zeros(more)])

    def _parts(self, values: Tensor) -> Iterator[tuple[int, Tensor]]:
        matrix = values if self.dimensions == 2 else values.reshape(-1, 1)
        self._extend(len(matrix))
        return _row_parts(matrix, min(self.at_once, _IN_CACHE) if values.device.type == "cpu" else self.at_once)

    def _add_rows(self, start: int, squares: Tensor) -> None:
        self.rows[start : start + len(squares)] += squares.sum(1, dtype=torch.float64)
        if self.dimensions == 2:
            self.columns += squares.sum(0, dtype=torch.float64)


def explained_share(squares: Tensor, rows: Tensor, columns: Tensor, at_once: int = ENTRIES_AT_ONCE) -> float:
    """How much of the variance of log F an outer product explains, over the entries above 0.

    A constant factor does not count, since it changes no order. 1 is all of it, also where log F does not vary; an
    outer product that is worse than a constant has less than 0.

    Args:
        squares: F [a, b], float32, at least 0.
        rows: [a], columns: [b]: above 0 wherever F has an entry above 0 in that row or column.
        at_once: entries in temporaries together.
    """
    device = squares.device
    across, down = (axis.to(device).log2().float() for axis in (columns, rows))
    sums = torch.zeros(5, dtype=torch.float64, device=device)  # entries, y, y^2, residual, residual^2
    for start, part in _row_parts(squares, at_once):
        there = part > 0
        logs = part.log2()
        residual = logs - down[start : start + len(part), None] - across
        logs, residual = (torch.where(there, values, 0.0).double() for values in (logs, residual))
        terms = (there, logs, logs * logs, residual, residual * residual)
        sums += torch.stack([term.sum(dtype=torch.float64) for term in terms])
    entries, *moments = sums.tolist()
    if not entries:
        return 1.0
    mean, square, rest, rest_square = (moment / entries for moment in moments)
    variance, left = square - mean**2, rest_square - rest**2
    return 1.0 - left / variance if variance > 1e-9 * square else 1.0


def _row_parts(matrix: Tensor, entries: int) -> Iterator[tuple[int, Tensor]]:
    """(first row, rows) of a matrix, about so many entries at a time."""
    at_once = max(1, entries // max(1, matrix.shape[1]))
    for start in range(0, matrix.shape[0], at_once):
        yield start, matrix[start : start + at_once]
