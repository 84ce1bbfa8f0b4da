"""How cost grows with size: a straight line through the measured points, and how well it fits."""

from collections.abc import Sequence
from dataclasses import dataclass

ENOUGH = 3  # points for a statement about growth


@dataclass(frozen=True)
class Growth:
    """`y = fixed + slope x`, fitted by least squares.

    `r_squared` is the share of the variance of y that the line explains, `deviation` the largest distance of a point
    from the line, as a share of its y.
    """

    fixed: float
    slope: float
    r_squared: float
    deviation: float

    def at(self, x: float) -> float:
        """The line's cost at x."""
        return self.fixed + self.slope * x

    def sentence(self, unit: str, per: float) -> str:
        """What the line says, with the slope per `per` units of x."""
        return (
            f"{self.fixed:.2f} s + {self.slope * per:.3f} s per {unit} (R² {self.r_squared:.4f}, no point more than "
            f"{self.deviation:.0%} off the line)"
        )


def fit(xs: Sequence[float], ys: Sequence[float]) -> Growth:
    """Fit a line of least squares through at least three points; costs are above 0.

    Raises:
        ValueError: fewer than three different x.
    """
    if len(set(xs)) < ENOUGH or len(xs) != len(ys):
        raise ValueError(f"growth needs at least {ENOUGH} sizes, got {sorted(set(xs))}")
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / sum((x - mean_x) ** 2 for x in xs)
    fixed = mean_y - slope * mean_x
    left = sum((y - fixed - slope * x) ** 2 for x, y in zip(xs, ys, strict=True))
    total = sum((y - mean_y) ** 2 for y in ys)
    deviation = max(abs(y - fixed - slope * x) / y for x, y in zip(xs, ys, strict=True))
    return Growth(fixed, slope, 1 - left / total if max(ys) > min(ys) else 1.0, deviation)
