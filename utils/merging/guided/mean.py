"""The mean of several changes, entry by entry, each weighed by how much its own task cares: tensors in, a tensor out.

    q_t    = (F_t / mean F_t)^power                       F_t ~ axis0_i axis1_j, the mean over the tensor
    merged = base + scale * sum_t w_t q_t m_t a_t delta_t / (sum_t w_t q_t + floor * mean of (sum_t w_t q_t) / T)

Averaging by Fisher information (arXiv 2111.09832) of task vectors delta_t, each tensor's information relative to its
mean, with an exponent. The floor leaves entries that matter to no task near the base; with none, an entry's divisor may
be 0, and there the mean by the weights alone is taken.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ENTRIES_AT_ONCE = 2**21  # entries in temporaries together
TEMPORARIES = 24 * ENTRIES_AT_ONCE  # bytes, about: six float32 of them


@dataclass(frozen=True)
class WeighedModel:
    """A model whose change is averaged.

    `tensor` is the model's, of the base's shape and device; `weight` w_t, at least 0; `axes` one vector for each axis of
    a matrix, F itself for a tensor of one axis, None where all entries count alike (q_t = 1). `kept` is m_t, bool, of
    the base's shape; None keeps all. `factor` a_t is that of the change alone.
    """

    tensor: Tensor
    weight: float
    axes: tuple[Tensor, ...] | None
    kept: Tensor | None = None
    factor: float = 1.0


def guided_mean(
    base: Tensor, models: Sequence[WeighedModel], *, power: float, floor: float, scale: float = 1.0
) -> Tensor:
    """Average the changes of T models; temporaries are bounded, whatever the tensor's size.

    Args:
        base: any shape, floating-point.
        models: those with weight 0 count for T alone.
        power: above 0, at most 1.
        floor: at least 0.
        scale: factor on the mean.

    Returns:
        A new tensor of the base's shape and dtype, computed in float32 (float64 for float64) and rounded once. Where no
        model has a weight above 0 it is the base.

    Raises:
        ValueError: axes that do not fit the tensor.
    """
    if not base.numel():
        return base.clone()
    before = _as_matrix(base)
    exact = torch.promote_types(base.dtype, torch.float32)
    weighed = [_Weighed.of(model, base, power, exact) for model in models if model.weight]
    least = floor / max(1, len(models)) * sum(one.weight * one.mean for one in weighed)
    merged = torch.empty_like(before, memory_format=torch.contiguous_format)
    at_once = max(1, ENTRIES_AT_ONCE // before.shape[1])
    for start in range(0, before.shape[0], at_once):
        rows = slice(start, start + at_once)
        merged[rows] = _mean_of_rows(before[rows].to(exact), weighed, rows, least, scale)
    return merged.view(base.shape)


@dataclass(frozen=True)
class _Weighed:
    """A model as matrices: q = outer(down, across), whose mean is `mean`."""

    tensor: Tensor
    kept: Tensor | None
    weight: float
    down: Tensor
    across: Tensor
    mean: float
    factor: float

    @classmethod
    def of(cls, model: WeighedModel, base: Tensor, power: float, exact: torch.dtype) -> "_Weighed":
        matrix = _as_matrix(model.tensor)
        axes = model.axes
        if axes is None:
            axes = tuple(torch.ones(length) for length in matrix.shape)
        elif tuple(axis.numel() for axis in axes) != (tuple(base.shape) or (1,)):
            lengths = " and ".join(str(axis.numel()) for axis in axes)
            raise ValueError(f"vectors of {lengths} do not fit a tensor {list(base.shape)}")
        elif len(axes) == 1:
            axes = (*axes, torch.ones(1))
        roots = [_relative_power(axis, power) for axis in axes]
        mean = float(roots[0].mean() * roots[1].mean())
        down, across = (root.to(base.device, exact) for root in roots)
        return cls(
            matrix,
            None if model.kept is None else _as_matrix(model.kept),
            model.weight,
            down,
            across,
            mean,
            model.factor,
        )

    def change(self, before: Tensor, rows: slice) -> Tensor:
        """What is kept of the change in some rows."""
        change = self.tensor[rows].to(before.dtype) - before
        change = change if self.factor == 1 else self.factor * change
        return change if self.kept is None else torch.where(self.kept[rows], change, 0.0)


def _mean_of_rows(before: Tensor, weighed: Sequence[_Weighed], rows: slice, least: float, scale: float) -> Tensor:
    above, below = torch.zeros_like(before), torch.full_like(before, least)
    for one in weighed:
        share = torch.outer(one.down[rows] * one.weight, one.across)
        below += share
        above.addcmul_(share, one.change(before, rows))
    nobody = below == 0
    if weighed and bool(nobody.any()):
        total = sum(one.weight for one in weighed)
        plain = sum((one.weight / total) * one.change(before, rows) for one in weighed)
        above, below = torch.where(nobody, plain, above), torch.where(nobody, 1.0, below)
    return before + scale * (above / below) if weighed else before


def _relative_power(axis: Tensor, power: float) -> Tensor:
    """(axis / mean axis)^power in float64 on the CPU: not every device has it. Zeros for a vector of zeros."""
    axis = axis.to("cpu", torch.float64)
    mean = axis.mean()
    return (axis / mean).pow(power) if float(mean) > 0 else torch.zeros_like(axis)


def _as_matrix(tensor: Tensor) -> Tensor:
    """One row for each entry along the first axis."""
    return tensor.reshape(tensor.shape[0] if tensor.dim() else 1, -1)
