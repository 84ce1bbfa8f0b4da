"""The arithmetic of merging, one piece of a tensor at a time, in place and with the roundings of mergekit's methods.

mergekit 0.1.5 computes whole tensors in the working dtype: every step below rounds to it. In the notation of TIES
(arXiv 2306.01708), for a base b, changed models x_i, weights w_i and a mask m_i:

    d_i    = w_i (m_i (x_i - b))
    voted  : d_i that differ in sign from the sum of all, or are zero, are left out
    mixed  = sum of d_i, added up in float32 and rounded once
    merged = b + lambda mixed / (sum of the w_i that were not left out; 1 if that is 0)       (the divisor if `normalize`)

Every entry is computed on its own, so pieces give the same bits as whole tensors do. The one exception is the order in
which torch adds up five or more tensors, which depends on an entry's place: `MOST_CHANGES` is four.

Signs are compared and entries left out on the bits of the numbers, which is several times faster than by masks.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from utils.errors import UserError
from utils.magnitudes import pattern_of
from utils.merging.pieces.cuts import Cut, magnitude

MOST_CHANGES = 4
_NO_DIVISOR = 1e-8  # without a vote, weights that add up to less than this are not divided by


@dataclass(frozen=True)
class Average:
    """A weighted sum of all inputs in float32; divided by the sum of the weights if `normalize`."""

    weights: tuple[float, ...]
    normalize: bool

    @cached_property
    def rounded_weights(self) -> Tensor:
        """The weights in float32."""
        return torch.tensor(self.weights, dtype=torch.float32)


@dataclass(frozen=True)
class Combination:
    """How the changes to one tensor become one. Numbers are the recipe's, `dtype` is the working dtype."""

    weights: tuple[float, ...]
    vote: bool
    normalize: bool
    scale: float  # lambda
    dtype: torch.dtype

    @property
    def overwrites(self) -> bool:
        """Whether `mix` overwrites the changes it is given."""
        return self.vote or any(weight != 1 for weight in self.rounded_weights)

    @cached_property
    def rounded_weights(self) -> list[float]:
        """The weights, rounded to the working dtype."""
        return torch.tensor(self.weights, dtype=self.dtype).tolist()

    @cached_property
    def divisors(self) -> Tensor:
        """Of every set of changes that may agree, the sum of their weights; bit i of an index stands for change i.

        Without a vote all weights are added up: one entry.
        """
        count, weights = len(self.weights), torch.tensor(self.weights, dtype=self.dtype)
        if not self.vote:
            total = weights.sum(dim=0, keepdim=True)
            return total.masked_fill(total.abs() < _NO_DIVISOR, 1)
        sets = torch.arange(1 << count)
        members = torch.stack([(sets >> place) & 1 for place in range(count)]).to(self.dtype)
        total = (weights.unsqueeze(1) * members).sum(dim=0)
        return total.masked_fill(total == 0, 1)


class Scratch:
    """Buffers of one thread, made when first asked for and used again and again, so that they stay in its cache."""

    def __init__(self) -> None:
        self._held: dict[tuple[Hashable, torch.dtype], Tensor] = {}

    def take(self, use: Hashable, entries: int, dtype: torch.dtype) -> Tensor:
        """The first `entries` entries of the buffer for a use, with whatever they hold."""
        found = self._held.get((use, dtype))
        if found is None or found.numel() < entries:
            found = self._held[use, dtype] = torch.empty(entries, dtype=dtype)
        return found[:entries]


def keep_band(change: Tensor, outer: int, inner: int | None, out: Tensor, scratch: Scratch) -> None:
    """Write a change to `out`, which may be itself: zero where the magnitude pattern is not above `outer`, or above `inner`.

    All entries must be finite. A pattern of -1 is below all.
    """
    if outer >= 0:
        torch.hardshrink(change, magnitude(outer, change.dtype), out=out)
    elif out is not change:
        out.copy_(change)
    if inner is not None and inner >= 0:
        large = scratch.take("other", out.numel(), out.dtype)
        out.sub_(torch.hardshrink(out, magnitude(inner, out.dtype), out=large))
    elif inner is not None:
        out.zero_()


def mix(changes: Sequence[Tensor], rule: Combination, scratch: Scratch) -> Tensor:
    """Make one change of the masked changes to a piece, before it is scaled.

    Args:
        changes: per model [entries], working dtype; overwritten where `rule.overwrites`.
        rule: what to do; its `scale` does not matter.
        scratch: buffers; the result is one of them.

    Returns:
        [entries] in the working dtype, valid until the scratch is used again.
    """
    entries, dtype = changes[0].numel(), changes[0].dtype
    for change, weight in zip(changes, rule.rounded_weights, strict=True):
        if weight != 1:
            change.mul_(weight)
    mixed = scratch.take("mixed", entries, dtype)
    if rule.vote and len(changes) > 1:
        _drop_outvoted(changes, _add_up(changes, mixed, scratch), scratch)
    _add_up(changes, mixed, scratch).add_(0.0)  # a sum of negative zeros is zero, as torch.sum has it
    if rule.normalize and rule.vote:
        index = scratch.take("index", entries, torch.int64).copy_(_members(changes, scratch))
        divisor = scratch.take("other", entries, dtype)
        mixed.div_(torch.index_select(rule.divisors, 0, index, out=divisor))
    elif rule.normalize:
        mixed.div_(rule.divisors)
    return mixed


