"""One tensor merged in pieces: counted span by span if changes are cut by magnitude, then computed and written.

Spans can be worked on in any order and from several threads, each with a `Scratch` of its own, but counting must be done
before merging begins. Inputs that are counted are read twice, the second time from the page cache.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from utils.merging.pieces.arithmetic import (
    Average,
    Scratch,
    average,
    combine,
    cut_places,
    is_finite_piece,
    keep_band,
    not_finite,
)
from utils.merging.pieces.choice import STORED, DirectTensor
from utils.merging.pieces.cuts import Cut, CutSearch, KnownCuts, OpenCut
from utils.models.tensor_files import TensorFiles, as_bytes

PIECE = 1 << 17  # entries at a time: with all buffers, about what a core's own cache holds
SPAN = 1 << 18  # entries of a span at least: its table of counts is a quarter as large as its bfloat16 numbers
MOST_SPANS = 64  # of a tensor, so that the tables of the largest take 8 MiB for each change (16 MiB in float32)


class Output(Protocol):
    """Where merged tensors go."""

    def write(self, name: str, start: int, content: memoryview) -> None:
        """Take bytes of a tensor from byte `start` of it on."""


class TensorMerge:
    """The work on one tensor, a job of `utils/merging/pieces/work_line.py`. `spans` are (first entry, entry behind the last)."""

    def __init__(
        self,
        tensor: DirectTensor,
        inputs: TensorFiles,
        output: Output,
        report: Callable[[int, int], None],
        known: KnownCuts | None = None,
    ) -> None:
        """Prepare the work on a tensor from open inputs into an open output.

        `report` is told how many bytes more have been read for the first time, and how many written. `known` are cuts of
        these very inputs that need not be searched again; what is found is added.
        """
        self.tensor, self.report = tensor, report
        self._inputs, self._output, self._known = inputs, output, known or KnownCuts()
        self._counting = self._merging = False  # what has been handed out
        self.spans = _spans(tensor.numel)
        self._searches: dict[int, CutSearch] = {}  # by the place of the change
        self._cuts: dict[int, Sequence[Cut]] = {}

    def next_stage(self, scratch: Scratch) -> list[Callable[[Scratch], None]]:
        """The steps of the next stage: count every span (once or, for float32, twice), merge every span, nothing.

        Raises:
            UserError: a change is not finite, so the result would not be.
        """
        if self._merging:
            return []
        if not self._counting:
            self._begin()
        if self._searches and (not self._counting or self._end_round()):
            self._counting = True
            return [partial(self._count, span) for span in range(len(self.spans))]
        for place, search in self._searches.items():
            for rank, cut in enumerate(search.cuts):
                if isinstance(cut, OpenCut):
                    search.close(rank, self._patterns_of_span(place, cut.span, scratch))
            self._cuts[place] = search.cuts
            self._known.keep(self._keys(place), search.cuts)
        self._merging = True
        return [partial(self._merge, span) for span in range(len(self.spans))]

    def _begin(self) -> None:
        """Take the cuts that are known, and begin to search the others."""
        for place, ranks in _ranks(self.tensor).items():
            found = self._known.of(self._keys(place))
            if found is None:
                self._searches[place] = CutSearch(self.tensor.dtype, self.tensor.numel, len(self.spans), ranks)
            else:
                self._cuts[place] = found

    def _keys(self, place: int) -> list[Hashable]:
        """What the cuts of a change depend on: where both inputs lie, the working dtype, the rank."""
        both = [(header.file, header.start) for header in (self.tensor.headers[0], self.tensor.headers[place + 1])]
        return [(*both, self.tensor.dtype, rank) for rank in _ranks(self.tensor)[place]]

    def _end_round(self) -> bool:
        """Draw the conclusions from what was counted; whether all has to be counted once more."""
        again = [search.end_round() for search in self._searches.values()]
        if not all(search.finite for search in self._searches.values()):
            raise not_finite(self.tensor.name)
        return any(again)

    def _count(self, span: int, scratch: Scratch) -> None:
        first, stop = self.spans[span]
        for begin in range(first, stop, SPAN):  # long stretches, because every count makes a table
            size = min(SPAN, stop - begin)
            blocks = {
                place: scratch.take(("block", place), size, search.kind.integer)
                for place, search in self._searches.items()
            }
            for start in range(0, size, PIECE):
                base = self._read(0, begin + start, min(PIECE, size - start), scratch)
                for place, block in blocks.items():
                    self._patterns(place, base, begin + start, block[start : start + base.numel()], scratch)
            for place, block in blocks.items():
                self._searches[place].count(span, block)
        self._report_read(first, stop)

    def _merge(self, span: int, scratch: Scratch) -> None:
        tensor, (first, stop) = self.tensor, self.spans[span]
        width = tensor.out_dtype.itemsize
        cuts = [cut for own in self._cuts.values() for cut in own]
        borders = [first, *cut_places(cuts, first, stop), stop]
        for begin, end in pairwise(borders):
            for start in range(begin, end, PIECE):
                merged = self._merge_piece(start, min(PIECE, end - start), scratch)
                if merged.dtype != tensor.out_dtype:
                    merged = scratch.take("result", merged.numel(), tensor.out_dtype).copy_(merged)
                if not is_finite_piece(merged, scratch):
                    raise not_finite(tensor.name)
                self._output.write(tensor.name, start * width, as_bytes(merged))
                self.report(0, merged.nbytes)
        if not self._searches:
            self._report_read(first, stop)

    def _report_read(self, first: int, stop: int) -> None:
        self.report(sum((stop - first) * STORED[header.dtype].itemsize for header in self.tensor.headers), 0)

    def _merge_piece(self, start: int, entries: int, scratch: Scratch) -> Tensor:
        rule, bands = self.tensor.rule, self.tensor.bands
        if isinstance(rule, Average):
            inputs = range(len(self.tensor.headers))
            return average([self._read(place, start, entries, scratch) for place in inputs], rule, scratch)
        base = self._read(0, start, entries, scratch)
        changes = []
        for place, band in enumerate(bands):
            if band is not None and not band.keep:
                change = scratch.take(("change", place), entries, base.dtype).zero_()
            else:
                change = self._change(place, base, start, scratch)
                if band is not None:
                    outer, *inner = (cut.floor(start) for cut in self._cuts[place])
                    keep_band(change, outer, inner[0] if inner else None, scratch)
            changes.append(change)
        return combine(base, changes, rule, scratch)

    def _patterns_of_span(self, place: int, span: int, scratch: Scratch) -> Iterator[tuple[int, Tensor]]:
        first, stop = self.spans[span]
        for start in range(first, stop, PIECE):
            base = self._read(0, start, min(PIECE, stop - start), scratch)
            out = scratch.take("bits", base.numel(), self._searches[place].kind.integer)
            yield start, self._patterns(place, base, start, out, scratch)

    def _patterns(self, place: int, base: Tensor, start: int, out: Tensor, scratch: Scratch) -> Tensor:
        return self._searches[place].patterns(self._change(place, base, start, scratch), out)

    def _change(self, place: int, base: Tensor, start: int, scratch: Scratch) -> Tensor:
        other = self._read(place + 1, start, base.numel(), scratch)
        return torch.sub(other, base, out=scratch.take(("change", place), base.numel(), base.dtype))

    def _read(self, place: int, start: int, entries: int, scratch: Scratch) -> Tensor:
        """A piece of an input in the working dtype, in that input's buffer."""
        header, dtype = self.tensor.headers[place], self.tensor.dtype
        stored = scratch.take(("input", place), entries, STORED[header.dtype])
        self._inputs.read(header, start, stored)
        return stored if stored.dtype == dtype else scratch.take(("cast", place), entries, dtype).copy_(stored)


