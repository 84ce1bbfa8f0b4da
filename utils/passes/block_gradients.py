"""Per-sample gradients of a causal language model whose weights stream in block by block.

All samples go forward through one block after the other, which keeps each sample's hidden state at every block's
entrance. Then the blocks come once more, from the last to the first; each sample's pass through the block is computed
again, differentiated, and each parameter's gradient goes to an observer the moment it exists. Every sample is alone in
its pass, so that its gradients are its own, exactly, for every kind of parameter.

Memory: what lies outside the blocks (the language-model head included), two blocks of weights (this one and the next,
which is being fetched; without their experts where these come one at a time), the activations and parameter gradients of one sample in one block, the logits of one sample,
and three hidden states of each sample (where it enters the blocks, where it stands, and a gradient). The checkpoints,
samples x blocks x tokens x hidden size in the model's dtype, wait on disk, or on the host where a GPU computes
(`checkpoint_bytes`). Models with a sliding window add one mask of tokens x tokens per sample.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from utils.errors import UserError
from utils.models.decoder import Decoder
from utils.models.weight_source import WeightSource
from utils.passes.block_runner import BlocksInTurn
from utils.passes.flows import stops
from utils.passes.gradient_refusals import refuse_shared, refuse_short
from utils.passes.gradient_snapshots import GradientSnapshots
from utils.passes.hand_over import handed_over
from utils.passes.placed_outside import placed_outside
from utils.passes.sample_pass import OnGraph, SamplePass
from utils.passes.tensor_store import TensorStore
from utils.passes.way import Way, take_back, waiting_of


class GradientObserver(Protocol):
    """What is done with the gradients. Names are the model's (`model.layers.3.mlp.up_proj.weight`)."""

    def wants(self, name: str) -> bool:
        """Whether a parameter's gradients are to be computed."""

    def gradient(self, name: str, parameter: torch.Tensor, gradient: torch.Tensor, sample: int) -> None:
        """One sample's gradient of its loss, of the parameter's shape and dtype (accumulate in float32).

        Called at most once for a parameter and a sample; not at all where the sample's loss does not depend on the
        parameter (an expert no token was routed to): the gradient is zero then. The gradient is the observer's to
        keep or change; the parameter may be a read-only page of a file. Gradients are not recorded in here.
        """

    def expert_gradient(
        self, name: str, expert: int, matrix: torch.Tensor, gradient: torch.Tensor, sample: int
    ) -> None:
        """The same of one expert's matrix in a stack of this name, where experts are fetched one at a time.

        Then `parameters` of `finish` has the stack on the meta device.
        """

    def finish(self, layer: int | None, parameters: Mapping[str, torch.Tensor]) -> None:
        """All samples went through a block; `parameters` are all the block's, by name.

        `layer` is None for what lies outside the blocks, which comes last.
        """


Observing = Callable[[int, nn.Module], AbstractContextManager[None]]
"""Attaches observers to a block (layer, module) for as long as its samples are computed again, each one once."""


ObservingSample = Callable[[nn.Module, Mapping[str, nn.Parameter]], AbstractContextManager[OnGraph]]
"""Attaches observers to a block and its parameters by name while one sample is computed again and differentiated; at last, to
a model and what lies outside its blocks. Gives what the graph is shown to in between."""


def nothing(layer: int, block: nn.Module) -> AbstractContextManager[None]:
    """Attach no observer."""
    return nullcontext()


