"""Magnitudes of floating-point numbers as integers: the bits without the sign.

They order exactly as magnitudes do (IEEE 754), so a rank can be found by counting integers instead of moving entries about:

    zero of either sign = 0  <  subnormals  <  normals  <  infinity  <  every NaN, all tied with each other

Tensors are float32, bfloat16 or float16. Patterns are made in chunks (`CHUNK_ENTRIES`); a strided tensor is copied chunk by
chunk.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Entries at a time. On the CPU a chunk's patterns (1 MiB at most) stay in cache between the steps; on a GPU a chunk must be
# long enough to hide the start of each kernel, and bounds the temporaries to 64 MiB each.
CHUNK_ENTRIES = {"cpu": 1 << 18, "default": 1 << 24}


@dataclass(frozen=True)
class Pattern:
    """How a floating-point type shows its magnitude as an integer."""

    integer: torch.dtype  # of the same width
    bits: int  # width without the sign
    low_bits: int  # counted in a second table: one for all 31 bits of a float32 would have 2**31 counters
    infinity: int


_PATTERNS = {
    torch.float32: Pattern(torch.int32, 31, 16, 0x7F800000),
    torch.bfloat16: Pattern(torch.int16, 15, 0, 0x7F80),
    torch.float16: Pattern(torch.int16, 15, 0, 0x7C00),
}


def pattern_of(dtype: torch.dtype) -> Pattern:
    """The layout of a floating-point type; a TypeError for any but float32, bfloat16 and float16."""
    if dtype not in _PATTERNS:
        names = ", ".join(str(known).removeprefix("torch.") for known in _PATTERNS)
        raise TypeError(f"selection is for {names}, not {str(dtype).removeprefix('torch.')}")
    return _PATTERNS[dtype]


def chunk_entries(x: Tensor) -> int:
    return CHUNK_ENTRIES.get(x.device.type, CHUNK_ENTRIES["default"])


def magnitude_patterns(piece: Tensor, kind: Pattern) -> Tensor:
    """The magnitude patterns of a contiguous piece, as a new integer tensor; every NaN is infinity + 1."""
    bits = piece.view(kind.integer).bitwise_and((1 << kind.bits) - 1)
    return bits.clamp_(max=kind.infinity + 1)


def _flat_pieces(x: Tensor, limit: int) -> Iterator[Tensor]:
    """x in flattened order as contiguous 1-D pieces of at most `limit` entries: views where possible, else copies of one piece."""
    if x.is_contiguous():
        yield from x.view(-1).split(limit)
    elif x.numel() <= limit:
        yield x.reshape(-1)
    elif x[0].numel() > limit:
        for part in x:
            yield from _flat_pieces(part, limit)
    else:
        for part in x.split(limit // x[0].numel()):
            yield part.reshape(-1)


def flat_patterns(x: Tensor, kind: Pattern) -> Iterator[Tensor]:
    for piece in _flat_pieces(x, chunk_entries(x)):
        yield magnitude_patterns(piece, kind)
