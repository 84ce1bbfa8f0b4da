"""Whether another model's routers would give tokens the same experts of a mixture, on the inputs that a model's own are given.

A mixture's forward runs a second time on its own input with the other model's router, up to where it calls its experts: so
the choice is the architecture's own (groups, biases, whatever comes before the top k), and no form of router is assumed.
It costs the router's product again, and what the mixture computes before its experts, but no expert.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from utils.models.decoder import Decoder
from utils.models.routers import Mixture, find_mixtures
from utils.models.weight_source import WeightSource
from utils.pair.batches import MicroBatch
from utils.passes.block_runner import Visitor


@dataclass(frozen=True)
class Agreement:
    """How far two routers agree on the tokens of one mixture.

    `same` is the share of tokens that both give the same set of experts, `common` the share of all choices that both make;
    None where the choices could not be seen. `chosen` is how many experts a token is given, 0 where that is not known.
    """

    layer: int
    mixture: str
    tokens: int
    chosen: int
    same: float | None
    common: float | None


def agreement(own: Tensor, other: Tensor, real: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Over tokens, how many are given the same set of experts, and how many choices are made by both; int64 scalars.

    Args:
        own, other: numbers of experts [tokens, chosen], each at most once in a row.
        real: bool [tokens], which of them count; None: all. Nothing waits for a GPU.
    """
    both = (own[:, :, None] == other[:, None, :]).any(dim=2)
    same = both.all(dim=1) if own.shape == other.shape else both.new_zeros(len(both))
    if real is not None:
        both, same = both & real[:, None], same & real
    return same.sum(), both.sum()


