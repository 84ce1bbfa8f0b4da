"""Text and models that gradients block by block cannot be taken of."""

from collections.abc import Sequence

from utils.errors import UserError
from utils.models.decoder import Decoder
from utils.passes.block_runner import shared_in_blocks


def refuse_short(samples: Sequence[Sequence[int]]) -> None:
    """Refuse samples without a next token."""
    for place, ids in enumerate(samples):
        if len(ids) < 2:
            raise UserError(
                f"sample {place + 1} of {len(samples)} of the calibration text has {len(ids)} token(s), so no next "
                "token to predict; gradients need longer text: choose another seed, column or data set",
                "text-too-short",
            )


def refuse_shared(decoder: Decoder) -> None:
    """Refuse parameters of a block that are also used elsewhere: a block's gradient would be a part of theirs."""
    if shared := shared_in_blocks(decoder):
        raise UserError(
            f"{type(decoder.model).__name__}: {', '.join(shared[:4])} is shared between decoder blocks or with what "
            "lies outside them; gradients block by block are not supported for it",
            "model-unsupported",
        )
