"""One sample's way through a causal language model and back, a block at a time.

On the way forward no graph is kept inside the blocks: each block's output enters the rest of the model's own forward as
a new leaf of the graph, and the call that the model made to the block is kept (the checkpoint: by reference what is the
same for all blocks, such as masks and rotary tables; the hidden state in a `TensorStore`, so that memory does not grow
with the number of blocks). On the way back each block is computed again from its call, this time with a graph. What the
model computes outside its blocks (between two of them, the final norm, the head, a cap or a scale on the logits) is
differentiated by autograd as it stands, so nothing about it is assumed; of a model that computes something between two
blocks, autograd keeps in memory what it needs for that.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from utils.errors import UserError
from utils.pair.batches import MicroBatch
from utils.passes.block_calls import Call, Output, arguments, floating, items, mapped
from utils.passes.flows import Arrival, Flow
from utils.passes.shared_state import Left, entries, left_behind, mappings, put_back, with_copies
from utils.passes.tensor_store import Stored, TensorStore

OnGraph = Callable[[Sequence[Tensor]], None]
"""Takes the tensors that are about to be differentiated."""


def nothing(tensors: Sequence[Tensor]) -> None:
    """Look at no graph."""


class SamplePass:
    """One sample's pass; see the module.

    Args:
        model: a causal language model; what lies outside its blocks is in memory.
        token_ids: the sample's tokens, at least two.
        device: where to compute.
        store: where hidden states wait for the way back.
    """

    def __init__(self, model: nn.Module, token_ids: Sequence[int], device: torch.device, store: TensorStore) -> None:
        self.model, self.device, self.store = model, device, store
        self.batch = MicroBatch.of([token_ids])
        self.calls: list[Call] = []
        # By block, its output with `Stored.plain()` in a list for each tensor; None where there is more.
        self.waiting: list[Any] | None = []
        self.flow = self._started()

    def _started(self) -> Flow:
        flow = Flow(self.model, self.batch, self.device)
        _run(flow)
        return flow

    def forward(self, layer: int) -> None:
        """Take the sample through a block, to the entrance of the next one or to the logits.

        Raises:
            UserError: the model visits its blocks in another order, or hands state from block to block.
        """
        self.flow.expect(layer)
        arrival = self.flow.arrival
        handed = mappings(arrival.args, arrival.kwargs)
        plain = [
            value for value in (*arrival.args, *arrival.kwargs.values()) if not any(value is one for one in handed)
        ]
        mapped((*plain, *entries(handed)), _refuse_state)
        args, kwargs = with_copies(arrival.args, arrival.kwargs)
        with torch.no_grad():
            output = arrival.forward(*arrival.args, **arrival.kwargs)
        output = mapped(_as_tuple(output), _leaf)
        left = {key: mapped(value, _leaf) for key, value in left_behind(mappings(args, kwargs), handed).items()}
        put_back(left, handed)
        kept = {key: mapped(value, self._kept) for key, value in left.items()}
        self.calls.append(Call(self._put_by(arrival, args, kwargs), mapped(output, self._kept), kept))
        self._note(self.calls[-1])
        _run(self.flow, output)

    def forward_as(self, layer: int, waiting: Any) -> None:
        """Take the sample past a block as `forward` does, with an output that waits in the store already.

        Args:
            layer: the block, whose weights are not needed.
            waiting: what `self.waiting` had of it, with `Stored` for tensors.
        """
        self.flow.expect(layer)
        arrival = self.flow.arrival
        args, kwargs = with_copies(arrival.args, arrival.kwargs)
        output = mapped(waiting, lambda one: one and self.store.take(one).requires_grad_())
        stored = iter(items(waiting, Stored))
        kept = mapped(output, lambda leaf: leaf if leaf is None else Output(leaf, self.store, next(stored)))
        self.calls.append(Call(self._put_by(arrival, args, kwargs), kept, {}))
        self._note(self.calls[-1])
        _run(self.flow, output)

    def _note(self, call: Call) -> None:
        outputs = items(call.output, object)
        if (
            self.waiting is not None
            and not call.left
            and all(one is None or isinstance(one, Output) for one in outputs)
        ):
            self.waiting.append(mapped(call.output, lambda one: one and [one.stored.plain()]))
        else:
            self.waiting = None

    def _put_by(self, arrival: Arrival, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arrival:
        """A call that is over, with its arguments in mappings of their own and earlier blocks' outputs where they wait."""
        waiting = {id(leaf): one for call in self.calls for one in call.outputs() if (leaf := one.leaf()) is not None}

        def put_by(value: Any) -> Any:
            return waiting.get(id(value), value)

        for one in mappings(args, kwargs):
            for key in one:
                one[key] = mapped(one[key], put_by)
        kwargs = {key: mapped(value, put_by) for key, value in kwargs.items()}
        return replace(arrival, args=mapped(args, put_by), kwargs=kwargs)

    def _kept(self, value: Any) -> Any:
        return Output(value, self.store) if isinstance(value, Tensor) and value.is_floating_point() else value

    def score(self) -> float:
        """Compute the loss from the logits and its gradient for the last block's output; lets go of the logits.

        Returns:
            The mean negative log-likelihood per predicted token, in nats.

        Raises:
            UserError: the forward pass has not ended, or gives no loss that could be differentiated.
        """
        loss = _loss(self.flow)
        self.flow.close()
        del self.flow
        entrances = [argument for call in self.calls[1:] for argument in call.arguments()]
        # The way to blocks may share parts with this one.
        again = any(isinstance(argument, Tensor) and not argument.is_leaf for argument in entrances)
        self._differentiate(loss, None, again)
        return float(loss.detach())

    def backward(self, layer: int, keep_output: bool, on_graph: OnGraph = nothing) -> None:
        """Compute a block again and take the gradient of its output back to its input.

        Gradients of the block's parameters arrive at their hooks (see `handed_over`).

        Args:
            layer: the block, whose weights are in memory; every later block's turn has been.
            keep_output: whether `outside` will be called.
            on_graph: is given the outputs that are differentiated, before they are.
        """
        call = self.calls[layer]
        given = [output.gradient for output in call.outputs()]
        outputs, leaves = _computed_again(call.arrival, call.left)
        pairs = [
            (output, gradient)
            for output, gradient in zip(outputs, given, strict=True)
            if gradient is not None and output.requires_grad
        ]
        if pairs:
            outputs, given = zip(*pairs, strict=True)
            on_graph(outputs)
            torch.autograd.backward(outputs, given)
        del outputs, pairs
        for place, (argument, copy) in enumerate(zip(call.arguments(), leaves, strict=True)):
            if copy.grad is not None:
                self._take_back(call, place, argument, copy.grad)
        call.arrival = None
        for output in call.outputs():
            output.gradient = None
        if not keep_output:
            call.output, call.left = None, {}

    def _take_back(self, call: Call, place: int, argument: Tensor | Output, gradient: Tensor) -> None:
        """Take the gradient of a block's argument to where it was computed."""
        if isinstance(argument, Output):
            argument.add(gradient)
            return
        call.entering[place] = gradient
        self._differentiate(argument, gradient, True)

    def _differentiate(self, value: Tensor, gradient: Tensor | None, retain_graph: bool) -> None:
        """Take a gradient back to the outputs of the blocks that the way back has not passed."""
        outputs = [output for call in self.calls if call.arrival is not None for output in call.outputs()]
        leaves = [leaf for output in outputs if (leaf := output.leaf()) is not None]
        if leaves:
            torch.autograd.backward(value, gradient, inputs=leaves, retain_graph=retain_graph)
        for output in outputs:
            output.collect()

    def outside(self, parameters: Sequence[nn.Parameter], on_graph: OnGraph = nothing) -> None:
        """Differentiate with respect to parameters outside the blocks, once the way back has passed all blocks.

        What lies outside the blocks is computed once more, with the blocks' outputs in their places, so that each
        parameter gets the sum over all its uses at once (a tied embedding has two), at its hook.
        """
        flow = self._started()
        reached, gradients = [], []
        for layer, call in enumerate(self.calls):
            flow.expect(layer)
            given = arguments(flow.arrival)
            for place, gradient in call.entering.items():
                reached.append(given[place])
                gradients.append(gradient)
            left = {key: mapped(value, _value) for key, value in call.left.items()}
            put_back(left, mappings(flow.arrival.args, flow.arrival.kwargs))
            _run(flow, mapped(call.output, _value))
        loss = _loss(flow)
        flow.close()
        del flow
        on_graph([loss, *reached])
        torch.autograd.backward([loss, *reached], [None, *gradients], inputs=parameters)
        self.calls.clear()

    def close(self) -> None:
        """Let go of everything; also ends a forward pass that was given up."""
        if hasattr(self, "flow"):
            self.flow.close()
            del self.flow
        self.calls.clear()


