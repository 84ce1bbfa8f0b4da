"""Weights on their way from a checkpoint to the device, a group of modules at a time.

The usual way is a skeleton on the meta device whose tensors are read from the safetensors files when a block's turn
comes: on the CPU they stay memory-mapped (reclaimable), on a GPU one block's worth is copied. Where the names in the
checkpoint are not the names in the model (transformers converts some architectures while loading), the model is
loaded by transformers as a whole, on the CPU, and its blocks are copied to the device in turn.
"""

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import nn

from utils.errors import UserError, brief
from utils.models.checkpoints import Checkpoint, TensorHeader
from utils.models.pinned_copies import PinnedCopies


def build_skeleton(checkpoint: Checkpoint, dtype: torch.dtype, trust_remote_code: bool) -> nn.Module:
    """Build the checkpoint's causal language model with parameters on the meta device and real buffers.

    Raises:
        UserError: the config needs remote code that was not allowed, or transformers cannot build the model.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=trust_remote_code)
        layers = config.get_text_config(decoder=True).num_hidden_layers
        if layers > len(checkpoint.tensors):  # a typing error that would build modules for minutes
            raise ValueError(
                f"config.json asks for {layers} layers, the weights hold {len(checkpoint.tensors)} tensors"
            )
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever a wrong number in config.json leads to: a zero division, an assertion ...
        remote = "" if trust_remote_code or "auto_map" not in checkpoint.config else " (try --trust_remote_code)"
        raise UserError(
            f"model {checkpoint.name}: transformers cannot build {checkpoint.architecture}{remote}: {brief(error)}",
            "model-not-buildable",
        ) from error
    return model.eval()


def match_names(model: nn.Module, checkpoint: Checkpoint, head: bool = False) -> dict[str, TensorHeader] | None:
    """Map the model's parameter and stored-buffer names to the checkpoint's tensors.

    A checkpoint of the bare body lacks the body's prefix, and one of a causal model has it; both are matched. None if
    a parameter is not found under its own name, that is, if transformers would convert the checkpoint. A head that
    is tied to the embedding may be absent.

    Args:
        model: the skeleton.
        checkpoint: its checkpoint.
        head: include the language-model head, which is not needed for hidden states.

    Raises:
        UserError: a tensor's shape is not what config.json makes of the model.
    """
    prefix = model.base_model_prefix + "."
    body = {id(value) for value in [*model.base_model.parameters(), *model.base_model.buffers()]}
    tied = tied_names(model)
    found = {}
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if id(value) not in body and not head:
            continue
        header = next(
            (checkpoint.tensors[key] for key in (name, name.removeprefix(prefix)) if key in checkpoint.tensors), None
        )
        if header is None:
            if isinstance(value, nn.Parameter) and (id(value) in body or name not in tied):
                return None
            continue
        if header.shape != tuple(value.shape):
            raise UserError(
                f"model {checkpoint.name}: tensor {header.name} is {list(header.shape)} in the checkpoint but "
                f"config.json makes it {list(value.shape)}",
                "model-shape",
            )
        found[name] = header
    return found


class StreamedWeights:
    """Reads tensors by name from safetensors files onto a device in a dtype; holds the open files.

    On the CPU, in the stored dtype, tensors are views of the files' pages. Elsewhere they go through pinned buffers, on
    a stream of their own, so that copies overlap computation (`utils/models/pinned_copies.py`).
    """

    def __init__(self, headers: Mapping[str, TensorHeader], device: torch.device, dtype: torch.dtype) -> None:
        self.headers, self.device, self.dtype = dict(headers), device, dtype
        self.files = ExitStack()
        self.handles: dict[Path, object] = {}
        self.copies: PinnedCopies | None = None
        self.opening = threading.Lock()
        self.computation = torch.cuda.current_stream(device) if device.type == "cuda" else None

    def fetch(self, names: list[str]) -> dict[str, torch.Tensor]:
        """Read tensors onto the device; they are ready when this returns.

        Raises:
            UserError: a file cannot be read, or was changed while it was read.
        """
        stored = {name: self.headers[name] for name in names if name in self.headers}
        if self.device.type != "cpu":
            return self._copies().fetch(stored, self.dtype, self.computation)
        views = {name: self._handle(header.file).get_tensor(header.name) for name, header in stored.items()}
        return {name: view.to(self.dtype) if view.is_floating_point() else view for name, view in views.items()}

    def read_ahead(self, names: list[str]) -> None:
        """Ask the system to have these tensors' pages in memory soon; returns at once."""
        for name in names:
            header = self.headers.get(name)
            if header is not None and hasattr(os, "posix_fadvise"):
                with open(header.file, "rb") as file:
                    os.posix_fadvise(file.fileno(), header.start, header.nbytes, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        """Close the files; mapped pages go when the last tensor does."""
        self.handles.clear()
        self.copies = None
        self.files.close()

    def _copies(self) -> PinnedCopies:
        with self.opening:  # blocks are fetched ahead by a thread of their own
            if self.copies is None:
                files = {header.file for header in self.headers.values()}
                self.copies = self.files.enter_context(PinnedCopies(files, self.device))
            return self.copies

    def _handle(self, file: Path):
        from safetensors import safe_open

        with self.opening:
            if file not in self.handles:
                self.handles[file] = self.files.enter_context(safe_open(file, framework="pt", device="cpu"))
            return self.handles[file]


class ResidentWeights:
    """The same service from a model that transformers has loaded on the CPU.

    It is held in the narrower of the checkpoint's dtype and the one asked for, and handed over in the latter.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, trust_remote_code: bool):
        from transformers import AutoModelForCausalLM

        self.device, self.dtype = device, dtype
        stored = getattr(torch, checkpoint.float_dtype)
        loaded, report = AutoModelForCausalLM.from_pretrained(
            checkpoint.folder,
            dtype=min(stored, dtype, key=lambda one: one.itemsize),
            trust_remote_code=trust_remote_code,
            local_files_only=True,
            output_loading_info=True,
        )
        left_out = set(report["missing_keys"])  # random numbers: a head that the checkpoint of a bare body lacks
        if stored.itemsize < dtype.itemsize:  # buffers that no file stores, made in few bits: the skeleton has its own
            saved = loaded.state_dict()
            left_out |= {name for name, _ in loaded.named_buffers() if name not in saved}
        named = [*loaded.named_parameters(), *loaded.named_buffers()]
        self.tensors = {name: value for name, value in named if name not in left_out}

    def fetch(self, names: list[str]) -> dict[str, torch.Tensor]:
        """Copy tensors to the device."""
        return {
            name: value.detach().to(self.device, self.dtype if isinstance(value, nn.Parameter) else None)
            for name, value in ((name, self.tensors[name]) for name in names if name in self.tensors)
        }

    def read_ahead(self, names: list[str]) -> None:
        """Nothing to do: the weights are in memory."""

    def close(self) -> None:
        """Let go of the model."""
        self.tensors.clear()


WeightSource = StreamedWeights | ResidentWeights


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
                    table[name] = nn.Parameter(new, requires_grad=False) if isinstance(value, nn.Parameter) else new
                elif value.device.type != "meta":
                    table[name] = value.to(device)
    try:
        yield
    finally:
        for table, name, value in before:
            table[name] = value
