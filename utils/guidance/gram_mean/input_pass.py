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
from utils.passes.block_gradients import Observing, nothing, together
from utils.passes.block_runner import run_blocks
from utils.passes.expert_grams import ExpertInputGrams, StackGrams, summed_up
from utils.passes.input_grams import InputGram, InputGrams
from utils.passes.snapshots import Snapshots

OnBlock = Callable[[int], None]


@dataclass(frozen=True)
class Side:
    """A model, where its weights come from, its text in its own tokens, what else observes it on its way back, and what to
    call it in a message."""

    decoder: Decoder
    weights: WeightSource
    samples: Sequence[Sequence[int]]
    observing: Observing = nothing
    label: str = ""


@dataclass(frozen=True)
class SharedInputs:
    """The inputs that some components of a block share.

    `gram` [n, n], float32 on the device: sum of x x' over the tokens that came, divided by all tokens of the text, added up
    over the models. `tokens` is how many came, the least of any model.
    """

    components: tuple[Component, ...]
    gram: Tensor = field(repr=False)
    tokens: int


@dataclass(frozen=True)
class BlockInputs:
    """All inputs of one block: of linear layers, and of each expert of its mixtures, summed up over the models."""

    shared: tuple[SharedInputs, ...] = ()
    stacks: Mapping[Component, StackGrams] = field(default_factory=dict)


OnInputs = Callable[[int, BlockInputs], None]


@dataclass(frozen=True)
class Kept:
    """Where a way forward is kept: `state` gives what has been made of the inputs so far as plain data."""

    snapshots: Snapshots
    state: Callable[[], Any]


def input_pass(
    side: Side,
    device: torch.device,
    on_block: OnBlock,
    on_inputs: OnInputs,
    kept: Kept | None = None,
    *,
    with_stacks: bool = True,
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
        with_stacks: whether the inputs of stacked experts are taken, too.
    """
    batches = [MicroBatch.of([ids]) for ids in side.samples]  # one sample each: no pads
    taker = InputTaker([side], with_stacks=with_stacks)
    visitor = _Inputs(taker, on_inputs, kept.state if kept else lambda: None)
    snapshots = kept.snapshots if kept else None
    run_blocks(side.decoder, side.weights, batches, visitor, device, on_block=on_block, snapshots=snapshots)


class _Inputs:
    """Sums up the inputs of every block (a `KeptVisitor`)."""

    rewrites = False

    def __init__(self, taker: "InputTaker", on_inputs: OnInputs, state: Callable[[], Any]) -> None:
        self.taker, self.on_inputs, self.state = taker, on_inputs, state

    def observing(self, layer: int, block: nn.Module) -> AbstractContextManager[None]:
        (observing,) = self.taker.observing
        return observing(layer, block)

    def restore(self, state: Any, device: torch.device) -> None:
        """Whoever takes the inputs has what was made of them."""

    def begin(self, batch: MicroBatch) -> None:
        """Nothing to note: every token is real."""

    def finish(self, layer: int, block: nn.Module) -> None:
        self.on_inputs(layer, self.taker.take(layer))


class InputTaker:
    """Sums up the inputs of one block of several models at a time.

    `observing` attaches to a block of each model, in their order; `take` gives what came since.

    Args:
        sides: models of one architecture.
        with_stacks: whether the inputs of stacked experts are taken, too.
    """

    def __init__(self, sides: Sequence[Side], *, with_stacks: bool) -> None:
        self._by_path = {one.path: one for one in sides[0].decoder.components if not one.is_stacked}
        self._linear = [
            InputGrams([one.path for one in side.decoder.components if not one.is_stacked]) for side in sides
        ]
        self._stacks = [ExpertInputGrams(side.decoder) for side in sides] if with_stacks else []
        self._texts = [sum(map(len, side.samples)) for side in sides]
        stacks = [one.attached for one in self._stacks] or [nothing] * len(sides)
        pairs = zip(self._linear, stacks, strict=True)
        self.observing: list[Observing] = [together(linear.attached, stack) for linear, stack in pairs]

    def take(self, layer: int) -> BlockInputs:
        """The inputs of a block, which are let go of. Raises as `shared_inputs`."""
        shared = shared_inputs(layer, [one.take() for one in self._linear], self._by_path, self._texts)
        stacks = summed_up([one.take() for one in self._stacks], self._texts) if self._stacks else {}
        return BlockInputs(shared, stacks)


def shared_inputs(
    layer: int, models: Sequence[Sequence[InputGram]], by_path: Mapping[str, Component], texts: Sequence[int]
) -> tuple[SharedInputs, ...]:
    """The inputs of one block, summed up over models; the sums of the first are used up.

    Args:
        layer: its number.
        models: what was summed up in each.
        by_path: the components.
        texts: tokens of the text, in each model's; the sums are divided by them.

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
        gram = first.total.div_(texts[0])
        for one, text in zip(others, texts[1:], strict=True):
            gram.add_(one.total, alpha=1 / text)
        components = tuple(by_path[path] for path in first.paths)
        found.append(SharedInputs(components, gram, min(one.tokens for one in shared)))
    return tuple(found)