class RouterComparison:
    """Compares, block after block, the choices of a model's routers with those of another model's.

    Args:
        decoder: the model that computes.
        weights: the other model's; only its routers are read. Closed by `close`.
    """

    def __init__(self, decoder: Decoder, weights: WeightSource) -> None:
        self.path, self.weights = decoder.blocks_path, weights
        self.hidden = getattr(decoder.model.config.get_text_config(decoder=True), "hidden_size", None)
        self.batch: MicroBatch | None = None
        self.sums: dict[tuple[int, str], list[Any]] = {}  # tokens, chosen, and both of `agreement`

    def attached(self, layer: int, block: nn.Module) -> AbstractContextManager[None]:
        """Watch a block's mixtures, whose weights are in place, while the context lasts."""
        return self._watched(layer, block, find_mixtures(block, self.hidden))

    def begin(self, batch: MicroBatch) -> None:
        """Say which micro-batch comes next (on the block's device); where nothing is said, all tokens are real."""
        self.batch = batch

    def close(self) -> None:
        """Close the files."""
        self.weights.close()

    def state(self) -> list[tuple[Any, ...]]:
        """What has been summed up, as plain data and tensors."""
        return [(*place, *sums) for place, sums in self.sums.items()]

    def restore(self, state: Sequence[Sequence[Any]], device: torch.device) -> None:
        """Take that up again."""
        for layer, mixture, tokens, chosen, *sums in state:
            self.sums[layer, mixture] = [tokens, chosen, *(one.to(device) for one in sums)]

    def found(self) -> list[Agreement]:
        """What was found of every mixture, in the order of the blocks."""
        rows = []
        for (layer, mixture), (tokens, chosen, same, common) in sorted(self.sums.items(), key=lambda one: one[0][0]):
            shares = (float(same) / tokens, float(common) / (tokens * chosen)) if tokens and chosen else (None, None)
            rows.append(Agreement(layer, mixture, tokens, chosen, *shares))
        return rows

    @contextmanager
    def _watched(self, layer: int, block: nn.Module, mixtures: Sequence[Mixture]) -> Iterator[None]:
        with ExitStack() as stack:
            for mixture in mixtures:
                zero = torch.zeros((), dtype=torch.int64, device=next(block.parameters()).device)
                sums = self.sums.setdefault((layer, mixture.path), [0, 0, zero, zero.clone()])
                names = {name: f"{self.path}.{layer}.{name}" for name in mixture.router}
                if names and all(full in self.weights.layout for full in names.values()):
                    read = self.weights.fetch(list(names.values()))
                    routers = {name: read[full] for name, full in names.items()}
                    stack.enter_context(self._compared(block, mixture, routers, sums))
            yield

    @contextmanager
    def _compared(
        self, block: nn.Module, mixture: Mixture, routers: Mapping[str, Tensor], sums: list[Any]
    ) -> Iterator[None]:
        path = mixture.path or _holder(mixture.router)
        module = block.get_submodule(path)
        other, waiting = _with_router(module, path, mixture, routers), []

        def before(_: nn.Module, args: tuple, kwargs: dict) -> None:
            with torch.no_grad():
                waiting[:] = [_choice(other, args, kwargs)]

        def at_experts(_: nn.Module, args: tuple, kwargs: dict) -> None:
            own, theirs = _numbers([*args, *kwargs.values()]), waiting.pop() if waiting else None
            if own is not None and theirs is not None and len(own) == len(theirs):
                self._add(sums, own, theirs)

        handles = [module.register_forward_pre_hook(before, with_kwargs=True)]
        experts = block.get_submodule(mixture.experts[0])
        handles.append(experts.register_forward_pre_hook(at_experts, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _add(self, sums: list[Any], own: Tensor, other: Tensor) -> None:
        mask = None if self.batch is None else self.batch.mask
        tokens = len(own) if mask is None else self.batch.tokens
        same, common = agreement(own, other, None if mask is None else mask.reshape(-1).bool())
        sums[:] = [sums[0] + tokens, own.shape[1], sums[2] + same, sums[3] + common]


def _holder(names: Sequence[str]) -> str:
    """The module that a block's own router is, by its parameters' names."""
    return min((name.rpartition(".")[0] for name in names), key=len)


class _Chosen(Exception):
    """Ends a mixture's forward where it calls its experts."""

    def __init__(self, numbers: Tensor | None) -> None:
        super().__init__()
        self.numbers = numbers


def _with_router(module: nn.Module, path: str, mixture: Mixture, routers: Mapping[str, Tensor]) -> nn.Module:
    """A module that holds a mixture, or its router alone, with another router; all else is shared with it."""
    held = [*module.parameters(), *module.buffers()]
    other = copy.deepcopy(module, {id(value): value for value in held})
    for one in other.modules():  # what watches the module itself is not to see this
        one._forward_hooks.clear()
        one._forward_pre_hooks.clear()

    def stop(*args: Any, **kwargs: Any) -> None:
        raise _Chosen(_numbers([*args, *kwargs.values()]))

    start = f"{path}." if path else ""
    for experts in mixture.experts:
        if experts.startswith(start):
            other.get_submodule(experts.removeprefix(start)).forward = stop
    for name, value in routers.items():
        owner, _, slot = name.removeprefix(start).rpartition(".")
        parent = other.get_submodule(owner)
        if slot in parent._buffers:
            parent._buffers[slot] = value
        else:
            parent._parameters[slot] = nn.Parameter(value, requires_grad=False)
    return other


def _choice(module: nn.Module, args: tuple, kwargs: dict) -> Tensor | None:
    """The experts [tokens, chosen] that a mixture, or a router, chooses."""
    try:
        output = module(*args, **kwargs)
    except _Chosen as chosen:
        return chosen.numbers
    return _numbers(output if isinstance(output, (tuple, list)) else [output])


def _numbers(values: Sequence[Any]) -> Tensor | None:
    """Among what experts are called with, or a router returns: the numbers of each token's experts."""
    whole = (torch.int32, torch.int64)
    return next((one for one in values if isinstance(one, Tensor) and one.ndim == 2 and one.dtype in whole), None)


class VisitorWithRouters:
    """A visitor of blocks with a comparison of routers beside it (a `block_runner.KeptVisitor`, if the visitor is)."""

    def __init__(self, visitor: Visitor, routers: RouterComparison) -> None:
        self.visitor, self.routers = visitor, routers

    @property
    def rewrites(self) -> bool:
        """As the visitor."""
        return self.visitor.rewrites

    @contextmanager
    def observing(self, layer: int, block: nn.Module) -> Iterator[None]:
        """Both observe the block."""
        with self.routers.attached(layer, block), self.visitor.observing(layer, block):
            yield

    def begin(self, batch: MicroBatch) -> None:
        """Both take note."""
        self.routers.begin(batch)
        self.visitor.begin(batch)

    def finish(self, layer: int, block: nn.Module) -> None:
        """As the visitor."""
        self.visitor.finish(layer, block)

    def state(self) -> dict[str, Any]:
        """Both their states."""
        return {"visitor": self.visitor.state(), "routers": self.routers.state()}

    def restore(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Take both up again."""
        self.routers.restore(state["routers"], device)
        self.visitor.restore(state["visitor"], device)
