"""How many tokens each expert of a mixture is given, and where what was measured on few of them is taken.

An expert's few tokens say little about it: a sum over them has the pattern of those tokens. With n of them, below a number
`fewest`, it is taken towards the mean of all experts of its layer:

    n / fewest of its own, and the rest of the mean

so that one that no token came to has the mean, and nothing jumps where n passes `fewest`.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from utils.models.decoder import Component, Decoder
from utils.passes.squared_gradients import SquaredGradients


def own_shares(tokens: Tensor, fewest: int) -> Tensor:
    """What each expert keeps of its own, [experts], by how many tokens it had, [experts]; `fewest` is above 0."""
    return (tokens / fewest).clamp(max=1)


def take_towards_mean(values: Tensor, tokens: Tensor, fewest: int) -> Tensor:
    """Take what was summed up of experts with few tokens towards the mean of all, in place.

    Args:
        values: [experts, ...], any floating-point dtype.
        tokens: [experts], how many each had.
        fewest: the number below which one is taken there; 0 leaves all as they are.

    Returns:
        The values.
    """
    if fewest:
        own = own_shares(tokens, fewest)
        mean = mean_in_order(values)
        for value, share in zip(values, own.to(values.dtype), strict=True):
            value.mul_(share).add_(mean * (1 - share))
    return values


def mean_in_order(values: Iterable[Tensor]) -> Tensor:
    """The mean of tensors of one shape and dtype, in that dtype: added up in float64 one after the other, whoever asks."""
    total, count = None, 0
    for value in values:
        total = value.to(torch.float64, copy=True) if total is None else total.add_(value)
        count, dtype = count + 1, value.dtype
    return total.div_(count).to(dtype)


def count_tokens(arguments: Sequence[Any], experts: int) -> Tensor | None:
    """How many rows each expert has of those that a module of experts is called with; int64 [experts], None if that is not seen.

    Args:
        arguments: of the call. They tell it in one of three ways: numbers of experts [tokens, chosen]; how many of the rows,
            which lie in the order of the experts, are of each; every token for every expert, zero where it is not its own.
        experts: how many there are; higher numbers stand for what has no matrices.
    """
    tensors = [value for value in arguments if isinstance(value, Tensor)]
    whole = [value for value in tensors if not value.is_floating_point() and value.dtype != torch.bool]
    numbers = next((value for value in whole if value.ndim == 2), None)
    if numbers is not None:
        places = numbers.reshape(-1).clamp(max=experts)
        return places.new_zeros(experts + 1).index_add_(0, places, torch.ones_like(places))[:experts]
    rows = next((value for value in tensors if value.is_floating_point()), None)
    if rows is None:
        return None
    flat = rows.reshape(-1, rows.shape[-1])
    sizes = next((value for value in whole if value.shape == (experts,)), None)
    if sizes is None:
        listed = next(
            (value for value in arguments if isinstance(value, (list, tuple)) and len(value) == experts), None
        )
        if listed is not None and all(isinstance(one, int) for one in listed) and sum(listed) == len(flat):
            sizes = torch.tensor(listed, device=rows.device)
    if sizes is not None:
        return sizes.long()
    if len(flat) % experts or (rows.ndim == 3 and rows.shape[0] != experts):
        return None
    return (flat.reshape(experts, -1, flat.shape[1]) != 0).any(dim=2).sum(dim=1)


class RoutedTokens:
    """Counts the tokens of each expert of one block after the other; several models that are watched are added up.

    Inputs must hold no pads.

    Args:
        components: of the blocks; those that are stacks of experts' matrices are watched.
    """

    def __init__(self, components: Sequence[Component]) -> None:
        self._parameters: dict[str, list[str]] = {}
        for one in components:
            if one.is_stacked:
                self._parameters.setdefault(one.path, []).append(one.parameter)
        self._counts: dict[str, Tensor | None] = {}

    @contextmanager
    def attached(self, layer: int, block: nn.Module) -> Iterator[None]:
        """Watch a block (an `Observing`); what was counted stays until it is forgotten."""
        modules, handles = dict(block.named_modules()), []
        for path in self._parameters:
            if path in modules:
                handles.append(modules[path].register_forward_pre_hook(self._hook(path), with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def __contains__(self, path: object) -> bool:
        return path in self._parameters

    def of(self, path: str) -> Tensor | None:
        """The tokens [experts], int64, of a module's experts since the last time they were forgotten; None if not seen.

        Of a module whose stacks differ in length (LongCat has matrices that nothing uses for experts that hand on what they
        are given) those experts count that are in all of them.
        """
        return self._counts.get(path)

    def forget(self) -> None:
        """Begin at zero, for another block."""
        self._counts = {}

    def _hook(self, path: str):
        def take(module: nn.Module, args: tuple, kwargs: dict) -> None:
            experts = min(len(getattr(module, parameter)) for parameter in self._parameters[path])
            found = count_tokens([*args, *kwargs.values()], experts)
            before = self._counts.get(path, 0)
            self._counts[path] = None if found is None or before is None else before + found

        return take


ByExpert = Callable[[str], Sequence[Sequence[str]]]
"""Of a parameter that is a stack, its pieces by name: those of one kind together, in the order of the experts."""


class FewTokens:
    """Takes squared gradients of experts with few tokens towards the mean of their layer, block after block.

    `found` are by layer and module how many tokens its experts had, on average of the models that are watched; None where
    that is not seen.

    Args:
        decoder: any of the models.
        models: how many are watched by `counts`.
        fewest: the number of tokens below which one is taken there; 0: none is.
        by_expert: how stacks are stored.
    """

    def __init__(self, decoder: Decoder, models: int, fewest: int, by_expert: ByExpert = lambda name: ()) -> None:
        self.counts, self.models, self.fewest, self.by_expert = (
            RoutedTokens(decoder.components),
            models,
            fewest,
            by_expert,
        )
        self._path = decoder.blocks_path
        self.found: dict[tuple[int, str], list[float | None]] = {}

    def state(self) -> list[tuple]:
        """What was found, as plain data."""
        return [(*place, own) for place, own in self.found.items()]

    def restore(self, state: Sequence[Sequence[Any]] | None) -> None:
        """Take that up again."""
        self.found |= {(layer, path): own for layer, path, own in state or ()}

    def own_shares(self, layer: int, path: str, experts: int) -> Tensor | None:
        """What each of a stack's experts keeps of its own; None: all of it."""
        tokens = self._tokens(layer, path, experts)
        return None if tokens is None or not self.fewest else own_shares(tokens, self.fewest)

    def take(self, layer: int, path: str, squares: Tensor) -> None:
        """The sums [experts, ...] of a stack, in place."""
        tokens = self._tokens(layer, path, len(squares))
        if tokens is not None:
            take_towards_mean(squares, tokens, self.fewest)

    def take_outlines(self, layer: int, name: str, like: Tensor, squares: SquaredGradients) -> None:
        """The sums over axes that stand for a parameter, if that is a stack in pieces; `like` has its shape."""
        path = name.removeprefix(f"{self._path}.{layer}.").rpartition(".")[0]
        groups = [own for own in self.by_expert(name) if len(own) == len(like)] if path in self.counts else []
        tokens = self._tokens(layer, path, len(like)) if groups else None
        for names in groups if tokens is not None else ():
            sums = squares.outlines_of(name, like, names)
            for axis in ("rows", "columns"):
                taken = take_towards_mean(torch.stack([getattr(one, axis) for one in sums]), tokens, self.fewest)
                for one, value in zip(sums, taken, strict=True):
                    setattr(one, axis, value)

    def _tokens(self, layer: int, path: str, experts: int) -> Tensor | None:
        """The tokens [experts] of a stack's experts, none where one has a matrix in this stack alone; None if not seen."""
        counts = self.counts.of(path)
        if counts is None:
            self.found[layer, path] = [None] * experts
            return None
        tokens = counts.double() / self.models
        self.found[layer, path] = tokens.tolist()
        return torch.cat([tokens, tokens.new_zeros(experts - len(tokens))])
