"""What a file of saliency vectors holds besides: Gram matrices, of a layer's inputs or of an embedding's gradients.

| key | content, float32 |
|---|---|
| `TENSOR.axis0`, `TENSOR.axis1` | vectors for F (`utils/recipes/saliency_vectors.py`) |
| `TENSOR.inputs1` | C = mean of x x' over the inputs x of a linear layer stored [out, in]: its lower triangle [n (n + 1) / 2], row by row |
| `TENSOR.inputs0` | the same of one stored [in, out] |
| `TENSOR.rows` | R = sum of g g' over the rows g of an embedding's or a head's gradients, its lower triangle |

Layers that are given the same inputs share a matrix: the metadata's `shared` (JSON) says by tensor under which other
tensor's name it is, and its `sha256` has the digest of every entry. With n inputs a triangle takes 2 n (n + 1) bytes, so
that all of a decoder's take about as much as its weights in bfloat16.
"""

import json
import os
import struct
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO

from utils.errors import UserError
from utils.recipes.saliency_vectors import (
    AXES,
    DIGESTS,
    FORMAT,
    SaliencyVectors,
    VectorKey,
    entry_digest,
    open_once,
    open_vectors,
)

if TYPE_CHECKING:
    from torch import Tensor


class NotFiniteError(ValueError):
    """Numbers that such a file does not take: not finite in float32, or negative where that has no meaning."""


INPUTS = ("inputs0", "inputs1")  # by the axis of the stored weight that the inputs run along
ROWS = "rows"
_SHARED = "shared"
_ENTRY = 160  # bytes of a header's entry beside the key


class GramFileWriter:
    """Writes such a file one matrix after the other, so that no more than one is in memory; a context manager.

    The header, which comes first, has its place kept free until the end.
    """

    def __init__(self, path: Path, tensors: Iterable[str], begun: Mapping[str, Any] | None = None) -> None:
        """`tensors` are the names of all that may be written; `begun` is the `state` of one who has begun the file."""
        keys = [f"{tensor}.{end}" for tensor in tensors for end in (*AXES, INPUTS[0], ROWS)]
        reserved = sum(2 * len(json.dumps(key)) + _ENTRY for key in keys)
        self._path, self._reserved = path, reserved + -reserved % 8 + 1024
        begun = begun or {"entries": {}, "shared": {}, "end": 0}
        self._entries: dict[str, dict] = begun["entries"]
        self._shared: dict[str, str] = begun["shared"]
        self._digests: dict[str, str] = begun.get("digests", {})
        self._end: int = begun["end"]
        self._file: BinaryIO
        self._open = ExitStack()

    def __enter__(self) -> "GramFileWriter":
        """Create the file, or cut off what was added to it after its state was taken."""
        self._file = self._open.enter_context(open(self._path, "r+b" if self._end else "wb"))
        self._file.truncate(8 + self._reserved + self._end)
        self._file.seek(0, os.SEEK_END)
        return self

    def begin_anew(self) -> None:
        """Take back everything that was written."""
        self._entries.clear()
        self._shared.clear()
        self._digests.clear()
        self._end = 0
        self._file.truncate(8 + self._reserved)
        self._file.seek(0, os.SEEK_END)

    def state(self) -> dict[str, Any]:
        """What has been written, as plain data."""
        made = {"entries": self._entries, "shared": self._shared, "digests": self._digests}
        return {**{key: dict(value) for key, value in made.items()}, "end": self._end}

    def sync(self) -> int:
        """Have the disk hold what was written; how long the file is. Raises OSError if it cannot."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return 8 + self._reserved + self._end

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Write the header, unless the file was given up, and close."""
        with self._open:
            if kind is None:
                self._write_header()

    def add_axes(self, tensor: str, axes: "tuple[Tensor, ...]") -> None:
        """Write the one or two vectors of a tensor. Raises NotFiniteError if they are negative or not finite in float32."""
        for end, axis in zip(AXES, axes, strict=False):
            if bool((axis < 0).any()):
                raise NotFiniteError(f"{tensor}.{end} holds negative numbers")
            self._add(f"{tensor}.{end}", axis)

    def add_inputs(self, tensor: str, axis: int, gram: "Tensor", shared_by: Iterable[str] = ()) -> None:
        """Write the Gram matrix of a layer's inputs, and which other layers have it. NotFiniteError if it is not finite."""
        self._add(f"{tensor}.{INPUTS[axis]}", _packed(gram))
        self._shared |= dict.fromkeys(shared_by, tensor)

    def add_rows(self, tensor: str, gram: "Tensor") -> None:
        """Write the Gram matrix of the gradients' rows. Raises NotFiniteError if it is not finite."""
        self._add(f"{tensor}.{ROWS}", _packed(gram))

    def add_gradients(self, earlier: Path) -> None:
        """Write what another file holds of gradients: all vectors and `rows`. What it holds of inputs is left out.

        Raises:
            UserError: the file cannot be read.
        """
        import torch

        other = open_vectors(earlier)
        for key in sorted(other.keys):
            if key.endswith(tuple(f".{end}" for end in (*AXES, ROWS))):
                self._add(key, torch.from_numpy(other.entry(key)))

    def _add(self, key: str, values: "Tensor") -> None:
        import torch

        values = values.detach().to(torch.float32).contiguous()
        if values.numel() and not bool(torch.stack(values.aminmax()).isfinite().all()):  # NaN is both
            raise NotFiniteError(f"{key} holds numbers that are not finite")
        values = values.cpu()
        content = memoryview(values.view(torch.uint8).numpy())
        self._file.write(content)
        self._digests[key] = entry_digest(content)
        start, self._end = self._end, self._end + values.nbytes
        self._entries[key] = {"dtype": "F32", "shape": list(values.shape), "data_offsets": [start, self._end]}

    def _write_header(self) -> None:
        metadata = {"format": FORMAT, _SHARED: json.dumps(self._shared), DIGESTS: json.dumps(self._digests)}
        text = json.dumps({"__metadata__": metadata, **self._entries}, separators=(",", ":")).encode()
        if len(text) > self._reserved:
            raise ValueError(f"a header of {len(text)} bytes does not fit into {self._reserved}")
        self._file.seek(0)
        self._file.write(struct.pack("<Q", self._reserved) + text.ljust(self._reserved))


