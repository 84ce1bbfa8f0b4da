"""Which entries of a change to keep when what is kept will be fitted anew: pure tensors in, a mask out.

    minimize over x    sum over rows i of  w_i (x_i - d_i) C (x_i - d_i)',    k entries of x not 0

d a change, C the mean of x x' over a layer's inputs with a ridge on its diagonal, w_i what an error in the output i costs. An
entry is worth keeping by itself if its saliency is large, but a fit takes over what other inputs, which come along with its
own, could do as well. Of any set of k entries the best fit is a least-squares solve; the best set is found nearly, by the
alternating directions of Boza (arXiv 2401.02938), with all rows sharing one factorization:

    x <- the best of all x near to z - u:   x = d + (z - u - d) rho (C + rho 1)^-1
    z <- the k entries of x + u of largest  sqrt(w_i) |x + u|_ij
    u <- u + x - z

in units where C has ones on its diagonal, k falling to its end within the first steps. With v = x + u, z and u are v on the
entries that are kept and v on the others, so that v alone is the state.

In float64, but for the ranks. A step takes 2 a b^2 operations for a change [a, b], the factorization b^3.
"""

import torch
from torch import Tensor

from utils.merging.guided.definite import require_finite
from utils.merging.guided.mask import relative_root
from utils.selection import top_k_mask

STEPS = 40
_FALLING = 0.75  # share of the steps within which k falls
_RHO = 0.5


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
    gram = gram.to(change.device, torch.float64)
    roots = relative_root(outputs).to(change.device)[:, None]
    scale, entries = float(gram.diagonal().mean()), change.numel()
    if not scale > 0:
        return top_k_mask(change.float() * roots, k)
    if not 0 < k < entries:
        return torch.full(change.shape, k > 0, device=change.device)
    pull, lengths = _pull(gram, ridge * scale)
    whole = change.double() * lengths
    state = whole.clone()
    for step in range(1, steps + 1):
        mask = top_k_mask(state.float().mul_(roots), _kept(k, entries, step, steps))
        if step == steps:
            break
        apart = state.neg()
        torch.where(mask, state, apart, out=apart).sub_(whole)  # z - u - d
        state.masked_fill_(mask, 0.0).add_(whole).addmm_(apart, pull)  # u + x
        del apart
    return mask


def _kept(k: int, entries: int, step: int, steps: int) -> int:
    """How many entries a step keeps: by a cube, nearly all at first."""
    left = max(0.0, 1 - step / (_FALLING * steps)) if steps > 1 else 0.0
    return k + int((entries - k) * left**3)


def _pull(gram: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """rho (C + rho 1)^-1 [in, in], C with its ridge and in units where its diagonal is 1; and those units [in]."""
    metric = gram.clone()
    metric.diagonal().add_(ridge)
    lengths = metric.diagonal().sqrt()
    metric.div_(lengths[:, None]).div_(lengths).diagonal().add_(_RHO)
    factor, failed = torch.linalg.cholesky_ex(metric)
    if bool(failed):
        raise ValueError("a Gram matrix is far from definite; was it measured on this model?")
    del metric
    return torch.cholesky_inverse(factor).mul_(_RHO), lengths
