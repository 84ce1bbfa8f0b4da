"""Sums of several models' weights, where stacks of experts' matrices are on the meta device and come one at a time.

A stack that is fetched so says how (`matrix_of`); what is made of several is a stack like them, whose matrices are made as
they are asked for (`utils/passes/experts_in_parts.py`).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


class MixedStack(nn.Parameter):
    """A stack on the meta device of which an expert's matrix is made when it is asked for."""

    matrix_of: Callable[[int], Tensor]


def between(base: Tensor, other: Tensor, share: float) -> Tensor:
    """`base.lerp(other, share)`."""
    if not base.is_meta:
        return base.lerp(other, share)
    return _stack(base, lambda expert: base.matrix_of(expert).lerp(other.matrix_of(expert), share))


def with_changes(base: Tensor, others: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The base and so much of what each of the others changes of it."""
    if not base.is_meta:
        return _summed(base, others, weights)
    return _stack(
        base, lambda expert: _summed(base.matrix_of(expert), [other.matrix_of(expert) for other in others], weights)
    )


def differ(one: Tensor, other: Tensor) -> Tensor:
    """Whether any entry differs, a bool on the device."""
    if not one.is_meta:
        return (one != other).any()
    return torch.stack([(one.matrix_of(expert) != other.matrix_of(expert)).any() for expert in range(len(one))]).any()


def _summed(base: Tensor, others: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    total = base.detach().clone()
    for weight, other in zip(weights, others, strict=True):
        total += weight * (other - base)
    return total


def _stack(like: Tensor, matrix_of: Callable[[int], Tensor]) -> MixedStack:
    made = MixedStack(torch.empty(like.shape, dtype=like.dtype, device="meta"), requires_grad=False)
    made.matrix_of = matrix_of
    return made
