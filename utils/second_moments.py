"""Second moments of the inputs of a block's components, collected by forward hooks."""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from utils.block_runner import MicroBatch
from utils.errors import UserError


def column_square_sums(x: torch.Tensor) -> torch.Tensor:
    """Sum of squares of each column of x [rows, columns], in float32 within the call, returned in float64 [columns]."""
    return x.float().square().sum(dim=0).double()


class SecondMoments:
    """Sums x_j^2 over real tokens for each input channel j of some linear parts of one block.

    Sums are float32 within a micro-batch and float64 across micro-batches, on the block's device. Parts that are given
    the very same tensor (q, k and v; gate and up) share one computation.

    Args:
        paths: module paths inside a block.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = tuple(paths)
        self.sums: dict[str, torch.Tensor] = {}
        self.tokens: dict[str, int] = {}
        self.batch: MicroBatch | None = None
        self._last: tuple[torch.Tensor, torch.Tensor] | None = None

    @contextlib.contextmanager
    def attached(self, block: nn.Module) -> Iterator[None]:
        """Start from zero and observe a block while the context lasts."""
        self.sums, self.tokens, self._last = {}, dict.fromkeys(self.paths, 0), None
        handles = [
            block.get_submodule(path).register_forward_pre_hook(self._hook(path), with_kwargs=True)
            for path in self.paths
        ]
        try:
            yield
        finally:
            self._last = None
            for handle in handles:
                handle.remove()

    def begin(self, batch: MicroBatch) -> None:
        """Say which micro-batch comes next (on the block's device)."""
        self.batch, self._last = batch, None

    def checked(self, layer: int, expected_tokens: int) -> dict[str, torch.Tensor]:
        """The sums by path, each [in] float64, after a check that each part saw every token once.

        Raises:
            UserError: a part saw more or fewer tokens, so that its statistic would not mean what it says.
        """
        for path, seen in self.tokens.items():
            if seen != expected_tokens:
                raise UserError(
                    f"{path} of block {layer} saw {seen} tokens where the text has {expected_tokens}; it does not "
                    "process each token once and cannot be measured (leave it out of components)"
                )
        return self.sums

    def _hook(self, path: str):
        def observe(module: nn.Module, args: tuple, kwargs: dict) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            if self._last is None or self._last[0] is not x:
                self._last = (x, column_square_sums(self._real_rows(x, path)))
            sums = self._last[1]
            self.sums[path] = self.sums[path] + sums if path in self.sums else sums
            self.tokens[path] += self.batch.tokens

        return observe

    def _real_rows(self, x: torch.Tensor, path: str) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if rows.shape[0] != self.batch.input_ids.numel():
            raise UserError(
                f"{path} is given {rows.shape[0]} rows for {self.batch.input_ids.numel()} tokens; it does not process "
                "each token once and cannot be measured (leave it out of components)"
            )
        return rows if self.batch.mask is None else rows[self.batch.mask.reshape(-1)]
