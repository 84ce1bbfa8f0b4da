"""Safetensors files whose tensors are written piece by piece, in any order, from several threads.

All names, shapes and dtypes are known before the first number is, so a file's header and every tensor's place in it are,
too: nothing has to be collected in memory. Names, order, index and header are those that mergekit 0.1.5 and safetensors
write, down to the byte.
"""

import json
import math
import os
import stat
import struct
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import TracebackType

from utils.errors import LIMITS, UserError, reason
from utils.models.headers import DTYPE_BYTES, FLOAT_CODES, INDEX, SINGLE
from utils.publishing.checksums import checksum, file_checksum

_WIDEST_FIRST = ("F64", "F32", "BF16", "F16")  # the order of tensors in a file; within a dtype by name
_ALIGNMENT = 8


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written; `dtype` is torch's name of a floating-point type."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its entries."""
        return math.prod(self.shape) * DTYPE_BYTES[FLOAT_CODES[self.dtype]]


class ShardFiles:
    """The weight files of a model under construction.

    As a context manager: opens them on entry, closes them on exit. The files hold zeros wherever nothing was written.
    """

    def __init__(self, folder: Path, tensors: Sequence[TensorSpec], shard_bytes: int, *, begun: bool = False) -> None:
        """Lay out the files in an existing folder.

        Args:
            folder: where they go.
            tensors: everything that will be written, in the order in which files are filled.
            shard_bytes: most bytes of tensors in a file with more than one of them; 0 for one file.
            begun: the files are there already, laid out in the very same way (`misfit` is ""); what was written stays.
        """
        self._folder, self._begun = folder, begun
        self._shards = _shards(tensors, shard_bytes)
        count = len(self._shards)
        names = [f"model-{place:05d}-of-{count:05d}.safetensors" for place in range(1, count + 1)]
        self._names = names if count > 1 else [SINGLE]
        self._places: dict[str, tuple[int, int]] = {}  # tensor: which file, offset of its first byte
        self._bytes = {spec.name: spec.nbytes for spec in tensors}
        self._files: list[int] = []
        self._open = ExitStack()

    def misfit(self, sums: Mapping[str, int]) -> str:
        """What of the files that are there already is not as it was left, as a clause; "" if nothing is.

        `sums` are the checksums of the tensors that are complete, by their names.
        """
        for name, shard in zip(self._names, self._shards, strict=True):
            header, offsets = _header(shard)
            size = len(header) + sum(spec.nbytes for spec in shard)
            try:
                found = os.lstat(self._folder / name)
            except FileNotFoundError:
                return f"{name} is missing"
            if not stat.S_ISREG(found.st_mode):
                return f"{name} is no plain file"
            if found.st_size != size:
                return f"{name} has {found.st_size} bytes, not {size}"
            for spec in shard:
                place = (self._folder / name, len(header) + offsets[spec.name], spec.nbytes)
                if spec.name in sums and (changed := change_of(spec.name, sums[spec.name], place)):
                    return changed
        return ""

    def __enter__(self) -> "ShardFiles":
        """Create the files with their headers and, if there are several, the index."""
        try:
            for number, (name, shard) in enumerate(zip(self._names, self._shards, strict=True)):
                header, offsets = _header(shard)
                self._places |= {tensor: (number, len(header) + offset) for tensor, offset in offsets.items()}
                new = 0 if self._begun else os.O_CREAT | os.O_EXCL
                descriptor = os.open(self._folder / name, os.O_RDWR | new, 0o666)
                self._open.callback(os.close, descriptor)
                self._files.append(descriptor)
                os.ftruncate(descriptor, len(header) + sum(spec.nbytes for spec in shard))
                _write(descriptor, header, 0)
            if len(self._shards) > 1:
                (self._folder / INDEX).write_text(self._index(), encoding="utf-8")
        except OSError as error:
            self._open.close()
            raise _failure(error) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the files."""
        self._open.close()

    def write(self, name: str, start: int, content: memoryview) -> None:
        """Write bytes of a tensor from byte `start` of it on.

        Raises:
            UserError: the disk is full, or the system refuses for another reason.
        """
        number, offset = self._places[name]
        try:
            _write(self._files[number], content, offset + start)
        except OSError as error:
            raise _failure(error) from error

    def checksum(self, name: str) -> int:
        """The checksum of a tensor that is complete, of what the file holds.

        Raises:
            UserError: the disk is broken.
        """
        number, offset = self._places[name]
        try:
            return checksum(self._files[number], offset, self._bytes[name])
        except OSError as error:
            raise _failure(error) from error

    def sync(self) -> None:
        """Have everything that was written reach the disk.

        Raises:
            UserError: the disk is full or broken.
        """
        try:
            for descriptor in self._files:
                os.fdatasync(descriptor)
        except OSError as error:
            raise _failure(error) from error

    def _index(self) -> str:
        weight_map = {spec.name: file for file, shard in zip(self._names, self._shards, strict=True) for spec in shard}
        total = sum(spec.nbytes for shard in self._shards for spec in shard)
        described = {"total_size": total, "mergekit_version": metadata.version("mergekit")}
        return json.dumps({"metadata": described, "weight_map": weight_map}, indent=2)


def change_of(name: str, left: int | None, place: tuple[Path, int, int]) -> str:
    """What became of a tensor that had the checksum `left`, as a clause; "" if it is as it was. `place`: its file, where it
    begins there, its bytes."""
    try:
        return "" if file_checksum(*place) == left else f"{name} holds other numbers"
    except OSError as error:
        return f"{name} cannot be read: {reason(error)}"


def _shards(tensors: Iterable[TensorSpec], shard_bytes: int) -> list[list[TensorSpec]]:
    shards: list[list[TensorSpec]] = [[]]
    held = 0
    for tensor in tensors:
        if shards[-1] and 0 < shard_bytes < held + tensor.nbytes:
            shards.append([])
            held = 0
        shards[-1].append(tensor)
        held += tensor.nbytes
    return shards


def _header(shard: Iterable[TensorSpec]) -> tuple[bytes, Mapping[str, int]]:
    """The first bytes of a file, and where each tensor begins behind them."""
    ordered = sorted(shard, key=lambda spec: (_WIDEST_FIRST.index(FLOAT_CODES[spec.dtype]), spec.name.encode()))
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offsets, end = {}, 0
    for spec in ordered:
        offsets[spec.name] = end
        end += spec.nbytes
        place = [offsets[spec.name], end]
        table[spec.name] = {"dtype": FLOAT_CODES[spec.dtype], "shape": list(spec.shape), "data_offsets": place}
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return struct.pack("<Q", len(text)) + text, offsets


def _write(descriptor: int, content: bytes | memoryview, offset: int) -> None:
    left = memoryview(content)
    while left:
        written = os.pwrite(descriptor, left, offset)
        left, offset = left[written:], offset + written


def _failure(error: OSError) -> UserError:
    remedy = "" if error.errno in LIMITS else "; make room, or choose another --output_path"
    return UserError(f"writing the weights failed: {reason(error)}{remedy}", "weights-unwritable")
