"""Run a model's own forward with one decoder block in fast memory at a time.

Every micro-batch runs the model's own `forward` in a coroutine of its own (a greenlet). At the entrance of each block
it stops and hands control back, so that the runner can take all micro-batches through one block before the next one's
weights are needed. Nothing is captured or replayed: embeddings, masks, rotary tables per layer type and residual
scaling are computed by the model itself, for the micro-batch's own shape, so the results are those of a plain forward,
and each weight is read once.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import torch
from torch import nn

from utils.models.decoder import Decoder
from utils.models.weight_source import WeightSource, placed, tensor_names, tied_names
from utils.pair.batches import MicroBatch
from utils.passes.experts_in_parts import ExpertMatrices, block_bytes, experts_in_parts, stack_names
from utils.passes.flows import Flow, stops
from utils.passes.snapshots import Snapshot, Snapshots, digests
from utils.runtime import available_bytes


class Visitor(Protocol):
    """What is done at each block."""

    def observing(self, layer: int, block: nn.Module) -> contextlib.AbstractContextManager[None]:
        """Attach observers to a block for the passes made inside the context."""

    def begin(self, batch: MicroBatch) -> None:
        """A micro-batch is about to go through the block."""

    def finish(self, layer: int, block: nn.Module) -> None:
        """All micro-batches went through the block, whose weights are still there and may be replaced."""

    @property
    def rewrites(self) -> bool:
        """Whether `finish` replaces weights, so that a second, unobserved pass must yield the block's output."""


class KeptVisitor(Visitor, Protocol):
    """A visitor whose pass can be gone on with after a kill."""

    def state(self) -> Any:
        """What has been measured so far, between two blocks: plain data and tensors."""

    def restore(self, state: Any, device: torch.device) -> None:
        """Take that up again."""


class Bystander:
    """A visitor of blocks that only lets the tokens through."""

    rewrites = False

    def observing(self, layer: int, block: nn.Module) -> contextlib.AbstractContextManager[None]:
        """Observe nothing."""
        return contextlib.nullcontext()

    def begin(self, batch: MicroBatch) -> None:
        """Nothing to note."""

    def finish(self, layer: int, block: nn.Module) -> None:
        """Nothing to take."""

    def state(self) -> None:
        """Nothing has been measured."""

    def restore(self, state: None, device: torch.device) -> None:
        """Nothing to take up again."""


@torch.inference_mode()
def run_blocks(
    decoder: Decoder,
    weights: WeightSource,
    batches: Sequence[MicroBatch],
    visitor: Visitor,
    device: torch.device,
    *,
    on_block: Callable[[int], None] = lambda layer: None,
    snapshots: Snapshots | None = None,
) -> list[torch.Tensor]:
    """Take all micro-batches through all blocks, block by block.

    Memory: what lies outside the blocks, two blocks (this one and the next, which is being fetched), the hidden
    states of all micro-batches, and the activations of one micro-batch inside one block.

    Args:
        decoder: the model; its parameters are on the meta device before and after.
        weights: where parameters come from.
        batches: micro-batches on the CPU.
        visitor: what to do at each block.
        device: where to compute.
        on_block: called with the layer number after each block.
        snapshots: where the pass of a `KeptVisitor` is kept; it begins where a killed run's stood.

    Returns:
        The final hidden states (after the final norm) of each micro-batch, [samples, length, hidden], on `device`.

    Raises:
        UserError: the model does not visit its blocks once each and in order.
    """
    in_blocks = block_tensor_names(decoder)
    outside = [name for name in body_names(decoder) if name not in in_blocks]
    layers = range(len(decoder.blocks))
    with contextlib.ExitStack() as stack:
        stack.callback(weights.close)
        stack.enter_context(placed(decoder.model, "", weights.fetch(outside), device))
        stack.enter_context(stops(decoder.blocks))
        flows: list[Flow] = []
        stack.callback(lambda: [flow.close() for flow in flows])
        first = _begun(decoder, batches, visitor, device, flows, snapshots)
        for layer in range(first):
            on_block(layer)
        turn = stack.enter_context(BlocksInTurn(decoder, weights, layers[first:], device))
        for layer in layers[first:]:
            with turn.next_block() as block, turn.experts():
                _through_block(layer, block, flows, visitor)
            on_block(layer)
            if snapshots is not None and layer + 1 < len(layers):
                snapshots.offer(layer + 1, [flow.returned for flow in flows], Around(flows), visitor.state)
        if snapshots is not None:
            snapshots.pass_over()
        return [flow.result() for flow in flows]


