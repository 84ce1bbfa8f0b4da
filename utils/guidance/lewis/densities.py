"""How a delta table becomes densities (arXiv 2503.03874)."""

import pandas as pd

from utils.guidance.lewis.method import BOUNDS

_DECIMALS = 5  # the released code rounds the deltas before it scales them


def densities(deltas: pd.DataFrame, gamma: float, epsilon: float, bound: str = "minmax") -> pd.DataFrame:
    """Densities of one expert from its delta table.

    `minmax` is the released code's map: the smallest delta of the table gets `gamma`, the largest `epsilon`. `clip` is
    the paper's wording: the deltas, relative to the largest, are clipped to [gamma, epsilon]. Deltas are rounded to
    five decimals first. Where all are equal nothing is known to matter more, and all get `(gamma + epsilon) / 2`.

    Args:
        deltas: layer x component, finite and not negative; NaN where a block has no such component, which stays.
        gamma: density of what changed least, 0 to 1.
        epsilon: density of what changed most, gamma to 1.
        bound: `minmax` or `clip`.

    Returns:
        float64 in the same layout, within [gamma, epsilon] up to one rounding of float64 (the operations are in the
        released code's order, so that its numbers come out bit for bit).
    """
    if bound not in BOUNDS:
        raise ValueError(f"bound {bound!r} is not one of {BOUNDS}")
    # Python's round is exact in decimal; numpy's, which multiplies, differs in the last place.
    rounded = deltas.map(lambda value: round(float(value), _DECIMALS), na_action="ignore")
    low, high = float(rounded.min().min()), float(rounded.max().max())
    if low == high:
        return rounded * 0.0 + (gamma + epsilon) / 2
    if bound == "clip":
        return (rounded / high).clip(gamma, epsilon)
    return gamma + (rounded - low) / (high - low) * (epsilon - gamma)


def share_at_bounds(density: pd.DataFrame, gamma: float, epsilon: float) -> tuple[float, float]:
    """The shares of a density table's entries that are exactly `gamma`, and exactly `epsilon`."""
    return float((density == gamma).to_numpy().mean()), float((density == epsilon).to_numpy().mean())
