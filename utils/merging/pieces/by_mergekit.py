"""mergekit's executor, run in memory: planned tensors in, merged tensors out."""

from collections.abc import Iterator, Sequence

import torch

from utils.mergekit_api import Executor, TaskUniverse, dtype_from_name
from utils.merging.pieces.arithmetic import is_finite, not_finite
from utils.merging.plan import MergePlan, OutputTensor


def merge_by_mergekit(
    tensors: Sequence[tuple[MergePlan, OutputTensor]], device: str = "cpu"
) -> Iterator[tuple[int, torch.Tensor]]:
    """Merge tensors of one or several plans; what several plans read alike is read once.

    Args:
        tensors: the tensors, each with its plan.
        device: torch's name of the device to compute on, where the results stay.

    Yields:
        Place in `tensors`, and the tensor: contiguous, in the output dtype. In mergekit's order. An optional tensor
        that the method skips does not come.

    Raises:
        UserError: a merged tensor is not finite.
    """
    universe = TaskUniverse()
    wanted, known = {}, {}
    for place, (plan, tensor) in enumerate(tensors):
        wanted.setdefault(universe.add_task(tensor.task), []).append(place)
        if plan.vocabulary.task is not None:  # built while planning, so not again
            known[universe.add_task(plan.vocabulary.task)] = plan.vocabulary.info
    for task, value in Executor(list(wanted), device, device, cached_values=known).run(quiet=True):
        for place in wanted[universe.add_task(task)] if value is not None else ():
            tensor = tensors[place][1]
            merged = value.to(dtype=dtype_from_name(tensor.dtype) or value.dtype).contiguous()
            if not is_finite(merged):
                raise not_finite(tensor.name)
            yield place, merged
