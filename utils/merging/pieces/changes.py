"""The inputs of one tensor in pieces, and what each of them changes about the first."""

from torch import Tensor, sub

from utils.merging.pieces.arithmetic import Scratch
from utils.merging.pieces.choice import TORCH_DTYPES, DirectTensor
from utils.models.tensor_files import TensorFiles

PIECE = 1 << 17  # entries at a time: with all buffers, about what a core's own cache holds
SPAN = 1 << 18  # entries of a span at least: its table of counts is a quarter as large as its bfloat16 numbers


class Changes:
    """Reads a tensor's inputs, the base first, from open files."""

    def __init__(self, tensor: DirectTensor, inputs: TensorFiles) -> None:
        self.tensor, self._inputs = tensor, inputs

    def read(self, place: int, start: int, entries: int, scratch: Scratch) -> Tensor:
        """A piece of an input in the working dtype, in that input's buffer."""
        header, dtype = self.tensor.headers[place], self.tensor.dtype
        stored = scratch.take(("input", place), entries, TORCH_DTYPES[header.dtype])
        self._inputs.read(header, start, stored)
        return stored if stored.dtype == dtype else scratch.take(("cast", place), entries, dtype).copy_(stored)

    def change(self, place: int, base: Tensor, start: int, scratch: Scratch) -> Tensor:
        """What input `place` + 1 changes about a piece of the base that begins at `start`."""
        other = self.read(place + 1, start, base.numel(), scratch)
        return sub(other, base, out=scratch.take(("change", place), base.numel(), base.dtype))


def spans_of(numel: int, most: int) -> list[tuple[int, int]]:
    """At most about `most` stretches of a flattened tensor: (first entry, entry behind the last)."""
    length = max(SPAN, -(-numel // (most * PIECE)) * PIECE)
    return [(first, min(first + length, numel)) for first in range(0, numel, length)]
