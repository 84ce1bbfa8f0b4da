"""A model on disk: its folder, config and tensor headers. No weights enter memory here.

A model is a local folder or a hub id. Hub ids are fetched in two steps, the small files of every model first, so that
a mistake in one of them shows before gigabytes have moved; `utils/models/opening.py` is the second.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from utils.bounded_files import read_json
from utils.errors import UserError
from utils.models.config_check import check_config
from utils.models.headers import FLOAT_DTYPES, TensorHeader, header_hash, refuse_other_formats
from utils.models.hub import download
from utils.models.low_rank import adapter_name
from utils.models.small_files import SMALL_FILES, check_small_files
from utils.models.stacks import Stack
from utils.named_paths import check_path


@dataclass(frozen=True)
class Checkpoint:
    """A model folder: where it is, its `config.json`, and the headers of its tensors by name in the file.

    `name` and `revision` are what the user asked for; `folder` is where it lies, absolute. `adapter` is the folder of an
    adapter whose changes the tensors have, while config and tokenizer are the model's. `stacks` are stored tensors that
    `tensors` has in slices instead, by their own names (`utils/models/experts_apart.py`). `tower` is the checkpoint that
    was asked for where that is a language tower alone and this one the whole model (`utils/models/language_tower.py`).
    """

    name: str
    revision: str | None
    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorHeader] = field(repr=False)
    adapter: Path | None = None
    stacks: Mapping[str, Stack] = field(default_factory=dict, repr=False)
    tower: "Checkpoint | None" = field(default=None, repr=False)

    @cached_property
    def stored(self) -> Mapping[str, TensorHeader]:
        """The headers of the tensors as the files hold them."""
        if not self.stacks:
            return self.tensors
        slices = {header.name for stack in self.stacks.values() for header in stack.slices}
        whole = {name: header for name, header in self.tensors.items() if name not in slices}
        return {**whole, **{name: stack.header for name, stack in self.stacks.items()}}

    @property
    def place(self) -> tuple[Path, Path | None]:
        """What tells it from every other one: the model's folder and the adapter's."""
        return (self.folder, self.adapter) if self.tower is None else self.tower.place

    @property
    def architecture(self) -> str:
        """The model class named by `config.json`."""
        return self.config["architectures"][0]

    @property
    def files(self) -> list[Path]:
        """The weight files, in name order."""
        return sorted({file for header in self.tensors.values() for file in header.files})

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
    looks_local = name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1 or not name.isascii()
    return looks_local or os.path.exists(name)


def find_small_files(name: str, revision: str | None = None) -> Path:
    """Return the folder that holds a model's config and tokenizer; for a hub id, only these small files are fetched.

    Raises:
        UserError: no such folder; or the hub does not have it, refuses it, or cannot be reached.
    """
    parts = adapter_name(name)
    if parts is not None:
        return find_small_files(parts.model, revision)
    if not is_local(name):
        return download(name, revision, list(SMALL_FILES))
    return local_folder(name, revision)


def local_folder(name: str, revision: str | None = None) -> Path:
    """The absolute path of a model folder on this machine.

    Raises:
        UserError: it is not there, is no folder, or lies where libraries cannot open it (`check_path`).
    """
    check_path(name, f"model folder {name}")
    path = Path(os.path.expanduser(name))
    if not os.path.exists(path):
        state = "is a broken symbolic link" if os.path.islink(path) else f"does not exist (looked in {Path.cwd()})"
        raise UserError(f"model folder {name} {state}", "model-missing")
    if not path.is_dir():
        text = f"model {name} is a file; give the folder that holds config.json and the weights"
        raise UserError(text, "model-is-file")
    if revision:
        text = f"model {name} is a local folder, which has no revision {revision!r}; remove the key"
        raise UserError(text, "model-revision")
    folder = path.resolve()
    check_path(folder, f"model folder {name}")
    return folder


def read_model_config(folder: Path, name: str) -> dict[str, Any]:
    """Read and check a model folder's `config.json`.

    Raises:
        UserError: it is missing, malformed, names no architecture, or belongs to an adapter, an encoder-decoder or a
            quantized model.
    """
    path = folder / "config.json"
    if not path.exists():
        refuse_other_formats(folder, name)
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


def weight_file_record(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a manifest says about an input model: name, revision, weight file sizes, header hash."""
    checkpoint = checkpoint.tower or checkpoint
    return {
        "name": checkpoint.name,
        "revision": checkpoint.revision or hub_commit(checkpoint.folder),
        "architecture": checkpoint.architecture,
        "files": {file.name: file.stat().st_size for file in checkpoint.files},
        "modified_ns": {file.name: file.stat().st_mtime_ns for file in checkpoint.files},
        "header_sha256": header_hash(checkpoint.stored.values()),
        **({} if checkpoint.adapter is None else {"adapter": checkpoint.adapter.name}),
    }


def hub_commit(folder: Path) -> str | None:
    """The commit hash of a folder in the hub cache (`.../snapshots/<commit>`), else None."""
    return folder.name if folder.parent.name == "snapshots" else None
