"""Gram matrices of what the linear parts of a block are given: C = sum over tokens of x x', by forward hooks."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from utils.errors import UserError
from utils.models.decoder import weight_matrix
from utils.passes.gram_sums import add_gram, complete


@dataclass
class InputGram:
    """The inputs of the parts `paths` of a block, which all are given the same: `total` [in, in], over `tokens` of them.

    float32 on the block's device; zeros where no token came.
    """

    paths: list[str]
    total: Tensor = field(repr=False)
    tokens: int = 0


class InputGrams:
    """Sums x x' over the rows that linear parts of one block are given, in float32.

    Parts that are given the very same tensor (q, k and v; gate and up) share one matrix. A part of a mixture of experts
    counts the tokens routed to it. Inputs must hold no pads.

    Args:
        paths: module paths inside a block; those that a block lacks are passed over.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = tuple(paths)
        self._found: dict[str, InputGram] = {}
        self._last: tuple[Tensor, InputGram] | None = None

    @contextlib.contextmanager
    def attached(self, layer: int, block: nn.Module) -> Iterator[None]:
        """Start from nothing and observe a block while the context lasts."""
        self._found, self._last = {}, None
        modules = dict(block.named_modules())
        present = [path for path in self.paths if path in modules]  # blocks may differ
        handles = [
            modules[path].register_forward_pre_hook(self._hook(layer, path), with_kwargs=True) for path in present
        ]
        try:
            yield
        finally:
            self._last = None
            for handle in handles:
                handle.remove()
        for path in present:
            if path not in self._found:
                weight = weight_matrix(modules[path])
                self._found[path] = InputGram([path], weight.new_zeros((weight.shape[1],) * 2, dtype=torch.float32))

    def take(self) -> list[InputGram]:
        """What was summed up, each matrix once, in the order of the paths; it is let go of."""
        found, self._found = self._found, {}
        sums = list({id(one): one for one in (found[path] for path in self.paths if path in found)}.values())
        for one in sums:
            complete(one.total)
        return sums

    def _hook(self, layer: int, path: str):
        def observe(module: nn.Module, args: tuple, kwargs: dict) -> None:
            given = args[0] if args else next(iter(kwargs.values()))
            if self._last is not None and self._last[0] is given:
                self._share(layer, path, self._last[1])
                return
            rows = given.detach().reshape(-1, given.shape[-1])
            own = self._found.get(path)
            if own is None:
                width = rows.shape[1]
                own = self._found[path] = InputGram([path], rows.new_zeros((width, width), dtype=torch.float32))
            add_gram(own.total, rows)
            own.tokens += len(rows)
            self._last = (given, own)

        return observe

    def _share(self, layer: int, path: str, gram: InputGram) -> None:
        if self._found.setdefault(path, gram) is not gram:
            raise UserError(
                f"{path} of block {layer} is given what {gram.paths[0]} is in some samples and not in others; its inputs "
                "cannot be measured (leave it out of components)",
                "measure-inputs-differ",
            )
        if path not in gram.paths:
            gram.paths.append(path)
