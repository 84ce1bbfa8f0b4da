"""Experts of a mixture that a checkpoint stores as one tensor, named and placed each on its own. No weights are read here.

A stack [experts, ...] `a.experts.down_proj` holds the tensors `a.experts.down_proj.0.weight`, `.1.weight` ...; where a
matrix is made of several (gate and up), also `a.experts.gate_up_proj.0.gate_proj.weight`. A filter that hits the stack's
name hits all of them, so that a recipe for stacks means the same.
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property

from utils.models.headers import TensorHeader

_BIAS = "_bias"


@dataclass(frozen=True)
class Stack:
    """A stored tensor whose first axis is experts, and into which parts the next axis is divided evenly, "" for none."""

    header: TensorHeader
    parts: tuple[str, ...] = ("",)

    @cached_property
    def slices(self) -> tuple[TensorHeader, ...]:
        """Each expert's own tensors, one expert after the other, an expert's in the order of their names."""
        experts, first, *others = (*self.header.shape, 1)[: max(2, len(self.header.shape))]
        shape = (first // len(self.parts), *others)
        nbytes = self.header.nbytes // (experts * len(self.parts))
        found = []
        for expert in range(experts):
            for part in sorted(self.parts):
                start = self.header.start + (expert * len(self.parts) + self.parts.index(part)) * nbytes
                name = self.slice_name(self.header.name, str(expert), part)
                found.append(replace(self.header, name=name, shape=shape, start=start, nbytes=nbytes))
        return tuple(found)

    def slice_name(self, stack: str, expert: str, part: str) -> str:
        """What an expert's part of a stack of this name is called."""
        is_bias = stack.endswith(_BIAS) and len(self.header.shape) == 2
        names = (stack.removesuffix(_BIAS) if is_bias else stack, expert, part, "bias" if is_bias else "weight")
        return ".".join(name for name in names if name)

    def patterns(self, stack: str) -> dict[str, str]:
        """The slices' names with `*` for the expert, by part, as a model's conversion has them."""
        return {part: self.slice_name(stack, "*", part) for part in self.parts}

    def first_entry(self, number: int) -> int:
        """Where the slice of a number (its place in `slices`) begins in the flattened stack."""
        entry = self.header.nbytes // math.prod(self.header.shape)
        return (self.slices[number].start - self.header.start) // entry
