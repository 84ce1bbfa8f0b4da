"""Whether the parts of blocks are called as modules, once each: tried before weights are read, on zeros in their place."""

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack

from utils.errors import UserError
from utils.guidance.submodule_linearity.method import TENSOR
from utils.guidance.submodule_linearity.part_changes import refuse_calls
from utils.guidance.submodule_linearity.parts import block_submodules
from utils.models.decoder import Decoder
from utils.passes.dry_walk import DryWalk, dry_walk, forward_on_zeros
from utils.passes.flows import Arrival


def walk_through_parts(decoder: Decoder, ids: Sequence[int], where: str) -> DryWalk:
    """A `dry_walk`, by its arguments, that goes through one block of each kind, too.

    Raises:
        UserError: a part of one, other than a single tensor's, is called never or more than once; as `dry_walk`.
    """
    tried: set[tuple[type, ...]] = set()
    found: dict[str, int] = {}  # calls of parts that are not called once

    def through(layer: int, call: Arrival) -> None:
        block = decoder.blocks[layer]
        kinds = tuple(type(module) for module in block.modules())
        if kinds in tried:
            return
        tried.add(kinds)
        paths = [one.path for one in block_submodules(block) if one.path and one.levels != (TENSOR,)]
        calls: Counter[str] = Counter()
        with ExitStack() as stack:
            for path in paths:
                stack.callback(block.get_submodule(path).register_forward_hook(_counting(calls, path)).remove)
            try:
                forward_on_zeros(decoder, layer, call)
            except (UserError, MemoryError):
                raise
            except Exception:  # whatever a model's own code makes of zeros: nothing is known, the pass itself will say
                return
        found.update({f"{path} of block {layer}": calls[path] for path in paths if calls[path] != 1})

    seen = dry_walk(decoder, ids, where, through)
    for part, calls in found.items():
        refuse_calls(calls, 1, f"{where}: {part}")
    return seen


def _counting(calls: Counter[str], path: str) -> Callable[..., None]:
    return lambda *_: calls.update([path])