def _run(flow: Flow, output: Any = None) -> None:
    """Let a pass go on to where it stops next, recording a graph, from the output of the block it stands at, if any."""
    with torch.enable_grad():
        if output is None:
            flow.advance()
        else:
            flow.advance_with(output)
        if flow.arrival is not None and not torch.is_grad_enabled():
            _refuse_frozen(flow)


def _refuse_frozen(flow: Flow) -> None:
    raise UserError(
        f"{type(flow.body).__name__} computes a part without gradients; gradients are not supported for it",
        "model-unsupported",
    )


def _loss(flow: Flow) -> Tensor:
    """Mean next-token cross-entropy of a finished pass, in float32."""
    logits = flow.result()
    if not logits.requires_grad:
        _refuse_frozen(flow)
    targets = flow.batch.input_ids[0, 1:]
    with torch.enable_grad():
        return nn.functional.cross_entropy(logits[0, :-1].float(), targets)


def _computed_again(arrival: Arrival, left: Left) -> tuple[list[Tensor], list[Tensor]]:
    """A block's outputs with a graph of the block alone, and the copies of its differentiable arguments it starts at.

    Its outputs are what it returns, and what it leaves in mappings under the keys of `left`.
    """
    leaves = []

    def leaf(value: Any) -> Any:
        if isinstance(value, Output):
            leaves.append(value.value())
        elif isinstance(value, Tensor) and value.requires_grad:
            leaves.append(value.detach().requires_grad_())
        else:
            return value
        return leaves[-1]

    args, kwargs = with_copies(arrival.args, arrival.kwargs)
    args = mapped(args, leaf)
    kwargs = {key: mapped(value, leaf) for key, value in kwargs.items()}
    handed = mappings(args, kwargs)
    for one in handed:
        for key in sorted(one, key=str):
            one[key] = mapped(one[key], leaf)
    with torch.enable_grad():
        output = arrival.forward(*args, **kwargs)
        return floating((_as_tuple(output), *(handed[place][key] for place, key in left))), leaves


def _value(value: Any) -> Any:
    """A block's output in the place of where it waits."""
    return value.value() if isinstance(value, Output) else value


def _as_tuple(output: Any) -> Any:
    """What a block returned; some return a list."""
    return tuple(output) if isinstance(output, list) else output


def _leaf(value: Any) -> Any:
    """A floating-point tensor as a new leaf of the graph; anything else as it is."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().requires_grad_()
    return value


def _refuse_state(value: Any) -> Any:
    """Raise on an argument of a block through which values could pass that no gradient would follow."""
    if value is None or isinstance(value, (Tensor, bool, int, float, str, torch.dtype, torch.device)):
        return value
    raise UserError(
        f"the model hands its blocks a {type(value).__name__}, which may carry values from block to block; gradients "
        "block by block are not supported for it",
        "model-unsupported",
    )
