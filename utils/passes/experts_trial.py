"""Whether an architecture takes the experts of its mixtures one after the other, so that they can be fetched so.

Tried on a few tokens through one block of each kind, with zeros in the place of all weights: nothing is read.
"""

import torch
from torch import Tensor

from utils.errors import UserError
from utils.models.weight_source import placed
from utils.passes.dry_walk import dry_walk
from utils.passes.experts_in_parts import experts_in_parts, stack_names
from utils.passes.flows import Arrival
from utils.passes.shared_state import with_copies
from utils.passes.subjects import Subject

_REFUSED = "experts-not-in-parts"


def come_one_at_a_time(subject: Subject) -> bool:
    """Whether `experts_in_parts` works for every block; True where a trial cannot tell, which the pass itself will say."""
    decoder, tried = subject.decoder, set()

    def through(layer: int, call: Arrival) -> None:
        names = stack_names(decoder, layer, subject.layout)
        block, path = decoder.blocks[layer], f"{decoder.blocks_path}.{layer}"
        kinds = tuple(type(module) for module in block.modules())
        if not names or kinds in tried:
            return
        tried.add(kinds)
        own = {f"{path}.{name}": value for name, value in block.named_parameters()}
        zeros = {name: _zeros(value.shape, value.dtype) for name, value in own.items() if name not in names}
        args, kwargs = with_copies(call.args, call.kwargs)
        with (
            placed(block, path, zeros, torch.device("cpu")),
            experts_in_parts(decoder, layer, names, lambda name, expert: _zeros(own[name].shape[1:], own[name].dtype)),
        ):
            call.forward(*args, **kwargs)

    text = next(iter(subject.texts.values()))
    try:
        dry_walk(decoder, text.encoded[0], f"model {subject.entry.name}", through)
    except UserError as error:
        if _REFUSED in error.codes:
            return False
        raise
    return True


def _zeros(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """One number, whatever the size."""
    return torch.zeros((), dtype=dtype).expand(shape)
