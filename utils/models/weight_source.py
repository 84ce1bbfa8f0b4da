"""Weights on their way from a checkpoint to the device, a group of modules at a time.

A skeleton stands on the meta device, and its tensors are read from the safetensors files when a block's turn comes, one
block's worth into memory of its own: a file that shrinks meanwhile is an error, not a crash. What the checkpoint stores
otherwise than the model has it (experts each on their own, say) is put together then, by transformers' own rules
(`utils/models/stored_layout.py`).
"""

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto import modeling_auto

from utils.errors import UserError, brief
from utils.models.checkpoints import Checkpoint
from utils.models.headers import FLOAT_DTYPES, TensorHeader
from utils.models.pinned_copies import PinnedCopies
from utils.models.stored_layout import StoredLayout
from utils.models.tensor_files import TensorFiles
from utils.runtime import return_freed_memory


def build_skeleton(checkpoint: Checkpoint, dtype: torch.dtype, trust_remote_code: bool) -> nn.Module:
    """Build the checkpoint's model with parameters on the meta device and real buffers.

    It is of the class that config.json names where that is one which predicts tokens (of a model with a vision tower,
    too), else the causal language model of its kind.

    Raises:
        UserError: the config needs remote code that was not allowed, or transformers cannot build the model.
    """
    try:
        config = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=trust_remote_code)
        layers = getattr(config.get_text_config(decoder=True), "num_hidden_layers", 1)
        if layers > len(checkpoint.tensors):  # a typing error that would build modules for minutes
            raise ValueError(
                f"config.json asks for {layers} layers, the weights hold {len(checkpoint.tensors)} tensors"
            )
        with init_empty_weights(include_buffers=False):
            model = _built(checkpoint.architecture, config, dtype, trust_remote_code)
    except Exception as error:  # whatever a wrong number in config.json leads to: a zero division, an assertion ...
        remote = "" if trust_remote_code or "auto_map" not in checkpoint.config else " (try --trust_remote_code)"
        raise UserError(
            f"model {checkpoint.name}: transformers cannot build {checkpoint.architecture}{remote}: {brief(error)}",
            "model-not-buildable",
        ) from error
    return model.eval()


def _built(architecture: str, config: Any, dtype: torch.dtype, trust_remote_code: bool) -> nn.Module:
    known = set()
    for mapping in (
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    ):
        known.update(name for names in mapping.values() for name in ([names] if isinstance(names, str) else names))
    if architecture in known and "auto_map" not in vars(config):
        return getattr(transformers, architecture)._from_config(config, dtype=dtype)
    auto = AutoModelForCausalLM
    if type(config) not in AutoModelForCausalLM._model_mapping and type(config) in (
        AutoModelForImageTextToText._model_mapping
    ):
        auto = AutoModelForImageTextToText
    return auto.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)


