"""Base and expert back through their blocks in lock-step, on the expert's text: Gram matrices and squared gradients."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from utils.errors import UserError
from utils.models.decoder import Component, Decoder
from utils.models.weight_source import WeightSource
from utils.passes.block_gradients import BlockDone, backward_pass
from utils.passes.input_grams import InputGram, InputGrams
from utils.passes.row_grams import RowGrams
from utils.passes.squared_gradients import SquaredGradients

OnBlock = Callable[[int], None]


@dataclass(frozen=True)
class PairSide:
    """A model, where its weights come from, and its text in its own tokens."""

    decoder: Decoder
    weights: WeightSource
    samples: Sequence[Sequence[int]]


@dataclass(frozen=True)
class SharedInputs:
    """The inputs that some components of a block share.

    `gram` [n, n], float32 on the device: mean of x x' over the tokens at the base plus that at the expert. `tokens` is
    how many there were, the lesser of both.
    """

    components: tuple[Component, ...]
    gram: Tensor = field(repr=False)
    tokens: int


@dataclass(frozen=True)
class PairPart:
    """A block, or (`layer` None) what lies outside: its inputs, and by parameter what its gradients came to.

    `axes` are the vectors that stand for the sum of squared gradients, float64 on the CPU; `rows` the Gram matrices of
    the rows of embeddings' gradients, float64 on the device. Parameters have the names in the model, tied ones the
    first. `shapes` are those parameters' shapes.
    """

    layer: int | None
    inputs: tuple[SharedInputs, ...]
    axes: Mapping[str, tuple[Tensor, ...]]
    rows: Mapping[str, Tensor]
    shapes: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class PairPass:
    """Both models on their way back. `losses` are each sample's, at base and expert; `parts` is computed as iterated."""

    losses: tuple[tuple[float, ...], tuple[float, ...]]
    parts: Iterator[PairPart]


class _Gradients:
    """What is kept of the gradients of both models, which have the same names (a `GradientObserver`)."""

    def __init__(self, names: frozenset[str], embeddings: frozenset[str]) -> None:
        self.squares, self.rows = SquaredGradients(frozenset(), names), RowGrams(embeddings)

    def wants(self, name: str) -> bool:
        return self.squares.wants(name)

    def gradient(self, name: str, parameter: Tensor, gradient: Tensor, sample: int) -> None:
        self.rows.add(name, gradient)
        self.squares.gradient(name, parameter, gradient, sample)

    def finish(self, layer: int | None, parameters: Mapping[str, Tensor]) -> None:
        """Sums stay until they are taken."""


@contextmanager
def pair_pass(base: PairSide, expert: PairSide, device: torch.device, on_block: OnBlock) -> Iterator[PairPass]:
    """Take base and expert forward on entering, and back block by block as `parts` is iterated.

    Memory: that of `backward_pass` for each side with what lies outside the blocks, and the Gram matrices of one block
    for each side in float32. Enter, iterate and leave in one thread. Closes the weight sources.

    Args:
        base, expert: models of one architecture; decoders that no other thread uses meanwhile.
        device: where to compute.
        on_block: called twice per block and side.

    Raises:
        UserError: as `backward_pass`; a matrix of more than two axes (stacked experts), which nothing here measures.
    """
    sides = (base, expert)
    named = [pair for side in sides for pair in side.decoder.model.named_parameters(remove_duplicate=False)]
    _refuse_stacked(named)
    observer = _Gradients(frozenset(name for name, _ in named), _embeddings(sides))
    grams = [InputGrams([component.path for component in side.decoder.components]) for side in sides]
    with ExitStack() as stack:
        passes = [
            stack.enter_context(
                backward_pass(
                    side.decoder,
                    side.weights,
                    side.samples,
                    observer,
                    device,
                    outside=True,
                    on_block=on_block,
                    observing=gram.attached,
                )
            )
            for side, gram in zip(sides, grams, strict=True)
        ]
        parts = _parts(base.decoder, [one.blocks for one in passes], grams, observer)
        stack.callback(parts.close)
        yield PairPass((passes[0].losses, passes[1].losses), parts)


def _refuse_stacked(named: Sequence[tuple[str, Tensor]]) -> None:
    stacked = [name for name, value in named if value.dim() > 2]
    if stacked:
        raise UserError(
            f"{', '.join(stacked[:3])} stacks the weights of several experts of a mixture, whose inputs are not measured "
            "yet; use --guidance saliency_budget or lewis",
            "gram-mean-stacked-experts",
        )


def _embeddings(sides: Sequence[PairSide]) -> frozenset[str]:
    """The names of embeddings and heads."""
    found = set()
    for side in sides:
        model = side.decoder.model
        ends = {
            id(end.weight) for end in (model.get_input_embeddings(), model.get_output_embeddings()) if end is not None
        }
        found |= {name for name, value in model.named_parameters(remove_duplicate=False) if id(value) in ends}
    return frozenset(found)


def _parts(
    decoder: Decoder, sides: Sequence[Iterator[BlockDone]], grams: Sequence[InputGrams], observer: _Gradients
) -> Iterator[PairPart]:
    by_path = {component.path: component for component in decoder.components}
    for layer in [*reversed(range(len(decoder.blocks))), None]:
        ours, theirs = (next(blocks).parameters for blocks in sides)
        shapes = {name: tuple(value.shape) for name, value in {**ours, **theirs}.items() if value.is_floating_point()}
        inputs = () if layer is None else _inputs(layer, [one.take() for one in grams], by_path)
        axes, rows = {}, {}
        for name, value in {**ours, **theirs}.items():
            if name in shapes:
                axes[name] = observer.squares.take_factors(name, value)
            if (gram := observer.rows.take(name)) is not None:
                rows[name] = gram
        del ours, theirs
        yield PairPart(layer, inputs, axes, rows, shapes)


def _inputs(
    layer: int, sides: Sequence[Sequence[InputGram]], by_path: Mapping[str, Component]
) -> tuple[SharedInputs, ...]:
    base, expert = sides
    if [one.paths for one in base] != [one.paths for one in expert]:
        raise UserError(
            f"the layers of block {layer} share their inputs differently in base and expert; they cannot be compared",
            "measure-inputs-differ",
        )
    found = []
    for ours, theirs in zip(base, expert, strict=True):
        gram = ours.total.div_(max(1, ours.tokens)).add_(theirs.total, alpha=1 / max(1, theirs.tokens))
        components = tuple(by_path[path] for path in ours.paths)
        found.append(SharedInputs(components, gram, min(ours.tokens, theirs.tokens)))
    return tuple(found)
