"""Squared gradients of the experts of a block that is not in memory whole: one matrix at a time.

What was summed up of the others waits in a file, or in the host's memory where a GPU computes.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from utils.passes.routed_tokens import mean_in_order
from utils.passes.tensor_store import Stored, TensorStore


class ExpertSquares(AbstractContextManager):
    """Sums of squares of the gradients of experts' matrices, float32, of one block after the other.

    Args:
        names: the stacks, by their names in the model.
        store: where they wait; it is closed at the end.
    """

    def __init__(self, names: frozenset[str], store: TensorStore) -> None:
        self.names, self._store = names, store
        self._places: dict[tuple[str, int], Stored] = {}
        self._free: dict[tuple[int, ...], list[Stored]] = {}

    def __exit__(self, *exception: object) -> None:
        self._store.close()

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def add(self, name: str, expert: int, gradient: Tensor) -> None:
        """Add one sample's gradient [a, b] of one expert's matrix.

        Raises:
            OSError: the disk is full, and so on.
        """
        exact = gradient.float()
        if (place := self._places.get((name, expert))) is not None:
            self._store.put_again(place, self._store.take(place).addcmul_(exact, exact))
            return
        squares = exact * exact
        if free := self._free.get(tuple(squares.shape)):
            place = free.pop()
            self._store.put_again(place, squares)
        else:
            place = self._store.put(squares.contiguous())
        self._places[name, expert] = place

    def each(self, name: str, like: Tensor, own: Tensor | None = None) -> Iterator[Tensor]:
        """The sums of one expert after the other, to be changed at will; zeros where no sample's loss depends on it.

        Args:
            name: the stack.
            like: of its shape [experts, a, b], on any device, for those that have no gradient.
            own: [experts], what each keeps of its own; the rest is of the mean of all. None: all of it.
        """
        experts = range(len(like))
        mean = (
            None if own is None or bool((own >= 1).all()) else mean_in_order(self._one(name, e, like) for e in experts)
        )
        for expert in experts:
            squares = self._one(name, expert, like)
            if mean is not None:
                share = own[expert].to(squares.dtype)
                squares = squares.mul_(share).add_(mean * (1 - share))
            yield squares

    def forget(self) -> None:
        """Begin at zero, for another block, which takes the places of this one."""
        for place in self._places.values():
            self._free.setdefault(place.shape, []).append(place)
        self._places = {}

    def _one(self, name: str, expert: int, like: Tensor) -> Tensor:
        if (place := self._places.get((name, expert))) is not None:
            return self._store.take(place)
        return torch.zeros(like.shape[1:], dtype=torch.float32, device=self._store.device)