def no_graph(module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> AbstractContextManager[OnGraph]:
    """Attach no observer of samples."""
    return nullcontext(lambda tensors: None)


def together(*several: Observing) -> Observing:
    """Attach several observers, in their order."""

    @contextmanager
    def observing(layer: int, block: nn.Module) -> Iterator[None]:
        with ExitStack() as stack:
            for one in several:
                stack.enter_context(one(layer, block))
            yield

    return observing


@dataclass(frozen=True)
class BlockDone:
    """A block that all samples went back through; its weights are in memory until the next one is asked for.

    `layer` is None for what lies outside the blocks; `parameters` are all its parameters by name, not to be changed,
    and none any more once the next block is asked for.
    """

    layer: int | None
    parameters: Mapping[str, torch.Tensor]

    @property
    def between(self) -> bool:
        """Whether another block follows, so that a snapshot can be made now."""
        return bool(self.layer)


@dataclass(frozen=True)
class BackwardPass:
    """A model on its way back: the loss of every sample, and its blocks, from the last to the first.

    `losses` are mean negative log-likelihoods per predicted token, in nats. `blocks` is computed as it is iterated; the
    first one is number `back` - 1, the others a killed run has passed.
    """

    losses: tuple[float, ...]
    blocks: Iterator[BlockDone]
    back: int


@contextmanager
def backward_pass(
    decoder: Decoder,
    weights: WeightSource,
    samples: Sequence[Sequence[int]],
    observer: GradientObserver,
    device: torch.device,
    *,
    outside: bool = False,
    on_block: Callable[[int], None] = lambda layer: None,
    observing: Observing = nothing,
    observing_sample: ObservingSample = no_graph,
    folder: Path | None = None,
    snapshots: GradientSnapshots | None = None,
    name: str = "model",
    label: str = "",
) -> Iterator[BackwardPass]:
    """Take all samples forward on entering, and back block by block as `blocks` is iterated.

    The loss of a sample is the mean cross-entropy of its next tokens (float32 from the logits on); everything else is
    computed in the weights' dtype, in which gradients are handed over. Several models can go back in lock-step: enter
    them all and `zip` their `blocks`. Leaving the context at any time puts the model back onto the meta device. Enter,
    iterate and leave in one thread.

    Args:
        decoder: the model; its parameters are on the meta device before and after.
        weights: where parameters come from, the language-model head's too (`stored_layout`).
        samples: token ids of each sample, at least two.
        observer: what to do with the gradients.
        device: where to compute.
        outside: whether parameters outside the blocks (embeddings, final norm, head) are observed, too. It costs one
            more pass through the head. A tied embedding has one gradient, under the embedding's name.
        on_block: called with the layer number after each block, on both ways (twice per block).
        observing: what else to attach to a block on the way back, such as hooks that see its modules' inputs.
        observing_sample: the same for each sample by itself, and for its way through what lies outside the blocks.
        folder: where hidden states wait in a file without a name; None: the system's folder for temporary files.
        snapshots: what a killed run has left, and where this one leaves what it needs to go on; it begins there. Whoever
            iterates the blocks registers what is made of them, and offers a snapshot between two blocks (`between`).
        name: of this model's part of the snapshots.
        label: what to call the model in a message.

    Raises:
        UserError: a sample without a next token; weights that lack a parameter; blocks that share parameters or hand
            each other state, or are not visited once each and in order; a loss that is not finite.
    """
    refuse_short(samples)
    refuse_shared(decoder)
    layers = range(len(decoder.blocks))
    with ExitStack() as stack:
        stack.callback(weights.close)
        around = stack.enter_context(placed_outside(decoder, weights, device))
        if outside:
            _require_wanted(around, observer)
        snapshots = GradientSnapshots(None) if snapshots is None else snapshots
        found = snapshots.found(name)
        way = Way(len(layers)) if found is None else Way(found["back"], found["forward"])
        left = [*layers[way.forward :], *reversed(layers[: way.back])]
        turn = stack.enter_context(BlocksInTurn(decoder, weights, left, device))
        stack.callback(lambda: [sample.close() for sample in way.passes])
        store = stack.enter_context(closing(snapshots.store(name, device, folder)))
        snapshots.keep(name, way.state)
        losses = _forward(decoder, turn, samples, way, found and waiting_of(found), store, device, on_block, snapshots)
        _require_finite(losses, label)
        if found is not None and found["gradients"] is not None:
            take_back(way, found["gradients"], device)
        del found
        blocks = _backward(
            decoder, turn, way, around if outside else None, observer, on_block, (observing, observing_sample)
        )
        stack.callback(blocks.close)
        yield BackwardPass(tuple(losses), blocks, way.back)


def observe_gradients(
    decoder: Decoder,
    weights: WeightSource,
    samples: Sequence[Sequence[int]],
    observer: GradientObserver,
    device: torch.device,
    *,
    outside: bool = False,
    on_block: Callable[[int], None] = lambda layer: None,
    observing: Observing = nothing,
    folder: Path | None = None,
    snapshots: GradientSnapshots | None = None,
) -> tuple[float, ...]:
    """Take one model forward and all the way back; arguments and errors as for `backward_pass`.

    Returns:
        The loss of each sample: mean negative log-likelihood per predicted token, in nats.
    """
    snapshots = GradientSnapshots(None) if snapshots is None else snapshots
    places = {"on_block": on_block, "observing": observing, "folder": folder, "snapshots": snapshots}
    with backward_pass(decoder, weights, samples, observer, device, outside=outside, **places) as model:
        for done in model.blocks:
            if done.between:
                snapshots.offer()
        return model.losses


def _forward(
    decoder: Decoder,
    turn: BlocksInTurn,
    samples: Sequence[Sequence[int]],
    way: Way,
    waiting: Sequence[Sequence[Any]] | None,
    store: TensorStore,
    device: torch.device,
    on_block: Callable[[int], None],
    snapshots: GradientSnapshots,
) -> list[float]:
    """Take all samples forward, past the first `way.forward` blocks by what is `waiting`; their losses."""
    known, losses = way.forward, []
    with stops(decoder.blocks):
        for ids in samples:
            way.passes.append(SamplePass(decoder.model, ids, device, store))
        for layer in range(len(decoder.blocks)):
            with _next_block(turn) if layer >= known else nullcontext():
                for place, sample in enumerate(way.passes):
                    if layer >= known:
                        sample.forward(layer)
                    else:
                        sample.forward_as(layer, waiting[place][layer])
                    if layer + 1 == len(decoder.blocks):
                        losses.append(sample.score())
            way.forward = max(way.forward, layer + 1)
            on_block(layer)
            if layer >= known:
                snapshots.offer()
    return losses


def _require_finite(losses: Sequence[float], label: str) -> None:
    for place, loss in enumerate(losses):
        if not math.isfinite(loss):
            raise UserError(
                f"{label}{': ' if label else ''}the loss of sample {place + 1} of {len(losses)} is {loss}: weights or hidden "
                "states are not finite in this dtype; check the checkpoint, or use --dtype float32 or bfloat16",
                "measured-not-finite",
            )


@contextmanager
def _next_block(turn: BlocksInTurn) -> Iterator[None]:
    with turn.next_block(), turn.experts():
        yield


def _backward(
    decoder: Decoder,
    turn: BlocksInTurn,
    way: Way,
    around: Mapping[str, nn.Parameter] | None,
    observer: GradientObserver,
    on_block: Callable[[int], None],
    watching: tuple[Observing, ObservingSample],
) -> Iterator[BlockDone]:
    observing, observing_sample = watching
    wanted = [parameter for parameter in (around or {}).values() if parameter.requires_grad]
    for layer in reversed(range(way.back, len(decoder.blocks))):
        on_block(layer)
    for layer in reversed(range(way.back)):
        with turn.next_block() as block:
            path = f"{decoder.blocks_path}.{layer}"
            parameters = {f"{path}.{name}": parameter for name, parameter in block.named_parameters()}
            _require_wanted(parameters, observer)
            with observing(layer, block):
                for place, sample in enumerate(way.passes):
                    with (
                        handed_over(parameters, _addressed(observer, place)),
                        _experts(turn, observer, place),
                        observing_sample(block, parameters) as on_graph,
                    ):
                        sample.backward(layer, bool(wanted), on_graph)
            way.back = layer
            yield from _finished(layer, parameters, observer)
            del parameters
        on_block(layer)
    if wanted:
        with stops(decoder.blocks):
            for place, sample in enumerate(way.passes):
                with (
                    handed_over(around, _addressed(observer, place)),
                    observing_sample(decoder.model, around) as on_graph,
                ):
                    sample.outside(wanted, on_graph)
    if around is not None:
        yield from _finished(None, around, observer)


def _addressed(observer: GradientObserver, sample: int) -> Callable[[str, torch.Tensor, torch.Tensor], None]:
    return lambda name, parameter, gradient: observer.gradient(name, parameter, gradient, sample)


@contextmanager
def _experts(turn: BlocksInTurn, observer: GradientObserver, sample: int) -> Iterator[None]:
    """Fetch the present block's experts one at a time, where they are apart, and hand their gradients over."""
    with turn.experts() as experts:
        if experts is None:
            yield
            return
        with experts.handing_over(lambda *found: observer.expert_gradient(*found, sample)):
            yield


def _finished(
    layer: int | None, parameters: Mapping[str, nn.Parameter], observer: GradientObserver
) -> Iterator[BlockDone]:
    values = {name: parameter.detach() for name, parameter in parameters.items()}
    with torch.no_grad():
        observer.finish(layer, values)
    yield BlockDone(layer, values)
    values.clear()  # whoever still holds the mapping must not hold the weights: those of the next block are coming


def _require_wanted(parameters: Mapping[str, nn.Parameter], observer: GradientObserver) -> None:
    for name, parameter in parameters.items():
        if parameter.is_floating_point() and observer.wants(name):
            parameter.requires_grad_()
