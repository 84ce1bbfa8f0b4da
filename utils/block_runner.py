"""Run a model's own forward with one decoder block in fast memory at a time.

Every micro-batch runs the model's own `forward` in a coroutine of its own (a greenlet). At the entrance of each block
it stops and hands control back, so that the runner can take all micro-batches through one block before the next one's
weights are needed. Nothing is captured or replayed: embeddings, masks, rotary tables per layer type and residual
scaling are computed by the model itself, for the micro-batch's own shape, so the results are those of a plain forward,
and each weight is read once.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import greenlet
import torch
from torch import nn

from utils.decoder import Decoder
from utils.errors import UserError
from utils.weight_source import WeightSource, placed, tensor_names


@dataclass(frozen=True)
class MicroBatch:
    """Right-padded samples that go through a block together.

    `input_ids` [samples, length] are token ids (int64), `lengths` how many of each sample's are real (the first ones),
    `mask` (bool, as `input_ids`) says which, None that all are.
    """

    input_ids: torch.Tensor
    lengths: tuple[int, ...]
    mask: torch.Tensor | None

    @classmethod
    def of(cls, samples: Sequence[Sequence[int]], pad_id: int = 0) -> "MicroBatch":
        """Pad token lists to the longest of them."""
        lengths = tuple(len(ids) for ids in samples)
        longest = max(lengths)
        padded = torch.tensor([[*ids, *[pad_id] * (longest - len(ids))] for ids in samples])
        mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
        return cls(padded, lengths, None if min(lengths) == longest else mask)

    @property
    def tokens(self) -> int:
        """How many real tokens there are."""
        return sum(self.lengths)

    def to(self, device: torch.device) -> "MicroBatch":
        """The same micro-batch on a device."""
        mask = None if self.mask is None else self.mask.to(device)
        return MicroBatch(self.input_ids.to(device), self.lengths, mask)


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


@torch.inference_mode()
def run_blocks(
    decoder: Decoder,
    weights: WeightSource,
    batches: Sequence[MicroBatch],
    visitor: Visitor,
    device: torch.device,
    *,
    on_block: Callable[[int], None] = lambda layer: None,
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

    Returns:
        The final hidden states (after the final norm) of each micro-batch, [samples, length, hidden], on `device`.

    Raises:
        UserError: the model does not visit its blocks once each and in order.
    """
    names = [tensor_names(block, f"{decoder.blocks_path}.{i}") for i, block in enumerate(decoder.blocks)]
    in_blocks = {name for group in names for name in group}
    outside = [name for name in _body_names(decoder) if name not in in_blocks]
    with contextlib.ExitStack() as stack:
        stack.callback(weights.close)
        fetcher = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="fetch"))
        stack.enter_context(placed(decoder.model, "", weights.fetch(outside), device))
        coming = fetcher.submit(weights.fetch, names[0])
        stack.enter_context(_stops(decoder.blocks))
        flows = [_Flow(decoder.body, batch, device) for batch in batches]
        stack.callback(lambda: [flow.close() for flow in flows])
        for flow in flows:
            flow.advance()
        computed = _marker(device)
        for layer, block in enumerate(decoder.blocks):
            tensors = coming.result()
            if layer + 1 < len(names):
                coming = fetcher.submit(_fetch_after, computed, weights, names[layer + 1])
                if layer + 2 < len(names):
                    weights.read_ahead(names[layer + 2])
            with placed(block, f"{decoder.blocks_path}.{layer}", tensors, device):
                del tensors
                _through_block(layer, block, flows, visitor)
            computed = _marker(device)
            on_block(layer)
        return [flow.result() for flow in flows]


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


def _through_block(layer: int, block: nn.Module, flows: list["_Flow"], visitor: Visitor) -> None:
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


def _body_names(decoder: Decoder) -> list[str]:
    held = {id(value) for value in [*decoder.body.parameters(), *decoder.body.buffers()]}
    pairs = [*decoder.model.named_parameters(), *decoder.model.named_buffers()]
    return [name for name, value in pairs if id(value) in held]


@dataclass
class _Arrival:
    """A micro-batch standing at the entrance of a block: the block's own forward and the call it is about to make."""

    layer: int
    forward: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Flow:
    """One micro-batch's forward pass, which stops at the entrance of every block."""

    def __init__(self, body: nn.Module, batch: MicroBatch, device: torch.device) -> None:
        self.batch = batch.to(device)
        self.body = body
        self.greenlet = greenlet.greenlet(self._forward)
        self.arrival: _Arrival | None = None
        self.final: torch.Tensor | None = None

    def _forward(self) -> None:
        mask = None if self.batch.mask is None else self.batch.mask.long()
        output = self.body(input_ids=self.batch.input_ids, attention_mask=mask, use_cache=False)
        self.final = output[0]

    def advance(self) -> None:
        """Run until the entrance of the next block, or to the end."""
        self.arrival = None
        self.arrival = self.greenlet.switch()

    def rehearse(self) -> None:
        """Run the block this flow stands at and drop the output; the flow stays where it is."""
        self.arrival.forward(*self.arrival.args, **self.arrival.kwargs)

    def expect(self, layer: int) -> None:
        """Raise unless the flow stands at the entrance of `layer`."""
        at = None if self.arrival is None else self.arrival.layer
        if at != layer:
            raise UserError(
                f"{type(self.body).__name__} does not visit its blocks once each and in order (block {layer} was due, "
                f"it {'ended' if at is None else f'came to {at}'}); this architecture is not supported"
            )

    def result(self) -> torch.Tensor:
        """The final hidden states; raises if the forward pass has not ended."""
        if self.final is None:
            self.expect(-1)
        return self.final

    def close(self) -> None:
        """End a pass that was given up, so that its frames let go of their tensors."""
        if not self.greenlet.dead and self.greenlet:
            self.greenlet.throw()


@contextlib.contextmanager
def _stops(blocks: nn.ModuleList) -> Iterator[None]:
    """Make each block's forward hand control to the runner before it runs."""
    runner = greenlet.getcurrent()

    def stopping(layer: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def stop_then_forward(*args: Any, **kwargs: Any) -> Any:
            runner.switch(_Arrival(layer, forward, args, kwargs))
            return forward(*args, **kwargs)

        return stop_then_forward

    for layer, block in enumerate(blocks):
        block.forward = stopping(layer, block.forward)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward
