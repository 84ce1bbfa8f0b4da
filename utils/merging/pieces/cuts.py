"""Where to cut a tensor by magnitude when it comes in pieces: differences that are computed, counted and forgotten.

The k entries of largest magnitude of a tensor are those above some magnitude and, of those that tie with it, the first
few. Both are found from tables of how often each magnitude pattern (`utils/magnitudes.py`) occurs in each *span*, a
stretch of the flattened tensor: the tables of all spans added up give the pattern, and the span in which the last tie
to be kept lies. Only that span is looked at again. Nothing of the tensor's size is held; a table takes 128 KiB a span
(256 KiB for the second round of float32).

Counting different spans from several threads at once is safe. The tables need the CPU.
"""

import mmap
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from utils.magnitudes import pattern_of
from utils.selection import entry_of_rank


@dataclass(frozen=True)
class Cut:
    """The entries of a flattened tensor that a rank selects: above `pattern`, or equal to it and before index `place`."""

    pattern: int
    place: int

    def floor(self, start: int) -> int:
        """The pattern that selected entries exceed, for entries from `start` up to `place` or, behind it, to the end."""
        return self.pattern - 1 if start < self.place else self.pattern


@dataclass(frozen=True)
class OpenCut:
    """A cut that runs through the ties of one span: `ties` of those equal to `pattern` in `span` are selected."""

    pattern: int
    span: int
    ties: int


class KnownCuts:
    """Cuts that were found, for whoever cuts the same changes again; the newest `MOST` of them, by what they depend on."""

    MOST = 1 << 18

    def __init__(self) -> None:
        self._found: dict[Hashable, Cut] = {}

    def of(self, keys: Sequence[Hashable]) -> list[Cut] | None:
        """The cuts of some keys; None unless all are known."""
        found = [self._found.get(key) for key in keys]
        return None if None in found else found

    def keep(self, keys: Sequence[Hashable], cuts: Sequence[Cut]) -> None:
        """Remember cuts."""
        self._found.update(zip(keys, cuts, strict=True))
        while len(self._found) > self.MOST:
            self._found.pop(next(iter(self._found)), None)


class CutSearch:
    """Finds the cuts of a tensor at some ranks.

    Every span's pieces go to `count`, then comes `end_round`, and if that says so, the same once more. Then `cuts`
    holds, rank by rank, a `Cut`, or an `OpenCut` that `close` closes.
    """

    def __init__(self, dtype: torch.dtype, numel: int, spans: int, ranks: Sequence[int]) -> None:
        """Search a tensor of `numel` entries in `spans` spans for the cuts at `ranks` (each 1 .. numel)."""
        self.kind = pattern_of(dtype)
        self.cuts: list[Cut | OpenCut | None] = [Cut(0, numel) if rank == numel else None for rank in ranks]
        self.finite = True
        self._numel, self._spans, self._ranks = numel, spans, list(ranks)
        self._high: list[tuple[int, int]] = []  # of float32, after the first round: per rank high digit, entries above
        self._tables = [self._new_table(self.kind.bits - self.kind.low_bits)]

    @staticmethod
    def table_bytes(dtype: torch.dtype, spans: int, ranks: int) -> int:
        """Bytes of the tables that a search needs at a time."""
        kind = pattern_of(dtype)
        first, second = 1 << (kind.bits - kind.low_bits), ranks << kind.low_bits if kind.low_bits else 0
        return spans * max(first, second) * torch.int32.itemsize

    def patterns(self, values: Tensor, out: Tensor) -> Tensor:
        """Write the magnitude patterns of a contiguous piece into an integer tensor of the same length."""
        return torch.bitwise_and(values.view(self.kind.integer), (1 << self.kind.bits) - 1, out=out)

    def count(self, span: int, patterns: Tensor) -> None:
        """Count the patterns of a piece of a span; they are overwritten."""
        for table, digits in self._digits(patterns):
            if digits.numel():
                table[span] += torch.bincount(digits, minlength=table.shape[1])

    def end_round(self) -> bool:
        """Draw the conclusions from what was counted. True if every piece has to be counted once more (float32)."""
        tables, self._tables = self._tables, []
        if self._high:
            for place, (high, above) in enumerate(self._high):
                if self.cuts[place] is None:
                    found = entry_of_rank(_total(tables[place]), self._ranks[place] - above)
                    self._conclude(place, tables[place], found, high << self.kind.low_bits)
            return False
        counts = _total(tables[0])
        self.finite = not counts[self.kind.infinity >> self.kind.low_bits :].any()
        found = [entry_of_rank(counts, rank) for rank in self._ranks]
        if self.kind.low_bits:
            self._high = [(digit, above) for digit, above, _ in found]
            self._tables = [self._new_table(self.kind.low_bits) for _ in self._ranks]
            return any(cut is None for cut in self.cuts)
        for place, entry in enumerate(found):
            if self.cuts[place] is None:
                self._conclude(place, tables[0], entry, 0)
        return False

    def close(self, place: int, pieces: Iterable[tuple[int, Tensor]]) -> None:
        """Turn the open cut of a rank into a cut.

        Args:
            place: which rank, by its place in the list.
            pieces: the pieces of the cut's span in order, as (index of the first entry, patterns).
        """
        cut = self.cuts[place]
        left = cut.ties
        for start, patterns in pieces:
            tied = patterns == cut.pattern
            found = int(tied.count_nonzero())
            if found >= left:
                self.cuts[place] = Cut(cut.pattern, start + int(tied.nonzero()[left - 1]) + 1)
                return
            left -= found
        raise AssertionError("a span held other values when it was read again")

    def _new_table(self, bits: int) -> Tensor:
        # In pages of its own, which are the system's again at once: the C library keeps some of what it frees.
        pages = mmap.mmap(-1, self._spans * (torch.int32.itemsize << bits), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return torch.frombuffer(pages, dtype=torch.int32).view(self._spans, 1 << bits)

    def _digits(self, patterns: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Each table of this round with what a piece adds to it."""
        low = self.kind.low_bits
        if not self._high:
            yield self._tables[0], patterns.bitwise_right_shift_(low) if low else patterns
            return
        for place, (high, _) in enumerate(self._high):
            if self.cuts[place] is None:
                offsets = patterns - (high << low)
                yield self._tables[place], offsets[offsets.bitwise_right_shift(low) == 0]

    def _conclude(self, place: int, table: Tensor, entry: tuple[int, int, int], first: int) -> None:
        """Set a cut from counts of the patterns `first` + digit by span, and the digit at the rank, as `entry_of_rank`."""
        digit, above, ties = entry
        pattern = first + digit
        kept = self._ranks[place] - (self._high[place][1] if self._high else 0) - above
        if kept == ties:
            self.cuts[place] = Cut(pattern, self._numel)
            return
        up_to = table[:, digit].cumsum(0)
        span = int(torch.searchsorted(up_to, kept))
        before = int(up_to[span - 1]) if span else 0
        self.cuts[place] = OpenCut(pattern, span, kept - before)


def _total(table: Tensor) -> Tensor:
    """The counts of all spans, int64: row by row, since `sum` widens the whole table first."""
    total = torch.zeros(table.shape[1], dtype=torch.int64)
    for row in table:
        total += row
    return total


def magnitude(pattern: int, dtype: torch.dtype) -> float:
    """The number that a magnitude pattern stands for."""
    return torch.tensor(pattern, dtype=pattern_of(dtype).integer).view(dtype).item()