class StreamedWeights:
    """Reads tensors by name from safetensors files onto a device in a dtype; holds the open files.

    On the CPU they are read by system calls. Elsewhere they go through pinned buffers, on a stream of their own, so that
    copies overlap computation (`utils/models/pinned_copies.py`).
    """

    def __init__(
        self, layout: StoredLayout, device: torch.device, dtype: torch.dtype, *, experts_apart: bool = False
    ) -> None:
        """Read what `layout` says; with `experts_apart` the experts of blocks are to be fetched one at a time."""
        self.layout, self.device, self.dtype, self.experts_apart = layout, device, dtype, experts_apart
        self.files = ExitStack()
        self.inputs: TensorFiles | None = None
        self.copies: PinnedCopies | None = None
        self.opening = threading.Lock()
        self.computation = torch.cuda.current_stream(device) if device.type == "cuda" else None

    def fetch(self, names: list[str]) -> dict[str, torch.Tensor]:
        """Read tensors onto the device; they are ready when this returns.

        Raises:
            UserError: a file cannot be read, or was changed while it was read.
        """
        conversions = {id(one): one for name in names if (one := self.layout.conversions.get(name)) is not None}
        read = self._read({name: self.layout.direct[name] for name in names if name in self.layout.direct})
        for one in conversions.values():  # one after the other: the pieces of a mixture are as large as what they make
            made = one.convert(self._read({header.name: header for header in one.sources}))
            read |= {name: value for name, value in made.items() if name in names}
            if self.device.type == "cpu":
                return_freed_memory()
        return read

    def fetch_expert(self, name: str, expert: int) -> torch.Tensor:
        """Read one expert's matrix of a stack (`StoredLayout.can_take_expert`) onto the device.

        Raises:
            UserError: as `fetch`.
        """
        headers = self.layout.expert_headers(name, expert)
        return self.layout.expert_matrix(name, expert, self._read({header.name: header for header in headers}))

    def _read(self, headers: Mapping[str, TensorHeader]) -> dict[str, torch.Tensor]:
        if self.device.type != "cpu":
            return self._copies().fetch(headers, self.dtype, self.computation)
        inputs = self._inputs()
        return {
            name: inputs.read_whole(header, self.dtype if header.dtype in FLOAT_DTYPES else None)
            for name, header in headers.items()
        }

    def read_ahead(self, names: list[str]) -> None:
        """Ask the system to have these tensors' pages in memory soon; returns at once."""
        for header in [header for name in names for header in self.layout.headers(name)]:
            if hasattr(os, "posix_fadvise"):
                with open(header.file, "rb") as file:
                    os.posix_fadvise(file.fileno(), header.start, header.nbytes, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        """Close the files."""
        self.copies = self.inputs = None
        self.files.close()

    def _copies(self) -> PinnedCopies:
        with self.opening:  # blocks are fetched ahead by a thread of their own
            if self.copies is None:
                self.copies = self.files.enter_context(PinnedCopies(self._paths(), self.device))
            return self.copies

    def _inputs(self) -> TensorFiles:
        with self.opening:
            if self.inputs is None:
                self.inputs = self.files.enter_context(TensorFiles(self._paths()))
            return self.inputs

    def _paths(self) -> set[Path]:
        return set(self.layout.files)


WeightSource = StreamedWeights


def tensor_names(module: nn.Module, path: str) -> list[str]:
    """The full names of a module's parameters and buffers, given its path in the model."""
    return [f"{path}.{name}" for name, _ in [*module.named_parameters(), *module.named_buffers()]]


def tied_names(model: nn.Module) -> dict[str, str]:
    """The parameters that share another one's values by the model's config: name to the other's name."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def share_tied(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Make tied parameters one and the same, so that they have one gradient, as transformers does when it loads.

    Where both are stored and differ, they stay two, which is also what transformers makes of them.

    Args:
        model: the model, with `tensors` placed in it.
        tensors: the parameters that were fetched, by full name.
    """
    for name, other in tied_names(model).items():
        if name in tensors and other in tensors and not torch.equal(tensors[name], tensors[other]):
            continue
        absent, present = (name, other) if other in tensors else (other, name)
        owner, _, slot = absent.rpartition(".")
        model.get_submodule(owner)._parameters[slot] = model.get_parameter(present)


@contextmanager
def placed(module: nn.Module, path: str, tensors: Mapping[str, torch.Tensor], device: torch.device) -> Iterator[None]:
    """Put fetched tensors into a module (buffers that no file stores are moved along), and take them out at the end.

    Args:
        module: the module, with parameters on the meta device.
        path: its path in the model, the prefix of the names in `tensors`.
        tensors: parameters and buffers by full name, on `device`.
        device: where buffers that are not in `tensors` go.
    """
    before = []
    for owner_path, owner in module.named_modules():
        for table in (owner._parameters, owner._buffers):
            for name, value in table.items():
                if value is None:
                    continue
                full = ".".join(part for part in (path, owner_path, name) if part)
                before.append((table, name, value))
                if full in tensors:
                    new = tensors[full]
                    # a stack there stays itself: that is how its experts' matrices are found
                    as_it_is = new.is_meta or not isinstance(value, nn.Parameter)
                    table[name] = new if as_it_is else nn.Parameter(new, requires_grad=False)
                elif value.device.type != "meta":
                    table[name] = value.to(device)
    try:
        yield
    finally:
        for table, name, value in before:
            table[name] = value
