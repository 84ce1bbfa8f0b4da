"""Which entries of a change to keep when what is kept will be fitted anew: pure tensors in, a mask out.

    minimize over x    sum over rows i of  w_i (x_i - d_i) C (x_i - d_i)',    k entries of x not 0

d a change, C the mean of x x' over a layer's inputs with a ridge on its diagonal, w_i what an error in the output i costs. An
entry is worth keeping by itself if its saliency is large, but a fit takes over what other inputs, which come along with its
own, could do as well. Of any set of k entries the best fit is a least-squares solve; the best set is found nearly, by the
alternating directions of Boza (arXiv 2401.02938), with all rows sharing one inverse:

    x <- the best of all x near to z - u:   x = d + (z - u - d) rho (C + rho 1)^-1
    x <- a x + (1 - a) z                    over-relaxed, a = 1.5 (Boyd et al. 2011, 3.4.3)
    z <- the k entries of x + u of largest  sqrt(w_i) |x + u|_ij
    u <- u + x - z

in units where C has ones on its diagonal, k falling to its end within the first half of the steps. With v = x + u, z and u are
v on the entries that are kept and v on the others, so that v alone is the state; rows are held times sqrt(w_i).

In float32: only the order of the entries is wanted, and with rho the inverse is no matter of rounding. A step takes 2 a b^2
operations for a change [a, b], the inverse b^3.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from utils.merging.guided.definite import require_finite
from utils.merging.guided.mask import relative_root
from utils.selection import top_k_mask

STEPS = 15
AT_ONCE = 2**22  # entries of rows that are multiplied together
_FALLING, _POWER = 0.5, 7  # the share of the steps within which k falls, and how
_RHO, _RELAXED = 0.5, 1.5


def joint_support(change: Tensor, k: int, gram: Tensor, outputs: Tensor, ridge: float, steps: int = STEPS) -> Tensor:
    """Mark the k entries of a change that, fitted anew together, answer most like the whole.

    Args:
        change: d [out, in], any floating-point dtype.
        k: entries to mark; none if k <= 0, all if k >= out in.
        gram: C [in, in], symmetric and without negative eigenvalues but for rounding.
        outputs: w [out], at least 0; only ratios matter. Nothing but zeros counts as nothing but ones.
        ridge: above 0; what is added to C's diagonal, in units of its mean.
        steps: of the search. One ranks the entries by sqrt(w_i C_jj) |d_ij|.

    Returns:
        bool [out, in] on the change's device, exactly min(max(k, 0), entries) true. Where C is 0 the largest
        sqrt(w_i) |d_ij| are marked.

    Raises:
        ValueError: shapes that do not fit together; a Gram matrix that is not finite, or far from definite.
    """
    if outputs.shape != change.shape[:1] or gram.shape != (change.shape[1],) * 2:
        shapes = [list(tensor.shape) for tensor in (change, gram, outputs)]
        raise ValueError(f"change, Gram matrix and outputs do not fit together: {shapes}")
    require_finite(gram)
    entries = change.numel()
    if not 0 < k < entries:
        return torch.full(change.shape, k > 0, device=change.device)
    scale = float(gram.diagonal().double().mean())
    whole = change.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    whole.mul_(relative_root(outputs).to(change.device)[:, None])
    if not scale > 0:
        return top_k_mask(whole, k)
    pull, lengths = _pull(gram.to(change.device, torch.float32), scale, ridge)
    whole.mul_(lengths)
    state = whole.clone()
    for step in range(1, steps):
        mask = top_k_mask(state, _kept(k, entries, step, steps))
        for part, kept, target in _rows(state, mask, whole):
            apart = torch.where(kept, part, -part).sub_(target)  # z - u - d
            part.mul_(torch.where(kept, 1 - _RELAXED, 1.0)).add_(target, alpha=_RELAXED)
            part.addmm_(apart, pull, alpha=_RELAXED)
    return top_k_mask(state, k)


def search_bytes(shape: tuple[int, int]) -> int:
    """About how many bytes `joint_support` takes at its peak beside its arguments, the mask included."""
    entries = shape[0] * shape[1]
    return 9 * entries + 12 * min(entries, max(AT_ONCE, shape[1])) + 8 * shape[1] ** 2


def _kept(k: int, entries: int, step: int, steps: int) -> int:
    """How many entries a step keeps: many at first."""
    return k + int((entries - k) * max(0.0, 1 - step / (_FALLING * steps)) ** _POWER)


def _pull(gram: Tensor, scale: float, ridge: float) -> tuple[Tensor, Tensor]:
    """rho (C + rho 1)^-1 [in, in], C with its ridge and in units where its diagonal is 1; and those units [in], of a C whose
    mean diagonal is 1."""
    metric = gram / scale
    metric.diagonal().add_(ridge)
    lengths = metric.diagonal().sqrt()
    metric.div_(lengths[:, None]).div_(lengths).diagonal().add_(_RHO)
    factor, failed = torch.linalg.cholesky_ex(metric)
    if bool(failed):
        raise ValueError("a Gram matrix is far from definite; was it measured on this model?")
    del metric
    return torch.cholesky_inverse(factor).mul_(_RHO), lengths


def _rows(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Some rows of each at a time."""
    at_once = max(1, AT_ONCE // tensors[0].shape[1])
    return zip(*(tensor.split(at_once) for tensor in tensors), strict=True)
