"""Second moments of the inputs of a block's components, collected by forward hooks."""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from utils.errors import UserError
from utils.pair.batches import MicroBatch

ENTRIES_AT_ONCE = {"cpu": 2**17}  # float32 temporaries that stay in a core's cache; elsewhere the whole input
ANYWHERE_ELSE = 2**26


def column_square_sums(x: torch.Tensor) -> torch.Tensor:
    """Sum of squares of each column of x [rows, columns], any float dtype.

    Squares and sums are float32 within a chunk of rows; the chunks are added up in float64. Returns float64 [columns]
    on x's device, without synchronization.
    """
    total = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
    rows_at_once = max(1, ENTRIES_AT_ONCE.get(x.device.type, ANYWHERE_ELSE) // max(1, x.shape[1]))
    buffer = torch.empty(min(rows_at_once, x.shape[0]), x.shape[1], dtype=torch.float32, device=x.device)
    for rows in x.split(rows_at_once):
        values = buffer[: rows.shape[0]].copy_(rows)  # one buffer for all: new ones would cost more than the squares
        total += values.mul_(values).sum(dim=0)
    return total


def real_rows(mask: torch.Tensor, tokens: int) -> torch.Tensor:
    """The places of the true entries of a mask, in row-major order, int64 [tokens], on its device.

    `tokens` is how many there are. It is known on the host, so that nothing waits for a GPU, as `mask.nonzero()` would.
    """
    padding = mask.logical_not().view(torch.uint8).reshape(-1)
    return padding.argsort(stable=True)[:tokens]


class SecondMoments:
    """Sums x_j^2 over real tokens for each input channel j of some linear parts of one block.

    Sums are float32 within a micro-batch and float64 across micro-batches, on the block's device. Parts that are given
    the very same tensor (q, k and v; gate and up) share one computation.

    Args:
        paths: module paths inside a block.
        gather: whether the real rows of a padded input are copied together first, one kernel instead of some a sample;
            None: on any device but the CPU, where a view of each sample costs nothing.
    """

    def __init__(self, paths: Sequence[str], *, gather: bool | None = None) -> None:
        self.paths, self.gather = tuple(paths), gather
        self.sums: dict[str, torch.Tensor] = {}
        self.tokens: dict[str, int] = {}
        self.unfit: dict[str, str] = {}  # why a part cannot be measured
        self.batch: MicroBatch | None = None
        self._last: tuple[torch.Tensor, torch.Tensor] | None = None
        self._real_rows: torch.Tensor | None = None  # of a padded micro-batch, where rows are gathered

    @contextlib.contextmanager
    def attached(self, block: nn.Module) -> Iterator[None]:
        """Start from zero and observe a block while the context lasts."""
        self.sums, self.tokens, self.unfit, self._last = {}, dict.fromkeys(self.paths, 0), {}, None
        handles = [
            block.get_submodule(path).register_forward_pre_hook(self._hook(path), with_kwargs=True)
            for path in self.paths
        ]
        try:
            yield
        finally:
            self._last = self._real_rows = None
            for handle in handles:
                handle.remove()

    def begin(self, batch: MicroBatch) -> None:
        """Say which micro-batch comes next (on the block's device)."""
        self.batch, self._last, self._real_rows = batch, None, None

    def take(self) -> dict[str, torch.Tensor]:
        """The sums by path since the last time, or since a block was attached; they begin at zero again."""
        taken, self.sums = self.sums, {}
        return taken

    def checked(self, layer: int, expected_tokens: int, *, passing_over: bool = False) -> dict[str, torch.Tensor]:
        """The sums by path, each [in] float64, after a check that each part saw every token once.

        Args:
            layer: the block, for messages.
            expected_tokens: how many there were.
            passing_over: leave out parts that do not process each token once (a convolution's, routers that are called
                twice), or are never called as modules.

        Raises:
            UserError: a part saw more or fewer tokens, so that its statistic would not mean what it says.
        """
        unfit = dict(self.unfit)
        for path, seen in self.tokens.items():
            if seen != expected_tokens:
                unfit.setdefault(path, f"saw {seen} tokens where the text has {expected_tokens}")
        if unfit and (not passing_over or len(self.unfit) == len(self.paths)):  # all of them: the model adds rows
            path, reason = next(iter(unfit.items()))
            raise UserError(
                f"{path} of block {layer} {reason}; it does not process each token once and cannot be measured (leave it "
                "out of components)",
                "model-unsupported",
            )
        return {path: sums for path, sums in self.sums.items() if path not in unfit}

    def _hook(self, path: str):
        def observe(module: nn.Module, args: tuple, kwargs: dict) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            places = self.batch.input_ids.numel()
            if x.numel() != places * x.shape[-1]:
                self.unfit[path] = f"is given {x.numel() // x.shape[-1]} rows for {places} tokens"
                return
            if self._last is None or self._last[0] is not x:
                self._last = (x, self._sums_over_real_tokens(x))
            sums = self._last[1]
            self.sums[path] = self.sums[path] + sums if path in self.sums else sums
            self.tokens[path] += self.batch.tokens

        return observe

    def _sums_over_real_tokens(self, x: torch.Tensor) -> torch.Tensor:
        samples, length = self.batch.input_ids.shape
        if self.batch.mask is None:
            return column_square_sums(x.reshape(-1, x.shape[-1]))
        if x.device.type != "cpu" if self.gather is None else self.gather:
            if self._real_rows is None:
                self._real_rows = real_rows(self.batch.mask, self.batch.tokens)
            return column_square_sums(x.reshape(-1, x.shape[-1]).index_select(0, self._real_rows))
        x = x.reshape(samples, length, x.shape[-1])  # right-padded: real tokens are the first ones of each sample
        parts = [column_square_sums(row[:real]) for row, real in zip(x, self.batch.lengths, strict=True)]
        return torch.stack(parts).sum(dim=0)
