"""The parts of one block of the base, with every expert's versions of them, while text goes through it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from utils.guidance.submodule_linearity.gram import NoTokenAxis
from utils.guidance.submodule_linearity.method import TENSOR
from utils.guidance.submodule_linearity.part_changes import Call, PartChanges, Passage, Variant, observe
from utils.guidance.submodule_linearity.parts import Submodule, block_submodules


@dataclass(frozen=True)
class WatchedPart:
    """A part of a block, with the experts' versions of it; `scored` says whether non-linearity is taken."""

    path: str
    part: PartChanges
    variants: Sequence[Variant]
    scored: bool

    @property
    def is_small(self) -> bool:
        """Whether it is a part at the finest level alone, within a part of a coarser one."""
        return self.part.levels == (TENSOR,)

    def take(self, call: Call, passage: Passage) -> None:
        """Observe one call that the base made; a small part's output may lack an axis of tokens."""
        try:
            observe(self.part, call, self.variants, passage, self.scored)
        except NoTokenAxis:
            if not self.is_small:
                raise


def watched_parts(
    blocks: Sequence[nn.Module], layer: int, prefix: str, sums_shape: Sequence[int], *, scores: bool
) -> list[WatchedPart]:
    """The parts of a block, nothing seen of them yet.

    Args:
        blocks: the base's and each expert's, on the device where sums are kept.
        layer: the block's number.
        prefix: what stands before the block's parameters in the model.
        sums_shape: of a part's Gram matrices.
        scores: whether to take the non-linearity of parts that are no single tensors.
    """
    device = next(value.device for value in blocks[0].parameters() if not value.is_meta)
    found = []
    for submodule in block_submodules(blocks[0]):
        names = tuple(prefix + name for name in submodule.parameters)
        sums = torch.zeros(sums_shape, dtype=torch.float64, device=device)
        part = PartChanges(submodule.levels, layer, submodule.name, names, sums)
        variants = [_variant(submodule, blocks[0], other) for other in blocks[1:]]
        found.append(WatchedPart(submodule.path, part, variants, scores and submodule.levels != (TENSOR,)))
    return found


def around(part: PartChanges, watched: Sequence[WatchedPart]) -> PartChanges:
    """The smallest larger part that holds a small one: its weight is taken where the small one's cannot be.

    Some modules do not answer once for each token (norms over heads), or have their weights used without being called.
    """
    larger = [one for one in watched if not one.is_small and set(part.parameters) <= set(one.part.parameters)]
    return min(larger, key=lambda one: len(one.part.parameters)).part


def _variant(submodule: Submodule, base: nn.Module, expert: nn.Module) -> Variant:
    tables = [dict(block.named_parameters()) for block in (base, expert)]
    ours, theirs = ({name: table[name] for name in submodule.parameters} for table in tables)
    path = submodule.path
    below = [f"{path}.{name}" if path else name for name, _ in base.get_submodule(path).named_parameters()]
    around = {name: tables[0][name] for name in below if name not in ours}
    return Variant(expert.get_submodule(path), expert, ours, theirs, around)
