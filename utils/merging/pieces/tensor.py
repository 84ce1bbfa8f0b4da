"""One tensor merged in pieces, by one recipe or by several: counted span by span if changes are cut by magnitude, then
computed and written.

Spans can be worked on in any order and from several threads, each with a `Scratch` of its own, but counting must be done
before merging begins. Inputs that are counted are read twice, the second time from the page cache. What several recipes
make of the same inputs is made piece by piece: a piece is read, and its changes are computed, once for all of them; and
mixed once for those that differ in the scale alone.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Protocol

from torch import Tensor

from utils.merging.pieces.arithmetic import (
    Average,
    Scratch,
    add_scaled,
    average,
    cut_places,
    is_finite_piece,
    keep_band,
    mix,
    not_finite,
)
from utils.merging.pieces.changes import PIECE, SPAN, Changes, spans_of
from utils.merging.pieces.choice import TORCH_DTYPES, DirectTensor
from utils.merging.pieces.cuts import KnownCuts
from utils.merging.pieces.tensor_cuts import MOST_SPANS, TensorCuts, ranks_of
from utils.models.tensor_files import TensorFiles, as_bytes


class Output(Protocol):
    """Where merged tensors go."""

    def write(self, name: str, start: int, content: memoryview) -> None:
        """Take bytes of a tensor from byte `start` of it on."""


@dataclass
class _Making:
    """What one recipe makes of the inputs: the tensor, where it goes, the search for its cuts."""

    tensor: DirectTensor
    output: Output
    finding: TensorCuts

    def cut_places(self, start: int, stop: int) -> list[int]:
        """Where, strictly between two entries, one of its cuts changes sides."""
        return cut_places([cut for own in self.finding.cuts.values() for cut in own], start, stop)


@dataclass(frozen=True)
class _Piece:
    """A piece of the inputs that begins at entry `start`: the base and what each other input changes about it (None where
    no recipe keeps anything of that); or all inputs, and no changes, for an average."""

    start: int
    inputs: list[Tensor]
    changes: list[Tensor | None] = field(default_factory=list)

    def part(self, begin: int, end: int) -> "_Piece":
        """The entries from one to before another, counted from the tensor's first."""
        own = slice(begin - self.start, end - self.start)
        changes = [None if change is None else change[own] for change in self.changes]
        return _Piece(begin, [values[own] for values in self.inputs], changes)


