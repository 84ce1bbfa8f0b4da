"""What tuning takes on its device, known from configs, headers and text: bytes at the peak of each thing it does.

parts     the merges that give what each expert adds
losses    a way forward alone, with a piece of the logits behind it
step      a way there and back; gradients of a block, then of what lies outside the blocks, summed up in float32, and a
          part beside them while they are multiplied by it
"""

import math
from collections.abc import Sequence

import torch

from utils.guidance.tuned.parts import groups_of, parameters_of
from utils.guidance.tuned.slopes import AT_ONCE
from utils.guidance.tuned.start import Start
from utils.merging.planning import plan_recipe
from utils.merging.resources import arithmetic_bytes
from utils.merging.settings import MergeSettings
from utils.pair.config import ModelEntry
from utils.passes.gradient_memory import gradient_memory
from utils.passes.sample_losses import LOGITS_AT_ONCE
from utils.passes.subjects import Subject, largest_block

_FLOAT32, _FLOAT64 = torch.float32.itemsize, torch.float64.itemsize


def parts_bytes(
    start: Start, base: Subject, experts: Sequence[ModelEntry], settings: MergeSettings, device: torch.device
) -> int:
    """Of the merge of a group of tensors for every expert (`write_parts`), the base beside them where the CPU computes.

    Raises:
        UserError: what command 3 would refuse.
    """
    planned = plan_recipe(settings, start.part_recipe(base.entry, experts, experts[0].type), lambda line: None)
    if torch.device(planned.device).type != device.type:
        return 0
    shapes = {name: value.shape for name, value in base.decoder.model.named_parameters()}
    if base.experts_apart:  # a matrix of a stack at a time
        shapes = {name: shape if len(shape) < 3 else shape[1:] for name, shape in shapes.items()}
    group = max(sum(math.prod(shapes[name]) for name in own) for own in groups_of(base.decoder, parameters_of(base)))
    held = (
        len(experts) - 1 + (device.type == "cpu")
    )  # parts that are there already, and the base where it is subtracted
    return arithmetic_bytes(planned.plan, planned.division, shared=True) + _FLOAT32 * held * group


def losses_bytes(base: Subject, samples: Sequence[Sequence[int]]) -> int:
    """Of the loss of each sample by a way forward (`sample_losses`), behind the blocks."""
    model, size = base.decoder.model, base.dtype.itemsize
    config = model.config.get_text_config(decoder=True)
    rows = model.get_input_embeddings().weight.shape[0]
    logits = min(max(rows, LOGITS_AT_ONCE), rows * max(map(len, samples)))
    return size * (rows + sum(map(len, samples))) * config.hidden_size + logits * (size + 2 * _FLOAT32)


def step_bytes(base: Subject, samples: Sequence[Sequence[int]], device: torch.device) -> int:
    """Of a step on the samples of all tasks (`backward_pass` with `CoefficientSlopes`)."""
    needed, size, block = gradient_memory(base, samples), base.dtype.itemsize, largest_block(base)
    blocks = [
        value[0] if base.experts_apart and value.dim() > 2 else value for value in base.decoder.blocks.parameters()
    ]
    inside = {id(value) for value in base.decoder.blocks.parameters()}
    around = [value.numel() for value in base.decoder.model.parameters() if id(value) not in inside]
    matrix, widest = max(value.numel() for value in blocks), max(around)
    coming = 2 * _FLOAT32 * matrix  # of the next block: a tensor's sum, and the part that is added
    in_block = _FLOAT32 * block + max(needed.block, _multiplied(matrix)) + coming
    cast = _FLOAT32 * widest if device.type == "cpu" and size < _FLOAT32 else 0  # a gradient, on its way into the sum
    without_blocks = _multiplied(widest) - 2 * size * block
    outside = _FLOAT32 * sum(around) + max(needed.outside + cast, without_blocks)
    return needed.held + max(needed.logits, in_block, outside)


def _multiplied(entries: int) -> int:
    """A part, and the pieces in float64 of it and of the gradient that it is multiplied by."""
    return _FLOAT32 * entries + 2 * _FLOAT64 * min(AT_ONCE, entries)
