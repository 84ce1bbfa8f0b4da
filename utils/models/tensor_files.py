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
from utils.models.checkpoints import TensorHeader


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

    def read_ahead(self, header: TensorHeader) -> None:
        """Ask the system to have a tensor's bytes in memory soon; returns at once where the system can do that."""
        if hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError):  # a file system that cannot; it was only a hint
                os.posix_fadvise(self._files[header.file], header.start, header.nbytes, os.POSIX_FADV_WILLNEED)


def as_bytes(values: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return memoryview(values.view(torch.uint8).numpy())
