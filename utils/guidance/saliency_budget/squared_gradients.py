"""Base and expert side by side, block by block from the last to the first, with the squared gradients of their weights.

    F_ij = sum over samples of (dL/dW_ij)^2

a diagonal empirical Fisher information, per sample, at the base's weights, at the expert's, or the sum of both. Models
whose gradients are taken go back in lock-step; a model whose gradients are not taken only has its blocks fetched.

Of a mixture's experts, F of those that few tokens came to is taken towards the mean of their layer.

F is held whole for the linear parts of one block. Of every other parameter, embeddings and head included, only what a
vector per axis needs is summed up, so that F of a vocabulary is never in memory.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from utils.models.decoder import Component, Decoder
from utils.models.weight_source import WeightSource
from utils.passes.block_gradients import BlockDone, Observing, backward_pass, nothing, together
from utils.passes.block_runner import BlocksInTurn
from utils.passes.gradient_snapshots import GradientSnapshots
from utils.passes.routed_tokens import ByExpert, FewTokens, RoutedTokens
from utils.passes.squared_gradients import Split, SquaredGradients, as_it_is

OnBlock = Callable[[int], None]


@dataclass(frozen=True)
class Side:
    """A model, and where its weights come from. With `samples` (token ids), its gradients on them count.

    `observing` is what else observes it on its way back.
    """

    decoder: Decoder
    weights: WeightSource
    samples: Sequence[Sequence[int]] | None
    observing: Observing = nothing


@dataclass
class ComponentSquares:
    """A stored tensor of one block that is measured: the weights of both models, and F, of their shape and float32."""

    layer: int
    component: Component
    tensor: str
    base: Tensor
    expert: Tensor
    squares: Tensor = field(repr=False)


@dataclass(frozen=True)
class SquaresPass:
    """Both models on their way back.

    `losses` are each sample's (nats per token), by side, () where no gradients are taken. `parts` is computed as it is
    iterated; tensors are in memory until the next one is asked for. Once it has ended, `others` has the vectors that
    stand for F of every other parameter of one or two axes, in the blocks and outside, by its name in the model, and of one
    in pieces by theirs: tied parameters have one name, the first one. float64 on the CPU. `tokens` are by layer and path of a module of experts how
    many tokens each of them had, on average of the sides with gradients; None where that is not seen.
    """

    losses: tuple[tuple[float, ...], tuple[float, ...]]
    parts: Iterator[ComponentSquares]
    others: Mapping[str, tuple[Tensor, ...]]
    tokens: Mapping[tuple[int, str], list[float | None]]


@contextmanager
def squares_pass(
    base: Side,
    expert: Side,
    device: torch.device,
    on_block: OnBlock,
    split: Split = as_it_is,
    folder: Path | None = None,
    snapshots: GradientSnapshots | None = None,
    fewest_tokens: int = 0,
    pieces: Split = as_it_is,
    by_expert: ByExpert = lambda name: (),
) -> Iterator[SquaresPass]:
    """Take base and expert through their blocks, and give each linear part with its squared gradients.

    Memory: that of `backward_pass` for each side with gradients, with one sample's gradients of what lies outside the
    blocks; two blocks of weights for one without; and one block's F in float32. Enter, iterate and leave in one thread.
    Closes the weight sources.

    Args:
        base, expert: models of one architecture; decoders that no other thread uses meanwhile.
        device: where to compute.
        on_block: called twice per block and side with gradients.
        split: how the linear parts are stored, by stored names; by default each as it is.
        folder: where hidden states wait, as `backward_pass`.
        snapshots: as `backward_pass`; offered between two blocks, when all parts of one have been taken.
        fewest_tokens: an expert of a mixture with fewer is taken towards the mean of its layer (`take_towards_mean`).
        pieces: how other parameters are stored; each piece has vectors of its own.
        by_expert: which of them belong to experts, in order.

    Raises:
        UserError: as `backward_pass`.
    """
    layers = range(len(base.decoder.blocks))
    whole = frozenset(
        base.decoder.weight_name(layer, component)
        for layer in layers
        for component in base.decoder.components_of(layer)
    )
    named = [
        (name, value)
        for side in (base, expert)
        for name, value in side.decoder.model.named_parameters(remove_duplicate=False)
    ]
    small = {
        name
        for name, value in named
        if name not in whole and all(part.dim() <= 2 for part in pieces(name, value).values())
    }
    observer = SquaredGradients(whole, frozenset(small), pieces)
    snapshots = GradientSnapshots(None) if snapshots is None else snapshots
    others: dict[str, tuple[Tensor, ...]] = snapshots.found("others") or {}
    snapshots.keep("others", lambda: others)
    back_again = sum(side.samples is not None for side in (base, expert))
    few = FewTokens(base.decoder, back_again, fewest_tokens, by_expert)
    few.restore(snapshots.found("tokens"))
    snapshots.keep("tokens", few.state)
    passed = snapshots.found(_PASSED)
    back = len(base.decoder.blocks) if passed is None else passed
    with ExitStack() as stack:
        sides = [
            stack.enter_context(_side(name, side, observer, few.counts, device, on_block, folder, snapshots, back))
            for name, side in (("base", base), ("expert", expert))
        ]
        parts = _parts(base.decoder, [blocks for _, blocks in sides], observer, few, others, split, snapshots, back)
        stack.enter_context(closing(parts))
        yield SquaresPass((sides[0][0], sides[1][0]), parts, others, few.found)


_Blocks = Iterator[BlockDone]
_PASSED = "passed"  # the part of snapshots that has the number of the block that comes next


@contextmanager
def _side(
    name: str,
    side: Side,
    observer: SquaredGradients,
    counts: RoutedTokens,
    device: torch.device,
    on_block: OnBlock,
    folder: Path | None,
    snapshots: GradientSnapshots,
    back: int,
) -> Iterator[tuple[tuple[float, ...], _Blocks]]:
    """Losses, and the blocks with their parameters, from the last to the first; with gradients, the rest behind them."""
    decoder, weights = side.decoder, side.weights
    if side.samples is not None:
        kept = {"snapshots": snapshots, "name": name}
        with backward_pass(
            decoder,
            weights,
            side.samples,
            observer,
            device,
            outside=True,
            on_block=on_block,
            observing=together(side.observing, counts.attached),
            folder=folder,
            **kept,
        ) as passed:
            yield passed.losses, passed.blocks
        return
    layers = list(reversed(range(back)))
    with ExitStack() as stack:
        stack.enter_context(closing(weights))
        turn = stack.enter_context(BlocksInTurn(decoder, weights, layers, device))
        yield (), stack.enter_context(closing(_fetched(decoder, turn, layers)))


def _fetched(decoder: Decoder, turn: BlocksInTurn, layers: Sequence[int]) -> _Blocks:
    for layer in layers:
        with turn.next_block() as block:
            path = f"{decoder.blocks_path}.{layer}"
            yield BlockDone(
                layer, {f"{path}.{name}": parameter.detach() for name, parameter in block.named_parameters()}
            )


def _parts(
    decoder: Decoder,
    sides: Sequence[_Blocks],
    observer: SquaredGradients,
    few: FewTokens,
    others: dict[str, tuple[Tensor, ...]],
    split: Split,
    snapshots: GradientSnapshots,
    back: int,
) -> Iterator[ComponentSquares]:
    """`back` is how many blocks the way back has before it."""
    snapshots.keep(_PASSED, lambda: back)
    for layer in reversed(range(back)):
        ours, theirs = (next(blocks).parameters for blocks in sides)
        for component in decoder.components_of(layer):
            name = decoder.weight_name(layer, component)
            sums = observer.take(name, ours[name])
            if component.is_stacked:
                few.take(layer, component.path, sums)
            squares, weights, others_weights = (split(name, value) for value in (sums, ours[name], theirs[name]))
            del sums
            for tensor in list(squares):
                yield ComponentSquares(
                    layer, component, tensor, weights[tensor], others_weights[tensor], squares.pop(tensor)
                )
            del squares, weights, others_weights
        for name, value in ours.items():
            if name in observer.outlined:
                few.take_outlines(layer, name, value, observer)
        others |= _outlines(ours | theirs, observer)
        few.counts.forget()
        back = layer
        if layer:
            snapshots.offer()
    outside: dict[str, Tensor] = {}
    for blocks in sides:
        for done in blocks:  # none without gradients
            outside |= {name: value.to("meta") for name, value in done.parameters.items()}
    others |= _outlines(outside, observer)


def _outlines(parameters: Mapping[str, Tensor], observer: SquaredGradients) -> dict[str, tuple[Tensor, ...]]:
    """The vectors of those parameters that are outlined."""
    found: dict[str, tuple[Tensor, ...]] = {}
    for name, value in parameters.items():
        if name in observer.outlined and value.is_floating_point():
            found |= observer.take_factors(name, value)
    return found
