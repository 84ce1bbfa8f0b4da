"""Whether an architecture takes the experts of its mixtures one after the other, so that they can be fetched so.

Tried on a few tokens through one block of each kind, with zeros in the place of all weights: nothing is read.
"""

from utils.errors import UserError
from utils.passes.dry_walk import dry_walk, forward_on_zeros, zeros
from utils.passes.experts_in_parts import experts_in_parts, stack_names
from utils.passes.flows import Arrival
from utils.passes.subjects import Subject

_REFUSED = "experts-not-in-parts"


def come_one_at_a_time(subject: Subject) -> bool:
    """Whether `experts_in_parts` works for every block; True where a trial cannot tell, which the pass itself will say."""
    decoder, tried, refused = subject.decoder, set(), []

    def through(layer: int, call: Arrival) -> None:
        names = stack_names(decoder, layer, subject.layout)
        kinds = tuple(type(module) for module in decoder.blocks[layer].modules())
        if not names or kinds in tried:
            return
        tried.add(kinds)
        own = {name: decoder.model.get_parameter(name) for name in names}
        try:
            with experts_in_parts(decoder, layer, names, lambda name, _: zeros(own[name].shape[1:], own[name].dtype)):
                forward_on_zeros(decoder, layer, call, names)
        except UserError as error:
            if _REFUSED not in error.codes:
                raise
            refused.append(layer)

    dry_walk(decoder, next(iter(subject.texts.values())).encoded[0], f"model {subject.entry.name}", through)
    return not refused
