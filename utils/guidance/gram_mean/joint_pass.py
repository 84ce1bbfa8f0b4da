"""Base and expert back through their blocks in lock-step, on the expert's text: Gram matrices and squared gradients."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from utils.guidance.gram_mean.input_pass import BlockInputs, InputTaker, OnBlock, Side
from utils.models.decoder import Decoder
from utils.passes.block_gradients import BlockDone, backward_pass, together
from utils.passes.gradient_factors import Use
from utils.passes.gradient_snapshots import GradientSnapshots
from utils.passes.routed_tokens import ByExpert, FewTokens
from utils.passes.row_grams import RowGrams
from utils.passes.squared_gradients import Split, SplitExpert, SquaredGradients, as_it_is, expert_as_it_is
from utils.passes.weight_uses import WeightUses

_PASSED = "passed"  # the part of snapshots that has the number of blocks that come next


@dataclass(frozen=True)
class JointPart:
    """A block, or (`layer` None) what lies outside: its inputs, and by parameter what its gradients came to.

    `axes` are the vectors that stand for the sum of squared gradients, float64 on the CPU; `rows` the Gram matrices of
    the rows of embeddings' gradients, float64 on the device. Parameters have the names in the model, tied ones the
    first.
    """

    layer: int | None
    inputs: BlockInputs
    axes: Mapping[str, tuple[Tensor, ...]]
    rows: Mapping[str, Tensor]


@dataclass(frozen=True)
class JointPass:
    """The models on their way back. `losses` are each sample's, by model; `parts` is computed as iterated. `tokens` are those
    of experts, as in `FewTokens`, once it has ended."""

    losses: tuple[tuple[float, ...], ...]
    parts: Iterator[JointPart]
    tokens: Mapping[tuple[int, str], list[float | None]]


class _Gradients:
    """What is kept of the gradients of the models, which have the same names (a `GradientObserver`)."""

    def __init__(
        self, names: frozenset[str], embeddings: frozenset[str], split: Split, split_expert: SplitExpert
    ) -> None:
        self.squares = SquaredGradients(frozenset(), names, split, split_expert)
        self.rows = RowGrams(embeddings)
        self.uses = WeightUses(self._pays, self._take)

    def _pays(self, name: str, parameter: nn.Parameter, tokens: int) -> bool:
        return self.squares.wants_uses(name, parameter, tokens, with_gram=name in self.rows.names)

    def _take(self, name: str, parameter: nn.Parameter, uses: Sequence[Use]) -> None:
        self.rows.add_uses(name, uses)
        self.squares.add_uses(name, parameter, uses)

    def wants(self, name: str) -> bool:
        return self.squares.wants(name)

    def gradient(self, name: str, parameter: Tensor, gradient: Tensor, sample: int) -> None:
        self.rows.add(name, gradient)
        self.squares.gradient(name, parameter, gradient, sample)

    def expert_gradient(self, name: str, expert: int, matrix: Tensor, gradient: Tensor, sample: int) -> None:
        self.squares.expert_gradient(name, expert, matrix, gradient, sample)

    def finish(self, layer: int | None, parameters: Mapping[str, Tensor]) -> None:
        """Sums stay until they are taken."""


@contextmanager
def joint_pass(
    sides: Sequence[Side],
    device: torch.device,
    on_block: OnBlock,
    *,
    split: Split = as_it_is,
    split_expert: SplitExpert = expert_as_it_is,
    with_stacks: bool = True,
    folder: Path | None = None,
    snapshots: GradientSnapshots | None = None,
    fewest_tokens: int = 0,
    by_expert: ByExpert = lambda name: (),
) -> Iterator[JointPass]:
    """Take models forward on entering, and back block by block as `parts` is iterated.

    Memory: that of `backward_pass` for each side with what lies outside the blocks, and the Gram matrices of one block
    for each side in float32. Enter, iterate and leave in one thread. Closes the weight sources.

    Args:
        sides: models of one architecture; decoders that no other thread uses meanwhile.
        device: where to compute.
        on_block: called twice per block and side.
        split: parameters that are stored in pieces (a mixture's experts), as these by stored names; others as they are.
        split_expert: the same of one expert's matrix of a stack, where experts are fetched one at a time.
        with_stacks: whether the inputs of stacked experts are taken, too.
        folder: where hidden states wait, as `backward_pass`.
        snapshots: as `backward_pass`; offered between two blocks, when the part of one is done with.
        fewest_tokens, by_expert: squared gradients of experts with fewer tokens are taken towards the mean, as in `FewTokens`.

    Raises:
        UserError: as `backward_pass`.
    """
    named = [pair for side in sides for pair in side.decoder.model.named_parameters(remove_duplicate=False)]
    whole = (name for name, value in named if all(part.dim() <= 2 for part in split(name, value).values()))
    observer = _Gradients(frozenset(whole), _embeddings(sides), split, split_expert)
    inputs = InputTaker(sides, with_stacks=with_stacks)
    snapshots = GradientSnapshots(None) if snapshots is None else snapshots
    few = FewTokens(sides[0].decoder, len(sides), fewest_tokens, by_expert)
    few.restore(snapshots.found("tokens"))
    snapshots.keep("tokens", few.state)
    passed = snapshots.found(_PASSED)
    back = len(sides[0].decoder.blocks) if passed is None else passed
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
                    observing=together(side.observing, attached, few.counts.attached),
                    observing_sample=observer.uses.observed,
                    folder=folder,
                    snapshots=snapshots,
                    name=f"model{number}",
                    label=side.label,
                )
            )
            for number, (side, attached) in enumerate(zip(sides, inputs.observing, strict=True))
        ]
        parts = _parts(sides[0].decoder, [one.blocks for one in passes], inputs, observer, few, snapshots, back)
        stack.callback(parts.close)
        yield JointPass(tuple(one.losses for one in passes), parts, few.found)


def _embeddings(sides: Sequence[Side]) -> frozenset[str]:
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
    decoder: Decoder,
    sides: Sequence[Iterator[BlockDone]],
    taker: InputTaker,
    observer: _Gradients,
    few: FewTokens,
    snapshots: GradientSnapshots,
    back: int,
) -> Iterator[JointPart]:
    """`back` is how many blocks the way back has before it."""
    snapshots.keep(_PASSED, lambda: back)
    for layer in [*reversed(range(back)), None]:
        parameters = {name: value for blocks in sides for name, value in next(blocks).parameters.items()}
        inputs = BlockInputs() if layer is None else taker.take(layer)
        axes, rows = {}, {}
        for name, value in parameters.items():
            if value.is_floating_point() and name in observer.squares.outlined:
                if layer is not None:
                    few.take_outlines(layer, name, value, observer.squares)
                axes |= observer.squares.take_factors(name, value)
            if (gram := observer.rows.take(name)) is not None:
                rows[name] = gram
        few.counts.forget()
        del parameters, value
        yield JointPart(layer, inputs, axes, rows)
        del inputs, axes, rows
        if layer:
            back = layer
            snapshots.offer()
