"""How far an expert is from its base, by a sample of the weights: what is no fine-tune of this base shows at once.

A fine-tune changes weights by a few hundredths of their norm, long further pretraining by a few tenths; of two models
that were trained apart the difference is larger than either.
"""

import math
import re
from dataclasses import dataclass

import torch

from utils.models.checkpoints import FLOAT_DTYPES, Checkpoint, TensorHeader
from utils.models.tensor_files import TensorFiles

UNUSUAL = 0.5  # relative change beyond what fine-tunes have
_STRETCH = 4096  # entries read at a place
_PLACES = 3  # of a tensor


@dataclass(frozen=True)
class GroupChange:
    """The relative change of the tensors of one name but for the layer: norm of the change over the base's norm."""

    group: str
    change: float


def relative_changes(base: Checkpoint, expert: Checkpoint) -> list[GroupChange]:
    """The relative change of each group of tensors that both have in one shape, estimated, the largest first.

    Read are a few thousand entries of every tensor, in float64: a hundredth of a percent of a large model.

    Raises:
        UserError: a file cannot be read.
    """
    sums: dict[str, list[float]] = {}
    pairs = [
        (header, expert.tensors[name])
        for name, header in base.tensors.items()
        if name in expert.tensors and expert.tensors[name].shape == header.shape
        if {header.dtype, expert.tensors[name].dtype} <= FLOAT_DTYPES.keys()
    ]
    with TensorFiles(header.file for pair in pairs for header in pair) as files:
        for before, after in pairs:
            old, new = _sample(files, before), _sample(files, after)
            found = sums.setdefault(re.sub(r"\.\d+\.", ".*.", before.name), [0.0, 0.0])
            found[0] += float((new - old).square().sum())
            found[1] += float(old.square().sum())
    changes = [GroupChange(group, math.sqrt(change / norm)) for group, (change, norm) in sums.items() if norm > 0]
    return sorted(changes, key=lambda one: -one.change)


def no_fine_tune(base: Checkpoint, expert: Checkpoint, name: str) -> list[str]:
    """A sentence where an expert's weights are too far from the base's for a fine-tune; empty where they are not."""
    far = [one for one in relative_changes(base, expert) if one.change > UNUSUAL]
    if not far:
        return []
    listed = ", ".join(f"{one.group} {one.change:.2f}" for one in far[:4])
    more = f" and {len(far) - 4} more groups" if len(far) > 4 else ""
    return [
        f"{name} does not look like a fine-tune of {base.name}: its weights differ by {far[0].change:.0%} of their norm "
        f"(relative change {listed}{more}; fine-tunes stay below {UNUSUAL:g}); is the base the right one?"
    ]


def _sample(files: TensorFiles, header: TensorHeader) -> torch.Tensor:
    """A few stretches of a tensor, from its beginning to its end, in float64."""
    numel = math.prod(header.shape)
    size = min(_STRETCH, numel)
    starts = sorted({(numel - size) * place // max(1, _PLACES - 1) for place in range(_PLACES)})
    dtype = getattr(torch, FLOAT_DTYPES[header.dtype])
    return torch.cat([files.read(header, start, torch.empty(size, dtype=dtype)).double() for start in starts])
