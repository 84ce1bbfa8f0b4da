"""Sums of x x' over rows x, which are symmetric, so that little more than half is computed: tensors in, tensors out."""

from collections.abc import Iterator

from torch import Tensor

from utils.exact_products import exact_products, in_float32

_PANELS, _LEAST = 4, 256  # more panels save little; narrower ones cost more than they save


def add_gram(total: Tensor, rows: Tensor) -> None:
    """Add X' X to a sum, from its diagonal to the right; what is left of that stays as it is until `complete`.

    Args:
        total: [n, n], float32, changed in place.
        rows: X [rows, n], any floating-point dtype; products are summed up in float32.
    """
    with exact_products(rows) as used:
        exact = in_float32(rows, used)
        for start, end in _panels(len(total)):
            total[start:end, start:].addmm_(exact[:, start:end].t(), exact[:, start:])


def complete(total: Tensor) -> Tensor:
    """A sum [..., n, n] of which `add_gram` has made a part, made whole in place."""
    for start, end in _panels(total.shape[-1]):
        total[..., end:, start:end] = total[..., start:end, end:].mT
    return total


def _panels(width: int) -> Iterator[tuple[int, int]]:
    """(first row, end) of the panels that a sum is computed in."""
    count = max(1, min(_PANELS, width // _LEAST))
    for number in range(count):
        yield width * number // count, width * (number + 1) // count
