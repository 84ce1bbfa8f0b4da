"""Where a merge computes, and how much memory it takes there."""

import torch

from utils.mergekit_api import MergeMethod
from utils.merging.method_memory import MethodMemory
from utils.merging.pieces.choice import Division, reason_against
from utils.merging.pieces.tensor import buffer_bytes
from utils.merging.pieces.tensor_cuts import table_bytes
from utils.merging.plan import MergePlan
from utils.merging.settings import MergeSettings
from utils.runtime import choose_device

# A thread merges some 50 M parameters a second of two experts by `ties` in pieces, and all threads read and write at the
# same time (benchmarks/merging.py). mergekit's executor, which a GPU needs, reads, computes and writes in turn: with 8
# bytes to move for a parameter it would have to move 3 GB a second to keep up with 8 threads.
ENOUGH_THREADS = 8

_FREE = 7 * 2**20  # bytes that the checks before have left free in the process (measured): a thread's buffers fit in
_LEAST = 3 * 2**20  # bytes; merges without counts took up to 4 MB


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

    mergekit's executor merges tensors in the order of their names. Of each there are at the same time the inputs, where they
    are no pages of their files (converted while they were read, aligned to a vocabulary, on a GPU), and what the method
    makes (`utils/merging/method_memory.py`), beside the part of a shard that is there already.

    For tensors merged in pieces, the buffers of every thread and the tables of the tensor that all of them count count
    instead, with the first spans of the next one's, and no weight file. What the process has free by then (`_FREE`) does not.
    """
    if division.direct:
        return max(_LEAST, arithmetic_bytes(plan, division) - _FREE)
    device, needed = plan.options.device, MethodMemory(plan, division.by_counting)
    kept_there = device == "cpu" or settings.low_cpu_memory  # where merged tensors wait for the rest of their shard
    peak = held = 0
    for tensor in sorted(plan.tensors, key=lambda tensor: tensor.name):  # mergekit's order
        if settings.out_shard_size and held + tensor.nbytes > settings.out_shard_size:
            held = 0
        peak = max(peak, held + needed.of(tensor))
        held += tensor.nbytes if kept_there else 0
        peak = max(peak, held * (2 if settings.async_write else 1))
    return peak


def arithmetic_bytes(plan: MergePlan, division: Division, *, shared: bool = False) -> int:
    """Bytes that making a merge's tensors takes at its peak, about, whatever becomes of them then.

    `shared`: other recipes are made of the same inputs in the same run."""
    needed = MethodMemory(plan, division.by_counting)
    if division.direct:
        threads = torch.get_num_threads()
        tables = max(map(table_bytes, division.direct))
        begun = 2 * (threads - 1)  # spans of the next tensor that others count while the last of this one are
        tables += max(table_bytes(tensor, begun) for tensor in division.direct)
        buffers = max(buffer_bytes(tensor, shared=shared) for tensor in division.direct)
        left = (needed.of(tensor) + tensor.nbytes for tensor, _ in division.left)
        return max(threads * buffers + tables, *left, 0)
    return max((needed.of(tensor) for tensor in plan.tensors), default=0)
