"""Where the changes of one tensor are cut by magnitude, found span by span: alone, or for several merges at a time.

Merges of the same inputs at other densities count the same changes; what is counted for several ranks at once is read
and subtracted once.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from functools import partial

from torch import Tensor

from utils.merging.pieces.arithmetic import Scratch, not_finite
from utils.merging.pieces.changes import PIECE, SPAN, Changes, spans_of
from utils.merging.pieces.choice import DirectTensor
from utils.merging.pieces.cuts import Cut, CutSearch, KnownCuts, OpenCut
from utils.models.tensor_files import TensorFiles

MOST_SPANS = 64  # of a tensor, so that the tables of the largest take 8 MiB for each change (16 MiB in float32)
_TOGETHER = 4  # ranks that are searched at a time; over as many times fewer spans, so that their tables are no larger

Ranks = Mapping[int, Sequence[int]]
"""By the place of each change that is cut, the ranks of its cuts."""


class TensorCuts:
    """The search for a tensor's cuts, a job of `utils/merging/pieces/work_line.py`; `cuts` holds them when it is done."""

    def __init__(
        self,
        changes: Changes,
        ranks: Ranks,
        known: KnownCuts,
        most_spans: int,
        on_read: Callable[[int, int], None] = lambda first, stop: None,
    ) -> None:
        """Prepare the search; cuts that are known need none, and what is found is added to them.

        `on_read` is called with the first entry, and that behind the last, of what has been read for the first time.
        """
        self._changes, self._known, self._on_read = changes, known, on_read
        self._ranks = {place: list(own) for place, own in ranks.items()}
        self._spans = spans_of(changes.tensor.numel, most_spans)
        self._searches: dict[int, CutSearch] | None = None  # by the place of the change
        self._rounds = 0
        self.cuts: dict[int, Sequence[Cut]] = {}

    @property
    def searched(self) -> bool:
        """Whether anything had to be searched."""
        return bool(self._searches)

    def next_stage(self, scratch: Scratch) -> list[Callable[[Scratch], None]]:
        """The steps of the next stage: count every span, once or, for float32, twice; none when the cuts are there.

        Raises:
            UserError: a change is not finite.
        """
        if self._searches is None:
            self._searches = self._begun()
        if self._searches and (not self._rounds or self._end_round()):
            self._rounds += 1
            return [partial(self._count, span) for span in range(len(self._spans))]
        for place, search in self._searches.items():
            for number, cut in enumerate(search.cuts):
                if isinstance(cut, OpenCut):
                    search.close(number, self._patterns_of_span(place, cut.span, scratch))
            self.cuts[place] = search.cuts
            self._known.keep(_keys(self._changes.tensor, place, self._ranks[place]), search.cuts)
        return []

    def _begun(self) -> dict[int, CutSearch]:
        """Take the cuts that are known, and begin to search the others."""
        tensor, searches = self._changes.tensor, {}
        for place, ranks in self._ranks.items():
            found = self._known.of(_keys(tensor, place, ranks))
            if found is None:
                searches[place] = CutSearch(tensor.dtype, tensor.numel, len(self._spans), ranks)
            else:
                self.cuts[place] = found
        return searches

    def _end_round(self) -> bool:
        """Draw the conclusions from what was counted; whether all has to be counted once more."""
        again = [search.end_round() for search in self._searches.values()]
        if not all(search.finite for search in self._searches.values()):
            raise not_finite(self._changes.tensor.name)
        return any(again)

    def _count(self, span: int, scratch: Scratch) -> None:
        first, stop = self._spans[span]
        for begin in range(first, stop, SPAN):  # long stretches, because every count makes a table
            size = min(SPAN, stop - begin)
            blocks = {
                place: scratch.take(("block", place), size, search.kind.integer)
                for place, search in self._searches.items()
            }
            for start in range(0, size, PIECE):
                base = self._changes.read(0, begin + start, min(PIECE, size - start), scratch)
                for place, block in blocks.items():
                    self._patterns(place, base, begin + start, block[start : start + base.numel()], scratch)
            for place, block in blocks.items():
                self._searches[place].count(span, block)
        self._on_read(first, stop)

    def _patterns_of_span(self, place: int, span: int, scratch: Scratch) -> Iterator[tuple[int, Tensor]]:
        first, stop = self._spans[span]
        for start in range(first, stop, PIECE):
            base = self._changes.read(0, start, min(PIECE, stop - start), scratch)
            out = scratch.take("bits", base.numel(), self._searches[place].kind.integer)
            yield start, self._patterns(place, base, start, out, scratch)

    def _patterns(self, place: int, base: Tensor, start: int, out: Tensor, scratch: Scratch) -> Tensor:
        return self._searches[place].patterns(self._changes.change(place, base, start, scratch), out)


def ranks_of(tensor: DirectTensor) -> dict[int, list[int]]:
    """The ranks of each change that is cut: of the outer cut, and of the inner one if there is one."""
    bands = {place: band for place, band in enumerate(tensor.bands) if band is not None and band.keep}
    return {place: [band.skip + band.keep, band.skip][: 1 + (band.skip > 0)] for place, band in bands.items()}


def shared_cuts(tensors: Sequence[DirectTensor], inputs: TensorFiles, known: KnownCuts) -> Iterator[TensorCuts]:
    """Searches for the cuts that several of these tensors, being of the same inputs, need and that are not known."""
    groups: dict[Hashable, list[DirectTensor]] = {}
    for tensor in tensors:
        places = tuple((header.file, header.start, header.change) for header in tensor.headers)
        groups.setdefault((*places, tensor.numel, tensor.dtype), []).append(tensor)
    for first, *others in groups.values():
        wanted: dict[int, set[int]] = {}
        for tensor in (first, *others) if others else ():
            for place, ranks in ranks_of(tensor).items():
                unknown = [rank for rank in ranks if known.of(_keys(tensor, place, [rank])) is None]
                wanted.setdefault(place, set()).update(unknown)
        sorted_ranks = {place: sorted(ranks, reverse=True) for place, ranks in wanted.items()}
        for start in range(0, max(map(len, sorted_ranks.values()), default=0), _TOGETHER):
            some = {place: ranks[start : start + _TOGETHER] for place, ranks in sorted_ranks.items()}
            some = {place: ranks for place, ranks in some.items() if ranks}
            if any(len(ranks) > 1 for ranks in some.values()):
                yield TensorCuts(Changes(first, inputs), some, known, MOST_SPANS // _TOGETHER)


def table_bytes(tensor: DirectTensor, most_spans: int = MOST_SPANS) -> int:
    """Bytes that the counts of a tensor take at most, or those of its first spans."""
    spans = min(most_spans, len(spans_of(tensor.numel, MOST_SPANS)))
    return sum(CutSearch.table_bytes(tensor.dtype, spans, len(ranks)) for ranks in ranks_of(tensor).values())


def _keys(tensor: DirectTensor, place: int, ranks: Sequence[int]) -> list[Hashable]:
    """What the cuts of a change depend on: where both inputs lie, how much of them, the working dtype, the rank."""
    both = [(header.file, header.start, header.change) for header in (tensor.headers[0], tensor.headers[place + 1])]
    return [(*both, tensor.numel, tensor.dtype, rank) for rank in ranks]