class TensorMerge:
    """The work on one tensor, a job of `utils/merging/pieces/work_line.py`. `spans` are (first entry, entry behind the last)."""

    def __init__(
        self,
        work: Sequence[tuple[DirectTensor, Output]],
        inputs: TensorFiles,
        report: Callable[[str, int, int], None],
        known: KnownCuts | None = None,
    ) -> None:
        """Prepare the work on tensors of the very same inputs (`inputs_of`), each into an open output.

        `report` is called with a tensor's name, how many more bytes were read for the first time, and how many were written.
        `known` are cuts of these very inputs that need not be searched again; what is found is added.
        """
        self.report, self._tensor = report, work[0][0]
        # of no object that holds it: merged tensors would stay in memory until Python looks for circles
        self._report_read = partial(_say_read, report, self._tensor)
        self._changes, known = Changes(self._tensor, inputs), known or KnownCuts()
        self._ones = [
            _Making(
                tensor,
                output,
                TensorCuts(
                    self._changes, ranks_of(tensor), known, MOST_SPANS, self._report_read if not place else _unsaid
                ),
            )
            for place, (tensor, output) in enumerate(work)
        ]
        self._alike: dict[Hashable, list[_Making]] = {}
        for one in self._ones:
            self._alike.setdefault(_mixture(one.tensor), []).append(one)
        self._counting = 0  # whose cuts are being searched; behind the last when all have been merged
        self.spans = spans_of(self._tensor.numel, MOST_SPANS)

    def next_stage(self, scratch: Scratch) -> list[Callable[[Scratch], None]]:
        """The steps of the next stage: for each recipe in turn count every span (once or, for float32, twice); merge every
        span; nothing.

        Raises:
            UserError: a change is not finite, so the result would not be.
        """
        while self._counting < len(self._ones):
            if steps := self._ones[self._counting].finding.next_stage(scratch):
                return steps
            self._counting += 1
        if self._counting > len(self._ones):
            return []
        self._counting += 1
        return [partial(self._merge, span) for span in range(len(self.spans))]

    def _merge(self, span: int, scratch: Scratch) -> None:
        first, stop = self.spans[span]
        for start in range(first, stop, PIECE):
            end = min(start + PIECE, stop)
            piece = self._read(start, end - start, scratch)
            for alike in self._alike.values():
                for begin, finish in pairwise([start, *alike[0].cut_places(start, end), end]):
                    self._merge_piece(alike, piece.part(begin, finish), scratch)
        if not self._ones[0].finding.searched:
            self._report_read(first, stop)

    def _read(self, start: int, entries: int, scratch: Scratch) -> _Piece:
        inputs = range(len(self._tensor.headers))
        if isinstance(self._tensor.rule, Average):
            return _Piece(start, [self._changes.read(place, start, entries, scratch) for place in inputs])
        base = self._changes.read(0, start, entries, scratch)
        wanted = [any(_is_kept(one.tensor, place) for one in self._ones) for place in inputs[:-1]]
        changes = [
            self._changes.change(place, base, start, scratch) if is_wanted else None
            for place, is_wanted in enumerate(wanted)
        ]
        return _Piece(start, [base], changes)

    def _merge_piece(self, alike: Sequence[_Making], piece: _Piece, scratch: Scratch) -> None:
        """Merge a piece by recipes of one mixture."""
        rule = alike[0].tensor.rule
        if isinstance(rule, Average):
            mixed = average(piece.inputs, rule, scratch)
        else:
            mixed = mix(self._own_changes(alike[0], piece, scratch), rule, scratch)
        for one in alike:
            tensor = one.tensor
            merged = (
                mixed if isinstance(rule, Average) else add_scaled(piece.inputs[0], mixed, tensor.rule.scale, scratch)
            )
            if merged.dtype != tensor.out_dtype:
                merged = scratch.take("result", merged.numel(), tensor.out_dtype).copy_(merged)
            if not is_finite_piece(merged, scratch):
                raise not_finite(tensor.name)
            one.output.write(tensor.name, piece.start * tensor.out_dtype.itemsize, as_bytes(merged))
            self.report(tensor.name, 0, merged.nbytes)

    def _own_changes(self, one: _Making, piece: _Piece, scratch: Scratch) -> list[Tensor]:
        """The changes as one recipe keeps them, which it may overwrite: in buffers of its own where others need them, too."""
        tensor, base = one.tensor, piece.inputs[0]
        copied = len(self._alike) > 1 and tensor.rule.overwrites
        found = []
        for place, (change, band) in enumerate(zip(piece.changes, tensor.bands, strict=True)):
            if not _is_kept(tensor, place):
                found.append(scratch.take(("own", place), base.numel(), base.dtype).zero_())
                continue
            is_apart = copied or (len(self._alike) > 1 and band is not None)
            own = scratch.take(("own", place), base.numel(), base.dtype) if is_apart else change
            if band is not None:
                outer, *inner = (cut.floor(piece.start) for cut in one.finding.cuts[place])
                keep_band(change, outer, inner[0] if inner else None, own, scratch)
            elif is_apart:
                own.copy_(change)
            found.append(own)
        return found


def _mixture(tensor: DirectTensor) -> Hashable:
    """What tensors of the same inputs need to have in common to be the base and the same change, each scaled its own way."""
    rule = tensor.rule if isinstance(tensor.rule, Average) else replace(tensor.rule, scale=1.0)
    return rule, tensor.bands


def _is_kept(tensor: DirectTensor, place: int) -> bool:
    """Whether anything of a change is kept."""
    band = tensor.bands[place]
    return band is None or band.keep > 0


def _say_read(report: Callable[[str, int, int], None], tensor: DirectTensor, first: int, stop: int) -> None:
    """Tell how much of the inputs some entries are."""
    report(tensor.name, sum((stop - first) * TORCH_DTYPES[header.dtype].itemsize for header in tensor.headers), 0)


def _unsaid(first: int, stop: int) -> None:
    """What further recipes read has been read before."""


def inputs_of(tensor: DirectTensor) -> tuple[Hashable, ...]:
    """What tensors need to have in common to be made of the same pieces."""
    places = tuple((header.file, header.start, header.change, header.dtype) for header in tensor.headers)
    return (*places, tensor.numel, tensor.dtype, isinstance(tensor.rule, Average))


def buffer_bytes(tensor: DirectTensor, *, shared: bool = False) -> int:
    """Bytes that a thread's buffers for a tensor take, about; more where several recipes are made of the same inputs."""
    changes, width = len(tensor.bands), tensor.dtype.itemsize
    own = changes if shared else sum(not _is_kept(tensor, place) for place in range(changes))
    stored = sum(TORCH_DTYPES[header.dtype].itemsize for header in tensor.headers)
    cast = sum(width for header in tensor.headers if TORCH_DTYPES[header.dtype] != tensor.dtype)
    entry = stored + cast + (changes + own + 5) * width + 16 + tensor.out_dtype.itemsize
    return min(PIECE, tensor.numel) * entry + min(SPAN, tensor.numel) * width * changes
