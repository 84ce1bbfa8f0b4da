"""Where a merge computes, and how much memory it takes there."""

import math

import torch

from utils.mergekit_api import MergeMethod, SparsificationMethod
from utils.merging.guided.gram_method import GramMean
from utils.merging.guided.mean import TEMPORARIES
from utils.merging.guided.methods import GuidedMean, OwnMethod
from utils.merging.pieces.choice import Division, reason_against
from utils.merging.pieces.tensor import buffer_bytes
from utils.merging.pieces.tensor_cuts import table_bytes
from utils.merging.plan import MergePlan, OutputTensor
from utils.merging.settings import MergeSettings
from utils.runtime import choose_device

# A thread merges some 50 M parameters a second of two experts by `ties` in pieces, and all threads read and write at the
# same time (benchmarks/merging.py). mergekit's executor, which a GPU needs, reads, computes and writes in turn: with 8
# bytes to move for a parameter it would have to move 3 GB a second to keep up with 8 threads.
ENOUGH_THREADS = 8

_ITEM = {"float64": 8, "float32": 4}
_SORT = 24  # bytes per entry: a float32 copy, the sorted copy, int64 indices and their exchange buffer
_ALLOCATED = 12 * 2**20  # bytes that freed buffers leave in allocators where tensors are merged in pieces (measured)
_COUNT = 1  # bytes per entry of a mask found by counting (`utils/merging/fast_sparsifiers.py`)


def choose_merge_device(settings: MergeSettings, method: MergeMethod) -> tuple[torch.device, str]:
    """The device of a merge and the reason for it.

    `auto` takes a GPU if one is there, unless the method can be merged in pieces on a CPU with enough threads, and no
    flag that is about GPU memory is given.

    Raises:
        UserError: a device that is unknown or not there.
    """
    device, why = choose_device(settings.device)
    if settings.device != "auto" or device.type == "cpu" or settings.low_cpu_memory or settings.read_to_gpu:
        return device, why
    threads = torch.get_num_threads()
    if threads < ENOUGH_THREADS or reason_against(settings, method) is not None:
        return device, why
    name = method.spec.name
    reason = f"{name} is merged in pieces while files are read and written (a GPU: --device {device})"
    return torch.device("cpu"), reason


def memory_estimate(plan: MergePlan, division: Division, settings: MergeSettings) -> int:
    """Bytes that a merge takes at its peak beside the runtime, about; file pages that can be dropped are not counted.

    The formula is fitted to mergekit 0.1.5 on the CPU (measured with one tensor of 65 M entries): for n changed models
    and items of w bytes, per entry of a tensor,

        n w                     the changes
        (n + 1) w               the inputs, if their dtype is another one
        2 w + 24 | 2 w + 1      a mask by magnitude, which sorts everything, or is found by counting
        7 w | w                 a mask by chance; none
        n (2 w + 2) + 3 w | 3 w the sign vote, with the sum; the sum alone

    where the last two are not there at the same time, beside the part of a shard that is there already: mergekit merges tensors in
    the order of their names. For tensors merged in pieces, the buffers of every thread and the
    tables of the tensors that can be under way at once, one a thread and the one that comes next, count instead, and no
    weight file.

    `guided_ties` is `ties` without its mask, beside w bytes for every change that is cut; w + 5 bytes while one is cut.
    `guided_mean` takes w for the result, 1 for every change that is cut, 9 more while one is, and a few rows' temporaries.
    `gram_mean` says itself what it takes.
    """
    if division.direct:
        return arithmetic_bytes(plan, division) + _ALLOCATED
    ranking = _COUNT if division.by_counting else _SORT
    peak = held = 0
    for tensor in sorted(plan.tensors, key=lambda tensor: tensor.name):  # mergekit's order
        peak = max(peak, held + _arithmetic(plan, tensor, ranking))
        held += tensor.nbytes
        peak = max(peak, held * (2 if settings.async_write else 1))
        if settings.out_shard_size and held > settings.out_shard_size:
            held = 0
    return peak


def arithmetic_bytes(plan: MergePlan, division: Division, *, shared: bool = False) -> int:
    """Bytes that making a merge's tensors takes at its peak, about, whatever becomes of them then.

    `shared`: other recipes are made of the same inputs in the same run."""
    ranking = _COUNT if division.by_counting else _SORT
    if division.direct:
        threads = torch.get_num_threads()
        tables = sorted((table_bytes(tensor) for tensor in division.direct), reverse=True)[: threads + 1]
        buffers = max(buffer_bytes(tensor, shared=shared) for tensor in division.direct)
        left = (_arithmetic(plan, tensor, ranking) + tensor.nbytes for tensor, _ in division.left)
        return max(threads * buffers + sum(tables), *left, 0)
    return max((_arithmetic(plan, tensor, ranking) for tensor in plan.tensors), default=0)


def _arithmetic(plan: MergePlan, tensor: OutputTensor, ranking: int) -> int:
    """Bytes that one tensor's arithmetic takes; `ranking` bytes per entry go to finding a mask by magnitude."""
    if isinstance(plan.method, GramMean):
        return plan.method.arithmetic_bytes(tensor.shape or (), len(tensor.sources) - 1)
    rows = min(TEMPORARIES, 24 * tensor.params) if isinstance(plan.method, GuidedMean) else 0
    return _per_entry(plan, tensor, ranking) * tensor.params + rows


def _per_entry(plan: MergePlan, tensor: OutputTensor, ranking: int) -> int:
    method = plan.method
    item = _ITEM.get(plan.dtype or tensor.dtype or "", 2)
    stored = {header.nbytes // max(1, math.prod(header.shape)) for header in tensor.sources.values()}
    converted = len(tensor.sources) * item if stored - {item} else 0
    if isinstance(method, OwnMethod):
        guided = _mean_per_entry if isinstance(method, GuidedMean) else _guided_per_entry
        return converted + guided(tensor, item)
    if not hasattr(method, "sparsification_method"):  # the others work in float32, on all inputs at once
        return converted + (len(tensor.sources) + 2) * 4
    models = max(1, len(tensor.sources) - 1)
    densities = [values.get("density", 1.0) for _, values in tensor.task.input_parameters.items()]
    if method.sparsification_method is None or not any(density < 1 for density in densities):
        mask = item
    else:
        mask = 7 * item if method.sparsification_method == SparsificationMethod.random else 2 * item + ranking
    total = models * (2 * item + 2) + 3 * item if method.consensus_method else 3 * item
    return models * item + converted + max(mask, total)


def _guided_per_entry(tensor: OutputTensor, item: int) -> int:
    densities = [values.get("density", 1.0) for _, values in tensor.task.input_parameters.items()]
    models, cut = max(1, len(tensor.sources) - 1), sum(0 < density < 1 for density in densities)
    vote = dict(tensor.task.parameters.items())["vote"]
    total = models * (2 * item + 2) + 3 * item if vote else 3 * item
    return cut * item + max(item + 5 if cut else 0, models * item + max(item, total))


def _mean_per_entry(tensor: OutputTensor, item: int) -> int:
    densities = [values.get("density", 1.0) for _, values in tensor.task.input_parameters.items()]
    cut = sum(0 < density < 1 for density in densities)
    return cut + max(item, 9 if cut else 0)
