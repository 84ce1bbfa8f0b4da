"""The file of saliency vectors: one vector per axis of each tensor of an expert; their outer product is about F.

F_ij ~ axis0_i * axis1_j stands for the squared gradient of the loss at entry (i, j) of a weight W [a, b] as the
checkpoint stores it, so that delta_ij^2 F_ij is what the change to that entry is worth. Layers that store a weight
transposed (GPT-2) are no special case: the axes are those of the stored tensor. A tensor of one axis (a norm, a bias) has
one vector, F itself. A file made for a recipe may hold F^p instead; its metadata then says `power`.

The format is safetensors, float32: under `TENSOR.axis0` a vector of length a; under `TENSOR.axis1` one of length b for a
matrix, nothing for a tensor of one axis; and `{"format": "lewis saliency 1"}` as metadata. Keys are built from tensor
names and never taken apart. Entries are finite and at least 0; only their ratios within a vector matter. A file may hold
more about a tensor (`utils/recipes/gram_file.py`).

A large file's metadata holds a digest of each entry under `sha256` (JSON): its header alone then says what is in it, and
an entry is held against its digest when it is read, so that the whole file never is for that.
"""

import base64
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.errors import UserError, brief
from utils.publishing.manifest import file_sha256

if TYPE_CHECKING:
    import numpy
    from torch import Tensor

FORMAT = "lewis saliency 1"
AXES = ("axis0", "axis1")
_REMEDY = (
    "measure again with lewis_importance.py and make the recipe again, or correct what the recipe says under `saliency`"
)
DIGESTS = "sha256"  # the metadata's key
_OPEN_AT_ONCE = 16  # files; more than any recipe has experts, few enough to leave open


@dataclass(frozen=True)
class VectorKey:
    """Where the vectors of one tensor are: the file, and the name of the tensor in it."""

    file: Path
    tensor: str


@dataclass(frozen=True)
class SaliencyVectors:
    """An open file of vectors. Nothing but its header has been read; vectors are, one tensor at a time.

    `keys` are the names in the file, one or two per tensor and those of what else it holds; `file` is safetensors' own
    handle, `metadata` what it says of itself, `digests` those of entries that it holds, by key (`entry_digest`).
    """

    path: Path
    keys: frozenset[str] = field(repr=False)
    file: Any = field(repr=False)
    metadata: Mapping[str, str] = field(repr=False)
    digests: Mapping[str, str] = field(repr=False)

    def __contains__(self, tensor: object) -> bool:
        """Whether the file has vectors of a tensor."""
        return isinstance(tensor, str) and _keys(tensor)[0] in self.keys

    @property
    def power(self) -> float | None:
        """The exponent of F that the vectors hold; None where the file does not say."""
        try:
            return float(self.metadata["power"])
        except (KeyError, ValueError):
            return None

    def of_these(self, tensors: Iterable[str]) -> list[str]:
        """Those of the tensors that the file has vectors of, in their order."""
        return [tensor for tensor in tensors if tensor in self]

    def shape(self, tensor: str) -> tuple[int, ...]:
        """The shape of the tensor that its vectors belong to, from the header: one or two lengths.

        Raises:
            UserError: the file lacks the first one, or one is not a vector of float32.
        """
        if tensor not in self:
            raise UserError(f"saliency file {self.path} has no {_keys(tensor)[0]}; {_REMEDY}", "vectors-lack-tensor")
        return tuple(self._length(key) for key in self._keys_of(tensor))

    def vectors(self, tensor: str) -> "tuple[Tensor, ...]":
        """Read the vectors of a tensor: float32 of lengths a and b (or a alone), on the CPU, finite and at least 0.

        Raises:
            UserError: as `shape`; an entry is negative or not finite.
        """
        self.shape(tensor)
        return tuple(self._axis(key) for key in self._keys_of(tensor))

    def check_all(self) -> None:
        """Raise a `UserError` if anything in the file is not a vector as `vectors` gives it."""
        for key in sorted(self.keys):
            self._length(key)
            self._axis(key)

    def content_hash(self) -> str:
        """What the file's content is known by, lower-case hexadecimal: SHA-256 of its header where that has the digest of
        every entry, else of all its bytes."""
        if not self.keys <= self.digests.keys():
            return file_sha256(self.path)
        with open(self.path, "rb") as file:
            length = file.read(8)
            return hashlib.sha256(length + file.read(int.from_bytes(length, "little"))).hexdigest()

    def entry(self, key: str) -> "numpy.ndarray":
        """Read one entry. Raises a `UserError` if it has a digest that is not its own."""
        values = self.file.get_tensor(key)
        if key in self.digests and entry_digest(values) != self.digests[key]:
            raise UserError(
                f"saliency file {self.path}: the content of {key} is not what was written; measure again",
                "vectors-damaged",
            )
        return values

    def _keys_of(self, tensor: str) -> tuple[str, ...]:
        return tuple(key for key in _keys(tensor) if key in self.keys)

    def _length(self, key: str) -> int:
        header = self.file.get_slice(key)
        shape, dtype = header.get_shape(), header.get_dtype()
        if len(shape) != 1 or dtype != "F32":
            raise UserError(
                f"saliency file {self.path}: {key} is {dtype} {shape}, not a vector of F32", "vectors-malformed"
            )
        return shape[0]

    def _axis(self, key: str) -> "Tensor":
        import torch

        axis = torch.tensor(self.entry(key))
        if not bool(torch.isfinite(axis).all()) or bool((axis < 0).any()):
            what = f"{key} holds negative numbers or numbers that are not finite"
            raise UserError(f"saliency file {self.path}: {what}; measure again", "vectors-not-finite")
        return axis


