"""How a budget of entries is shared out over tensors by the saliency of their entries: counts in, densities out."""

import numpy as np


def shares_of_budget(counts: np.ndarray, zeros: np.ndarray, budget: float) -> np.ndarray:
    """The share of each tensor's entries that are among the most salient of all tensors together.

    Entries are taken from the highest bin down until the budget is spent. Of the bin in which it ends, each tensor gets
    the same share of its entries, so that the mean is the budget; entries without saliency come last, and are shared out
    the same way if the budget reaches them.

    Args:
        counts: int [tensors, bins], entries by rising saliency; bins are the same for all.
        zeros: int [tensors], entries of saliency 0. No tensor is empty.
        budget: share of all entries to keep, 0 to 1.

    Returns:
        float64 [tensors], 0 to 1. Weighted by the tensors' entries, their mean is `budget` up to roundings (1e-12).
    """
    falling = np.concatenate([zeros[:, None], counts], axis=1)[:, ::-1].astype(np.int64)
    sizes = falling.sum(axis=1)
    target = budget * int(sizes.sum())
    reached = np.cumsum(falling.sum(axis=0))
    last = min(int(np.searchsorted(reached, target)), len(reached) - 1)
    here = falling[:, last]
    above = falling[:, :last].sum(axis=1)
    part = (target - int(above.sum())) / max(1, int(here.sum()))
    return np.clip((above + part * here) / sizes, 0.0, 1.0)