class Around(Sequence[list[float]]):
    """What the next block is given for each micro-batch, as digests that are made when they are asked for."""

    def __init__(self, flows: Sequence["Flow"]) -> None:
        self._flows = flows

    def __len__(self) -> int:
        return len(self._flows)

    def __getitem__(self, place: int) -> list[float]:
        return digests(self._flows[place].arrival.args, self._flows[place].arrival.kwargs)


def _begun(
    decoder: Decoder,
    batches: Sequence[MicroBatch],
    visitor: Visitor,
    device: torch.device,
    flows: list["Flow"],
    snapshots: Snapshots | None,
) -> int:
    """Start all micro-batches, as far as a snapshot says they are; the block in front of which they stand."""
    snapshot = snapshots.load() if snapshots is not None else None

    def start() -> None:
        flows.extend(Flow(decoder.body, batch, device) for batch in batches)
        for flow in flows:
            flow.advance()

    start()
    if snapshot is None or len(snapshot.outputs) != len(flows):
        return 0
    if not caught_up(flows, snapshot, device):
        for flow in flows:
            flow.close()
        flows.clear()
        start()
        return 0
    visitor.restore(snapshot.state, device)
    return snapshot.layer


def caught_up(flows: Sequence["Flow"], snapshot: Snapshot, device: torch.device) -> bool:
    """Take passes that stand at the first block to where a snapshot's stood; whether the next block is given the same there."""
    for flow, output in zip(flows, snapshot.outputs, strict=True):
        for layer in range(snapshot.layer):
            flow.expect(layer)
            flow.advance_with(on_device(output, device))
    return list(Around(flows)) == snapshot.around


def on_device(output: Any, device: torch.device) -> Any:
    """What a block has returned, a tensor or several, on a device."""
    if isinstance(output, tuple):
        return tuple(None if one is None else one.to(device) for one in output)
    return output.to(device)


def block_tensor_names(decoder: Decoder) -> set[str]:
    """The names, in the model, of all parameters and buffers inside the decoder blocks."""
    return {name for layer in range(len(decoder.blocks)) for name in _names_in_block(decoder, layer)}


def _names_in_block(decoder: Decoder, layer: int) -> list[str]:
    return tensor_names(decoder.blocks[layer], f"{decoder.blocks_path}.{layer}")


def shared_in_blocks(decoder: Decoder) -> list[str]:
    """The names of parameters and modules of blocks that other blocks, or what lies outside them, use too."""
    in_blocks = block_tensor_names(decoder)
    shared = [name for pair in tied_names(decoder.model).items() for name in pair if name in in_blocks]
    seen: set[int] = set()
    for block in decoder.blocks:
        own = {id(module): name for name, module in block.named_modules() if any(True for _ in module.parameters())}
        shared += [name for key, name in own.items() if key in seen]
        seen |= own.keys()
    return shared


