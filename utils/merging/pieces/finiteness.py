"""Whether a merged tensor may be published: one that holds a NaN or an infinity never is."""

import torch

from utils.errors import UserError


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no entry is NaN or infinite. Exact in every dtype; needs no memory of the tensor's size."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    low, high = torch.aminmax(tensor)  # both are NaN as soon as one entry is
    return bool(torch.isfinite(low) and torch.isfinite(high))


def not_finite(name: str) -> UserError:
    """The error that refuses a tensor."""
    return UserError(
        f"the merged tensor {name} holds NaN or infinity, so nothing was published. Check that tensor in the inputs; "
        "with float16, compute in float32 (dtype: float32, out_dtype: float16)"
    )
