"""What `backward_pass` needs, known from configs and text: memory on its device, and room for what waits elsewhere."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from utils.passes.subjects import Subject, largest_block

if TYPE_CHECKING:
    import torch
    from torch import nn


# What the ways back of two models together took on an H100 beyond their tensors (80 MB); it was not seen for what.
_TWO_ON_GPU = 64 * 2**20


@dataclass(frozen=True)
class GradientMemory:
    """Bytes of one model's way forward and back.

    `held` are there all the time: what lies outside the blocks, two blocks of weights, two hidden states of every sample.
    At one time or another there come on top of that, for one sample: `block`, what autograd keeps of a block and its
    largest gradient; `logits`, with what their loss takes; `outside`, the largest gradient of what lies outside the blocks
    (when no block is there any more). `waiting` are the hidden states at the entrance of every block, which wait elsewhere.
    """

    held: int
    block: int
    logits: int
    outside: int
    waiting: int

    def peak(self, beside_blocks: int = 0) -> int:
        """With `beside_blocks` bytes that are there together with gradients of blocks alone."""
        return self.held + max(self.logits, self.block + beside_blocks, self.outside)


def gradient_memory(subject: Subject, samples: Sequence[Sequence[int]]) -> GradientMemory:
    """Of a model in the dtype it is computed in, and the token ids of each sample."""
    decoder, size = subject.decoder, subject.dtype.itemsize
    block = largest_block(subject)
    inside = {id(value) for value in decoder.blocks.parameters()}
    around = [value for value in decoder.model.parameters() if id(value) not in inside]
    tokens, longest = sum(map(len, samples)), max(map(len, samples))
    hidden = decoder.model.config.get_text_config(decoder=True).hidden_size
    one = [value[0] if subject.experts_apart and value.dim() > 2 else value for value in decoder.blocks.parameters()]
    largest = max(value.numel() for value in one)
    logits = longest * decoder.model.get_input_embeddings().weight.shape[0] * (size + 12)
    widest = size * max(value.numel() for value in around)
    return GradientMemory(
        held=size * (sum(value.numel() for value in around) + 2 * block + 2 * tokens * hidden),
        block=size * largest + max(_kept(block, longest, size) for block in decoder.blocks),
        logits=logits,
        outside=logits + widest - 2 * size * block,
        waiting=size * tokens * hidden * len(decoder.blocks),
    )


def beside_two(device: "torch.device") -> int:
    """Bytes that the ways back of two models together take beyond their tensors."""
    return 0 if device.type == "cpu" else _TWO_ON_GPU


def on_the_disk(waiting: int, device: "torch.device") -> int:
    """How many of the bytes that wait lie in files without a name: none where a GPU computes, since the host keeps them."""
    return waiting if device.type == "cpu" else 0


def _kept(block: "nn.Module", tokens: int, size: int) -> int:
    """What autograd keeps of a block for one sample, about: what every matrix is given and returns."""
    return tokens * size * sum(sum(value.shape[-2:]) for value in block.parameters() if value.dim() > 1)
