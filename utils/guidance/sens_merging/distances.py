"""How far apart two models' logits are, token by token, never all logits at once.

g = mean over tokens x of || logits_a(x) - logits_b(x) ||_2
"""

from collections.abc import Sequence

import torch

from utils.pair.batches import MicroBatch
from utils.passes.language_head import ToLogits

_LOGITS_AT_ONCE = 2**23  # numbers per model and chunk: 32 MiB in float32


def real_tokens(finals: Sequence[torch.Tensor], batches: Sequence[MicroBatch]) -> torch.Tensor:
    """The hidden states of real tokens, in the order of the micro-batches, on the CPU.

    Args:
        finals: final hidden states of each micro-batch, [samples, length, hidden].
        batches: the micro-batches they belong to.

    Returns:
        [tokens, hidden] in the dtype of `finals`.
    """
    kept = []
    for final, batch in zip(finals, batches, strict=True):
        final = final.cpu()  # first: selecting on a GPU would wait for it to know how many there are
        kept.append(final.flatten(0, 1) if batch.mask is None else final[batch.mask])
    return torch.cat(kept)


def tokens_at_once(vocabulary: int) -> int:
    """How many tokens' logits are computed together, for a vocabulary of this size."""
    return max(1, _LOGITS_AT_ONCE // vocabulary)


def logits_bytes(size: int) -> int:
    """What `mean_distance` takes for each of a chunk's logits, in numbers of `size` bytes: both models', both in float32, and
    their difference."""
    return 2 * size + 3 * torch.float32.itemsize if size < torch.float32.itemsize else 3 * size


@torch.inference_mode()
def mean_distance(
    ours: torch.Tensor,
    theirs: torch.Tensor,
    our_logits: ToLogits,
    their_logits: ToLogits,
    device: torch.device,
    at_once: int,
) -> tuple[torch.Tensor, tuple[int, int]]:
    """The mean over tokens of the Euclidean distance of two models' logits (arXiv 2502.12420).

    Where the vocabularies differ in size, the rows that both have are compared. Differences and norms are float32, their
    sum over tokens float64.

    Args:
        ours: final hidden states of one model, [tokens, hidden].
        theirs: those of the other model for the same tokens.
        our_logits: from hidden states on `device` to logits (`utils/passes/language_head.py`).
        their_logits: the same of the other model.
        device: where to compute.
        at_once: tokens per chunk.

    Returns:
        The distance, a float64 scalar on `device`, and the sizes of the two vocabularies.
    """
    if len(ours) != len(theirs):
        raise ValueError(f"hidden states of {len(ours)} and {len(theirs)} tokens cannot be compared")
    total = torch.zeros((), dtype=torch.float64, device=device)
    sizes = (0, 0)
    for mine, other in zip(ours.split(at_once), theirs.split(at_once), strict=True):
        first, second = our_logits(mine.to(device)), their_logits(other.to(device))
        sizes = first.shape[-1], second.shape[-1]
        rows = min(sizes)
        exact = torch.promote_types(first.dtype, torch.float32)
        gap = first[:, :rows].to(exact) - second[:, :rows].to(exact)
        total += torch.linalg.vector_norm(gap, dim=-1).sum(dtype=torch.float64)
    return total / len(ours), sizes
