"""How much memory a merge method takes for a tensor: what its code allocates on small stand-ins for the inputs, scaled up.

mergekit's methods work on whole tensors, and what they hold at the same time hangs on dtype, number of models and
parameters alike. So each way of merging that a plan has is gone once, with tensors of 16,384 random numbers, and what is alive
at its peak is counted (`utils/merging/allocations.py`): every method of mergekit's is known by its own code. This project's
own methods read files that fit the true shapes alone; for them there are formulas.
"""

import math
from contextlib import ExitStack, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor

from utils.mergekit_api import (
    GatherTensors,
    ModelReference,
    Sparsifier,
    dtype_from_name,
    replaced_sparsifiers,
    rescaled_masked_tensor,
)
from utils.merging.allocations import LiveBytes
from utils.merging.guided.gram_method import GramMean
from utils.merging.guided.mean import TEMPORARIES
from utils.merging.guided.methods import GuidedMean
from utils.merging.guided.own_method import OwnMethod
from utils.merging.pieces.choice import TORCH_DTYPES
from utils.merging.plan import MergePlan, OutputTensor, gathered

_SIDE = 128  # of a stand-in for a matrix
AT_ONCE = {"slerp": 2**20}  # entries that a method has temporaries for at a time, if not all
# Bytes for an input's entry: float32 copies of chunks leave places that the C library does not fill again, in some of the
# three ways through a tensor (measured: 4.4 with 16 M entries, 5.5 with 33 M).
_HOLES = 5
# What a method raises over tensors that it refuses, or that stand-ins are not what it looks for in.
_REFUSALS = (ValueError, TypeError, LookupError, ArithmeticError, RuntimeError, AssertionError)
_LARGE = {"arcee_fusion": 2**21}  # entries of a stand-in, where a method does less for each of many


