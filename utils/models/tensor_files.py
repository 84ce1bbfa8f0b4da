"""Reading tensors of safetensors files piece by piece into buffers that stay in the processor's cache.

Unlike memory-mapped views, this costs no page tables and no page faults, needs no alignment, and a file that shrinks
while it is read is an error, not a crash. Reading from several threads at once is safe.
"""

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from utils.errors import UserError
from utils.models.headers import TensorHeader

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


class TensorFiles:
    """Open weight files; a context manager that closes them."""

    def __init__(self, files: Iterable[Path]) -> None:
        """Take the files to open on entry."""
        self._paths = sorted(set(files))
        self._files: dict[Path, int] = {}

    def __enter__(self) -> "TensorFiles":
        """Open the files.

        Raises:
            UserError: one cannot be opened.
        """
        for path in self._paths:
            try:
                self._files[path] = os.open(path, os.O_RDONLY)
            except OSError as error:
                self.__exit__(None, None, None)
                raise UserError(f"{path} cannot be read: {error.strerror}", "weights-unreadable") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the files."""
        while self._files:
            os.close(self._files.popitem()[1])

    def read(self, header: TensorHeader, start: int, out: Tensor) -> Tensor:
        """Fill a contiguous CPU tensor of the header's dtype with its entries from flat index `start` on.

        Raises:
            UserError: the file ends too early or cannot be read.
        """
        left = as_bytes(out)
        offset = header.start + start * out.element_size()
        while left:
            try:
                count = os.preadv(self._files[header.file], [left], offset)
            except OSError as error:
                raise UserError(f"{header.file} cannot be read: {error.strerror}", "weights-unreadable") from error
            if not count:
                text = f"{header.file} ends within {header.name}: it was changed while it was read"
                raise UserError(text, "weights-changed")
            left, offset = left[count:], offset + count
        return out

    def read_whole(self, header: TensorHeader) -> Tensor:
        """A tensor in memory of its own, in the dtype that it is stored in.

        Raises:
            UserError: as `read`; a dtype that torch does not have.
        """
        whole = torch.empty(header.shape, dtype=stored_dtype(header))
        self.read(header, 0, whole.view(-1))
        return whole

    def read_ahead(self, header: TensorHeader) -> None:
        """Ask the system to have a tensor's bytes in memory soon; returns at once where the system can do that."""
        if hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError):  # a file system that cannot; it was only a hint
                os.posix_fadvise(self._files[header.file], header.start, header.nbytes, os.POSIX_FADV_WILLNEED)


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