def vector_file_bytes(vectors: "Mapping[str, tuple[Tensor, ...]]", power: float | None = None) -> bytes:
    """Serialize vectors; the same vectors always give the same bytes.

    Args:
        vectors: by tensor name, axis0 [a] and axis1 [b], or axis0 alone, of any floating-point dtype and device; saved
            in float32.
        power: the exponent of F in them, recorded for people; None: not said.

    Raises:
        ValueError: none, or more than two, or not one-dimensional; or, in float32, negative or not finite.
    """
    from safetensors.numpy import save

    content = {}
    for tensor in sorted(vectors):
        axes = vectors[tensor]
        if not 1 <= len(axes) <= len(AXES):
            raise ValueError(f"{tensor} has {len(axes)} vectors; there must be one or two")
        for key, axis in zip(_keys(tensor), axes, strict=False):
            content[key] = _checked(key, axis)
    plain = save(content, metadata={"format": FORMAT})
    return plain if power is None else _with_metadata(plain, {"format": FORMAT, "power": repr(float(power))})


def _with_metadata(content: bytes, metadata: Mapping[str, str]) -> bytes:
    """A safetensors file with this metadata in this order; the library shuffles keys where there are several."""
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps({**json.loads(content[8:start]), "__metadata__": metadata}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + content[start:]


def open_vectors(path: Path) -> SaliencyVectors:
    """Open a file of vectors; reads the header.

    Raises:
        UserError: the file is missing, cannot be read, is not safetensors, or of another format.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(os.path.expanduser(path))
    if not path.is_file():
        state = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(f"saliency file {path} {state}; {_REMEDY}", "vectors-missing")
    try:
        file = safe_open(path, "numpy")
        metadata, keys = file.metadata() or {}, frozenset(file.keys())
    except SafetensorError as error:
        raise UserError(
            f"saliency file {path} is truncated or not safetensors: {brief(error)}; {_REMEDY}", "vectors-malformed"
        ) from error
    except OSError as error:
        # without a number it is safetensors', who say "No such file" whatever kept them from opening one
        why = error.strerror if error.errno else "it is there, but cannot be opened; are too many files open?"
        raise UserError(f"saliency file {path} cannot be read: {why}", "vectors-unreadable") from error
    if (found := metadata.get("format")) != FORMAT:
        raise UserError(
            f"saliency file {path} has the format {found!r}, not {FORMAT!r}; {_REMEDY}", "vectors-of-other-format"
        )
    return SaliencyVectors(path, keys, file, metadata, _digests(path, metadata))


def entry_digest(values: Any) -> str:
    """The digest of an entry's bytes (a buffer): the first 128 bits of SHA-256, as 22 letters."""
    return base64.b64encode(hashlib.sha256(values).digest()[:16]).decode().rstrip("=")


def _digests(path: Path, metadata: Mapping[str, str]) -> Mapping[str, str]:
    try:
        found = json.loads(metadata.get(DIGESTS, "{}"))
    except ValueError as error:
        raise UserError(
            f"saliency file {path}: the digests in its metadata are not JSON; measure again", "vectors-malformed"
        ) from error
    return found if isinstance(found, dict) else {}


def read_vectors(key: VectorKey) -> "tuple[Tensor, ...]":
    """Read the vectors of one tensor, as `SaliencyVectors.vectors`; the file stays open until it changes.

    Raises:
        UserError: as `open_vectors` and `SaliencyVectors.vectors`.
    """
    return open_once(key.file).vectors(key.tensor)


def open_once(path: Path) -> SaliencyVectors:
    """A file as `open_vectors` opens it, which stays open until it changes."""
    try:
        found = path.stat()
    except OSError:
        return open_vectors(path)  # says what is wrong
    return _opened(path, (found.st_ino, found.st_size, found.st_mtime_ns))


def close_files() -> None:
    """Let go of the files that `open_once` has left open."""
    _opened.cache_clear()


@lru_cache(maxsize=_OPEN_AT_ONCE)
def _opened(path: Path, _stamp: tuple[int, int, int]) -> SaliencyVectors:
    return open_vectors(path)


def _keys(tensor: str) -> tuple[str, str]:
    return f"{tensor}.{AXES[0]}", f"{tensor}.{AXES[1]}"


def _checked(key: str, axis: "Tensor") -> "numpy.ndarray":
    import torch

    values = axis.detach().to("cpu", torch.float32).contiguous()
    if values.dim() != 1 or not values.isfinite().all() or (values < 0).any():
        raise ValueError(f"{key} must be a vector of finite numbers of at least 0, got shape {list(values.shape)}")
    return values.numpy()
