"""The tensors of a folder's safetensors files, from their headers and the index alone. No weights enter memory here."""

import hashlib
import json
import math
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from utils.bounded_files import read_json
from utils.errors import UserError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_AT_ONCE = 2**20  # bytes that are compared together
MAX_HEADER_BYTES = 100 * 2**20
MOST_TENSORS = 300_000  # of a file; the largest mixtures have half as many in all their files
DTYPE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
    "U16": 2, "U32": 4, "U64": 8, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip
_OTHER_BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "C64": 64,
}  # of dtypes that nothing here reads  # fmt: skip
FLOAT_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
FLOAT_CODES = {name: code for code, name in FLOAT_DTYPES.items()}
_PICKLED = (
    "pickled weights can run code: load them once with transformers and save_pretrained() them, which writes "
    "safetensors"
)
_OTHER_WEIGHTS = {
    ".safetensors": f"a sharded model needs its {INDEX}, a single file must be called {SINGLE}",
    ".gguf": "give the checkpoint that the GGUF file was made from",
    **dict.fromkeys((".bin", ".pt", ".pth", ".ckpt"), _PICKLED),
}


@dataclass(frozen=True)
class LowRank:
    """The change that an adapter makes of a matrix W: `scale` B A, or its transpose.

    `down` is A [rank, in], `up` is B [out, rank]. With `magnitude` m [out] (DoRA) each row of W + scale B A is then brought
    to the length m.
    """

    down: "TensorHeader"
    up: "TensorHeader"
    scale: float
    transposed: bool = False
    magnitude: "TensorHeader | None" = None

    @property
    def headers(self) -> "tuple[TensorHeader, ...]":
        """The tensors it is made of."""
        return (self.down, self.up, *([self.magnitude] if self.magnitude else []))


@dataclass(frozen=True)
class TensorHeader:
    """One tensor of a safetensors file. `start` is the absolute offset of its first byte in `file`.

    With `change` the tensor is what the file holds with an adapter's change (`utils/models/tensor_files.py`).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    nbytes: int
    change: LowRank | None = None

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold any of it."""
        return (self.file, *(part.file for part in (self.change.headers if self.change else ())))


def first_rows(header: TensorHeader, rows: int) -> TensorHeader:
    """The first rows of a tensor, as a tensor of its own: they lie where it begins.

    Raises:
        ValueError: it has fewer, or an adapter changes it (what that makes of a row depends on the others, by a last bit).
    """
    there, *others = header.shape
    if rows > there or header.change is not None:
        raise ValueError(f"the first {rows} rows of {header.name}, {list(header.shape)}, are no tensor of their own")
    return replace(header, shape=(rows, *others), nbytes=header.nbytes // there * rows if there else 0)


def read_headers(folder: Path, name: str) -> dict[str, TensorHeader]:
    """Read the headers of all safetensors weights of a folder, from the index if there is one.

    Raises:
        UserError: no safetensors weights; an index that names missing files, files outside the folder or tensors
            that are not there, or that another file holds otherwise; a truncated or malformed file; both an index and a single file.
    """
    single, index = folder / SINGLE, folder / INDEX
    if os.path.lexists(single) and os.path.lexists(index):
        raise UserError(
            f"model {name}: {folder} holds both {SINGLE} and {INDEX}, two sets of weights; remove the stale one",
            "model-two-weights",
        )
    if os.path.lexists(index):
        headers = _indexed_headers(folder, name)
    elif os.path.lexists(single):
        headers = {header.name: header for header in file_headers(single, name)}
    else:
        refuse_other_formats(folder, name)
        raise UserError(f"model {name}: {folder} holds no {SINGLE} and no {INDEX}", "model-no-weights")
    if not headers:
        raise UserError(f"model {name}: the weight files in {folder} hold no tensors", "model-no-tensors")
    return headers


def refuse_other_formats(folder: Path, name: str) -> None:
    """Say what a folder without the usual files holds instead, if it is something known."""
    if (folder / "adapter_config.json").exists():
        raise UserError(
            f"model {name} is a LoRA adapter: merge it into its base model first, give the result", "model-is-adapter"
        )
    if os.path.lexists(folder / SINGLE) or os.path.lexists(folder / INDEX):
        return
    others = sorted(path.name for path in folder.iterdir() if path.suffix in _OTHER_WEIGHTS)
    for suffix, what in _OTHER_WEIGHTS.items():
        for other in others:
            if other.endswith(suffix):
                raise UserError(f"model {name}: no {SINGLE} and no {INDEX}, only {other}; {what}", "model-format")


def header_hash(headers: Iterable[TensorHeader]) -> str:
    """SHA-256 over the names, dtypes, shapes, places and sizes of tensors: changes when a checkpoint is saved anew."""
    digest = hashlib.sha256()
    for header in sorted(headers, key=lambda header: header.name):
        digest.update(f"{header.name}|{header.dtype}|{header.shape}|{header.file.name}|{header.start}\n".encode())
        if header.change is not None:
            digest.update(f"{header.change.scale}|{header_hash(header.change.headers)}\n".encode())
    return digest.hexdigest()


def weight_files(folder: Path, name: str) -> list[str]:
    """The names of a folder's weight files: those that its index lists, or the one a model without an index has.

    Raises:
        UserError: an index that is malformed, or names files outside the folder.
    """
    return sorted(set(_weight_map(folder, name).values())) if os.path.lexists(folder / INDEX) else [SINGLE]


def _weight_map(folder: Path, name: str) -> dict[str, str]:
    """The file of each tensor by the index."""
    weight_map = read_json(folder / INDEX, f"model {name}: {INDEX}").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"model {name}: {INDEX} has no weight_map", "model-index-damaged")
    for shard in map(str, weight_map.values()):
        if Path(shard).name != shard or shard in ("", "..") or not shard.isprintable():
            raise UserError(
                f"model {name}: {INDEX} names {shard!r}, which is not a plain file name in the folder",
                "model-index-outside",
            )
    return {tensor: str(shard) for tensor, shard in weight_map.items()}


