"""Tensors that wait outside of the memory that computes: in a file, or in the host's memory where a GPU computes.

The file has no name, so that nothing of it is left when the process ends, however it does; or it has one, so that a pass
that was killed can go on (`utils/passes/gradient_snapshots.py`). The system keeps as much of it in its page cache as nobody
else needs.
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

    def plain(self) -> tuple[tuple[int, ...], tuple[int, ...], torch.dtype, int]:
        """What `Stored` is made of again, for a tensor in a file with a name."""
        return self.shape, self.order, self.dtype, self.offset


class TensorStore:
    """Puts tensors by and gives them back, bit for bit and, where they lie dense in memory, with the same strides.

    Args:
        device: where the tensors come from and go to.
        folder: the folder of a file without a name, where the CPU computes; None: the system's for temporary files.
        path: a file with a name instead, which `sync` brings up to date where tensors wait in the host's memory.
        end: how many bytes of it a killed run has left there.
        on_host: whether tensors wait in the host's memory; None: where a GPU computes.
    """

    def __init__(
        self,
        device: torch.device,
        folder: Path | None = None,
        *,
        path: Path | None = None,
        end: int = 0,
        on_host: bool | None = None,
    ) -> None:
        self.device, self._folder, self._end = device, folder, end
        self.on_host = device.type != "cpu" if on_host is None else on_host
        self._unwritten: list[Stored] = []
        self._file: BinaryIO | None = None
        self._path = path
        if path is not None:
            self._file = open(path, "r+b" if end else "w+b")  # noqa: SIM115 (see `close`)

    def put(self, tensor: Tensor) -> Stored:
        """Put a tensor by.

        Raises:
            OSError: the disk is full, and so on.
        """
        order = tuple(sorted(range(tensor.dim()), key=lambda axis: (-tensor.stride(axis), axis)))
        dense = tensor.detach().permute(order).contiguous()
        shape, offset = tuple(dense.shape), self._end
        self._end += dense.nbytes
        if self.on_host:
            stored = Stored(shape, order, tensor.dtype, offset, dense.to("cpu"))
            if self._path is not None:
                self._unwritten.append(stored)
            return stored
        self._write(dense, offset)
        return Stored(shape, order, tensor.dtype, offset)

    def put_again(self, stored: Stored, tensor: Tensor) -> None:
        """Put a tensor of the same shape and dtype in the place of one that has no file with a name.

        Raises:
            OSError: the disk is full, and so on.
        """
        dense = tensor.detach().permute(stored.order)
        if stored.host is not None:
            stored.host.copy_(dense)
        else:
            self._write(dense.contiguous(), stored.offset)

    def _write(self, dense: Tensor, offset: int) -> None:
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self._folder, prefix=".gradients.")  # noqa: SIM115 (see `close`)
        left = memoryview(dense.reshape(-1).view(torch.uint8).numpy())
        while left:
            written = os.pwrite(self._file.fileno(), left, offset)
            left, offset = left[written:], offset + written

    def sync(self) -> int:
        """Have the disk hold everything that was put into a file with a name; how many bytes those are.

        Raises:
            OSError: the disk is full, and so on.
        """
        while self._unwritten:
            stored = self._unwritten.pop(0)
            self._write(stored.host, stored.offset)
        os.fsync(self._file.fileno())
        return self._end

    def leave_file(self) -> None:
        """Bring the file up to date no more."""
        self._path = None
        self._unwritten.clear()

    def take(self, stored: Stored) -> Tensor:
        """A tensor as it was put by; it stays there."""
        dense = (stored.host if stored.host is not None else self._read(stored)).to(self.device)
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

    def __enter__(self) -> "TensorStore":
        """The store itself, which is closed at the end."""
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of everything."""
        self._unwritten.clear()
        if self._file is not None:
            self._file.close()
            self._file = None
