"""One sample's way through a causal language model and back, a block at a time.

On the way forward no graph is kept inside the blocks: each block's output enters the rest of the model's own forward
as a new leaf of the graph, and the call that the model made to the block is kept (the checkpoint: the hidden state,
and by reference what comes with it, such as masks and rotary tables). On the way back each block is computed again
from its call, this time with a graph. What the model computes outside its blocks (between two of them, the final norm,
the head, a cap or a scale on the logits) is differentiated by autograd as it stands, so nothing about it is assumed.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from utils.errors import UserError
from utils.pair.batches import MicroBatch
from utils.passes.flows import Arrival, Flow
from utils.passes.shared_state import Left, entries, left_behind, mappings, put_back, with_copies

HandOver = Callable[[str, torch.Tensor, torch.Tensor], None]
"""Takes a parameter's name, its value and its gradient."""


@dataclass
class _Call:
    """A call that the model made to a block.

    `arrival` is the call with its arguments (mappings as they were then), None once the way back has passed it; `output`
    what was returned and `left` what the block left in mappings for later ones, whose floating-point tensors are leaves;
    `entering` the gradients of arguments that the model computed outside its blocks, by place among the differentiable
    arguments.
    """

    arrival: Arrival | None
    output: Any
    left: Left
    entering: dict[int, torch.Tensor] = field(default_factory=dict)

    def leaves(self) -> list[torch.Tensor]:
        """The differentiable tensors among what the block gave."""
        return _differentiable((self.output, *self.left.values()))

    def arguments(self) -> list[torch.Tensor]:
        """The differentiable tensors among the call's arguments."""
        return _arguments(self.arrival)


class SamplePass:
    """One sample's pass; see the module.

    Args:
        model: a causal language model; what lies outside its blocks is in memory.
        token_ids: the sample's tokens, at least two.
        device: where to compute.
    """

    def __init__(self, model: nn.Module, token_ids: Sequence[int], device: torch.device) -> None:
        self.model, self.device = model, device
        self.batch = MicroBatch.of([token_ids])
        self.calls: list[_Call] = []
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
        _mapped((*plain, *entries(handed)), _refuse_state)
        args, kwargs = with_copies(arrival.args, arrival.kwargs)
        with torch.no_grad():
            output = arrival.forward(*arrival.args, **arrival.kwargs)
        output = _mapped(_as_tuple(output), _leaf)
        left = {key: _mapped(value, _leaf) for key, value in left_behind(mappings(args, kwargs), handed).items()}
        put_back(left, handed)
        self.calls.append(_Call(replace(arrival, args=args, kwargs=kwargs), output, left))
        _run(self.flow, output)

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
        again = any(not argument.is_leaf for argument in entrances)  # the way to blocks may share parts with this one
        torch.autograd.backward(loss, inputs=self._leaves(), retain_graph=again)
        return float(loss.detach())

    def backward(self, layer: int, keep_output: bool) -> None:
        """Compute a block again and take the gradient of its output back to its input.

        Gradients of the block's parameters arrive at their hooks (see `handed_over`).

        Args:
            layer: the block, whose weights are in memory; every later block's turn has been.
            keep_output: whether `outside` will be called.
        """
        call = self.calls[layer]
        given = [leaf.grad for leaf in call.leaves()]
        outputs, leaves = _computed_again(call.arrival, call.left)
        pairs = [
            (output, gradient)
            for output, gradient in zip(outputs, given, strict=True)
            if gradient is not None and output.requires_grad
        ]
        if pairs:
            torch.autograd.backward(*zip(*pairs, strict=True))
        del outputs, pairs
        for place, (argument, copy) in enumerate(zip(call.arguments(), leaves, strict=True)):
            if copy.grad is not None:
                self._take_back(call, place, argument, copy.grad)
        call.arrival = None
        for leaf in call.leaves():
            leaf.grad = None
        if not keep_output:
            call.output, call.left = None, {}

    def _take_back(self, call: _Call, place: int, argument: torch.Tensor, gradient: torch.Tensor) -> None:
        """Take the gradient of a block's argument to where it was computed."""
        if argument.is_leaf and not isinstance(argument, nn.Parameter):  # a block's output as it was
            argument.grad = gradient if argument.grad is None else argument.grad + gradient
            return
        call.entering[place] = gradient
        leaves = self._leaves()
        if leaves:
            torch.autograd.backward(argument, gradient, inputs=leaves, retain_graph=True)

    def _leaves(self) -> list[torch.Tensor]:
        """The outputs of the blocks that the way back has not passed."""
        return [leaf for call in self.calls if call.arrival is not None for leaf in call.leaves()]

    def outside(self, parameters: Sequence[nn.Parameter]) -> None:
        """Differentiate with respect to parameters outside the blocks, once the way back has passed all blocks.

        What lies outside the blocks is computed once more, with the blocks' outputs in their places, so that each
        parameter gets the sum over all its uses at once (a tied embedding has two), at its hook.
        """
        flow = self._started()
        reached, gradients = [], []
        for layer, call in enumerate(self.calls):
            flow.expect(layer)
            arguments = _arguments(flow.arrival)
            for place, gradient in call.entering.items():
                reached.append(arguments[place])
                gradients.append(gradient)
            put_back(call.left, mappings(flow.arrival.args, flow.arrival.kwargs))
            _run(flow, call.output)
        loss = _loss(flow)
        flow.close()
        del flow
        torch.autograd.backward([loss, *reached], [None, *gradients], inputs=parameters)
        self.calls.clear()

    def close(self) -> None:
        """Let go of everything; also ends a forward pass that was given up."""
        if hasattr(self, "flow"):
            self.flow.close()
            del self.flow
        self.calls.clear()