@dataclass(frozen=True)
class LayerInputs:
    """The Gram matrix [n, n] of a layer's inputs, and the axis of the stored weight that they run along."""

    gram: "Tensor"
    axis: int


def input_gram(key: VectorKey) -> LayerInputs | None:
    """The inputs of a layer; None if the file has none for it.

    Raises:
        UserError: the file cannot be read; what it holds is no such matrix, or is not finite.
    """
    file = open_once(key.file)
    owner, axis = _owner(file, key.tensor)
    return None if axis is None else LayerInputs(_triangle(file, f"{owner}.{INPUTS[axis]}"), axis)


def row_gram(key: VectorKey) -> "Tensor | None":
    """The Gram matrix [d, d] of an embedding's gradients; None if the file has none for it. Raises as `input_gram`."""
    file = open_once(key.file)
    name = f"{key.tensor}.{ROWS}"
    return _triangle(file, name) if name in file.keys else None


def misfit(file: SaliencyVectors, tensor: str, shape: tuple[int, ...]) -> str:
    """What about a tensor's Gram matrices does not fit its shape, from the header, as a clause; "" if nothing.

    Raises:
        UserError: the metadata is not as this project writes it.
    """
    owner, axis = _owner(file, tensor)
    wanted = {f"{owner}.{INPUTS[axis]}": shape[axis]} if axis is not None and axis < len(shape) else {}
    if f"{tensor}.{ROWS}" in file.keys:
        wanted[f"{tensor}.{ROWS}"] = shape[-1]
    for name, width in wanted.items():
        found = file.file.get_slice(name).get_shape()
        if found != [width * (width + 1) // 2]:
            return f"{name} has {found} entries; a triangle of {width} channels has {width * (width + 1) // 2}"
    return ""


def _owner(file: SaliencyVectors, tensor: str) -> tuple[str, int | None]:
    """The tensor under whose name the inputs of a layer are, and their axis."""
    owner = _shared(file).get(tensor, tensor)
    return owner, next((axis for axis, end in enumerate(INPUTS) if f"{owner}.{end}" in file.keys), None)


def _shared(file: SaliencyVectors) -> Mapping[str, str]:
    try:
        found = json.loads(file.metadata.get(_SHARED, "{}"))
    except ValueError as error:
        raise UserError(
            f"saliency file {file.path}: its metadata is not JSON; measure again", "grams-damaged"
        ) from error
    return found if isinstance(found, dict) else {}


def _packed(gram: "Tensor") -> "Tensor":
    import torch

    gram = gram.detach().to(torch.float32)
    if gram.device.type != "cpu":  # half of it crosses over, and no row is taken by itself
        return gram[torch.ones_like(gram, dtype=torch.bool).tril()]
    packed = torch.empty(len(gram) * (len(gram) + 1) // 2)
    whole, target, start = gram.numpy(), packed.numpy(), 0  # numpy takes a short row four times as fast as torch
    for row in range(len(whole)):
        target[start : start + row + 1] = whole[row, : row + 1]
        start += row + 1
    return packed


def _triangle(file: SaliencyVectors, name: str) -> "Tensor":
    """The symmetric matrix of a packed triangle."""
    import torch

    packed = torch.from_numpy(file.entry(name))
    width = int(((8 * packed.numel() + 1) ** 0.5 - 1) / 2)
    if packed.dim() != 1 or width * (width + 1) // 2 != packed.numel() or not bool(packed.isfinite().all()):
        raise UserError(
            f"saliency file {file.path}: {name} is not a triangle of finite numbers; measure again", "grams-damaged"
        )
    gram, start = torch.empty(width, width), 0
    for row in range(width):
        gram[row, : row + 1] = packed[start : start + row + 1]
        gram[: row + 1, row] = packed[start : start + row + 1]
        start += row + 1
    return gram
