"""Paired differences to a control, their 95 % intervals, and what they say in words. The unit is the seed.

Every method and its control merge the very same models of a seed and are judged on the very same text, so only their
difference varies from seed to seed for reasons that matter. Nothing here knows what is compared.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean difference over `seeds` seeds and its confidence interval; infinite ends where one seed says nothing."""

    mean: float
    low: float
    high: float
    seeds: int

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of zero."""
        return self.low > 0 or self.high < 0


def paired_interval(
    ours: Mapping[int, float], control: Mapping[int, float], confidence: float = CONFIDENCE
) -> Interval:
    """Student's interval for the mean of `ours - control`, paired by key (the seed).

    mean +- t(n - 1) * s / sqrt(n) with s the sample standard deviation of the n differences.

    Raises:
        ValueError: the two do not have the same keys, or none.
    """
    if ours.keys() != control.keys() or not ours:
        raise ValueError(f"keys differ or are missing: {sorted(ours)} and {sorted(control)}")
    differences = [ours[key] - control[key] for key in ours]
    mean, count = statistics.fmean(differences), len(differences)
    if count == 1:
        return Interval(mean, -math.inf, math.inf, 1)
    half = t_quantile((1 + confidence) / 2, count - 1) * statistics.stdev(differences) / math.sqrt(count)
    return Interval(mean, mean - half, mean + half, count)


def verdict(interval: Interval, scale: float = 100.0, unit: str = "points") -> str:
    """One sentence: helps, hurts, or no difference seen, with the mean and the interval times `scale`."""
    mean = f"{interval.mean * scale:+.1f} {unit}"
    if interval.seeds == 1:
        return f"one seed says nothing certain: {mean}"
    within = (
        f"{mean}, 95 % interval {interval.low * scale:+.1f} to {interval.high * scale:+.1f}, {interval.seeds} seeds"
    )
    if not interval.excludes_zero:
        return f"no difference seen: {within}"
    return f"{'helps' if interval.low > 0 else 'hurts'}: {within}"


def t_cdf(value: float, freedom: int) -> float:
    """Distribution function of Student's t for whole degrees of freedom, by its finite sums.

    With theta = atan(t / sqrt(v)): for odd v, 1/2 + (theta + sin(theta) * sum) / pi with the sum over odd powers of
    cos(theta); for even v, 1/2 + sin(theta) / 2 * sum over even powers (Abramowitz and Stegun 26.7.3 and 26.7.4).
    """
    if freedom < 1:
        raise ValueError(f"degrees of freedom are {freedom}, not 1 or more")
    theta = math.atan(value / math.sqrt(freedom))
    odd = freedom % 2
    term = total = math.cos(theta) if odd else 1.0
    for power in range(3 if odd else 2, freedom - 1, 2):
        term *= math.cos(theta) ** 2 * (power - 1) / power
        total += term
    if odd:
        return 0.5 + (theta + (math.sin(theta) * total if freedom > 1 else 0.0)) / math.pi
    return 0.5 + math.sin(theta) * total / 2


def t_quantile(probability: float, freedom: int) -> float:
    """The value below which Student's t lies with `probability`, by bisection to the last digits.

    Raises:
        ValueError: the probability is not strictly between 0 and 1.
    """
    if not 0 < probability < 1:
        raise ValueError(f"probability {probability} is not between 0 and 1")
    if probability < 0.5:
        return -t_quantile(1 - probability, freedom)
    low, high = 0.0, 1.0
    while t_cdf(high, freedom) < probability:
        low, high = high, 2 * high
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if t_cdf(middle, freedom) < probability else (low, middle)
    return (low + high) / 2


def by_seed(rows: Sequence[Mapping], figure: str) -> dict[int, float]:
    """One figure of each row by the row's `seed`.

    Raises:
        ValueError: a seed occurs twice.
    """
    found = {int(row["seed"]): float(row[figure]) for row in rows}
    if len(found) != len(rows):
        raise ValueError(f"a seed occurs twice among {len(rows)} rows")
    return found
