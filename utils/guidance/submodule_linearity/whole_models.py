"""How far whole models are from linear between the base and an expert: passes with weights in between, block by block.

The weights theta_0 + a (theta_s - theta_0), for each a of the grid, make a model of their own each, which goes through the
expert's text beside the base; what is compared are the final hidden states (behind the last norm). Submodules are more
linear than the whole model (arXiv 2504.10902): this is the number to hold theirs against.

Memory: the hidden states of an expert's own text four times, and an interpolated block.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from utils.guidance.submodule_linearity.nonlinearity import GRID, distance_sums, nonlinearity
from utils.guidance.submodule_linearity.outside_changes import OutsideChanges
from utils.guidance.submodule_linearity.part_changes import Passage
from utils.models.decoder import Decoder
from utils.models.weight_source import placed
from utils.pair.batches import MicroBatch
from utils.passes.flows import Flow
from utils.passes.mixed_stacks import between

_SHARES = GRID[1:]  # the base's own pass is there
WAYS = len(_SHARES)  # passes of each expert's own text


@dataclass(frozen=True)
class _Way:
    """One micro-batch on its way through the model with a share of an expert's change."""

    expert: int
    share: float
    place: int  # of the micro-batch
    flow: Flow


class WholeModels:
    """Passes of interpolated models beside the base's. Each method is called while the base's weights are in place.

    Args:
        decoder: the base, whose code all of them run.
        outside: knows the experts' weights outside the blocks.
        batches, passages: every micro-batch of the base's pass; an expert goes through those that score it.
        device: where to compute.
    """

    def __init__(
        self,
        decoder: Decoder,
        outside: OutsideChanges,
        batches: Sequence[MicroBatch],
        passages: Sequence[Passage],
        device: torch.device,
    ) -> None:
        self.decoder, self.outside, self.passages, self.device = decoder, outside, passages, device
        self.ways = [
            _Way(expert, share, place, Flow(decoder.body, batch, device))
            for place, (batch, passage) in enumerate(zip(batches, passages, strict=True))
            for expert in passage.scored
            for share in _SHARES
        ]
        self.depth = len(decoder.blocks)

    def start(self) -> None:
        """Take every pass to the first block."""
        for expert, share, ways in self._models():
            with self._outside_placed(expert, share):
                for way in ways:
                    way.flow.advance()

    def through_block(self, layer: int, blocks: Sequence[nn.Module]) -> None:
        """Take every pass through a block.

        Args:
            layer: its number.
            blocks: the base's and each expert's, with their weights.
        """
        ours = dict(blocks[0].named_parameters())
        for expert, share, ways in self._models():
            theirs = blocks[1 + expert]
            mixed = {name: between(ours[name], value, share) for name, value in theirs.named_parameters()}
            with ExitStack() as stack:
                if share < 1:
                    stack.enter_context(placed(theirs, "", mixed, self.device))
                outputs = []
                for way in ways:
                    way.flow.expect(layer)
                    arrival = way.flow.arrival
                    outputs.append(theirs(*arrival.args, **arrival.kwargs))
            if layer < self.depth - 1:
                self._advance(ways, outputs)
            else:
                with self._outside_placed(expert, share, embeddings=False):
                    self._advance(ways, outputs)

    def scores(self, finals: Sequence[torch.Tensor]) -> dict[int, float]:
        """Non-linearity of the whole model by expert, from the base's final hidden states of each micro-batch."""
        sums: dict[int, torch.Tensor] = {}
        by_place: dict[tuple[int, int], list[torch.Tensor]] = {}
        for way in self.ways:
            by_place.setdefault((way.expert, way.place), []).append(way.flow.result())
        for (expert, place), found in by_place.items():
            rows = [self.passages[place].rows(final, "the model") for final in (finals[place], *found)]
            sums[expert] = sums.get(expert, 0) + distance_sums(rows)
        return {expert: nonlinearity(one) for expert, one in sums.items()}

    def _models(self) -> Iterator[tuple[int, float, list[_Way]]]:
        for expert in dict.fromkeys(way.expert for way in self.ways):
            for share in _SHARES:
                yield expert, share, [way for way in self.ways if (way.expert, way.share) == (expert, share)]

    @staticmethod
    def _advance(ways: Sequence[_Way], outputs: Sequence[torch.Tensor]) -> None:
        for way, output in zip(ways, outputs, strict=True):
            way.flow.advance_with(output)

    @contextmanager
    def _outside_placed(self, expert: int, share: float, embeddings: bool = True) -> Iterator[None]:
        """What text has reached outside the blocks, between the base's and the expert's; embeddings if they are needed."""
        model, tensors = self.decoder.model, {}
        for path in self.outside.parts:
            if not embeddings and model.get_submodule(path) is model.get_input_embeddings():
                continue
            variant = self.outside.variants_of(path)[expert]
            tensors |= {f"{path}.{name}": value.lerp(variant.own[name], share) for name, value in variant.base.items()}
        with placed(model, "", tensors, self.device):
            yield
