"""Tensors that wait outside of the memory that computes: in a file, or in the host's memory where a GPU computes.

The file has no name, so that nothing of it is left when the process ends, however it does; the system keeps as much of it
in its page cache as nobody else needs.
"""

import math
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor


@dataclass(frozen=True)
class Stored:
    """Where a tensor waits: at `offset` of the file, or `host`. `order` are its dimensions from the widest stride on."""

    shape: tuple[int, ...]
    order: tuple[int, ...]
    dtype: torch.dtype
    offset: int
    host: Tensor | None = field(default=None, repr=False)


class TensorStore:
    """Puts tensors by and gives them back, bit for bit and, where they lie dense in memory, with the same strides.

    Args:
        device: where the tensors come from and go to.
        folder: the folder of the file, where the CPU computes; None: the system's for temporary files.
    """

    def __init__(self, device: torch.device, folder: Path | None = None) -> None:
        self._device, self._folder = device, folder
        self._file: BinaryIO | None = None
        self._end = 0

    def put(self, tensor: Tensor) -> Stored:
        """Put a tensor by.

        Raises:
            OSError: the disk is full, and so on.
        """
        order = tuple(sorted(range(tensor.dim()), key=lambda axis: (-tensor.stride(axis), axis)))
        dense = tensor.detach().permute(order).contiguous()
        shape, offset = tuple(dense.shape), self._end
        if self._device.type != "cpu":
            return Stored(shape, order, tensor.dtype, 0, dense.to("cpu"))
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self._folder, prefix=".gradients.")  # noqa: SIM115 (see `close`)
        left = memoryview(dense.reshape(-1).view(torch.uint8).numpy())
        while left:
            written = os.pwrite(self._file.fileno(), left, self._end)
            self._end += written
            left = left[written:]
        return Stored(shape, order, tensor.dtype, offset)

    def take(self, stored: Stored) -> Tensor:
        """A tensor as it was put by; it stays there."""
        dense = stored.host.to(self._device) if stored.host is not None else self._read(stored)
        back = sorted(range(len(stored.order)), key=lambda place: stored.order[place])
        return dense.permute(back)

    def _read(self, stored: Stored) -> Tensor:
        content = torch.empty(math.prod(stored.shape) * stored.dtype.itemsize, dtype=torch.uint8)
        left, offset = memoryview(content.numpy()), stored.offset
        while left:
            count = os.preadv(self._file.fileno(), [left], offset)
            if count == 0:
                raise OSError(f"the file of gradient checkpoints ends at {offset} bytes")
            left, offset = left[count:], offset + count
        return content.view(stored.dtype).reshape(stored.shape)

    def close(self) -> None:
        """Let go of everything."""
        if self._file is not None:
            self._file.close()
            self._file = None
