"""The sums behind LEWIS norms, taken of a range of micro-batches at a time: ranges are measured apart and added up.

Each micro-batch's sums are kept by themselves and added in the order of the micro-batches, as one pass through all of
them adds them up: the norms have the same bits, wherever the ranges begin and wherever they were measured.
"""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from utils.guidance.lewis.norms import norm_of_sums
from utils.models.decoder import Decoder, weight_matrix
from utils.pair.batches import MicroBatch
from utils.passes.second_moments import SecondMoments, column_square_sums

Sums = dict[str, torch.Tensor]


class RangeVisitor:
    """Takes the sums of squares of each micro-batch's inputs to every component (a `block_runner.Visitor`).

    `sums` is by layer and micro-batch: by path [in], float64, on the device; inputs that parts share are one tensor.
    `squares`, if asked for, is by layer: by path the sums of squares of the weight's columns [in], float64.

    Args:
        decoder: the model.
        tokens: real tokens in the range; each component must see every one of them once.
        squares: whether those of the weights are taken: once for all ranges is enough.
    """

    rewrites = False

    def __init__(self, decoder: Decoder, tokens: int, *, squares: bool) -> None:
        self.tokens = tokens
        self.paths = [component.path for component in decoder.components]
        self.moments = SecondMoments(self.paths)
        self.wants_squares = squares
        self.sums: list[list[Sums]] = []
        self.squares: list[Sums] = []
        self._of_block: list[Sums] = []

    def observing(self, layer: int, block: nn.Module) -> contextlib.AbstractContextManager[None]:
        """Observe the inputs of the block's components."""
        self._of_block = []
        return self.moments.attached(block)

    def begin(self, batch: MicroBatch) -> None:
        """Put by the sums of the micro-batch before."""
        self._put_by()
        self.moments.begin(batch)

    def finish(self, layer: int, block: nn.Module) -> None:
        """Take the block's sums."""
        self._put_by()
        self.moments.checked(layer, self.tokens)
        self.sums.append(self._of_block)
        if self.wants_squares:
            weights = {path: weight_matrix(block.get_submodule(path)) for path in self.paths}
            self.squares.append({path: column_square_sums(weight) for path, weight in weights.items()})

    def result(self) -> dict[str, Any]:
        """`sums` and `squares` on the CPU; what is one tensor stays one."""
        moved: dict[int, torch.Tensor] = {}

        def on_cpu(sums: Sums) -> Sums:
            return {path: moved.setdefault(id(one), one.cpu()) for path, one in sums.items()}

        return {
            "sums": [[on_cpu(batch) for batch in layer] for layer in self.sums],
            "squares": [on_cpu(layer) for layer in self.squares],
        }

    def _put_by(self) -> None:
        if taken := self.moments.take():
            self._of_block.append(taken)


def norms_of_ranges(
    decoder: Decoder, ranges: Sequence[Mapping[str, Any]], divisor: int
) -> dict[tuple[int, str], torch.Tensor]:
    """Norms by (layer, component name), as `LewisVisitor` gives them, on the CPU.

    Args:
        decoder: the model.
        ranges: what `RangeVisitor.result` gave of each range, in the order of the text; the first has `squares`.
        divisor: what the sums of squares are divided by.
    """
    norms = {}
    for layer in range(len(decoder.blocks)):
        batches = [batch for one in ranges for batch in one["sums"][layer]]
        for component in decoder.components:
            total = batches[0][component.path]
            for batch in batches[1:]:
                total = total + batch[component.path]
            squares = ranges[0]["squares"][layer][component.path]
            norms[layer, component.name] = norm_of_sums(squares, total / divisor)
    return norms
