"""Products of numbers in bfloat16 by the processor's own instructions for them, summed up in float32.

Held in float32, such numbers multiply exactly in either kind of instruction, but several times as fast in the one made for
16 bits. torch's switch for it is of the whole process, and would round what another thread multiplies in float32
meanwhile: it is used only by work that has said to be alone.
"""

import contextlib
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_ALIKE = 32  # rows
_of_thread = threading.local()


@contextlib.contextmanager
def alone_in_process() -> Iterator[None]:
    """Say that no other thread of this process multiplies matrices while this one is in the context."""
    before = _is_alone()
    _of_thread.alone = True
    try:
        yield
    finally:
        _of_thread.alone = before


@contextlib.contextmanager
def exact_products(*values: "Tensor") -> Iterator[bool]:
    """While the context lasts, have float32 products of the values run on instructions for bfloat16, where they are exact.

    Nothing happens where a value is not in bfloat16, for devices other than the CPU, beside other threads, and on
    processors without such instructions.

    Args:
        values: what will be multiplied, in the dtype it came in.

    Yields:
        Whether they are used; then multiply what `in_float32` gives, else memory grows with every new length.
    """
    import torch

    exact = all(value.dtype == torch.bfloat16 and value.device.type == "cpu" for value in values)
    if not exact or not _is_alone() or not torch.backends.mkldnn.is_available():
        yield False
        return
    products = torch.backends.mkldnn.matmul
    before = products.fp32_precision
    products.fp32_precision = "bf16"
    try:
        yield True
    finally:
        products.fp32_precision = before


def in_float32(rows: "Tensor", used: bool) -> "Tensor":
    """Rows [n, width] in float32; with rows of zeros below if those instructions are `used`, so that lengths repeat.

    For each shape of a product a program of its own is made, which takes 6 ms, and is kept: 3 MB.
    """
    import torch

    if not used:
        return rows.float()
    filled = rows.new_zeros((-(-len(rows) // _ALIKE) * _ALIKE, rows.shape[1]), dtype=torch.float32)
    filled[: len(rows)] = rows
    return filled


def _is_alone() -> bool:
    return getattr(_of_thread, "alone", False)