def _indexed_headers(folder: Path, name: str) -> dict[str, TensorHeader]:
    weight_map = _weight_map(folder, name)
    headers: dict[str, TensorHeader] = {}
    unlisted: list[TensorHeader] = []
    for shard in sorted(set(weight_map.values())):
        if not os.path.lexists(folder / shard):
            text = f"model {name}: {INDEX} names {shard}, which is missing from {folder}"
            raise UserError(text, "model-shard-missing")
        for header in file_headers(folder / shard, name):
            if weight_map.get(header.name) == shard:
                headers[header.name] = header
            else:
                unlisted.append(header)
    absent = [tensor for tensor in weight_map if tensor not in headers]
    if absent:
        text = f"model {name}: {INDEX} lists {absent[0]} in {weight_map[absent[0]]}, but it is not there"
        raise UserError(text, "model-index-wrong")
    for header in unlisted:
        if header.name in headers and not same_content(header, headers[header.name]):
            raise UserError(
                f"model {name}: {header.name} is in {headers[header.name].file.name}, where {INDEX} has it, and another in "
                f"{header.file.name}, which transformers may take instead; remove the wrong one",
                "model-tensor-twice",
            )
    return headers


def same_content(one: TensorHeader, other: TensorHeader) -> bool:
    """Whether two tensors are equal to the bit."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    with open(one.file, "rb") as first, open(other.file, "rb") as second:
        first.seek(one.start)
        second.seek(other.start)
        for start in range(0, one.nbytes, _AT_ONCE):
            size = min(_AT_ONCE, one.nbytes - start)
            if first.read(size) != second.read(size):
                return False
    return True


def file_headers(file: Path, name: str) -> list[TensorHeader]:
    """The tensors of a safetensors file of model `name`, from its header alone.

    Raises:
        UserError: no such file, or it is truncated, malformed, or names more tensors than any model has.
    """
    where = f"model {name}: {file.name}"
    if not os.path.isfile(file):
        raise UserError(
            f"{where} is no regular file, but a folder, a device or a broken link; copy or download it again",
            "weights-missing",
        )
    size = file.stat().st_size
    if size < 8:
        raise UserError(f"{where} is truncated ({size} bytes); copy or download it again", "weights-truncated")
    with open(file, "rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        if length > min(MAX_HEADER_BYTES, size - 8):
            text = f"{where} is truncated or not a safetensors file (header of {length} bytes)"
            raise UserError(text, "weights-truncated")
        raw = stream.read(length)
    if raw.count(b"{") > MOST_TENSORS:  # each is an object of its own
        raise UserError(f"{where} names more than {MOST_TENSORS} tensors: is it the right file?", "weights-too-many")
    try:
        table = json.loads(raw, object_pairs_hook=_without_duplicates)
        metadata = table.pop("__metadata__", None)
        if metadata is not None and not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("metadata must be text")
        headers = [_tensor_header(tensor, entry, file, 8 + length) for tensor, entry in table.items()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{where} has a malformed safetensors header: {error}", "weights-damaged") from error
    end = 8 + length
    for header in sorted(headers, key=lambda header: (header.start, header.nbytes)):
        if header.start != end:
            text = f"{where}: tensor {header.name} overlaps another or leaves a gap; the file is damaged"
            raise UserError(text, "weights-damaged")
        end = header.start + header.nbytes
    if end != size:
        state = "truncated" if end > size else "damaged"
        text = f"{where} is {state}: {size} bytes where its header says {end}; copy or download it again"
        raise UserError(text, f"weights-{state}")
    return headers


def _tensor_header(tensor: str, entry: Mapping[str, Any], file: Path, data_start: int) -> TensorHeader:
    begin, end = entry["data_offsets"]
    shape, dtype = tuple(entry["shape"]), entry["dtype"]
    if len(shape) > 16 or any(type(count) is not int or not 0 <= count < 2**63 for count in (begin, end, *shape)):
        raise ValueError(f"{tensor}: shape and offsets must be whole numbers of at least 0")
    if begin > end or not isinstance(dtype, str) or not tensor.isprintable():
        raise ValueError(f"{tensor!r}: offsets, dtype or name are not valid")
    bits = 8 * DTYPE_BYTES.get(dtype, 0) or _OTHER_BITS.get(dtype)
    if bits is None:
        raise ValueError(f"{tensor}: safetensors has no dtype {dtype[:40]!r}")
    if math.prod(shape) * bits != 8 * (end - begin):
        raise ValueError(f"{tensor}: {end - begin} bytes do not hold {dtype} {list(shape)}")
    return TensorHeader(tensor, dtype, shape, file, data_start + begin, end - begin)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        raise ValueError("a name is given twice")
    return table
