"""How far an expert is from its base, by a sample of the weights: what is no fine-tune of this base shows at once.

A fine-tune changes weights by a few hundredths of their norm, long further pretraining by a few tenths; of two models
that were trained apart the difference is larger than either.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from utils.models.checkpoints import Checkpoint
from utils.models.headers import FLOAT_DTYPES, TensorHeader
from utils.models.tensor_files import TensorFiles

UNUSUAL = 0.5  # relative change beyond what fine-tunes have
_STRETCH = 4096  # entries read at a place
_PLACES = 3  # of a tensor
_TENSORS = 6  # read of a group: blocks are alike, and a mixture may have thousands of experts
_SHOWN = 12


@dataclass(frozen=True)
class GroupChange:
    """The relative change of the tensors of one name but for the layer: norm of the change over the base's norm."""

    group: str
    change: float


def relative_changes(base: Checkpoint, expert: Checkpoint) -> list[GroupChange]:
    """The relative change of each group of matrices that both have in one shape, estimated, the largest first.

    Read are a few thousand entries of a few tensors of each group, in float64: some megabytes of a model of any size.

    Raises:
        UserError: a file cannot be read.
    """
    groups: dict[str, list[tuple[TensorHeader, TensorHeader]]] = {}
    for name, header in base.tensors.items():
        other = expert.tensors.get(name)
        alike = other is not None and other.shape == header.shape and {header.dtype, other.dtype} <= FLOAT_DTYPES.keys()
        if alike and len(header.shape) > 1:
            groups.setdefault(re.sub(r"\.\d+(?=\.)", ".*", name), []).append((header, other))
    chosen = {group: pairs[:: -(-len(pairs) // _TENSORS)] for group, pairs in groups.items()}
    with TensorFiles(header.file for pairs in chosen.values() for pair in pairs for header in pair) as files:
        found = [GroupChange(group, _change(files, pairs)) for group, pairs in chosen.items()]
    return sorted((one for one in found if math.isfinite(one.change)), key=lambda one: -one.change)


def no_fine_tune(base: Checkpoint, expert: Checkpoint, name: str) -> list[str]:
    """A sentence where an expert's weights are too far from the base's for a fine-tune; empty where they are not."""
    far = [one for one in relative_changes(base, expert) if one.change > UNUSUAL]
    if not far:
        return []
    listed = ", ".join(f"{one.group} {one.change:.2f}" for one in far[:_SHOWN])
    more = f" and {len(far) - _SHOWN} more groups" if len(far) > _SHOWN else ""
    return [
        f"{name} does not look like a fine-tune of {base.name}: its weights differ by {far[0].change:.0%} of their norm "
        f"(relative change of {listed}{more}; fine-tunes stay below {UNUSUAL:g}); is the base the right one?"
    ]


def strangers(checkpoints: Mapping[str, Checkpoint], base: str, experts: Sequence[str]) -> list[str]:
    """The same of several experts, by what they are called in `checkpoints`; those that are not there are left out."""
    there = [name for name in experts if name in checkpoints and base in checkpoints and name != base]
    return [line for name in there for line in no_fine_tune(checkpoints[base], checkpoints[name], name)]


def _change(files: TensorFiles, pairs: Sequence[tuple[TensorHeader, TensorHeader]]) -> float:
    """The norm of the changes of some tensors over the norm of what was changed; NaN where that is zero."""
    change = norm = 0.0
    for before, after in pairs:
        old, new = _sample(files, before), _sample(files, after)
        change += float((new - old).square().sum())
        norm += float(old.square().sum())
    return math.sqrt(change / norm) if norm > 0 else math.nan


def _sample(files: TensorFiles, header: TensorHeader) -> torch.Tensor:
    """A few stretches of a tensor, from its beginning to its end, in float64."""
    numel = math.prod(header.shape)
    size = min(_STRETCH, numel)
    starts = sorted({(numel - size) * place // max(1, _PLACES - 1) for place in range(_PLACES)})
    dtype = getattr(torch, FLOAT_DTYPES[header.dtype])
    return torch.cat([files.read(header, start, torch.empty(size, dtype=dtype)).double() for start in starts])
