"""Which entries of a change to keep when each is worth its saliency: pure tensors in, a mask out.

    saliency_ij = delta_ij^2 F_ij,     F_ij ~ axis0_i axis1_j      (for a tensor of one axis: F_i = axis0_i)

the second-order estimate (up to a factor) of what the loss loses with the entry, with the squared gradient for
curvature (optimal brain damage; the Fisher information of a matrix in Kronecker form, diagonal). Only the order within
one tensor decides, so entries are ranked by the root,

    rank_ij     = |delta_ij| sqrt(axis0_i / max axis0) sqrt(axis1_j / max axis1)

in float32, where the square itself would not fit: delta ~ 1e-5 and F ~ 1e-12 make 1e-22, and what is small beside them
less than the 1e-38 that float32 can hold. Divided by their largest entry the vectors lie in [0, 1], so no rank
overflows.
"""

import torch
from torch import Tensor

from utils.magnitudes import pattern_of
from utils.selection import top_k_mask


def kept_entries(numel: int, density: float) -> int:
    """Entries of a tensor that a density keeps: int(density numel), but one at least if the density is positive."""
    if density <= 0 or not numel:
        return 0
    return numel if density >= 1 else max(1, int(density * numel))


def saliency_mask(change: Tensor, k: int, *axes: Tensor) -> Tensor:
    """Mark the k entries of largest saliency; ties go to the lowest index in row-major order.

    Args:
        change: delta [a, b] or [a], any floating-point dtype and device.
        k: entries to mark; none if k <= 0, all if k >= a b.
        axes: [a] and [b], or [a] alone: floating-point, finite, at least 0, any device. One of nothing but zeros ranks
            no entry before another and is left out, so that zeros in all leave the order to the magnitudes.

    Returns:
        bool, of the change's shape and on its device, exactly min(max(k, 0), entries) true. Beside it, 4 bytes an entry
        are in use for a while.

    Raises:
        ValueError: shapes that do not fit together.
    """
    if change.shape != tuple(axis.numel() for axis in axes):
        lengths = " and ".join(str(axis.numel()) for axis in axes)
        raise ValueError(f"vectors of {lengths} do not fit a tensor {list(change.shape)}")
    rank = torch.empty(change.shape, dtype=torch.float32, device=change.device)
    rank.copy_(change).abs_()
    for place, axis in enumerate(axes):
        root = relative_root(axis).to(change.device)
        rank.mul_(root.view(-1, *[1] * (len(axes) - 1 - place)))
    return top_k_mask(rank, k)


def magnitude_mask(change: Tensor, k: int) -> Tensor:
    """Mark the k entries of largest magnitude; ties go to the lowest index. float64 is compared as float32."""
    try:
        pattern_of(change.dtype)
    except TypeError:
        change = change.float()
    return top_k_mask(change, k)


def relative_root(axis: Tensor) -> Tensor:
    """sqrt(axis / max axis) in float32; ones for a vector of zeros. On the CPU: not every device has float64."""
    axis = axis.to("cpu", torch.float64)
    if not bool((axis > 0).any()):
        return torch.ones_like(axis, dtype=torch.float32)
    return (axis / axis.max()).sqrt().float()
