"""A model on disk: its folder, config and tensor headers. No weights enter memory here.

A model is a local folder or a hub id. Hub ids are fetched in two steps, the small files of every model first, so that
a mistake in one of them shows before gigabytes have moved. Only safetensors weights are read: pickled ones can run
code.
"""

import hashlib
import json
import math
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from utils.bounded_files import read_json
from utils.errors import UserError
from utils.models.config_check import check_config, check_layers
from utils.models.hub import download
from utils.models.small_files import SMALL_FILES, check_small_files

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100 * 2**20
DTYPE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
    "U16": 2, "U32": 4, "U64": 8, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip
_OTHER_DTYPES = {"F4", "F6_E2M3", "F6_E3M2", "F8_E8M0", "C64", "F8_E4M3FNUZ", "F8_E5M2FNUZ"}  # which nothing here reads
FLOAT_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
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
class TensorHeader:
    """One tensor of a safetensors file. `start` is the absolute offset of its first byte in `file`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    nbytes: int


@dataclass(frozen=True)
class Checkpoint:
    """A model folder: where it is, its `config.json`, and the headers of its tensors by name in the file.

    `name` and `revision` are what the user asked for; `folder` is where it lies, absolute.
    """

    name: str
    revision: str | None
    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorHeader] = field(repr=False)

    @property
    def architecture(self) -> str:
        """The model class named by `config.json`."""
        return self.config["architectures"][0]

    @property
    def files(self) -> list[Path]:
        """The weight files, in name order."""
        return sorted({header.file for header in self.tensors.values()})

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(header.nbytes for header in self.tensors.values())

    @cached_property
    def float_dtype(self) -> str:
        """The torch name of the dtype that holds most of the bytes (`bfloat16`, `float32` ...)."""
        held: dict[str, int] = {}
        for header in self.tensors.values():
            held[header.dtype] = held.get(header.dtype, 0) + header.nbytes
        dtype = max(held, key=lambda key: held[key])
        if dtype not in FLOAT_DTYPES:
            raise UserError(
                f"model {self.name}: most weights are {dtype}; give the unquantized checkpoint", "model-quantized"
            )
        return FLOAT_DTYPES[dtype]


def is_local(name: str) -> bool:
    """Whether `name` means a folder on this machine rather than a hub id."""
    looks_local = name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1
    return looks_local or os.path.exists(name)


def open_checkpoint(name: str, revision: str | None = None) -> Checkpoint:
    """Open a local folder or hub id, weights included (a hub id is downloaded or found in the cache).

    Raises:
        UserError: as `find_small_files` and `read_headers`.
    """
    folder = find_small_files(name, revision)
    config = read_model_config(folder, name)
    if not is_local(name):
        folder = download(name, revision, [*SMALL_FILES, *weight_files(folder, name)])
    headers = read_headers(folder, name)
    check_layers(config, len(headers), name)
    return Checkpoint(name, revision, folder, config, headers)


def open_without_download(name: str, revision: str | None = None) -> Checkpoint | None:
    """Open a model that already lies on this machine, weights included; None if it does not. Nothing is fetched.

    Raises:
        UserError: a local folder exists but is malformed, as in `open_checkpoint`.
    """
    if is_local(name):
        return open_checkpoint(name, revision) if Path(name).expanduser().exists() else None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, revision=revision, local_files_only=True)).resolve()
        return Checkpoint(name, revision, folder, read_model_config(folder, name), read_headers(folder, name))
    except (HFValidationError, LocalEntryNotFoundError, OSError, UserError):
        return None  # not in the hub cache, or only in part: the next download completes it


def find_small_files(name: str, revision: str | None = None) -> Path:
    """Return the folder that holds a model's config and tokenizer; for a hub id, only these small files are fetched.

    Raises:
        UserError: no such folder; or the hub does not have it, refuses it, or cannot be reached.
    """
    if not is_local(name):
        return download(name, revision, list(SMALL_FILES))
    return local_folder(name, revision)


def local_folder(name: str, revision: str | None = None) -> Path:
    """The absolute path of a model folder on this machine.

    Raises:
        UserError: it is not there, or is no folder.
    """
    path = Path(os.path.expanduser(name))
    if not os.path.exists(path):
        if "+" in name:
            raise UserError(
                f"model {name}: adapters (model+adapter) are for merge recipes, which utils/merger.py takes; merge the "
                "adapter into its model first, and give the result",
                "model-is-adapter",
            )
        state = "is a broken symbolic link" if os.path.islink(path) else f"does not exist (looked in {Path.cwd()})"
        raise UserError(f"model folder {name} {state}", "model-missing")
    if not path.is_dir():
        text = f"model {name} is a file; give the folder that holds config.json and the weights"
        raise UserError(text, "model-is-file")
    if revision:
        text = f"model {name} is a local folder, which has no revision {revision!r}; remove the key"
        raise UserError(text, "model-revision")
    return path.resolve()


def read_model_config(folder: Path, name: str) -> dict[str, Any]:
    """Read and check a model folder's `config.json`.

    Raises:
        UserError: it is missing, malformed, names no architecture, or belongs to an adapter, an encoder-decoder or a
            quantized model.
    """
    path = folder / "config.json"
    if not path.exists():
        _refuse_other_formats(folder, name)
        raise UserError(f"model {name}: {folder} has no config.json; is it a model folder?", "model-no-config")
    check_small_files(folder, name)
    config = read_json(path, f"model {name}: config.json")
    architectures = config.get("architectures")
    if not (isinstance(architectures, list) and architectures and isinstance(architectures[0], str)):
        raise UserError(
            f'model {name}: config.json names no model class; add "architectures": ["...ForCausalLM"]',
            "model-no-architecture",
        )
    if config.get("is_encoder_decoder"):
        raise UserError(
            f"model {name} is an encoder-decoder ({architectures[0]}); only decoders are supported",
            "model-encoder-decoder",
        )
    if quantization := config.get("quantization_config"):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise UserError(
            f"model {name} is quantized ({method or 'unknown method'}); give the unquantized checkpoint",
            "model-quantized",
        )
    check_config(config, name)
    return config


def read_headers(folder: Path, name: str) -> dict[str, TensorHeader]:
    """Read the headers of all safetensors weights of a folder, from the index if there is one.

    Raises:
        UserError: no safetensors weights; an index that names missing files, files outside the folder or tensors
            that are not there; a truncated or malformed file; both an index and a single file.
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
        _refuse_other_formats(folder, name)
        raise UserError(f"model {name}: {folder} holds no {SINGLE} and no {INDEX}", "model-no-weights")
    if not headers:
        raise UserError(f"model {name}: the weight files in {folder} hold no tensors", "model-no-tensors")
    return headers


