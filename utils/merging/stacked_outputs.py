"""What a merge writes: planned tensors, and stacks of experts in one piece again where their slices were merged each alone.

The result keeps the names and the layout of the model whose config it has (`utils/models/stacks.py`).
"""

import threading
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from utils.mergekit_api import dtype_from_name
from utils.merging.pieces.tensor import Output
from utils.merging.plan import MergePlan, OutputTensor


@dataclass(frozen=True)
class WrittenTensor:
    """A tensor of the result's files; `merged` are the planned tensors that it is made of, one behind the other."""

    name: str
    shape: tuple[int, ...] | None
    dtype: str | None
    optional: bool
    nbytes: int
    merged: tuple[OutputTensor, ...]


@dataclass(frozen=True)
class Place:
    """Where a slice goes: the stack, and its first entry there."""

    stack: str
    first: int


def written_tensors(plan: MergePlan) -> list[WrittenTensor]:
    """The tensors of the result, in the order in which the plan has the first of what each is made of."""
    places, stacks = StackPlaces(plan), plan.inputs.donor.checkpoint.stacks
    members: dict[str, list[OutputTensor]] = {}
    for tensor in plan.tensors:
        members.setdefault(places.name_of(tensor.name), []).append(tensor)
    found = []
    for name, own in members.items():
        first, alone = own[0], places.of(own[0].name) is None
        found.append(
            WrittenTensor(
                name,
                first.shape if alone else stacks[name].header.shape,
                first.dtype,
                any(one.weight.optional for one in own),
                first.nbytes if alone else sum(one.nbytes for one in own),
                tuple(own) if alone else tuple(sorted(own, key=lambda one: places.of(one.name).first)),
            )
        )
    return found


class StackPlaces:
    """Where the slices of a plan's stacks go, by their names."""

    def __init__(self, plan: MergePlan) -> None:
        self._places = {
            header.name: Place(name, stack.first_entry(number))
            for name, stack in plan.inputs.donor.checkpoint.stacks.items()
            for number, header in enumerate(stack.slices)
        }

    def of(self, name: str) -> Place | None:
        """Where a planned tensor goes; None if it is no slice."""
        return self._places.get(name)

    def name_of(self, name: str) -> str:
        """The name in the result's files of a planned tensor, or of the stack that it belongs to."""
        return self._places[name].stack if name in self._places else name


class StackedOutput:
    """Takes pieces of merged tensors (an `Output`), and hands those of slices on as pieces of their stacks."""

    def __init__(self, output: Output, plan: MergePlan) -> None:
        self._output = output
        self.places = StackPlaces(plan)
        slices = [one for one in plan.tensors if self.places.of(one.name)]
        self._widths = {one.name: dtype_from_name(one.dtype).itemsize for one in slices}

    def write(self, name: str, start: int, content: memoryview) -> None:
        """Take bytes of a tensor from byte `start` of it on."""
        place = self.places.of(name)
        if place is None:
            self._output.write(name, start, content)
        else:
            self._output.write(place.stack, place.first * self._widths[name] + start, content)


class Stacking:
    """Collects the slices of stacks in memory, and gives each stack once it is whole. Several threads may add."""

    def __init__(self, plan: MergePlan) -> None:
        self.places = StackPlaces(plan)
        self._shapes = {name: stack.header.shape for name, stack in plan.inputs.donor.checkpoint.stacks.items()}
        self._begun: dict[str, tuple[Tensor, list[int]]] = {}
        self._lock = threading.Lock()

    def add(self, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Take a merged tensor; yield it, or the stack that it makes whole."""
        place = self.places.of(name)
        if place is None:
            yield name, tensor
            return
        with self._lock:
            if place.stack not in self._begun:
                empty = torch.empty(self._shapes[place.stack], dtype=tensor.dtype, device=tensor.device)
                self._begun[place.stack] = empty, [empty.numel()]
            whole, left = self._begun[place.stack]
            whole.view(-1)[place.first : place.first + tensor.numel()] = tensor.reshape(-1).to(whole.device)
            left[0] -= tensor.numel()
            if left[0]:
                return
            del self._begun[place.stack]
        yield place.stack, whole
