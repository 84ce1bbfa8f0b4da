"""What lies outside a model's blocks, in the model for as long as a pass lasts."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from utils.errors import UserError
from utils.models.decoder import Decoder
from utils.models.weight_source import WeightSource, placed, share_tied
from utils.passes.block_runner import block_tensor_names


@contextmanager
def placed_outside(decoder: Decoder, weights: WeightSource, device: torch.device) -> Iterator[dict[str, nn.Parameter]]:
    """Put everything outside the blocks into the model; the parameters by name, tied ones once."""
    in_blocks = block_tensor_names(decoder)
    model = decoder.model
    names = [name for name, _ in [*model.named_parameters(), *model.named_buffers()] if name not in in_blocks]
    tensors = weights.fetch(names)
    with placed(model, "", tensors, device):
        share_tied(model, tensors)
        del tensors
        around = {name: value for name, value in model.named_parameters() if name not in in_blocks}
        absent = [name for name, value in around.items() if value.is_meta]
        if absent:
            raise UserError(
                f"{type(model).__name__}: the weights hold no {', '.join(absent[:4])}; gradients need the whole model, "
                "its language-model head included",
                "model-no-head",
            )
        yield around
