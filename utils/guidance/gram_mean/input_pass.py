"""Gram matrices of what linear layers are given on one text: summed up over models, or by one model's way forward alone."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from utils.errors import UserError
from utils.models.decoder import Component, Decoder
from utils.models.weight_source import WeightSource
from utils.pair.batches import MicroBatch
from utils.passes.block_gradients import Observing, nothing
from utils.passes.block_runner import run_blocks
from utils.passes.input_grams import InputGram, InputGrams
from utils.passes.snapshots import Snapshots

OnBlock = Callable[[int], None]


@dataclass(frozen=True)
class Side:
    """A model, where its weights come from, its text in its own tokens, and what else observes it on its way back."""

    decoder: Decoder
    weights: WeightSource
    samples: Sequence[Sequence[int]]
    observing: Observing = nothing


@dataclass(frozen=True)
class SharedInputs:
    """The inputs that some components of a block share.

    `gram` [n, n], float32 on the device: mean of x x' over the tokens, added up over the models. `tokens` is how many
    there were, the least of any model.
    """

    components: tuple[Component, ...]
    gram: Tensor = field(repr=False)
    tokens: int


OnInputs = Callable[[int, tuple[SharedInputs, ...]], None]


@dataclass(frozen=True)
class Kept:
    """Where a way forward is kept: `state` gives what has been made of the inputs so far as plain data."""

    snapshots: Snapshots
    state: Callable[[], Any]


def input_pass(
    side: Side, device: torch.device, on_block: OnBlock, on_inputs: OnInputs, kept: Kept | None = None
) -> None:
    """Take a model forward, and hand over each block's inputs. Closes the weight source.

    Memory: that of `run_blocks`, and the Gram matrices of one block in float32.

    Args:
        side: the model; a decoder that no other thread uses meanwhile.
        device: where to compute.
        on_block: called once per block.
        on_inputs: takes the layer and its inputs, block after block, from the first one on or, where a run was stopped and the
            way is `kept`, from the one at which that stood.
        kept: for a run after a kill.
    """
    batches = [MicroBatch.of([ids]) for ids in side.samples]  # one sample each: no pads
    visitor = _Inputs(side.decoder, on_inputs, kept.state if kept else lambda: None)
    snapshots = kept.snapshots if kept else None
    run_blocks(side.decoder, side.weights, batches, visitor, device, on_block=on_block, snapshots=snapshots)


class _Inputs:
    """Sums up the inputs of every block (a `KeptVisitor`)."""

    rewrites = False

    def __init__(self, decoder: Decoder, on_inputs: OnInputs, state: Callable[[], Any]) -> None:
        self.by_path = {component.path: component for component in decoder.components if not component.is_stacked}
        self.grams, self.on_inputs = InputGrams(list(self.by_path)), on_inputs
        self.state = state

    def observing(self, layer: int, block: nn.Module) -> AbstractContextManager[None]:
        return self.grams.attached(layer, block)

    def restore(self, state: Any, device: torch.device) -> None:
        """Whoever takes the inputs has what was made of them."""

    def begin(self, batch: MicroBatch) -> None:
        """Nothing to note: every token is real."""

    def finish(self, layer: int, block: nn.Module) -> None:
        self.on_inputs(layer, shared_inputs(layer, [self.grams.take()], self.by_path))


def shared_inputs(
    layer: int, models: Sequence[Sequence[InputGram]], by_path: Mapping[str, Component]
) -> tuple[SharedInputs, ...]:
    """The inputs of one block, summed up over models; the sums of the first are used up.

    Raises:
        UserError: the layers of one model share other inputs than those of another.
    """
    if any([one.paths for one in own] != [one.paths for one in models[0]] for own in models):
        raise UserError(
            f"the layers of block {layer} share their inputs differently in base and expert; they cannot be compared",
            "measure-inputs-differ",
        )
    found = []
    for shared in zip(*models, strict=True):
        first, *others = shared
        gram = first.total.div_(max(1, first.tokens))
        for one in others:
            gram.add_(one.total, alpha=1 / max(1, one.tokens))
        components = tuple(by_path[path] for path in first.paths)
        found.append(SharedInputs(components, gram, min(one.tokens for one in shared)))
    return tuple(found)
