"""A fine-tune of a model's language tower alone, seen as the whole model: what the tower lacks is the base's.

So a language model can be an expert of one with a vision tower: what is measured of both goes by the same names. Which
tensor is which is proven parameter by parameter (`utils/models/stored_architecture.py`). No weights are read.
"""

from collections.abc import Mapping
from dataclasses import replace

from utils.errors import UserError
from utils.models.checkpoints import Checkpoint
from utils.models.mergekit_inputs import load_config
from utils.models.stored_architecture import Place, piece_counts, read_models


def as_whole_model(expert: Checkpoint, base: Checkpoint, trust_remote_code: bool = False) -> Checkpoint:
    """The expert as a checkpoint of the base's class; itself where it is of that class, or the base has no such tower.

    Raises:
        UserError: the expert is not like the base's language tower; both store the tower in different pieces.
    """
    if expert.architecture == base.architecture:
        return expert
    config = load_config(base, trust_remote_code)
    if config.get_text_config(decoder=True) is config:
        return expert
    ours, theirs = (model.places() for model in read_models(base, [expert], trust_remote_code))
    _refuse_other_pieces(expert, base, ours, theirs)
    if odd := [name for place, name in theirs.items() if place not in ours]:
        raise UserError(
            f"model {expert.name} stores {odd[0]}, which {base.name} does not (a head that one of them ties?), so it is no "
            "fine-tune of its language tower as it is stored",
            "model-not-of-base",
        )
    own = {
        stored: replace(expert.tensors[theirs[place]], name=stored) for place, stored in ours.items() if place in theirs
    }
    whole = replace(base, name=expert.name, revision=expert.revision, tensors={**base.tensors, **own})
    return replace(whole, tower=expert)


def _refuse_other_pieces(
    expert: Checkpoint, base: Checkpoint, ours: Mapping[Place, str], theirs: Mapping[Place, str]
) -> None:
    """Refuse parameters that are one tensor in one checkpoint and several in the other, as stacks of experts are."""
    pieces = piece_counts(ours)
    for parameter, count in piece_counts(theirs).items():
        if count != pieces.get(parameter, count):
            raise UserError(
                f"model {expert.name} stores in {count} tensors ({theirs[parameter, 0]}) what {base.name} stores in "
                f"{pieces[parameter]} ({ours[parameter, 0]}); load {expert.name} with transformers and save it by "
                f"save_pretrained(folder, save_original_format={count < pieces[parameter]}), so that both are stored alike",
                "model-stored-unlike",
            )
