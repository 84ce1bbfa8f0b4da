"""What mergekit will merge for a set of checkpoints: the tensors, and where the list of them comes from."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from utils.mergekit_api import ModelArchitecture
    from utils.models.headers import TensorHeader

DEFINITION = "mergekit's definition"
ADJUSTED = "mergekit's definition, adjusted"
INFERENCE = "mergekit's inference"
STORED = "the names that the base stores"
_SHOWN = 4


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor that mergekit will merge and write.

    `name` is what filters are matched on and what the output is called. A checkpoint may store it under `name`, under
    one of `aliases`, or, if it is tied, under one of `tied_names`; mergekit tries them in this order.
    """

    name: str
    optional: bool = False
    aliases: tuple[str, ...] = ()
    tied_names: tuple[str, ...] = ()
    vocabulary_axis: int | None = None

    def stored_name(self, tensors: Mapping[str, object]) -> str | None:
        """The name under which a checkpoint's `tensors` hold this one, or None."""
        return next((name for name in (self.name, *self.aliases, *self.tied_names) if name in tensors), None)

    def is_stored(self, tensors: Mapping[str, object]) -> bool:
        """Whether the tensor itself, not one it is tied to, is in a checkpoint's `tensors`."""
        return any(name in tensors for name in (self.name, *self.aliases))


@dataclass(frozen=True)
class ArchitecturePlan:
    """What mergekit will merge for a set of checkpoints.

    Attributes:
        origin: `DEFINITION`, `ADJUSTED`, `INFERENCE` or `STORED`.
        reason: why it is not the definition as shipped, as a clause ("" if it is).
        tensors: every tensor that will be merged and written, in the order of planning. Optional ones that no
            checkpoint stores (a tied head) are not in it.
        missing: per checkpoint folder, planned optional tensors that it can supply neither directly nor through a
            tied one or a conversion, though another checkpoint does. (A missing required one is a `UserError`.)
        dropped: per checkpoint folder, stored tensors that the merge leaves out. The model class reads none of them:
            they are buffers that older versions saved, or extra heads. (Losing one that it reads is a `UserError`.)
        spellings: planned name by every name that a tensor of the base goes by: stored, alias, module parameter.
        info: mergekit's `ModelArchitecture`, to hand to its planner.
    """

    origin: str
    reason: str
    tensors: tuple[PlannedTensor, ...] = field(repr=False)
    missing: Mapping[Path, tuple[str, ...]]
    dropped: Mapping[Path, tuple[str, ...]]
    spellings: Mapping[str, str] = field(repr=False)
    info: "ModelArchitecture" = field(repr=False)

    def embedding_rows(self, tensors: Mapping[str, "TensorHeader"]) -> dict[str, int]:
        """Rows of a checkpoint's token-indexed tensors, by planned name."""
        rows = {}
        for tensor in self.tensors:
            stored = tensor.stored_name(tensors)
            if tensor.vocabulary_axis is not None and stored is not None:
                rows[tensor.name] = tensors[stored].shape[tensor.vocabulary_axis]
        return rows


def natural_order(name: str) -> list[tuple[int, int | str]]:
    """A key that sorts names with their numbers as numbers."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", name)]


def some_of(names: Sequence[str]) -> str:
    """The first few names for a message, those of all blocks as one."""
    unique = list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names))
    more = f" and {len(unique) - _SHOWN} more" if len(unique) > _SHOWN else ""
    return ", ".join(unique[:_SHOWN]) + more