def _refuse_other_formats(folder: Path, name: str) -> None:
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
    return digest.hexdigest()


def weight_file_record(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a manifest says about an input model: name, revision, weight file sizes, header hash."""
    return {
        "name": checkpoint.name,
        "revision": checkpoint.revision or hub_commit(checkpoint.folder),
        "architecture": checkpoint.architecture,
        "files": {file.name: file.stat().st_size for file in checkpoint.files},
        "modified_ns": {file.name: file.stat().st_mtime_ns for file in checkpoint.files},
        "header_sha256": header_hash(checkpoint.tensors.values()),
    }


def hub_commit(folder: Path) -> str | None:
    """The commit hash of a folder in the hub cache (`.../snapshots/<commit>`), else None."""
    return folder.name if folder.parent.name == "snapshots" else None


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
    for shard in sorted(set(weight_map.values())):
        if not os.path.lexists(folder / shard):
            text = f"model {name}: {INDEX} names {shard}, which is missing from {folder}"
            raise UserError(text, "model-shard-missing")
        for header in file_headers(folder / shard, name):
            if weight_map.get(header.name) == shard:
                headers[header.name] = header
    absent = [tensor for tensor in weight_map if tensor not in headers]
    if absent:
        text = f"model {name}: {INDEX} lists {absent[0]} in {weight_map[absent[0]]}, but it is not there"
        raise UserError(text, "model-index-wrong")
    return headers


def file_headers(file: Path, name: str) -> list[TensorHeader]:
    """The tensors of a safetensors file of model `name`, from its header alone.

    Raises:
        UserError: no such file, or it is truncated or malformed.
    """
    where = f"model {name}: {file.name}"
    if not os.path.isfile(file):
        raise UserError(
            f"{where} is a folder or a broken link, not a file; copy or download it again", "weights-missing"
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
    if dtype not in DTYPE_BYTES and dtype not in _OTHER_DTYPES:
        raise ValueError(f"{tensor}: safetensors has no dtype {dtype[:40]!r}")
    if dtype in DTYPE_BYTES and math.prod(shape) * DTYPE_BYTES[dtype] != end - begin:
        raise ValueError(f"{tensor}: {end - begin} bytes do not hold {dtype} {list(shape)}")
    return TensorHeader(tensor, dtype, shape, file, data_start + begin, end - begin)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        raise ValueError("a name is given twice")
    return table
