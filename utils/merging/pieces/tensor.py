"""One tensor merged in pieces: counted span by span if changes are cut by magnitude, then computed and written.

Spans can be worked on in any order and from several threads, each with a `Scratch` of its own, but counting must be done
before merging begins. Inputs that are counted are read twice, the second time from the page cache.
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Protocol

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
from utils.merging.pieces.changes import PIECE, SPAN, Changes, spans_of
from utils.merging.pieces.choice import STORED, DirectTensor
from utils.merging.pieces.cuts import KnownCuts
from utils.merging.pieces.tensor_cuts import MOST_SPANS, TensorCuts, ranks_of
from utils.models.tensor_files import TensorFiles, as_bytes


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
        self.tensor, self.report, self._output = tensor, report, output
        self._changes = Changes(tensor, inputs)
        self._finding = TensorCuts(
            self._changes,
            ranks_of(tensor),
            known or KnownCuts(),
            MOST_SPANS,
            self._report_read,
        )
        self._merging = False  # whether the last stage has been handed out
        self.spans = spans_of(tensor.numel, MOST_SPANS)

    def next_stage(self, scratch: Scratch) -> list[Callable[[Scratch], None]]:
        """The steps of the next stage: count every span (once or, for float32, twice), merge every span, nothing.

        Raises:
            UserError: a change is not finite, so the result would not be.
        """
        if self._merging:
            return []
        if steps := self._finding.next_stage(scratch):
            return steps
        self._merging = True
        return [partial(self._merge, span) for span in range(len(self.spans))]

    def _merge(self, span: int, scratch: Scratch) -> None:
        tensor, (first, stop) = self.tensor, self.spans[span]
        width = tensor.out_dtype.itemsize
        cuts = [cut for own in self._finding.cuts.values() for cut in own]
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
        if not self._finding.searched:
            self._report_read(first, stop)

    def _report_read(self, first: int, stop: int) -> None:
        self.report(sum((stop - first) * STORED[header.dtype].itemsize for header in self.tensor.headers), 0)

    def _merge_piece(self, start: int, entries: int, scratch: Scratch) -> Tensor:
        rule, bands = self.tensor.rule, self.tensor.bands
        if isinstance(rule, Average):
            inputs = range(len(self.tensor.headers))
            return average([self._changes.read(place, start, entries, scratch) for place in inputs], rule, scratch)
        base = self._changes.read(0, start, entries, scratch)
        changes = []
        for place, band in enumerate(bands):
            if band is not None and not band.keep:
                change = scratch.take(("change", place), entries, base.dtype).zero_()
            else:
                change = self._changes.change(place, base, start, scratch)
                if band is not None:
                    outer, *inner = (cut.floor(start) for cut in self._finding.cuts[place])
                    keep_band(change, outer, inner[0] if inner else None, scratch)
            changes.append(change)
        return combine(base, changes, rule, scratch)


def buffer_bytes(tensor: DirectTensor) -> int:
    """Bytes that a thread's buffers for a tensor take, about."""
    changes, width = len(tensor.bands), tensor.dtype.itemsize
    stored = sum(STORED[header.dtype].itemsize for header in tensor.headers)
    cast = sum(width for header in tensor.headers if STORED[header.dtype] != tensor.dtype)
    entry = stored + cast + (changes + 4) * width + 16 + tensor.out_dtype.itemsize
    return min(PIECE, tensor.numel) * entry + min(SPAN, tensor.numel) * width * changes
