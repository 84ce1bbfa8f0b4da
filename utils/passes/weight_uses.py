"""Takes what the gradients of weights are made of, one sample at a time, in place of the gradients themselves.

A module that computes what `nn.Linear`, `nn.Embedding` or transformers' `Conv1D` does knows its weight's gradient by two
factors: what it is given, and the gradient of what it returns. Where all that a sample's loss owes to a weight goes through
such modules, which its graph shows, the factors are handed over and no gradient of the weight is computed. Wherever
something else reads the weight, the gradient is computed as ever.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from transformers.pytorch_utils import Conv1D

from utils.passes.gradient_factors import Factor, Use
from utils.passes.sample_pass import OnGraph

TakeUses = Callable[[str, nn.Parameter, Sequence[Use]], None]
"""Takes a weight by its name, and all uses of it in one sample."""

Pays = Callable[[str, nn.Parameter, int], bool]
"""Whether factors of so many vectors together are wanted in the place of a weight's gradient, by its name."""


@dataclass
class _Weight:
    """A weight in one sample's pass: how many uses there will be, none if its gradient is computed, and those that came."""

    name: str
    expected: int = 0
    found: list[Use] = field(default_factory=list)


@dataclass
class _Given:
    """What modules are given; several may be given the same (q, k and v)."""

    factor: Factor | None = None

    def of(self, values: Tensor) -> Factor:
        """The factor that they are, one for all modules."""
        if self.factor is None:
            self.factor = Factor(
                values.reshape(-1, values.shape[-1]) if values.is_floating_point() else values.reshape(-1)
            )
        return self.factor


class WeightUses:
    """Hands over factors of weights (an `ObservingSample`).

    Args:
        pays: which are wanted, and when.
        take: what to do with them; called while a sample goes back.
    """

    def __init__(self, pays: Pays, take: TakeUses) -> None:
        self._pays, self._take = pays, take
        self._last: tuple[Tensor, _Given] | None = None

    @contextlib.contextmanager
    def observed(self, module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Iterator[OnGraph]:
        """Watch a block, or a model, with some of its parameters by name, for one sample's way forward and back."""
        weights = {id(one): _Weight(name) for name, one in parameters.items() if one.requires_grad and one.dim() == 2}
        watched = [one for one in module.modules() if _is_plain(one) and id(one.weight) in weights]
        for one in watched:
            one.forward = partial(self._call, one, weights[id(one.weight)])
        try:
            yield lambda roots: self._settle(roots, weights)
        finally:
            self._last = None
            for one in watched:
                del one.forward

    def _call(self, module: nn.Module, weight: _Weight, *args: Any, **kwargs: Any) -> Tensor:
        if len(args) != 1 or kwargs or not torch.is_grad_enabled():
            return type(module).forward(module, *args, **kwargs)
        (given,) = args
        if self._last is None or self._last[0] is not given:
            self._last = (given, _Given())
        tokens = given.numel() if isinstance(module, nn.Embedding) else given.numel() // given.shape[-1]
        call = _Call(module, weight, self._last[1], tokens, self._take)
        return _Watched.apply(given, module.weight, getattr(module, "bias", None), call)

    def _settle(self, roots: Sequence[Tensor], weights: Mapping[int, _Weight]) -> None:
        """Have those weights handed over by factors whose gradients come from watched modules alone."""
        self._last = None
        for parameter, sources in _sources(roots, weights):
            calls = [getattr(one, "call", None) for one in sources]
            weight = weights[id(parameter)]
            if all(isinstance(one, _Call) for one in calls):
                tokens = sum(one.tokens for one in calls)
                weight.expected = len(calls) if self._pays(weight.name, parameter, tokens) else 0


def _sources(roots: Sequence[Tensor], weights: Mapping[int, _Weight]) -> list[tuple[nn.Parameter, list[Any]]]:
    """Each weight that tensors depend on, and the functions in their graph that it is an argument of."""
    found: dict[int, tuple[nn.Parameter, list[Any]]] = {}
    left = [root.grad_fn for root in roots if root.grad_fn is not None]
    seen = set(left)
    while left:
        node = left.pop()
        for below, _ in node.next_functions:
            if below is None:
                continue
            parameter = getattr(below, "variable", None)
            if parameter is not None and id(parameter) in weights:
                found.setdefault(id(parameter), (parameter, []))[1].append(node)
            elif below not in seen:
                seen.add(below)
                left.append(below)
    return list(found.values())


def _is_plain(module: nn.Module) -> bool:
    """Whether a module is of a kind that is watched, and does nothing more than its kind."""
    if "forward" in vars(module) or not isinstance(module._parameters.get("weight"), nn.Parameter):
        return False
    if isinstance(module, nn.Embedding):
        alters = module.max_norm is not None or module.scale_grad_by_freq or module.sparse
        return type(module).forward is nn.Embedding.forward and not alters
    kind = next((one for one in (nn.Linear, Conv1D) if isinstance(module, one)), None)
    return kind is not None and type(module).forward is kind.forward


@dataclass(frozen=True)
class _Call:
    """One call of a watched module."""

    module: nn.Module
    weight: _Weight
    given: _Given
    tokens: int
    take: TakeUses

    @property
    def turned(self) -> bool:
        """Whether the weight is [in, out]."""
        return isinstance(self.module, Conv1D)

    def forward(self, given: Tensor) -> Tensor:
        """What the module's kind computes."""
        return type(self.module).forward(self.module, given)

    def came(self, given: Tensor, rows: Tensor) -> None:
        """Note a use, with the gradient [T, n] of what was returned, and hand all of them over if it is the last."""
        if (pad := getattr(self.module, "padding_idx", None)) is not None:
            rows = rows.masked_fill(given.reshape(-1, 1) == pad, 0)  # that token's row has no gradient
        own, other = self.given.of(given), Factor(rows)
        self.weight.found.append(Use(own, other) if self.turned or own.is_units else Use(other, own))
        if len(self.weight.found) == self.weight.expected:
            with torch.no_grad():
                self.take(self.weight.name, self.module.weight, self.weight.found)
            self.weight.found = []

    def gradient(self, given: Tensor, rows: Tensor) -> Tensor:
        """The part of the weight's gradient that this call has."""
        if isinstance(self.module, nn.Embedding):
            count, pad = self.module.weight.shape[0], self.module.padding_idx
            return torch.ops.aten.embedding_dense_backward(rows, given, count, -1 if pad is None else pad, False)
        inputs = given.reshape(-1, given.shape[-1])
        return inputs.t() @ rows if self.turned else rows.t() @ inputs


class _Watched(torch.autograd.Function):
    """What a watched module returns, with its weight's gradient only where that is asked for."""

    @staticmethod
    def forward(ctx: FunctionCtx, given: Tensor, weight: Tensor, bias: Tensor | None, call: _Call) -> Tensor:
        ctx.save_for_backward(given, weight)
        ctx.call = call
        return call.forward(given)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        given, weight = ctx.saved_tensors
        call, ctx.call = ctx.call, None
        rows = gradient.reshape(-1, gradient.shape[-1])
        for_given = for_bias = for_weight = None
        if ctx.needs_input_grad[0]:
            for_given = (rows @ (weight.t() if call.turned else weight)).view(given.shape)
        if ctx.needs_input_grad[2]:
            for_bias = rows.sum(0)
        if call.weight.expected:
            call.came(given, rows)
        else:
            for_weight = call.gradient(given, rows)
        return for_given, for_weight, for_bias, None
