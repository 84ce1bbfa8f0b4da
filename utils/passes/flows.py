"""One micro-batch's forward pass through a model, which stops at the entrance of every decoder block.

Every pass runs the model's own `forward` in a coroutine of its own (a greenlet), so that whoever drives several of them
can take them all through one block before the next one's weights are needed.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import greenlet
import torch
from torch import nn

from utils.errors import UserError
from utils.pair.batches import MicroBatch


@dataclass
class Arrival:
    """A micro-batch standing at the entrance of a block: the block's own forward and the call it is about to make.

    `output` is what the block shall seem to have returned; None to make the call, and then what it returned.
    """

    layer: int
    forward: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any = None


class Flow:
    """One micro-batch's forward pass through a model, which stops at the entrance of every block (see `stops`).

    `body` is what is run: with the body of a causal language model the pass ends in final hidden states, with the
    whole model in logits.
    """

    def __init__(self, body: nn.Module, batch: MicroBatch, device: torch.device) -> None:
        self.batch = batch.to(device)
        self.body = body
        self.greenlet = greenlet.greenlet(self._forward)
        self.arrival: Arrival | None = None
        self.returned: Any = None  # by the block before
        self.final: torch.Tensor | None = None

    def _forward(self) -> None:
        mask = None if self.batch.mask is None else self.batch.mask.long()
        output = self.body(input_ids=self.batch.input_ids, attention_mask=mask, use_cache=False)
        self.final = output[0]

    def advance(self) -> None:
        """Run until the entrance of the next block, or to the end."""
        left, self.arrival, self.returned = self.arrival, None, None
        self.arrival = self.greenlet.switch()
        self.returned = None if left is None else left.output

    def advance_with(self, output: Any) -> None:
        """Run on as if the block this flow stands at had returned `output`."""
        self.arrival.output = output
        self.advance()

    def rehearse(self) -> None:
        """Run the block this flow stands at and drop the output; the flow stays where it is."""
        self.arrival.forward(*self.arrival.args, **self.arrival.kwargs)

    def expect(self, layer: int) -> None:
        """Raise unless the flow stands at the entrance of `layer`, with hidden states of one row of tokens a sample."""
        at = None if self.arrival is None else self.arrival.layer
        if at != layer:
            raise UserError(
                f"{type(self.body).__name__} does not visit its blocks once each and in order (block {layer} was due, "
                f"it {'ended' if at is None else f'came to {at}'}); this architecture is not supported",
                "model-unsupported",
            )
        if self.arrival is not None:
            self._refuse_tokens_first(self.arrival)

    def _refuse_tokens_first(self, arrival: Arrival) -> None:
        """Refuse states [length, samples, hidden]: which of their rows are padding would be taken for the wrong ones."""
        states = next((value for value in (*arrival.args, *arrival.kwargs.values()) if torch.is_tensor(value)), None)
        samples, length = self.batch.input_ids.shape
        if states is not None and samples != length and states.shape[:2] == (length, samples):
            raise UserError(
                f"{type(self.body).__name__} hands its blocks hidden states of {length} tokens times {samples} samples, not "
                "the other way round; this architecture is not supported",
                "model-unsupported",
            )

    def result(self) -> torch.Tensor:
        """The first output (final hidden states, or logits); raises if the forward pass has not ended."""
        if self.final is None:
            self.expect(-1)
        return self.final

    def close(self) -> None:
        """End a pass that was given up, so that its frames let go of their tensors."""
        if not self.greenlet.dead and self.greenlet:
            self.greenlet.throw()


@contextlib.contextmanager
def stops(blocks: nn.ModuleList) -> Iterator[None]:
    """Make each block's forward hand control back before it runs, to whoever has entered this context."""
    runner = greenlet.getcurrent()

    def stopping(layer: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def stop_then_forward(*args: Any, **kwargs: Any) -> Any:
            arrival = Arrival(layer, forward, args, kwargs)
            runner.switch(arrival)
            if arrival.output is None:
                arrival.output = forward(*args, **kwargs)
            return arrival.output

        return stop_then_forward

    for layer, block in enumerate(blocks):
        block.forward = stopping(layer, block.forward)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward
