"""Exact selection by rank, without sorting: the k entries of a tensor largest in magnitude, the k smallest of each row.

Everything works on the integers of `utils/magnitudes.py`. Tensors are float32, bfloat16 or float16. Nothing is rounded or
turned into another floating-point type: masks are exact. Apart from the mask that is returned, temporaries are a few buffers
of at most 4 bytes per entry of one chunk and at most a few tables of 65,536 counters.

On the CPU patterns are counted in a table. On any other device the threshold is found bit by bit, by comparing and adding
up: with a table, thousands of threads would wait for one counter wherever many entries are equal, as zeros are in the
difference of two bfloat16 models. That path leaves every number on the device; nothing in this module waits for a GPU.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from utils.magnitudes import Pattern, chunk_entries, flat_patterns, magnitude_patterns, pattern_of


@dataclass(frozen=True)
class _Cut:
    """A selection by rank: all entries above a pattern, and the first few, in memory order, of those equal to it.

    Integers where the host counted (CPU), scalar tensors on the device elsewhere.
    """

    pattern: int | Tensor
    ties_kept: int | Tensor


_setting_threads = threading.Lock()


@contextlib.contextmanager
def one_torch_thread() -> Iterator[None]:
    """Have torch compute on one core while the context lasts, in this thread and those that start meanwhile."""
    if torch.get_num_threads() == 1:
        yield
        return
    with _setting_threads:  # of two threads at a time, one would take the other's setting for the one to put back
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def top_k_mask(x: Tensor, k: int) -> Tensor:
    """Mark the k entries of largest magnitude.

    Ties in magnitude at the threshold go to the lowest index in flattened (row-major) order. 0.0 and -0.0 tie. NaN counts as
    larger than infinity, as in torch.sort; NaNs tie with each other.

    Args:
        x: float32, bfloat16 or float16, any shape, strides and device.
        k: entries to mark; none if k <= 0, all if k >= x.numel().

    Returns:
        A contiguous bool tensor of x's shape on its device, with exactly min(max(k, 0), x.numel()) entries true.

    Raises:
        TypeError: another dtype.
    """
    return band_mask(x, 0, k)


def band_mask(x: Tensor, skip: int, k: int) -> Tensor:
    """Mark the k entries of largest magnitude that remain when the `skip` largest are left out.

    Equals top_k_mask(x, skip + k) & ~top_k_mask(x, skip), with the ties that those two resolve; arguments, result and errors
    as there. A band that runs past the smallest entry holds only the entries there are.
    """
    kind = pattern_of(x.dtype)
    mask = torch.zeros(x.shape, dtype=torch.bool, device=x.device)
    inner = min(max(skip, 0), x.numel())
    outer = min(max(skip + k, inner), x.numel())
    if inner == outer:
        return mask
    if outer == x.numel():
        mask.fill_(True)
    partial = [rank for rank in (inner, outer) if 0 < rank < x.numel()]
    if not partial:
        return mask
    # on the CPU torch's threads would wait for each other after every short step; where they outnumber the free cores, a
    # wait is a time slice of the system's, and a selection takes longer than the sort it replaces
    with one_torch_thread() if x.device.type == "cpu" else contextlib.nullcontext():
        for cut in (_cuts_by_counting if counts_patterns(x.device) else _cuts_by_bits)(x, kind, partial):
            _toggle(mask, x, kind, cut)
    return mask


def smallest_per_row_mask(metric: Tensor, k: int) -> Tensor:
    """Mark the k smallest entries of each row, as the first k columns of a stable ascending sort would.

    Ties go to the lowest column. Infinity is larger than any number and NaN larger than infinity, as in torch.sort; NaNs tie.

    Args:
        metric: [rows, columns], entries >= 0 or NaN (not checked: a negative entry is ranked by its magnitude), float32,
            bfloat16 or float16, any strides and device.
        k: entries to mark in each row; none if k <= 0, all if k >= columns.

    Returns:
        A contiguous bool tensor [rows, columns] on the metric's device, with exactly min(max(k, 0), columns) true in each row.

    Raises:
        TypeError: another dtype.
        ValueError: not two dimensions.
    """
    kind = pattern_of(metric.dtype)
    if metric.dim() != 2:
        raise ValueError(f"a metric must have 2 dimensions [rows, columns], not {metric.dim()}")
    columns = metric.shape[1]
    if k <= 0 or k >= columns or not metric.numel():
        return torch.full(metric.shape, 0 < columns <= k, dtype=torch.bool, device=metric.device)
    mask = torch.empty(metric.shape, dtype=torch.bool, device=metric.device)
    rows_at_once = max(1, chunk_entries(metric) // columns)
    for rows, out in zip(metric.split(rows_at_once), mask.split(rows_at_once), strict=True):
        patterns = magnitude_patterns(rows.contiguous(), kind)
        if counts_patterns(metric.device):
            _smallest_on_host(patterns, k, out)
        else:
            _smallest_on_device(patterns, k, kind.bits, out)
    return mask


def counts_patterns(device: torch.device) -> bool:
    """Whether thresholds are found on the host, by tables and partitions; else by the search that needs no synchronization."""
    return device.type == "cpu"


# --- whole tensors --------------------------------------------------------------------------------------------------------


def _cuts_by_counting(x: Tensor, kind: Pattern, ranks: list[int]) -> list[_Cut]:
    """The cut that selects each rank (1 .. numel), from tables of how often each pattern occurs. CPU."""
    counts = torch.zeros(1 << (kind.bits - kind.low_bits), dtype=torch.int64, device=x.device)
    for patterns in flat_patterns(x, kind):
        digits = patterns.bitwise_right_shift_(kind.low_bits) if kind.low_bits else patterns
        counts += torch.bincount(digits, minlength=len(counts))
    cuts = []
    for rank in ranks:
        pattern, above, ties = entry_of_rank(counts, rank)
        if kind.low_bits:
            low, low_above, ties = entry_of_rank(_low_digit_counts(x, kind, pattern), rank - above)
            pattern, above = (pattern << kind.low_bits) | low, above + low_above
        # If every tie is kept, the same set lies above the next lower pattern, and no tie needs a look.
        all_ties = rank - above == ties
        cuts.append(_Cut(pattern - 1, 0) if all_ties else _Cut(pattern, rank - above))
    return cuts


def _low_digit_counts(x: Tensor, kind: Pattern, high: int) -> Tensor:
    """How often each low digit occurs among the patterns whose high digit is `high`."""
    counts = torch.zeros(1 << kind.low_bits, dtype=torch.int64, device=x.device)
    for patterns in flat_patterns(x, kind):
        offsets = patterns.sub_(high << kind.low_bits)
        inside = offsets[offsets.bitwise_right_shift(kind.low_bits) == 0]
        if inside.numel():
            counts += torch.bincount(inside, minlength=len(counts))
    return counts


def entry_of_rank(counts: Tensor, rank: int) -> tuple[int, int, int]:
    """The value at a rank (1 = largest) of the entries a table counts; how many are larger, and how many equal it."""
    from_top = counts.flip(0).cumsum(0)
    position = int(torch.searchsorted(from_top, rank))
    ties = int(counts[len(counts) - 1 - position])
    return len(counts) - 1 - position, int(from_top[position]) - ties, ties


def _cuts_by_bits(x: Tensor, kind: Pattern, ranks: list[int]) -> list[_Cut]:
    """The cut that selects each rank (1 .. numel), by a search over the bits of the pattern. Any device, no synchronization."""

    # A tensor of one chunk is turned into patterns once, a longer one anew for every bit.
    held = tuple(flat_patterns(x, kind)) if x.numel() <= chunk_entries(x) else None

    def count_from(pattern: Tensor) -> Tensor:
        # torch sums booleans by way of a copy in the sum's dtype: int32 holds the count of a chunk.
        return sum(
            ((patterns >= pattern).sum(dtype=torch.int32) for patterns in held or flat_patterns(x, kind)),
            pattern.new_zeros((), dtype=torch.int64),
        )

    start = torch.zeros((), dtype=kind.integer, device=x.device)
    cuts = []
    for rank in ranks:
        pattern = _pattern_of_rank(count_from, start, kind.bits, rank)
        cuts.append(_Cut(pattern, rank - count_from(pattern + 1)))
    return cuts


def _pattern_of_rank(count_from: Callable[[Tensor], Tensor], start: Tensor, bits: int, rank: int) -> Tensor:
    """The largest pattern that at least `rank` entries reach, in the shape of `start` (zeros): one bit a step, the highest first."""
    pattern = start
    for bit in reversed(range(bits)):
        candidate = pattern | (1 << bit)
        pattern = torch.where(count_from(candidate) >= rank, candidate, pattern)
    return pattern


def _toggle(mask: Tensor, x: Tensor, kind: Pattern, cut: _Cut) -> None:
    """Flip the mask wherever the cut selects."""
    flat_mask = mask.view(-1)
    ties_left = cut.ties_kept
    start = 0
    for patterns in flat_patterns(x, kind):
        selected = patterns > cut.pattern
        if isinstance(ties_left, Tensor):
            tied = patterns == cut.pattern
            order = tied.cumsum(0, dtype=torch.int32)
            # The scalar joins order's dtype, int32, in the comparison: keep it within.
            selected |= tied.logical_and_(order <= ties_left.clamp(max=tied.numel()))
            ties_left = ties_left - order[-1]
        elif ties_left:
            tied = patterns == cut.pattern
            found = int(tied.count_nonzero())
            if found > ties_left:
                tied.logical_and_(tied.cumsum(0, dtype=torch.int32) <= ties_left)
            selected |= tied
            ties_left = max(0, ties_left - found)
        flat_mask[start : start + selected.numel()] ^= selected
        start += selected.numel()


# --- rows -----------------------------------------------------------------------------------------------------------------


def _smallest_on_host(patterns: Tensor, k: int, out: Tensor) -> None:
    """Write the mask of the k smallest (0 < k < columns) of each row of patterns."""
    partitioned = patterns.clone()
    # The array shares the tensor's memory. Its in-place partition (vector instructions) is an order of magnitude faster than
    # torch.kthvalue, which moves an int64 index along with every entry.
    partitioned.numpy().partition(k - 1, axis=1)
    threshold = partitioned[:, k - 1 : k]
    torch.le(patterns, threshold, out=out)
    excess = (out.sum(dim=1) > k).nonzero().squeeze(1)
    if excess.numel():
        out[excess] = _first_k(patterns[excess], threshold[excess], k)


def _smallest_on_device(patterns: Tensor, k: int, bits: int, out: Tensor) -> None:
    """Write the mask of the k smallest (0 < k < columns) of each row of patterns. Any device, no synchronization."""
    rows, columns = patterns.shape

    def count_from(pattern: Tensor) -> Tensor:
        return (patterns >= pattern).sum(dim=1, keepdim=True, dtype=torch.int32)

    threshold = _pattern_of_rank(count_from, patterns.new_zeros((rows, 1)), bits, columns - k + 1)
    out.copy_(_first_k(patterns, threshold, k))


def _first_k(patterns: Tensor, threshold: Tensor, k: int) -> Tensor:
    """The k entries of each row that lie below its threshold [rows, 1] or, leftmost first, equal it."""
    below = patterns < threshold
    tied = patterns == threshold
    places = k - below.sum(dim=1, keepdim=True, dtype=torch.int32)
    return below.logical_or_(tied.logical_and_(tied.cumsum(dim=1, dtype=torch.int32) <= places))
