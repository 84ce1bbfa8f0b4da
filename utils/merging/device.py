"""Where a merge computes: what `--device` says, or for `auto` where it should end first."""

from typing import TYPE_CHECKING

from utils.mergekit_api import MergeMethod
from utils.merging.pieces.choice import reason_against
from utils.merging.settings import MergeSettings
from utils.runtime import choose_device

if TYPE_CHECKING:
    import torch

# A thread merges some 50 M parameters a second of two experts by `ties` in pieces, and all threads read and write at the
# same time (benchmarks/merging.py). mergekit's executor, which a GPU needs, reads, computes and writes in turn: with 8
# bytes to move for a parameter it would have to move 3 GB a second to keep up with 8 threads.
ENOUGH_THREADS = 8


def choose_merge_device(settings: MergeSettings, method: MergeMethod) -> "tuple[torch.device, str]":
    """The device of a merge and the reason for it.

    `auto` takes a GPU if one is there, unless the method can be merged in pieces on a CPU with enough threads, and no
    flag that is about GPU memory is given.

    Raises:
        UserError: a device that is unknown or not there.
    """
    import torch

    device, why = choose_device(settings.device)
    if settings.device != "auto" or device.type == "cpu" or settings.low_cpu_memory or settings.read_to_gpu:
        return device, why
    threads = torch.get_num_threads()
    if threads < ENOUGH_THREADS or reason_against(settings, method) is not None:
        return device, why
    name = method.spec.name
    return torch.device(
        "cpu"
    ), f"{name} is merged in pieces while files are read and written (a GPU: --device {device})"
