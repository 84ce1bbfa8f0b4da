"""Bringing tensors from safetensors files to a GPU: read by several threads into pinned buffers, copied from there.

Pages of a file are read straight into memory that the GPU can fetch from by itself, with no page faults and no copy
in between, and while one buffer is on its way to the GPU the next ones are being read. What is pinned is a ring of
`SLOTS` buffers, however large the tensors are.
"""

import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from utils.models.headers import TensorHeader
from utils.models.tensor_files import TensorFiles, stored_dtype

SLOTS = 8
SLOT_BYTES = 16 * 2**20
READERS = 4  # one thread copies out of the page cache more slowly than a GPU fetches


@dataclass
class _Slot:
    """A buffer in the host's memory, and the mark behind the last copy from it (None where copies are made at once)."""

    buffer: Tensor
    copied: "torch.cuda.Event | None"


@dataclass(frozen=True)
class _Chunk:
    """The bytes from `start` to `stop` of a tensor, and the whole tensor on the device as bytes."""

    header: TensorHeader
    target: Tensor
    start: int
    stop: int


class PinnedCopies:
    """Open weight files and a way to a device; a context manager that closes them.

    On a device other than a GPU of CUDA's the same is done with plain memory and without a stream.
    """

    def __init__(self, files: Iterable[Path], device: torch.device) -> None:
        """Take the files to open on entry, and the device."""
        self.device = device
        self._files = TensorFiles(files)
        self._gpu = device.type == "cuda"
        self._lock = threading.Lock()
        self._turn = 0

    def __enter__(self) -> "PinnedCopies":
        """Open the files and pin the buffers.

        Raises:
            UserError: a file cannot be opened.
        """
        self._files.__enter__()
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="read")
        self._stream = torch.cuda.Stream(self.device) if self._gpu else None
        self._slots = [
            _Slot(
                torch.empty(SLOT_BYTES, dtype=torch.uint8, pin_memory=self._gpu),
                torch.cuda.Event() if self._gpu else None,
            )
            for _ in range(SLOTS)
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the files and let go of the buffers."""
        self._readers.shutdown()
        self._slots = []
        self._files.__exit__(kind, error, trace)

    def fetch(
        self, headers: dict[str, TensorHeader], dtype: torch.dtype, user: "torch.cuda.Stream | None"
    ) -> dict[str, Tensor]:
        """Bring tensors to the device; they are ready when this returns. One call at a time, others wait.

        Args:
            headers: the tensors, by the names they are asked for.
            dtype: what floating-point numbers are turned into, on the device; other dtypes stay.
            user: the stream that will compute with the tensors; None where there are no streams.

        Raises:
            UserError: a file ends too early or cannot be read, or a tensor is stored in a dtype torch does not have.
        """
        with self._lock:
            if not self._gpu:
                return self._fetch(headers, dtype)
            with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
                tensors = self._fetch(headers, dtype)
                for tensor in tensors.values():
                    # memory freed while queued computation still reads it must not be handed to the next copy
                    tensor.record_stream(user)
                self._stream.synchronize()  # waits in the fetching thread only
                return tensors

    def _fetch(self, headers: dict[str, TensorHeader], dtype: torch.dtype) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        under_way: deque[tuple[Future, _Slot, _Chunk]] = deque()
        try:
            for name, header in headers.items():
                tensors[name] = torch.empty(header.shape, dtype=stored_dtype(header), device=self.device)
                for chunk in _chunks(header, tensors[name]):
                    if len(under_way) == len(self._slots):  # the oldest one holds the slot whose turn it is
                        self._send(*under_way.popleft())
                    slot = self._slots[self._turn % len(self._slots)]
                    self._turn += 1
                    under_way.append((self._readers.submit(self._fill, slot, chunk), slot, chunk))
            while under_way:
                self._send(*under_way.popleft())
        finally:
            for reading, _, _ in under_way:  # after an error: no thread may still write into a slot
                reading.exception()
        return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}

    def _fill(self, slot: _Slot, chunk: _Chunk) -> None:
        if slot.copied is not None:
            slot.copied.synchronize()  # one that was never recorded is done
        self._files.read(chunk.header, chunk.start, slot.buffer[: chunk.stop - chunk.start])

    def _send(self, reading: Future, slot: _Slot, chunk: _Chunk) -> None:
        reading.result()
        read = slot.buffer[: chunk.stop - chunk.start]
        chunk.target[chunk.start : chunk.stop].copy_(read, non_blocking=True)
        if slot.copied is not None:
            slot.copied.record(self._stream)


def _chunks(header: TensorHeader, tensor: Tensor) -> Iterator[_Chunk]:
    target = tensor.flatten().view(torch.uint8)  # the same memory
    for start in range(0, header.nbytes, SLOT_BYTES):
        yield _Chunk(header, target, start, min(start + SLOT_BYTES, header.nbytes))
