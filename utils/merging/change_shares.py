"""How much of each expert's change is in a merge that is not written, tensor by tensor.

    for one in change_shares(planned, names): ...      # one mapping for each expert, in the order of the recipe

The share of an expert's change is the factor by which its change has to be multiplied to come nearest to the merged one:
0 where the merge has nothing of it, 1 where it has all of it, negative where it goes against it.
"""

from collections.abc import Collection

import torch
from torch import Tensor

from utils.merging.merged_tensors import merged_tensors, prepare
from utils.merging.planning import PlannedMerge
from utils.models.headers import FLOAT_DTYPES
from utils.models.tensor_files import TensorFiles

_AT_ONCE = 2**20  # entries in float64


def share_of_change(merged: Tensor, base: Tensor, expert: Tensor) -> float | None:
    """<merged - base, expert - base> / <expert - base, expert - base>, in float64, some entries at a time.

    Args:
        merged, base, expert: tensors of one shape, of any floating-point dtypes, on one device.

    Returns:
        The share; None where the expert has not changed the tensor.
    """
    common = squared = 0.0
    parts = (one.reshape(-1).split(_AT_ONCE) for one in (merged, base, expert))
    for of_merged, of_base, of_expert in zip(*parts, strict=True):
        start = of_base.double()
        change = of_expert.double() - start
        common += float((of_merged.double() - start) @ change)
        squared += float(change @ change)
    return common / squared if squared else None


def change_shares(planned: PlannedMerge, names: Collection[str]) -> list[dict[str, float]]:
    """The share of each expert's change in some tensors of a planned merge.

    Each tensor is merged in memory by the functions that command 3 merges with, and compared while its inputs are in the
    system's cache: one pass over the inputs. In memory are the merged tensor, the base's and one expert's at a time, beside
    what merging takes; nothing is written.

    Args:
        planned: a merge into a base.
        names: planned tensors. Those that the base or an expert does not have as they are merged (converted while
            loading, another vocabulary, no floating-point numbers) are passed over for it.

    Returns:
        For each model but the base, in the plan's order, its share by tensor, without those that it has not changed.

    Raises:
        UserError: a merged tensor is not finite, or an input cannot be read.
    """
    inputs = planned.plan.inputs
    base, work = inputs.config.base_model, prepare(planned)
    experts = [one.reference for one in inputs.models if one.reference != base]
    found: list[dict[str, float]] = [{} for _ in experts]
    for tensor in planned.plan.tensors:
        alike = {
            model for model, one in tensor.sources.items() if one.shape == tensor.shape and one.dtype in FLOAT_DTYPES
        }
        if tensor.name not in names or base not in alike or len(alike) < 2:
            continue
        merged = merged_tensors([work], [tensor.name])[0].get(tensor.name)
        if merged is None:  # an optional tensor that the method leaves out
            continue
        merged, headers = merged.cpu(), [tensor.sources[model] for model in tensor.sources if model in alike]
        with torch.inference_mode(), TensorFiles(file for header in headers for file in header.files) as files:
            start = files.read_whole(tensor.sources[base])
            for expert, shares in zip(experts, found, strict=True):
                if expert in alike:
                    share = share_of_change(merged, start, files.read_whole(tensor.sources[expert]))
                    if share is not None:
                        shares[tensor.name] = share
    return found