class MethodMemory:
    """Of a plan's tensors, what is known of each way of merging kept for the tensors that are merged alike."""

    def __init__(self, plan: MergePlan, by_counting: bool) -> None:
        """`by_counting`: what mergekit sorts to select entries is found by counting (`utils/merging/fast_sparsifiers.py`)."""
        self._plan, self._by_counting = plan, by_counting
        self._device = torch.device(plan.options.device)
        self._known: dict[Any, float] = {}

    def of(self, tensor: OutputTensor) -> int:
        """Bytes at the peak of making one tensor: inputs, where they are in memory, temporaries, and the result."""
        entries = tensor.params or tensor.nbytes // 2  # the shape is unknown where the stored tensors are converted
        loaded = {model: _loaded(tensor, model, stored) for model, stored in tensor.stored_dtypes.items()}
        if not loaded:
            return tensor.nbytes  # put together by transformers under a name that its class does not have
        if not all(dtype.is_floating_point for dtype in loaded.values()):
            return tensor.nbytes  # a copy of the first
        inputs = entries * sum(
            dtype.itemsize for model, dtype in loaded.items() if self._in_memory(tensor, model, dtype)
        )
        item = max(dtype.itemsize for dtype in loaded.values())
        if isinstance(self._plan.method, OwnMethod):
            return inputs + _of_own(self._plan, tensor, item)
        each, at_once = self._made(tensor, loaded), AT_ONCE.get(self._plan.method.spec.name, entries)
        result = entries * item
        made = result + (each - item) * min(entries, at_once)
        if at_once < entries and self._device.type == "cpu":
            made += _HOLES * len(loaded) * entries
        return inputs + math.ceil(max(made, result + tensor.nbytes))

    def _in_memory(self, tensor: OutputTensor, model: ModelReference, loaded: torch.dtype) -> bool:
        """Whether an input is more than pages of its file."""
        header = tensor.sources.get(model)
        if header is None:
            return True
        is_read = TORCH_DTYPES.get(header.dtype) == loaded and header.change is None and tensor.shape is not None
        return self._device.type != "cpu" or not is_read or type(tensor.task.gather_tensors) is not GatherTensors

    def _made(self, tensor: OutputTensor, loaded: dict[ModelReference, torch.dtype]) -> float:
        """Bytes for an entry at the method's own peak, its result with them, without the inputs."""
        task = tensor.task
        parameters = [*task.parameters.items()]
        for _, own in task.input_parameters.items():
            parameters += own.items()
        dimensions = len(tensor.assembled.shape if tensor.assembled else tensor.shape or (0, 0))
        key = (dimensions, tuple(loaded.values()), tuple((name, _kind(value)) for name, value in parameters))
        if key not in self._known:
            self._known[key] = self._counted(tensor, loaded, dimensions)
        return self._known[key]

    def _counted(self, tensor: OutputTensor, loaded: dict[ModelReference, torch.dtype], dimensions: int) -> float:
        entries = _LARGE.get(self._plan.method.spec.name, _SIDE * _SIDE)
        shape = (*(1,) * (dimensions - 2), _SIDE, entries // _SIDE) if dimensions > 1 else (entries,)
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(torch.random.fork_rng([self._device] if self._device.type == "cuda" else []))
            stack.enter_context(replaced_sparsifiers(_by_mask, _by_mask) if self._by_counting else nullcontext())
            torch.manual_seed(0)
            common = torch.randn(shape, device=self._device)
            tensors = {
                model: (common + 0.1 * torch.randn(shape, device=self._device)).to(dtype)
                for model, dtype in loaded.items()
            }
            del common
            # The merge meets the true tensors, and says what is wrong if it is; until then inputs and result count.
            with LiveBytes(tensors.values()) as counted, suppress(*_REFUSALS):
                tensor.task.execute(tensors)
        return counted.peak / entries


def _loaded(tensor: OutputTensor, model: ModelReference, stored: str) -> torch.dtype:
    """The dtype in which mergekit gets an input."""
    gather = gathered(tensor.task)
    asked = gather.weight_info[model].force_dtype or gather.dtype
    return dtype_from_name(asked) if asked else TORCH_DTYPES.get(stored, torch.int64)


def _kind(value: Any) -> Any:
    """What of a parameter can make a method work in another way: of a number, whether it is 0, 1 or in between."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return repr(value)  # lists and mappings cannot be looked up
    return (value > 0, value >= 1, value == 1)


def _by_mask(original: Sparsifier) -> Sparsifier:
    """A sparsifier that takes the memory of one that finds a mask by counting, without the tables, whose size is fixed."""

    def half(tensor: Tensor, density: float, rescale_norm: Any = None, *rest: float, **more: float) -> Tensor:
        if not 0 < density < 1:
            return original(tensor, density, rescale_norm, *rest, **more)
        mask = torch.zeros(tensor.shape, dtype=torch.bool, device=tensor.device)
        mask[::2] = True
        return rescaled_masked_tensor(tensor, mask, rescale_norm)

    return half


def _of_own(plan: MergePlan, tensor: OutputTensor, item: int) -> int:
    """Bytes of one of this project's own methods, beside the inputs.

    `guided_ties` is `ties` without its mask, beside w bytes for every change that is cut, and w + 5 while one is cut.
    `guided_mean` takes w for the result, 1 for every change that is cut, 9 more while one is, and a few rows' temporaries.
    `gram_mean` says itself what it takes.
    """
    models = max(1, len(tensor.sources) - 1)
    densities = [values.get("density", 1.0) for _, values in tensor.task.input_parameters.items()]
    cuts = [density for density in densities if 0 < density < 1]
    if isinstance(plan.method, GramMean):
        is_vocabulary = tensor.vocabulary_axis is not None
        density = max(cuts, default=1.0)
        return plan.method.arithmetic_bytes(
            tensor.shape or (),
            models,
            is_vocabulary=is_vocabulary,
            density=density,
            device=torch.device(plan.options.device).type,
        )
    cut = len(cuts)
    if isinstance(plan.method, GuidedMean):
        return (cut + max(item, 9 if cut else 0)) * tensor.params + min(TEMPORARIES, 24 * tensor.params)
    total = models * (2 * item + 2) + 3 * item if dict(tensor.task.parameters.items())["vote"] else 3 * item
    return (cut * item + max(item + 5 if cut else 0, models * item + max(item, total))) * tensor.params