def add_scaled(base: Tensor, mixed: Tensor, scale: float, scratch: Scratch) -> Tensor:
    """The base and a scaled change [entries], in the working dtype; `mixed` stays. Valid until the scratch is used again."""
    merged = scratch.take("merged", base.numel(), base.dtype)
    if scale != 1:
        mixed = torch.mul(mixed, scale, out=merged)
    return torch.add(base, mixed, out=merged)


def average(tensors: Sequence[Tensor], rule: Average, scratch: Scratch) -> Tensor:
    """A weighted sum of a piece of several models, added up and divided in float32.

    Args:
        tensors: per model [entries], working dtype.
        rule: the weights.
        scratch: buffers; the result is one of them.

    Returns:
        [entries] in the working dtype, valid until the scratch is used again.
    """
    entries, dtype = tensors[0].numel(), tensors[0].dtype
    total = scratch.take("sum", entries, torch.float32).zero_()
    for tensor, weight in zip(tensors, rule.rounded_weights.split(1), strict=True):
        if tensor.dtype != torch.float32:  # else torch widens it into memory of its own, piece after piece
            tensor = scratch.take("term", entries, torch.float32).copy_(tensor)
        total.addcmul_(tensor, weight)
    if rule.normalize:
        total.div_(rule.rounded_weights.sum(dim=0, keepdim=True))
    return total if dtype == torch.float32 else scratch.take("mixed", entries, dtype).copy_(total)


def is_finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN or infinite. Exact in every dtype; needs no memory of the tensor's size."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    low, high = torch.aminmax(tensor)  # both are NaN as soon as one entry is
    return bool(torch.isfinite(low) and torch.isfinite(high))


def is_finite_piece(values: Tensor, scratch: Scratch) -> bool:
    """Whether no entry of a contiguous piece is NaN or infinite."""
    kind = pattern_of(values.dtype)
    bits = scratch.take("bits", values.numel(), kind.integer)
    torch.bitwise_and(values.view(kind.integer), (1 << kind.bits) - 1, out=bits)
    return int(bits.amax()) < kind.infinity


def not_finite(name: str) -> UserError:
    """The error that refuses a merged tensor with a NaN or an infinity: none is ever published."""
    return UserError(
        f"the merged tensor {name} holds NaN or infinity, which no merge may. Check that tensor in the inputs; "
        "with float16, compute in float32 (dtype: float32, out_dtype: float16)",
        "merge-not-finite",
    )


def cut_places(cuts: Sequence[Cut], start: int, stop: int) -> list[int]:
    """The indices strictly between start and stop at which a cut changes sides."""
    return sorted({cut.place for cut in cuts if start < cut.place < stop})


def _add_up(changes: Sequence[Tensor], out: Tensor, scratch: Scratch) -> Tensor:
    """The sum of the changes, rounded once; negative zeros may remain."""
    if len(changes) == 1:
        return out.copy_(changes[0])
    if len(changes) == 2:
        return torch.add(changes[0], changes[1], out=out)
    total, term = (scratch.take(use, out.numel(), torch.float32) for use in ("sum", "term"))
    total.copy_(changes[0])
    for change in changes[1:]:
        total.add_(term.copy_(change))
    return out.copy_(total)


def _drop_outvoted(changes: Sequence[Tensor], total: Tensor, scratch: Scratch) -> None:
    """Zero, in place, the entries whose sign is not that of the total (a total of zero counts as positive)."""
    kind = pattern_of(total.dtype)
    sign, bits = total.view(kind.integer), scratch.take("bits", total.numel(), kind.integer)
    for change in changes:
        own = change.view(kind.integer)
        # all ones where the signs differ, so that what differs can be taken out of the number's own bits
        differs = torch.bitwise_xor(own, sign, out=bits).bitwise_right_shift_(kind.bits)
        own.bitwise_xor_(differs.bitwise_and_(own))


def _members(changes: Sequence[Tensor], scratch: Scratch) -> Tensor:
    """Which changes are not zero, as the sum of 2^i over them."""
    kind = pattern_of(changes[0].dtype)
    members, bits = (scratch.take(use, changes[0].numel(), kind.integer) for use in ("members", "bits"))
    for place, change in enumerate(changes):
        found = members if place == 0 else bits
        torch.bitwise_and(change.view(kind.integer), (1 << kind.bits) - 1, out=found).clamp_(max=1)
        if place:
            members.add_(found, alpha=1 << place)
    return members
