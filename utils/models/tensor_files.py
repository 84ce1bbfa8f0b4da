"""Reading tensors of safetensors files piece by piece into buffers that stay in the processor's cache.

Unlike memory-mapped views, this costs no page tables and no page faults, needs no alignment, and a file that shrinks
while it is read is an error, not a crash. Reading from several threads at once is safe.
"""

import contextlib
import os
import threading
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from utils.errors import UserError, reason
from utils.models.headers import LowRank, TensorHeader

_STORED = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


_ROWS = 64  # of a matrix that an adapter changes, computed together
_KEPT = 16  # matrices of adapters held at a time
_ENTRIES = 2**19  # that are converted together: fewer cost more calls, more leave the processor's cache


class TensorFiles:
    """Open weight files; a context manager that closes them."""

    def __init__(self, files: Iterable[Path]) -> None:
        """Take the files to open on entry; those of adapters are opened when they are first read."""
        self._paths = sorted(set(files))
        self._files: dict[Path, int] = {}
        self._opening = threading.Lock()
        self._small: dict[TensorHeader, Tensor] = {}  # the adapters' matrices that were read last

    def __enter__(self) -> "TensorFiles":
        """Open the files.

        Raises:
            UserError: one cannot be opened.
        """
        try:
            for path in self._paths:
                self._file(path)
        except UserError:
            self.__exit__(None, None, None)
            raise
        return self

    def _file(self, path: Path) -> int:
        with self._opening:
            if path not in self._files:
                try:
                    self._files[path] = os.open(path, os.O_RDONLY)
                except OSError as error:
                    raise UserError(f"{path} cannot be read: {reason(error)}", "weights-unreadable") from error
            return self._files[path]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the files."""
        while self._files:
            os.close(self._files.popitem()[1])

    def read(self, header: TensorHeader, start: int, out: Tensor) -> Tensor:
        """Fill a contiguous CPU tensor of the header's dtype (or of bytes) with its entries from flat index `start` on.

        An adapter's change is computed in float32 and the sum rounded once, to the dtype that the model is stored in.

        Raises:
            UserError: the file ends too early or cannot be read.
        """
        if header.change is not None:
            return self._read_changed(header, header.change, start, out)
        left = as_bytes(out)
        offset = header.start + start * out.element_size()
        while left:
            try:
                count = os.preadv(self._file(header.file), [left], offset)
            except OSError as error:
                raise UserError(f"{header.file} cannot be read: {reason(error)}", "weights-unreadable") from error
            if not count:
                text = f"{header.file} ends within {header.name}: it was changed while it was read"
                raise UserError(text, "weights-changed")
            left, offset = left[count:], offset + count
        return out

    def _read_changed(self, header: TensorHeader, change: LowRank, start: int, out: Tensor) -> Tensor:
        dtype, (height, columns) = stored_dtype(header), header.shape
        entries = out.view(-1) if out.dtype == dtype else out.view(-1).view(dtype)
        first = start * out.element_size() // dtype.itemsize
        stop = first + entries.numel()
        exact = torch.promote_types(dtype, torch.float32)
        down, up = (self._small_matrix(part).to(exact) for part in (change.down, change.up))
        left, right = (down.T, up.T) if change.transposed else (up, down)
        plain = replace(header, change=None)
        # always the same rows together: of other shapes, products may differ in the last bit
        for row in range(first // columns // _ROWS * _ROWS, -(-stop // columns), _ROWS):
            rows = slice(row, min(row + _ROWS, height))
            values = self.read(plain, row * columns, torch.empty((rows.stop - row) * columns, dtype=dtype)).to(exact)
            values = values.view(-1, columns).add_(left[rows] @ right, alpha=change.scale)
            if change.magnitude is not None:
                lengths = self._small_matrix(change.magnitude).to(exact).view(-1)[rows]
                values *= (lengths / values.norm(dim=1))[:, None]
            begin, end = max(first, row * columns), min(stop, rows.stop * columns)
            entries[begin - first : end - first] = values.view(-1)[begin - row * columns : end - row * columns]
        return out

    def _small_matrix(self, header: TensorHeader) -> Tensor:
        """A tensor of an adapter; the last few are kept, since a matrix may be read in many pieces."""
        found = self._small.get(header)
        if found is None:
            found = self.read_whole(header)
            while len(self._small) >= _KEPT:
                with contextlib.suppress(KeyError, StopIteration, RuntimeError):  # another thread was faster
                    del self._small[next(iter(self._small))]
            self._small[header] = found
        return found

    def read_whole(self, header: TensorHeader, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor in memory of its own, in the dtype that it is stored in; in another one by way of a small buffer.

        Raises:
            UserError: as `read`; a dtype that torch does not have.
        """
        stored = stored_dtype(header)
        if header.change is not None and dtype not in (None, stored):
            return self.read_whole(header).to(dtype)  # computed in rows, which pieces would cut
        whole = torch.empty(header.shape, dtype=dtype or stored)
        if whole.dtype == stored:
            self.read(header, 0, whole.view(-1))
            return whole
        buffer = torch.empty(min(_ENTRIES, whole.numel()), dtype=stored)
        for start in range(0, whole.numel(), _ENTRIES):
            part = whole.view(-1)[start : start + _ENTRIES]
            part.copy_(self.read(header, start, buffer[: len(part)]))
        return whole

    def read_ahead(self, header: TensorHeader) -> None:
        """Ask the system to have a tensor's bytes in memory soon; returns at once where the system can do that."""
        if hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError):  # a file system that cannot; it was only a hint
                os.posix_fadvise(self._file(header.file), header.start, header.nbytes, os.POSIX_FADV_WILLNEED)


def as_bytes(values: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return memoryview(values.view(torch.uint8).numpy())


def stored_dtype(header: TensorHeader) -> torch.dtype:
    """torch's dtype for what a file holds.

    Raises:
        UserError: torch has none.
    """
    if header.dtype not in _STORED:
        text = f"{header.file}: {header.name} is stored as {header.dtype}, which cannot be read here"
        raise UserError(text, "weights-dtype")
    return _STORED[header.dtype]