class BlocksInTurn:
    """Puts one block's weights into the model after the other, in a given order, and fetches the next one meanwhile.

    No more than two blocks are in fast memory: the present one and the one being fetched. Where the next one does not fit
    beside the present one and whatever else is there by then, it is fetched once the present one has gone. Where the weights'
    `experts_apart` says so, experts stay where they are and are fetched as they are asked for, within `experts`
    (`utils/passes/experts_in_parts.py`).
    """

    def __init__(self, decoder: Decoder, weights: WeightSource, order: Sequence[int], device: torch.device) -> None:
        self.decoder, self.weights, self.order, self.device = decoder, weights, list(order), device
        self.place = 0
        self._stacks: dict[int, tuple[str, ...]] = {}

    def __enter__(self) -> "BlocksInTurn":
        self.fetcher = ThreadPoolExecutor(1, thread_name_prefix="fetch")
        self.coming = self._begin() if self.order else None
        return self

    def __exit__(self, *exception: object) -> None:
        self.fetcher.shutdown()
        del self.coming

    @contextlib.contextmanager
    def next_block(self) -> Iterator[nn.Module]:
        """The next block in the order, with its weights for as long as the context lasts."""
        computed = _marker(self.device)
        layer = self.order[self.place]
        coming = self.coming or self._begin()
        self.place += 1
        tensors = coming.result()
        del coming
        if self.place < len(self.order) and self._fits(self.order[self.place]):
            self.coming = self.fetcher.submit(_fetch_after, computed, self.weights, self._names(self.place))
            if self.place + 1 < len(self.order):
                self.weights.read_ahead(self._names(self.place + 1))
        else:
            self.coming = None
        block = self.decoder.blocks[layer]
        with placed(block, f"{self.decoder.blocks_path}.{layer}", tensors, self.device):
            del tensors
            yield block

    def _begin(self) -> Future:
        """Begin to fetch the block whose turn it is, all of it or without its experts."""
        return self.fetcher.submit(self.weights.fetch, self._names(self.place))

    def experts(self) -> contextlib.AbstractContextManager[ExpertMatrices | None]:
        """For as long as the context lasts, the present block's experts come as they are asked for, where they are apart.

        Contexts of several models are to be left in the reverse order.
        """
        layer = self.order[self.place - 1]
        if not self._apart(layer):
            return contextlib.nullcontext()
        return experts_in_parts(self.decoder, layer, self._apart(layer), self.weights.fetch_expert)

    def _apart(self, layer: int) -> tuple[str, ...]:
        """The stacks of a block whose experts are fetched on their own."""
        if not self.weights.experts_apart:
            return ()
        if layer not in self._stacks:
            self._stacks[layer] = stack_names(self.decoder, layer, self.weights.layout)
        return self._stacks[layer]

    def _fits(self, layer: int) -> bool:
        return block_bytes(self.decoder, layer, self._apart(layer)) <= available_bytes(self.device)

    def _names(self, place: int) -> list[str]:
        layer = self.order[place]
        return [name for name in _names_in_block(self.decoder, layer) if name not in self._apart(layer)]


def _marker(device: torch.device) -> torch.cuda.Event | None:
    """A mark at the end of what a GPU has been told to compute so far; None on the CPU, which computes at once."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event


def _fetch_after(computed: torch.cuda.Event | None, weights: WeightSource, names: list[str]) -> dict[str, torch.Tensor]:
    """Fetch once the block before the current one is computed, so that no more than two blocks are on the device."""
    if computed is not None:
        computed.synchronize()
    return weights.fetch(names)


def _through_block(layer: int, block: nn.Module, flows: list["Flow"], visitor: Visitor) -> None:
    with visitor.observing(layer, block):
        for flow in flows:
            flow.expect(layer)
            visitor.begin(flow.batch)
            if visitor.rewrites:
                flow.rehearse()
            else:
                flow.advance()
    visitor.finish(layer, block)
    if visitor.rewrites:
        for flow in flows:
            flow.advance()


def body_names(decoder: Decoder) -> list[str]:
    """The names, in the model, of all parameters and buffers of its body, those in the blocks included."""
    held = {id(value) for value in [*decoder.body.parameters(), *decoder.body.buffers()]}
    pairs = [*decoder.model.named_parameters(), *decoder.model.named_buffers()]
    return [name for name, value in pairs if id(value) in held]