@contextmanager
def handed_over(parameters: Mapping[str, nn.Parameter], hand_over: HandOver) -> Iterator[None]:
    """Hand each parameter's gradient over as soon as a backward pass has it, and let go of it.

    Args:
        parameters: by name; those that do not require a gradient are passed over.
        hand_over: takes name, value and gradient; gradients are not recorded meanwhile.
    """

    def hook(name: str) -> Callable[[nn.Parameter], None]:
        def take(parameter: nn.Parameter) -> None:
            gradient, parameter.grad = parameter.grad, None
            with torch.no_grad():
                hand_over(name, parameter.detach(), gradient)

        return take

    wanted = [(name, value) for name, value in parameters.items() if value.requires_grad]
    handles = [parameter.register_post_accumulate_grad_hook(hook(name)) for name, parameter in wanted]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for _, parameter in wanted:
            parameter.grad = None


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


def _loss(flow: Flow) -> torch.Tensor:
    """Mean next-token cross-entropy of a finished pass, in float32."""
    logits = flow.result()
    if not logits.requires_grad:
        _refuse_frozen(flow)
    targets = flow.batch.input_ids[0, 1:]
    with torch.enable_grad():
        return nn.functional.cross_entropy(logits[0, :-1].float(), targets)


def _computed_again(arrival: Arrival, left: Left) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """A block's outputs with a graph of the block alone, and the copies of its differentiable arguments it starts at.

    Its outputs are what it returns, and what it leaves in mappings under the keys of `left`.
    """
    leaves = []

    def leaf(value: Any) -> Any:
        if not (isinstance(value, torch.Tensor) and value.requires_grad):
            return value
        leaves.append(value.detach().requires_grad_())
        return leaves[-1]

    args, kwargs = with_copies(arrival.args, arrival.kwargs)
    args = _mapped(args, leaf)
    kwargs = {key: _mapped(value, leaf) for key, value in kwargs.items()}
    handed = mappings(args, kwargs)
    for one in handed:
        for key in sorted(one, key=str):
            one[key] = _mapped(one[key], leaf)
    with torch.enable_grad():
        output = arrival.forward(*args, **kwargs)
        return _floating((_as_tuple(output), *(handed[place][key] for place, key in left))), leaves


def _as_tuple(output: Any) -> Any:
    """What a block returned; some return a list."""
    return tuple(output) if isinstance(output, list) else output


def _leaf(value: Any) -> Any:
    """A floating-point tensor as a new leaf of the graph; anything else as it is."""
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.detach().requires_grad_()
    return value


def _refuse_state(value: Any) -> Any:
    """Raise on an argument of a block through which values could pass that no gradient would follow."""
    if value is None or isinstance(value, (torch.Tensor, bool, int, float, str, torch.dtype, torch.device)):
        return value
    raise UserError(
        f"the model hands its blocks a {type(value).__name__}, which may carry values from block to block; gradients "
        "block by block are not supported for it",
        "model-unsupported",
    )


def _arguments(arrival: Arrival) -> list[torch.Tensor]:
    handed = mappings(arrival.args, arrival.kwargs)
    return _differentiable((arrival.args, tuple(arrival.kwargs.values()), *entries(handed)))


def _differentiable(value: Any) -> list[torch.Tensor]:
    return [tensor for tensor in _floating(value) if tensor.requires_grad]


def _floating(value: Any) -> list[torch.Tensor]:
    """The floating-point tensors in nested tuples, in order."""
    found = []
    _mapped(
        value, lambda item: found.append(item) if isinstance(item, torch.Tensor) and item.is_floating_point() else None
    )
    return found


def _mapped(value: Any, function: Callable[[Any], Any]) -> Any:
    """Nested tuples with each item replaced."""
    if isinstance(value, tuple):
        items = [_mapped(item, function) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return function(value)
