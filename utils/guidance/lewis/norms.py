"""The Wanda metric |W| * sqrt(s) of a linear weight: its norm, and pruning by it (arXiv 2306.11695).

Pure tensor functions. W is [out, in]; s [in] is the second moment of each input channel.
"""

import torch

from utils.passes.second_moments import column_square_sums
from utils.selection import smallest_per_row_mask

ENTRIES_AT_ONCE = 2**22  # weight entries turned to float32 at a time: bounds the temporaries to some 16 MiB


def metric_norm(weight: torch.Tensor, second_moment: torch.Tensor) -> torch.Tensor:
    """Frobenius norm of the Wanda metric, || |W| * sqrt(s) ||_F = sqrt(sum_ij W_ij^2 s_j).

    Args:
        weight: [out, in], any float dtype; squares are summed as `column_square_sums` does.
        second_moment: [in], at least 0; used in float64.

    Returns:
        A float64 scalar tensor on the weight's device (no synchronization).
    """
    return norm_of_sums(column_square_sums(weight), second_moment)


def norm_of_sums(squares: torch.Tensor, second_moment: torch.Tensor) -> torch.Tensor:
    """The norm from the sums of squares of the weight's columns, [in] float64 each; as `metric_norm`."""
    return (squares * second_moment.double()).sum().sqrt()


def pruned(weight: torch.Tensor, second_moment: torch.Tensor, ratio: float) -> torch.Tensor:
    """A copy of a weight whose rows have lost their floor(in * ratio) entries of smallest metric.

    Ties in the metric are resolved by column, the lowest first, as a stable sort does. The metric is float32.

    Args:
        weight: [out, in].
        second_moment: [in].
        ratio: share of each row to zero, in [0, 1).
    """
    count = int(weight.shape[1] * ratio)
    scale = second_moment.float().sqrt()
    result = weight.clone(memory_format=torch.contiguous_format)
    for rows in result.split(max(1, ENTRIES_AT_ONCE // max(1, weight.shape[1]))):
        rows.masked_fill_(smallest_per_row_mask(rows.abs().float() * scale, count), 0)
    return result
