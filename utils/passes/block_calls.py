"""Calls that a model made to its blocks, kept for the way back; what earlier blocks gave waits in a `TensorStore`."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils.weak import TensorWeakRef

from utils.passes.flows import Arrival
from utils.passes.shared_state import Left, entries, mappings
from utils.passes.tensor_store import Stored, TensorStore


class Output:
    """A floating-point tensor that a block returned: a leaf of the graph as long as the model or its graph holds it.

    `gradient` is what has come back to it so far.
    """

    def __init__(self, leaf: Tensor, store: TensorStore, stored: Stored | None = None) -> None:
        """Put the leaf by, unless it waits there already, as `stored`."""
        self._leaf, self._store = TensorWeakRef(leaf), store
        self.stored = store.put(leaf) if stored is None else stored
        self.gradient: Tensor | None = None

    def leaf(self) -> Tensor | None:
        """The leaf, None once nobody holds it any more."""
        return self._leaf()

    def value(self) -> Tensor:
        """The tensor, as a leaf of its own."""
        return self._store.take(self.stored).requires_grad_()

    def add(self, gradient: Tensor) -> None:
        """Add a gradient to what has come back."""
        self.gradient = gradient if self.gradient is None else self.gradient + gradient

    def collect(self) -> None:
        """Take what a backward pass has left at the leaf."""
        leaf = self.leaf()
        if leaf is not None and leaf.grad is not None:
            self.add(leaf.grad)
            leaf.grad = None


@dataclass
class Call:
    """A call that the model made to a block.

    `arrival` is the call with its arguments (mappings as they were then, outputs of earlier blocks as `Output`), None once
    the way back has passed it; `output` what was returned and `left` what the block left in mappings for later ones, each
    floating-point tensor as an `Output`; `entering` the gradients of arguments that the model computed outside its blocks, by place among the differentiable
    arguments.
    """

    arrival: Arrival | None
    output: Any
    left: Left
    entering: dict[int, Tensor] = field(default_factory=dict)

    def outputs(self) -> list[Output]:
        """The differentiable tensors among what the block gave."""
        return items((self.output, *self.left.values()), Output)

    def arguments(self) -> list[Tensor | Output]:
        """The differentiable tensors among the call's arguments."""
        return arguments(self.arrival)


def arguments(arrival: Arrival) -> list[Tensor | Output]:
    """The differentiable tensors among a call's arguments."""
    handed = mappings(arrival.args, arrival.kwargs)
    given = items((arrival.args, tuple(arrival.kwargs.values()), *entries(handed)), (Tensor, Output))
    return [
        value for value in given if isinstance(value, Output) or (value.is_floating_point() and value.requires_grad)
    ]


def floating(value: Any) -> list[Tensor]:
    """The floating-point tensors in nested tuples, in order."""
    return [tensor for tensor in items(value, Tensor) if tensor.is_floating_point()]


def items(value: Any, kind: type | tuple[type, ...]) -> list[Any]:
    """The items of a kind in nested tuples, in order."""
    found = []
    mapped(value, lambda item: found.append(item) if isinstance(item, kind) else None)
    return found


def mapped(value: Any, function: Callable[[Any], Any]) -> Any:
    """Nested tuples with each item replaced."""
    if isinstance(value, tuple):
        parts = [mapped(item, function) for item in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return function(value)
