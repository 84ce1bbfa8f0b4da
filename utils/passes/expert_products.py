"""What each expert of a mixture is given for each product with a slice of its stacked matrices.

The experts' own forward runs; only its products with slices of the stacked matrices are watched, whichever of torch's
functions computes them, so that nothing about an architecture is assumed but what its stacks are called.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from utils.errors import UserError
from utils.models.decoder import Component
from utils.pair.batches import MicroBatch
from utils.passes.experts_in_parts import origin

_PRODUCTS = {"linear", "matmul", "__matmul__", "bmm", "mm"}


@dataclass(frozen=True)
class ExpertRows:
    """What one expert is given, or all of them.

    `rows` [tokens, in] are the real tokens routed to `expert`, or, where that is None, [experts, tokens, in]: every token to
    every expert, those that are not its own as zeros. `gates` [tokens, 1] are how each counts in the output, None where that is
    not known. `inputs_last`: whether a matrix is [out, in], else [in, out].
    """

    expert: int | None
    rows: torch.Tensor
    gates: torch.Tensor | None
    inputs_last: bool


Take = Callable[[Component, torch.Tensor, ExpertRows], None]
"""Takes a stack, as component and parameter, and what was given."""


@dataclass
class _Call:
    """A call of an experts module: which tokens are real, and each token's experts and their weights, if it is told."""

    real: torch.Tensor | None
    chosen: torch.Tensor | None
    gates: torch.Tensor | None


class ExpertProducts:
    """Watches the experts of one block's mixtures.

    Args:
        stacks: the components of the block that are stacks of experts' matrices.
        take: is given every product, while nothing else is watched.
    """

    def __init__(self, stacks: Sequence[Component], take: Take) -> None:
        self.stacks, self.take = tuple(stacks), take
        self.batch: MicroBatch | None = None  # None: every token is real
        self.device = torch.device("cpu")
        self._idle: dict[
            Component, tuple[torch.Tensor, int]
        ] = {}  # whether no token came, and how many experts there are

    @contextlib.contextmanager
    def attached(self, block: nn.Module) -> Iterator[None]:
        """Watch a block's experts while the context lasts; they run one after the other meanwhile."""
        self._idle = {}
        with contextlib.ExitStack() as stack:
            for path in dict.fromkeys(one.path for one in self.stacks):
                own = {one.parameter: one for one in self.stacks if one.path == path}
                stack.enter_context(self._watched(block.get_submodule(path), own))
            yield

    def idle_experts(self, component: Component) -> int:
        """How many experts a stack has, if all tokens so far were given to what has no matrices; else 0."""
        nobody_came, experts = self._idle.get(component, (False, 0))
        return experts if bool(nobody_came) else 0

    @contextlib.contextmanager
    def _watched(self, module: nn.Module, stacks: Mapping[str, Component]) -> Iterator[None]:
        forward, config = module.forward, getattr(module, "config", None)
        before = getattr(config, "_experts_implementation", None)

        def watching(*args: Any, **kwargs: Any) -> Any:
            call = self._call([*args, *kwargs.values()])
            self._note_idle(module, stacks, call)
            with _Products({name: getattr(module, name) for name in stacks}) as products:
                products.take = lambda name, *seen: self._add(stacks[name], getattr(module, name), call, *seen)
                return forward(*args, **kwargs)

        module.forward = watching
        if config is not None:
            config._experts_implementation = "eager"
        try:
            yield
        finally:
            del module.forward
            if config is not None:
                config._experts_implementation = before

    def _note_idle(self, module: nn.Module, stacks: Mapping[str, Component], call: _Call) -> None:
        """Note whether all tokens were given to what has no matrices (experts that return what they are given)."""
        if call.chosen is None:
            return
        sizes = {component: getattr(module, name).shape[0] for name, component in stacks.items()}
        came = (call.chosen < min(sizes.values())).any()
        self.device = came.device
        for component, size in sizes.items():
            before = self._idle[component][0] if component in self._idle else True
            self._idle[component] = (~came & before, size)

    def _call(self, values: Sequence[Any]) -> _Call:
        tensors = [value for value in values if isinstance(value, torch.Tensor) and value.ndim == 2]
        chosen = next((value for value in tensors if not value.is_floating_point()), None)
        gates = None
        if chosen is not None:
            gates = next((one for one in tensors if one.is_floating_point() and one.shape == chosen.shape), None)
        mask = None if self.batch is None else self.batch.mask
        return _Call(None if mask is None else mask.reshape(-1), chosen, gates)

    def _add(
        self, component: Component, stack: torch.Tensor, call: _Call, expert: int | None, x: torch.Tensor, last: bool
    ) -> None:
        x = x.detach()
        if expert is None:
            rows = x if call.real is None else x * call.real[None, :, None]
            self.take(component, stack, ExpertRows(None, rows, None, last))
            return
        gates, known = None, False
        if call.chosen is not None:
            place, token = torch.where(expert == call.chosen.T)
            known = len(token) == len(x)
            gates = call.gates.detach()[token, place, None] if known and call.gates is not None else None
            if call.real is not None and known:
                x, gates = x[call.real[token]], None if gates is None else gates[call.real[token]]
        if call.real is not None and not known:
            raise unknown_routing(component)
        self.take(component, stack, ExpertRows(expert, x, gates, last))


def unknown_routing(component: Component) -> UserError:
    """Which tokens an expert has cannot be seen."""
    return UserError(
        f"{component.own_path}: which tokens this architecture gives an expert is not known; leave it out of components",
        "model-unsupported",
    )


@dataclass
class _Products(TorchFunctionMode):
    """Sees products with slices of some stacks: `take(name, expert or None for all, inputs, whether inputs come last)`."""

    stacks: Mapping[str, torch.Tensor]
    take: Any = field(default=None)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if getattr(func, "__name__", "") in _PRODUCTS and len(args) > 1 and isinstance(args[1], torch.Tensor):
            found = self._slice(args[1])
            if found is not None:
                with torch._C.DisableTorchFunction():
                    self.take(*found, args[0], func.__name__ == "linear")
        return func(*args, **(kwargs or {}))

    def _slice(self, weight: torch.Tensor) -> tuple[str, int | None] | None:
        with torch._C.DisableTorchFunction():
            if (fetched := origin(weight)) is not None:
                return next(((name, fetched[1]) for name, stack in self.stacks.items() if stack is fetched[0]), None)
            for name, stack in self.stacks.items():
                if weight is stack:
                    return name, None
                if weight.is_meta or weight.untyped_storage().data_ptr() != stack.untyped_storage().data_ptr():
                    continue
                first = weight.storage_offset() - stack.storage_offset()
                if weight.ndim == 3 and first == 0 and weight.shape == stack.shape:
                    return name, None
                alike = weight.ndim == 2 and weight.shape == stack.shape[1:] and weight.stride() == stack.stride()[1:]
                if alike and 0 <= first < stack.shape[0] * stack.stride(0):
                    return name, first // stack.stride(0)
        return None
