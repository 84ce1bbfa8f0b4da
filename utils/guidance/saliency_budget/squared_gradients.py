"""Base and expert side by side, block by block from the last to the first, with the squared gradients of their weights.

    F_ij = sum over samples of (dL/dW_ij)^2

a diagonal empirical Fisher information, per sample, at the base's weights, at the expert's, or the sum of both. Models
whose gradients are taken go back in lock-step; a model whose gradients are not taken only has its blocks fetched.

Of a mixture's experts, F of those that few tokens came to is taken towards the mean of their layer.

F is held whole for the linear parts of one block, but of experts that are fetched one at a time for one matrix. Of every
other parameter, embeddings and head included, only what a vector per axis needs is summed up, so that F of a vocabulary is
never in memory.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from utils.errors import UserError
from utils.models.decoder import Component, Decoder
from utils.models.weight_source import WeightSource
from utils.passes.block_gradients import BlockDone, Observing, backward_pass, nothing, together
from utils.passes.block_runner import BlocksInTurn
from utils.passes.expert_squares import ExpertSquares
from utils.passes.experts_in_parts import stack_names
from utils.passes.gradient_snapshots import GradientSnapshots
from utils.passes.routed_tokens import ByExpert, FewTokens, RoutedTokens
from utils.passes.squared_gradients import Split, SplitExpert, SquaredGradients, as_it_is, expert_as_it_is
from utils.passes.tensor_store import TensorStore
from utils.passes.weight_uses import WeightUses

OnBlock = Callable[[int], None]


@dataclass(frozen=True)
class Side:
    """A model, and where its weights come from. With `samples` (token ids), its gradients on them count.

    `observing` is what else observes it on its way back, `label` what to call it in a message.
    """

    decoder: Decoder
    weights: WeightSource
    samples: Sequence[Sequence[int]] | None
    observing: Observing = nothing
    label: str = ""


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


@dataclass(frozen=True)
class Storing:
    """How parameters are stored (`StoredLayout`), by default each as it is.

    `split` is of the linear parts, by stored names, `split_expert` of one expert's matrix of a stack among them; `pieces` of
    other parameters, each of which has vectors of its own; `by_expert` says which of them belong to experts, in order.
    """

    split: Split = as_it_is
    split_expert: SplitExpert = expert_as_it_is
    pieces: Split = as_it_is
    by_expert: ByExpert = lambda name: ()


@contextmanager
def squares_pass(
    base: Side,
    expert: Side,
    device: torch.device,
    on_block: OnBlock,
    *,
    storing: Storing | None = None,
    folder: Path | None = None,
    snapshots: GradientSnapshots | None = None,
    fewest_tokens: int = 0,
) -> Iterator[SquaresPass]:
    """Take base and expert through their blocks, and give each linear part with its squared gradients.

    Memory: that of `backward_pass` for each side with gradients, with one sample's gradients of what lies outside the
    blocks; two blocks of weights for one without; and one block's F in float32, without that of experts where they are
    fetched one at a time, which waits where hidden states do. Enter, iterate and leave in one thread.
    Closes the weight sources.

    Args:
        base, expert: models of one architecture; decoders that no other thread uses meanwhile.
        device: where to compute.
        on_block: called twice per block and side with gradients.
        storing: how the base stores parameters.
        folder: where hidden states wait, as `backward_pass`.
        snapshots: as `backward_pass`; offered between two blocks, when all parts of one have been taken.
        fewest_tokens: an expert of a mixture with fewer is taken towards the mean of its layer (`take_towards_mean`).

    Raises:
        UserError: as `backward_pass`.
    """
    layers, storing = range(len(base.decoder.blocks)), Storing() if storing is None else storing
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
        if name not in whole and all(part.dim() <= 2 for part in storing.pieces(name, value).values())
    }
    apart = ExpertSquares(whole & _fetched_apart((base, expert)), TensorStore(device, folder))
    observer = SquaredGradients(whole, frozenset(small), storing.pieces, storing.split_expert, apart)
    snapshots = GradientSnapshots(None) if snapshots is None else snapshots
    others: dict[str, tuple[Tensor, ...]] = snapshots.found("others") or {}
    snapshots.keep("others", lambda: others)
    back_again = sum(side.samples is not None for side in (base, expert))
    few = FewTokens(base.decoder, back_again, fewest_tokens, storing.by_expert)
    few.restore(snapshots.found("tokens"))
    snapshots.keep("tokens", few.state)
    passed = snapshots.found(_PASSED)
    back = len(base.decoder.blocks) if passed is None else passed
    with apart, ExitStack() as stack:
        sides = [
            stack.enter_context(_side(name, side, observer, few.counts, device, on_block, folder, snapshots, back))
            for name, side in (("base", base), ("expert", expert))
        ]
        models = [(side.weights, blocks) for side, (_, blocks) in zip((base, expert), sides, strict=True)]
        sums = _Sums(observer, apart, few, others)
        parts = _parts(base.decoder, models, sums, storing, snapshots, back)
        stack.enter_context(closing(parts))
        yield SquaresPass((sides[0][0], sides[1][0]), parts, others, few.found)


def _fetched_apart(sides: Sequence[Side]) -> frozenset[str]:
    """The stacks of which one of the models has its experts fetched one at a time."""
    return frozenset(
        name
        for side in sides
        if side.weights.experts_apart
        for layer in range(len(side.decoder.blocks))
        for name in stack_names(side.decoder, layer, side.weights.layout)
    )


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
        kept = {"snapshots": snapshots, "name": name, "label": side.label}
        with backward_pass(
            decoder,
            weights,
            side.samples,
            observer,
            device,
            outside=True,
            on_block=on_block,
            observing=together(side.observing, counts.attached),
            observing_sample=WeightUses(observer.wants_uses, observer.add_uses).observed,
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


@dataclass(frozen=True)
class _Sums:
    """What is summed up of a block, and the vectors of what has been."""

    observer: SquaredGradients
    apart: ExpertSquares
    few: FewTokens
    others: dict[str, tuple[Tensor, ...]]


def _parts(
    decoder: Decoder,
    models: Sequence[tuple[WeightSource, _Blocks]],
    sums: _Sums,
    storing: Storing,
    snapshots: GradientSnapshots,
    back: int,
) -> Iterator[ComponentSquares]:
    """`back` is how many blocks the way back has before it."""
    snapshots.keep(_PASSED, lambda: back)
    observer, few = sums.observer, sums.few
    for layer in reversed(range(back)):
        ours, theirs = (next(blocks).parameters for _, blocks in models)
        for component in decoder.components_of(layer):
            name = decoder.weight_name(layer, component)
            if name in sums.apart:
                both = ((weights, values[name]) for (weights, _), values in zip(models, (ours, theirs), strict=True))
                yield from _apart(layer, component, name, tuple(both), sums, storing.split_expert)
                continue
            summed = observer.take(name, ours[name])
            if component.is_stacked:
                few.take(layer, component.path, summed)
            pieces = [storing.split(name, value) for value in (ours[name], theirs[name], summed)]
            del summed
            yield from _pieces(layer, component, *pieces)
            del pieces
        for name, value in ours.items():
            if name in observer.outlined:
                few.take_outlines(layer, name, value, observer)
        sums.others.update(_outlines(ours | theirs, observer))
        few.counts.forget()
        sums.apart.forget()
        back = layer
        if layer:
            snapshots.offer()
    outside: dict[str, Tensor] = {}
    for _, blocks in models:
        for done in blocks:  # none without gradients
            outside |= {name: value.to("meta") for name, value in done.parameters.items()}
    sums.others.update(_outlines(outside, observer))


def _pieces(
    layer: int,
    component: Component,
    base: Mapping[str, Tensor],
    expert: Mapping[str, Tensor],
    squares: dict[str, Tensor],
) -> Iterator[ComponentSquares]:
    for tensor in list(squares):
        yield ComponentSquares(layer, component, tensor, base[tensor], expert[tensor], squares.pop(tensor))


def _apart(
    layer: int,
    component: Component,
    name: str,
    models: Sequence[tuple[WeightSource, Tensor]],
    sums: _Sums,
    split: SplitExpert,
) -> Iterator[ComponentSquares]:
    """A stack of which one expert's matrices are there at a time; `models` are with the stack, which may be on the meta device."""
    like = models[0][1]
    own = sums.few.own_shares(layer, component.path, len(like))
    if len(like) > 1 and split(name, 0, like[0]).keys() & split(name, 1, like[1]).keys():
        raise UserError(
            f"{name} does not fit into memory, and its experts are not told apart; use --device cpu, or a machine with more",
            "experts-not-in-parts",
        )
    for number, squares in enumerate(sums.apart.each(name, like, own)):
        matrices = [weights.fetch_expert(name, number) if stack.is_meta else stack[number] for weights, stack in models]
        yield from _pieces(layer, component, *(split(name, number, value) for value in (*matrices, squares)))


def _outlines(parameters: Mapping[str, Tensor], observer: SquaredGradients) -> dict[str, tuple[Tensor, ...]]:
    """The vectors of those parameters that are outlined."""
    found: dict[str, tuple[Tensor, ...]] = {}
    for name, value in parameters.items():
        if name in observer.outlined and value.is_floating_point():
            found |= observer.take_factors(name, value)
    return found
