"""Squared gradients of a model's parameters, summed over samples: F_ij = sum over samples of (dL/dW_ij)^2.

Whole for the parameters asked for; of all others only what a vector per axis needs, so that F of a vocabulary is never in
memory.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from utils.passes.axis_sums import AxisSums
from utils.passes.gradient_factors import Use, axis_squares, factors_pay

Split = Callable[[str, Tensor], Mapping[str, Tensor]]
"""A tensor of a parameter's shape in the pieces that a checkpoint stores, by their names, or as it is, by the parameter's."""


def as_it_is(name: str, value: Tensor) -> Mapping[str, Tensor]:
    """The split of parameters that are stored as they are."""
    return {name: value}


SplitExpert = Callable[[str, int, Tensor], Mapping[str, Tensor]]
"""The same of one expert's matrix of a stack."""


def expert_as_it_is(name: str, expert: int, value: Tensor) -> Mapping[str, Tensor]:
    """The split of matrices that are stored as they are."""
    return {f"{name}.{expert}": value}


class SumsApart(Protocol):
    """Sums of squares of experts' gradients, one matrix at a time (`utils/passes/expert_squares.py`)."""

    def __contains__(self, name: object) -> bool:
        """Whether a stack's sums are here."""

    def add(self, name: str, expert: int, gradient: Tensor) -> None:
        """Add one sample's gradient of one expert's matrix."""


class SquaredGradients:
    """Sums up squared gradients in float32 (a `GradientObserver`); may observe several models with the same names.

    Args:
        whole: the parameters of which every entry is summed up; the sums are in `sums`, on the device, until taken.
        outlined: those of which sums over axes are enough (`utils/passes/axis_sums.py`), in `outlines` until taken.
        pieces: how the outlined ones are stored; each piece has sums of its own.
        expert_pieces: the same of experts that are fetched one at a time.
        apart: where the sums of those stacks among `whole` are that are not to be in memory whole.
    """

    def __init__(
        self,
        whole: frozenset[str],
        outlined: frozenset[str] = frozenset(),
        pieces: Split = as_it_is,
        expert_pieces: SplitExpert = expert_as_it_is,
        apart: SumsApart | None = None,
    ) -> None:
        self.whole, self.outlined, self.pieces, self.expert_pieces = whole, outlined, pieces, expert_pieces
        self.apart = apart
        self.sums: dict[str, Tensor] = {}
        self.outlines: dict[str, AxisSums] = {}
        self._by_axes: dict[str, list[str]] = {}

    def wants(self, name: str) -> bool:
        """The weights asked for."""
        return name in self.whole or name in self.outlined

    def gradient(self, name: str, parameter: Tensor, gradient: Tensor, sample: int) -> None:
        """Add one sample's gradient of one parameter."""
        if name not in self.whole:
            self._outline(self.pieces(name, gradient))
            return
        if self.apart is not None and name in self.apart:
            for expert, own in enumerate(gradient):
                self.apart.add(name, expert, own)
            return
        exact = gradient.float()
        if name in self.sums:
            self.sums[name].addcmul_(exact, exact)
        else:
            self.sums[name] = exact * exact

    def by_axes(self, name: str, parameter: Tensor) -> bool:
        """Whether of a parameter only sums over its own two axes are wanted: it is stored as it is."""
        if name not in self._by_axes:
            asked = name in self.outlined and name not in self.whole and parameter.dim() == 2
            found = self.pieces(name, parameter).items() if asked else ()
            self._by_axes[name] = [piece for piece, part in found if _are_the_same(part, parameter)]
        return bool(self._by_axes[name])

    def wants_uses(self, name: str, parameter: Tensor, tokens: int, *, with_gram: bool = False) -> bool:
        """Whether one sample's gradient is wanted by factors, which have so many vectors; arguments as of `factors_pay`."""
        return self.by_axes(name, parameter) and factors_pay(tokens, *parameter.shape, with_gram=with_gram)

    def add_uses(self, name: str, parameter: Tensor, uses: Sequence[Use]) -> None:
        """Add one sample's gradient of such a parameter by its factors."""
        (piece,) = self._by_axes[name]
        if piece not in self.outlines:
            self.outlines[piece] = AxisSums(parameter.shape, parameter.device)
        self.outlines[piece].add_sums(*axis_squares(uses, len(parameter)))

    def expert_gradient(self, name: str, expert: int, matrix: Tensor, gradient: Tensor, sample: int) -> None:
        """Add one sample's gradient of one expert's matrix of a stack that is outlined, or apart."""
        if self.apart is not None and name in self.apart:
            self.apart.add(name, expert, gradient)
        else:
            self._outline(self.expert_pieces(name, expert, gradient))

    def _outline(self, pieces: Mapping[str, Tensor]) -> None:
        for piece, part in pieces.items():
            if piece not in self.outlines:
                self.outlines[piece] = AxisSums(part.shape, part.device)
            self.outlines[piece].add_squares(part)

    def finish(self, layer: int | None, parameters: Mapping[str, Tensor]) -> None:
        """Sums stay until they are taken."""

    def take(self, name: str, like: Tensor) -> Tensor:
        """The sums of a parameter, which are let go of; zeros if no sample's loss depends on it."""
        found = self.sums.pop(name, None)
        return torch.zeros_like(like, dtype=torch.float32) if found is None else found

    def outlines_of(self, name: str, like: Tensor, pieces: Sequence[str]) -> list[AxisSums]:
        """The sums of some pieces of an outlined parameter, to be changed in place; zeros for those without a gradient."""
        shapes = {piece: part.shape for piece, part in self.pieces(name, like).items()}
        device = like.device
        if like.is_meta:  # a stack whose experts were fetched one at a time
            there = [self.outlines[piece].rows.device for piece in pieces if piece in self.outlines]
            device = there[0] if there else torch.device("cpu")
        for piece in pieces:
            self.outlines.setdefault(piece, AxisSums(shapes[piece], device))
        return [self.outlines[piece] for piece in pieces]

    def take_factors(self, name: str, like: Tensor) -> dict[str, tuple[Tensor, ...]]:
        """The vectors of an outlined parameter's pieces, as `AxisSums.factors`; zeros if no sample's loss depends on it."""
        found = {}
        for piece, part in self.pieces(name, like).items():
            sums = self.outlines.pop(piece, None)
            found[piece] = (AxisSums(part.shape, torch.device("cpu")) if sums is None else sums).factors()
        return found


def _are_the_same(part: Tensor, whole: Tensor) -> bool:
    """Whether a piece of a tensor is all of it, its axes in their order."""
    return (part.shape, part.stride(), part.data_ptr()) == (whole.shape, whole.stride(), whole.data_ptr())
