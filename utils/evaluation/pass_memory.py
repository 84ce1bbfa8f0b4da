"""How much memory a scoring pass takes, known before weights are read: from skeletons and batches alone.

A pass holds the hidden states of all its candidates from the first block to the last, and beside them what the present
stage needs: the tensors of a few candidates that are made at a time, and what making them or computing with them takes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from utils.errors import UserError
from utils.evaluation.encoding import ScoredBatch
from utils.evaluation.row_losses import logits_bytes
from utils.models.decoder import Decoder
from utils.passes.block_runner import block_tensor_names, body_names
from utils.passes.language_head import head_names
from utils.runtime import available_bytes, device_name, gigabytes

_KEPT = 2  # hidden states of a batch between blocks: the block's, and the embeddings that the body's forward began with
_ALIVE = 4  # tensors of the hidden width while a block computes, beside those of its widest layer
_WIDEST = 3  # tensors of the widest layer's width: two that are multiplied, and their product


@dataclass(frozen=True)
class Rider:
    """One candidate of a pass: its skeleton, its batches, what it is stored and computed in.

    `merging` are the bytes that making a tensor of it takes beside the tensor, 0 for a model.
    """

    decoder: Decoder = field(repr=False)
    batches: Sequence[ScoredBatch] = field(repr=False)
    dtype: torch.dtype
    merging: int = 0

    @property
    def hidden(self) -> int:
        """Bytes that are kept between blocks: hidden states, masks."""
        shapes = [scored.batch.input_ids.shape for scored in self.batches]
        width = self._config.hidden_size * self.dtype.itemsize
        return sum(_KEPT * rows * length * width + rows * length * length for rows, length in shapes)

    @property
    def activations(self) -> int:
        """Bytes that a block takes to compute its largest batch."""
        tokens = max(scored.batch.input_ids.numel() for scored in self.batches)
        widest = max(max(value.shape[-2:]) for value in self.decoder.blocks.parameters() if value.ndim > 1)
        return tokens * self.dtype.itemsize * (_WIDEST * widest + _ALIVE * self._config.hidden_size)

    @property
    def logits(self) -> int:
        """Bytes that the losses of a batch take."""
        width = self.decoder.model.get_input_embeddings().weight.shape[0]
        scored = [
            sum(max(0, length - max(1, first)) for first, length in zip(one.firsts, one.batch.lengths, strict=True))
            for one in self.batches
        ]
        return logits_bytes(max(scored), width, self.dtype)

    @property
    def stages(self) -> list[tuple[int, int]]:
        """Bytes of the tensors of each stage (outside the blocks, one block, the head), and of computing with them."""
        inside = block_tensor_names(self.decoder)
        outside = [name for name in body_names(self.decoder) if name not in inside]
        block = max(sum(value.numel() for value in one.parameters()) for one in self.decoder.blocks)
        return [
            (tensor_bytes(self.decoder.model, outside), 0),
            (block * self.dtype.itemsize, self.activations),
            (tensor_bytes(self.decoder.model, head_names(self.decoder)), self.logits),
        ]

    @property
    def _config(self) -> object:
        return self.decoder.model.config.get_text_config(decoder=True)


def refuse_too_large(decoder: Decoder, dtype: torch.dtype, device: torch.device, where: str) -> None:
    """Refuse a model of which a block does not fit into the memory that is free: each is made whole, with all its experts.

    Raises:
        UserError: it does not fit.
    """
    entries = max(sum(value.numel() for value in block.parameters()) for block in decoder.blocks)
    needed, free = entries * dtype.itemsize, available_bytes(device)
    if needed > free:
        half = "--dtype bfloat16, or " if entries * torch.bfloat16.itemsize <= free and dtype.itemsize > 2 else ""
        cpu = "" if device.type == "cpu" else "--device cpu, or "
        raise UserError(
            f"{where}: its largest block takes {gigabytes(needed)} in {str(dtype).removeprefix('torch.')}, and "
            f"{device_name(device)} has {gigabytes(free)} free; a block of each candidate is made whole to be scored, with all "
            f"its experts; use {half}{cpu}a machine with more memory",
            "memory-block-too-large",
        )


def tensor_bytes(model: nn.Module, names: Sequence[str]) -> int:
    """Bytes of some tensors of a model, by its skeleton."""
    wanted = set(names)
    pairs = [*model.named_parameters(), *model.named_buffers()]
    return sum(value.numel() * value.element_size() for name, value in pairs if name in wanted)


def pass_bytes(riders: Sequence[Rider], at_once: Callable[[int], int]) -> int:
    """Bytes that a pass takes at its peak beside the runtime, about.

    Args:
        riders: the candidates that go side by side.
        at_once: how many candidates' tensors are made at a time, where those of one take so many bytes.
    """
    hidden, merging = sum(one.hidden for one in riders), max((one.merging for one in riders), default=0)
    shapes = {id(one.decoder): one for one in riders}  # what shares a skeleton differs in its merge alone
    peak = 0
    for held, computing in (stage for one in shapes.values() for stage in one.stages):
        peak = max(peak, min(len(riders), at_once(held)) * held + max(merging, computing))
    return hidden + peak


def share_passes(riders: Sequence[Rider], available: int, most: int | None) -> list[list[int]]:
    """Put candidates, by their places, into passes whose hidden states fit into so many bytes; at most `most` in each."""
    passes: list[list[int]] = []
    held = 0
    for place, one in enumerate(riders):
        full = passes and most and len(passes[-1]) >= most
        if not passes or full or held + one.hidden > available:
            passes.append([])
            held = 0
        passes[-1].append(place)
        held += one.hidden
    return passes


def passes_line(passes: Sequence[Sequence[int]], needed: int, free: int) -> str:
    """How many passes, of how many candidates, in how much memory; and whether that may be too much."""
    count, most = sum(map(len, passes)), max(map(len, passes))
    said = f"{count} candidate{'s' if count > 1 else ''} in "
    said += "one pass" if len(passes) == 1 else f"{len(passes)} passes"
    said += f" over the inputs, up to {most} at once; memory: about {gigabytes(needed)} beside the runtime, "
    said += f"{gigabytes(free)} free"
    return said + (" (that may not be enough: lower --micro_batch_tokens or the rows)" if needed > free else "")
