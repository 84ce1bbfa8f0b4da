"""What is kept of a change, fitted anew to answer like the whole of it on a layer's inputs: tensors in, a tensor out.

    minimize over x on S    (x - d) C (x - d)'  +  r |x_S - d_S|^2
    x_S = d_S + (C_SS + r 1)^-1 (d_T C_TS)

for each row d of a change, S the entries that are kept of it, T the others, C the mean of x x' over the inputs: the least
squares that pruning by optimal brain surgeon solves one entry at a time, for a mask that is given. Entries that are kept
take over what the others did. With r above any eigenvalue of C (or no inputs) they stay as they are.

In float64. A row with k entries kept takes k^3 / 3 operations.
"""

import math

import torch
from torch import Tensor

from utils.merging.guided.definite import require_finite

# Entries of the rows' matrices together. On the CPU they stay in cache from step to step; a GPU wants many at a time.
_AT_ONCE = {"cpu": 2**18, "default": 2**24}
_ROWS_AT_ONCE = 2**22  # entries of rows that are multiplied together: of one alone the product reads all of C


def refitted(change: Tensor, kept: Tensor, gram: Tensor, ridge: float, entries_at_once: int | None = None) -> Tensor:
    """Fit what is kept of a change anew.

    Args:
        change: [out, in], any floating-point dtype.
        kept: bool [out, in].
        gram: C [in, in], symmetric and without negative eigenvalues but for rounding.
        ridge: above 0; r in units of C's mean diagonal.
        entries_at_once: entries of matrices that are in memory at a time; at least one row's are. By default as the device
            likes it.

    Returns:
        float64 [out, in] on the change's device, 0 where nothing is kept.

    Raises:
        ValueError: shapes that do not fit together; a Gram matrix that is not finite, or far from definite.
    """
    if kept.shape != change.shape or gram.shape != (change.shape[1],) * 2:
        shapes = [list(tensor.shape) for tensor in (change, kept, gram)]
        raise ValueError(f"change, mask and Gram matrix do not fit together: {shapes}")
    require_finite(gram)
    gram = gram.to(change.device, torch.float64)
    found = torch.where(kept, change.double(), 0.0)
    scale = float(gram.diagonal().mean())
    if not scale > 0:
        return found
    counts = kept.sum(1)
    order = counts.argsort(stable=True)  # rows of like many entries share a batch, padded to the longest
    order = order[int((counts == 0).sum()) :]
    if entries_at_once is None:
        entries_at_once = _entries_at_once(change.device.type)
    for rows in order.split(max(1, _ROWS_AT_ONCE // change.shape[1])):
        given = torch.where(kept[rows], 0.0, change[rows].double()) @ gram
        start = 0
        while start < len(rows):
            stop = _batch_end(counts, rows, start, entries_at_once)
            some = rows[start:stop]
            found[some] += _added(given[start:stop], kept[some], gram, ridge * scale)
            start = stop
    return found


def refit_bytes(shape: tuple[int, int], density: float, device: str = "cpu") -> int:
    """About how many bytes rows take in `refitted` on a device of some type, the matrices of a batch above all.

    Rows keep more than others: matrices are taken to have twice the density's share of the width.
    """
    out, width = shape
    squared = min(width, math.ceil(2 * density * width)) ** 2
    rows = min(out, max(1, _entries_at_once(device) // squared))
    multiplied = min(out, max(1, _ROWS_AT_ONCE // width))
    return rows * (18 * squared + 26 * width) + 25 * multiplied * width


def _entries_at_once(device: str) -> int:
    return _AT_ONCE.get(device, _AT_ONCE["default"])


def _batch_end(counts: Tensor, order: Tensor, start: int, entries: int) -> int:
    """Where a batch of rows ends whose matrices have at most so many entries; it has one row at least."""
    stop = start + 1
    while stop < len(order) and (stop + 1 - start) * int(counts[order[stop]]) ** 2 <= entries:
        stop += 1
    return stop


def _added(given: Tensor, kept: Tensor, gram: Tensor, ridge: float) -> Tensor:
    """(C_SS + r 1)^-1 (d_T C_TS) of some rows, whose d_T C is given; 0 beside S."""
    longest = int(kept.sum(1).max())
    places = kept.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :longest]  # S, then padding
    real = kept.gather(1, places)
    right = given.gather(1, places) * real
    matrices = gram[places[:, :, None], places[:, None, :]] * (real[:, :, None] & real[:, None, :])
    matrices.diagonal(dim1=1, dim2=2).add_(torch.where(real, ridge, 1.0))
    factors, failed = torch.linalg.cholesky_ex(matrices)
    if bool(failed.any()):
        raise ValueError("a Gram matrix is far from definite; was it measured on this model?")
    solved = torch.cholesky_solve(right[:, :, None], factors)[:, :, 0] * real
    return torch.zeros_like(given).scatter_(1, places, solved)
