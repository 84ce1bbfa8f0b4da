"""A device that is not the CPU, for machines without a GPU: real numbers, strict about what lies where.

    python -m tests.simulated_device REPORT < COMMANDS

Runs commands of this project, one after another, each as `python SCRIPT ARGUMENTS...` would, on a device called `sim:0`
unless `--device cpu` says otherwise; COMMANDS is a JSON list of [SCRIPT, ARGUMENTS...]. Tensors on it compute on the CPU, but
as on a GPU

- an operation on tensors of both devices is an error (a scalar on the CPU may take part);
- whatever makes the host wait for the device is recorded, with the bytes of tensors on it: REPORT is JSON, for each command
  {"waits", "most"}: a list of {"operation", "stack"}, where the stack names the functions of this project, the outermost
  first, and the most bytes that were there at a time.

torch is given the device as a backend written in Python (`torch.utils.backend_registration`), for the whole process;
so this is for a process of its own. CUDA's streams, events and pinned memory are not simulated.
"""

import json
import runpy
import sys
import threading
import traceback
import weakref
from pathlib import Path

import torch
from torch.utils._mode_utils import no_dispatch
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

from tests.conftest import ROOT

NAME = "sim"
COPIES = ("aten::copy_", "aten::_to_copy")
WAITING = (
    "aten::_local_scalar_dense",
    "aten::_unique2",
    "aten::bincount",
    "aten::equal",
    "aten::is_nonzero",
    "aten::masked_select",
    "aten::nonzero",
    "aten::repeat_interleave",
    "aten::unique_consecutive",
    "aten::unique_dim",
)

waits: list[dict] = []


class Memory:
    """The bytes of tensors that are on the device, of all threads, and the most of them at a time. State: what is counted."""

    def __init__(self) -> None:
        self.now = self.most = 0
        self._known: set[int] = set()
        self._lock = threading.RLock()  # a storage can be let go of anywhere, by whoever holds the lock, too

    def count(self, held: torch.Tensor) -> None:
        """Count a tensor's storage if it is new, until it is let go of."""
        storage = held.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        with self._lock:
            if key in self._known:
                return
            self._known.add(key)
            self.now += size
            self.most = max(self.most, self.now)
        weakref.finalize(storage, self._forget, key, size).atexit = False

    def _forget(self, key: int, size: int) -> None:
        with self._lock:
            self._known.discard(key)
            self.now -= size


memory = Memory()


class SimulatedTensor(torch.Tensor):
    """A tensor on the device. `held` is the CPU tensor that has its numbers."""

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> "SimulatedTensor":
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        return torch.Tensor._make_wrapper_subclass(cls, held.size(), device=torch.device(NAME, 0), **layout)

    def __init__(self, held: torch.Tensor) -> None:
        self.held = held
        memory.count(held)

    def __repr__(self) -> str:
        return f"SimulatedTensor({self.held!r})"

    def tolist(self):
        waits.append({"operation": "tolist", "stack": _stack()})
        return self.held.tolist()

    def numpy(self, *, force: bool = False):
        raise TypeError(f"can't convert {NAME} device type tensor to numpy")

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        name, kwargs = function._schema.name, dict(kwargs or {})
        if name == "aten::is_pinned":
            return False
        if function._can_decompose():  # made of other operations; in inference mode they come here whole
            return function.decompose(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        stays = _stays_on_device(name, args, kwargs)
        if name in WAITING or (name in COPIES and not stays):
            waits.append({"operation": name, "stack": _stack()})
        elif name not in COPIES and any(not isinstance(tensor, cls) and tensor.dim() for tensor in tensors):
            raise RuntimeError(f"{name}: tensors on the CPU and on {NAME}")
        if "device" in kwargs:
            kwargs["device"] = torch.device("cpu")
        same = {id(tensor.held): tensor for tensor in tensors if isinstance(tensor, cls)}
        result = function(*tree_map(_held, args), **tree_map(_held, kwargs))
        if torch.Tag.inplace_view in function.tags:  # `unsqueeze_` and the like change the shape of this tensor too
            with no_dispatch():
                function(*args, **kwargs)
        # a view of a tensor made outside inference mode is not an inference tensor either
        inference = torch.is_inference_mode_enabled() and (not function.is_view or args[0].is_inference())

        def placed(value):
            if not isinstance(value, torch.Tensor):
                return value
            if id(value) in same:  # in-place operations and `out=` give back what they were given
                return same[id(value)]
            with torch.inference_mode(inference):
                return cls(value) if stays else value

        return tree_map(placed, result)


def _stays_on_device(name: str, args: tuple, kwargs: dict) -> bool:
    if name == "aten::copy_":
        return isinstance(args[0], SimulatedTensor)
    return kwargs.get("device") is None or torch.device(kwargs["device"]).type == NAME


def _held(value):
    return value.held if isinstance(value, SimulatedTensor) else value


def _stack() -> list[str]:
    frames = traceback.extract_stack()
    return [frame.name for frame in frames if Path(frame.filename).is_relative_to(ROOT / "utils")]


class _Backend(_DummyBackendModule):
    """What torch asks of a device's module; autocast asks for dtypes."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]


def _empty(size, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
    return SimulatedTensor(torch.empty(size, dtype=dtype or torch.get_default_dtype()))


def _empty_strided(size, stride, dtype=None, layout=None, device=None, pin_memory=None):
    return SimulatedTensor(torch.empty_strided(size, stride, dtype=dtype or torch.get_default_dtype()))


def _copy_from(source, target, non_blocking=False):
    """What is left of a copy where torch does not let the tensors' own class see it, as in `torch.tensor`."""
    _held(target).copy_(_held(source))
    return target


def register() -> list[torch.library.Library]:
    """Give torch the device; it has it for as long as the result is kept."""
    _setup_privateuseone_for_python_backend(NAME, backend_module=_Backend())
    library = torch.library.Library("aten", "IMPL")
    library.impl("empty.memory_format", _empty, "PrivateUse1")
    library.impl("empty_strided", _empty_strided, "PrivateUse1")
    library.impl("_copy_from", _copy_from, "PrivateUse1")
    return [library]


def take_its_place() -> None:
    """Have everything that is not asked for on the CPU on the device; before anything else of the project is imported."""
    from utils import runtime

    choose = runtime.choose_device
    runtime.choose_device = lambda asked: choose(asked) if asked == "cpu" else (torch.device(NAME, 0), "simulated")


def main() -> None:
    """Run the commands on the device."""
    report, kept, found = Path(sys.argv[1]), register(), []
    take_its_place()
    for words in json.load(sys.stdin):
        waits.clear()
        memory.most = memory.now
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")
        found.append({"waits": list(waits), "most": memory.most})
    report.write_text(json.dumps(found))
    kept.clear()


if __name__ == "__main__":
    main()
