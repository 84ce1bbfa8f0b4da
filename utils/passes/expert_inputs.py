"""Second moments of what each expert of a mixture is given: of its own tokens, weighted as they count in the output.

    s_e,j = sum over the tokens t routed to e of (g_t,e x_t,j)^2          g: the gate's weight of e for that token

for the input x of each matrix of each expert. An expert that is rarely asked, or hardly counts where it is, gets small
sums; divided by all tokens of a text they are comparable between experts, and with the linear parts beside them.

The experts' own forward runs; only its products with slices of the stacked matrices are watched, whichever of torch's
functions computes them, so that nothing about an architecture is assumed but what its stacks are called.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from utils.errors import UserError
from utils.models.decoder import Component
from utils.pair.batches import MicroBatch
from utils.passes.experts_in_parts import origin
from utils.passes.routed_tokens import take_towards_mean

_PRODUCTS = {"linear", "matmul", "__matmul__", "bmm", "mm"}


@dataclass
class StackSums:
    """What was summed up of one stack of matrices.

    Attributes:
        squares: [experts, in], float64.
        tokens: [experts], float64: how many real tokens each expert had.
        inputs_last: whether a matrix is [out, in], else [in, out]; None before anything was seen.
    """

    squares: torch.Tensor
    tokens: torch.Tensor
    inputs_last: bool | None = None

    def metric(self, stack: torch.Tensor, divisor: float, fewest: int = 0) -> torch.Tensor:
        """W_ij^2 s_j of every expert, float32, of the stack's shape.

        Args:
            stack: the matrices.
            divisor: what the sums are divided by.
            fewest: an expert with fewer tokens is taken towards the mean of its layer (`take_towards_mean`).
        """
        return stack.float().square_().mul_(self._spread(divisor, fewest))

    def metrics(self, stack: torch.Tensor, divisor: float, fewest: int = 0) -> Iterator[torch.Tensor]:
        """The same of one expert after the other, whose matrices are taken as `stack[expert]`."""
        for expert, spread in enumerate(self._spread(divisor, fewest)):
            yield stack[expert].float().square_().mul_(spread)

    def _spread(self, divisor: float, fewest: int) -> torch.Tensor:
        moments = take_towards_mean(self.squares / divisor, self.tokens, fewest)
        return (moments[:, None, :] if self.inputs_last else moments[:, :, None]).float()


@dataclass
class _Call:
    """A call of an experts module: which tokens are real, and each token's experts and their weights, if it is told."""

    real: torch.Tensor | None
    chosen: torch.Tensor | None
    gates: torch.Tensor | None


class ExpertInputs:
    """Sums up what the experts of one block's mixtures are given.

    Args:
        stacks: the components of the block that are stacks of experts' matrices.
    """

    def __init__(self, stacks: Sequence[Component]) -> None:
        self.stacks = tuple(stacks)
        self.sums: dict[Component, StackSums] = {}
        self.batch: MicroBatch | None = None
        self.idle: dict[Component, tuple[torch.Tensor, StackSums]] = {}  # whether no token came, and the sums then

    @contextlib.contextmanager
    def attached(self, block: nn.Module) -> Iterator[None]:
        """Start from zero and watch a block's experts while the context lasts; they run one after the other meanwhile."""
        self.sums, self.idle = {}, {}
        with contextlib.ExitStack() as stack:
            for path in dict.fromkeys(one.path for one in self.stacks):
                own = {one.parameter: one for one in self.stacks if one.path == path}
                stack.enter_context(self._watched(block.get_submodule(path), own))
            yield

    def begin(self, batch: MicroBatch) -> None:
        """Say which micro-batch comes next (on the block's device)."""
        self.batch = batch

    def checked(self, layer: int) -> dict[Component, StackSums]:
        """The sums by component.

        Raises:
            UserError: an architecture that does not multiply its tokens with the stacks one expert after the other.
        """
        for one in self.stacks:
            if one not in self.sums and one in self.idle and bool(self.idle[one][0]):
                self.sums[one] = self.idle[one][1]
            if one not in self.sums:
                raise UserError(
                    f"{one.own_path} of block {layer}: this architecture computes its experts in a way that cannot be "
                    "watched; leave it out of components",
                    "model-unsupported",
                )
        return self.sums

    @contextlib.contextmanager
    def _watched(self, module: nn.Module, stacks: Mapping[str, Component]) -> Iterator[None]:
        forward, config = module.forward, getattr(module, "config", None)
        before = getattr(config, "_experts_implementation", None)

        def watching(*args: Any, **kwargs: Any) -> Any:
            call = self._call([*args, *kwargs.values()])
            self._take_idle(module, stacks, call)
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

    def _take_idle(self, module: nn.Module, stacks: Mapping[str, Component], call: _Call) -> None:
        """Note whether all tokens were given to what has no matrices (experts that return what they are given)."""
        if call.chosen is None:
            return
        sizes = {component: getattr(module, name).shape[0] for name, component in stacks.items()}
        came = (call.chosen < min(sizes.values())).any()
        for component, size in sizes.items():
            empty = torch.zeros(size, 1, dtype=torch.float64, device=came.device)
            before = self.idle[component][0] if component in self.idle else True
            self.idle[component] = (~came & before, StackSums(empty, empty[:, 0]))

    def _call(self, values: Sequence[Any]) -> _Call:
        tensors = [value for value in values if isinstance(value, torch.Tensor) and value.ndim == 2]
        chosen = next((value for value in tensors if not value.is_floating_point()), None)
        gates = None
        if chosen is not None:
            gates = next((one for one in tensors if one.is_floating_point() and one.shape == chosen.shape), None)
        return _Call(None if self.batch.mask is None else self.batch.mask.reshape(-1), chosen, gates)

    def _add(
        self, component: Component, stack: torch.Tensor, call: _Call, expert: int | None, x: torch.Tensor, last: bool
    ) -> None:
        width = stack.shape[2] if last else stack.shape[1]
        if component not in self.sums:
            empty = torch.zeros(stack.shape[0], width, dtype=torch.float64, device=x.device)
            self.sums[component] = StackSums(empty, empty.new_zeros(stack.shape[0]))
        sums = self.sums[component]
        sums.inputs_last = last
        if expert is None:  # every token to every expert, those that are not its own as zeros
            rows = x if call.real is None else x * call.real[None, :, None]
            squares = rows.float().square()
            sums.squares += squares.sum(dim=1, dtype=torch.float64)
            sums.tokens += (squares.amax(dim=2) > 0).sum(dim=1)
            return
        if call.chosen is None or call.gates is None:
            raise _unknown_routing(component)
        place, token = torch.where(expert == call.chosen.T)
        if len(token) != len(x):
            raise _unknown_routing(component)
        weighted = x.float() * call.gates[token, place, None].float()
        if call.real is not None:
            weighted = weighted[call.real[token]]
        sums.squares[expert] += weighted.square().sum(dim=0, dtype=torch.float64)
        sums.tokens[expert] += len(weighted)


def _unknown_routing(component: Component) -> UserError:
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
                if weight.untyped_storage().data_ptr() != stack.untyped_storage().data_ptr():
                    continue
                first = weight.storage_offset() - stack.storage_offset()
                if weight.ndim == 3 and first == 0 and weight.shape == stack.shape:
                    return name, None
                alike = weight.ndim == 2 and weight.shape == stack.shape[1:] and weight.stride() == stack.stride()[1:]
                if alike and 0 <= first < stack.shape[0] * stack.stride(0):
                    return name, first // stack.stride(0)
        return None