def _spans(numel: int) -> list[tuple[int, int]]:
    length = max(SPAN, -(-numel // (MOST_SPANS * PIECE)) * PIECE)
    return [(first, min(first + length, numel)) for first in range(0, numel, length)]


def _ranks(tensor: DirectTensor) -> dict[int, list[int]]:
    """By the place of each change that is cut, the ranks of its cuts: the outer one, and the inner one if there is one."""
    bands = {place: band for place, band in enumerate(tensor.bands) if band is not None and band.keep}
    return {place: [band.skip + band.keep, band.skip][: 1 + (band.skip > 0)] for place, band in bands.items()}


def buffer_bytes(tensor: DirectTensor) -> int:
    """Bytes that a thread's buffers for a tensor take, about."""
    changes, width = len(tensor.bands), tensor.dtype.itemsize
    stored = sum(STORED[header.dtype].itemsize for header in tensor.headers)
    cast = sum(width for header in tensor.headers if STORED[header.dtype] != tensor.dtype)
    entry = stored + cast + (changes + 4) * width + 16 + tensor.out_dtype.itemsize
    return min(PIECE, tensor.numel) * entry + min(SPAN, tensor.numel) * width * changes


def table_bytes(tensor: DirectTensor) -> int:
    """Bytes that the counts of a tensor take at most."""
    spans = len(_spans(tensor.numel))
    return sum(CutSearch.table_bytes(tensor.dtype, spans, len(ranks)) for ranks in _ranks(tensor).values())
