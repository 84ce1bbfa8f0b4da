"""From values to places in a picture: a linear scale in percent of the width, its ticks, and a range that holds."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from utils.reports.formats import number
from utils.reports.values import is_known

_STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)
_WIDEST = 3.0  # a range of more than this many times what must be told apart is cut


@dataclass(frozen=True)
class Scale:
    """A linear map of `low`..`high` to `start`..`end`, both of which may run backwards."""

    low: float
    high: float
    start: float = 4.0
    end: float = 96.0

    def place(self, value: float) -> float:
        """Where a value lies; one beyond an end lies on that end."""
        share = (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def beyond(self, value: float) -> int:
        """-1 for a value below the range, 1 for one above, 0 inside."""
        return (value > self.high) - (value < self.low)

    def ticks(self, most: int = 5) -> list[tuple[float, str]]:
        """Round values inside the range, at most `most`, each with its label; all labels have the same decimals."""
        span = self.high - self.low
        power = 10.0 ** math.floor(math.log10(span / most))
        step = next(power * each for each in (*_STEPS, 20.0) if span / (power * each) <= most - 1 + 1e-9)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        decimals = max(0, -math.floor(math.log10(step) + 1e-9))
        if round(step * 10**decimals, 9) % 1:  # 2.5 and 0.25 need one digit more than their power of ten
            decimals += 1
        return [(index * step, number(index * step, decimals)) for index in range(first, last + 1)]


def scale_for(
    values: Iterable[float | None], keep: Iterable[float | None] = (), start: float = 4.0, end: float = 96.0
) -> Scale:
    """A scale over the finite values. Where a few lie far beyond those in `keep`, they are left outside.

    Args:
        values: everything that is drawn.
        keep: what must be told apart well, such as the base, the experts and the best.
    """
    known = [value for value in values if is_known(value)] or [0.0, 1.0]
    kept = [value for value in keep if is_known(value)]
    low, high = min([*known, *kept]), max([*known, *kept])
    if kept and (span := max(kept) - min(kept)) > 0 and high - low > _WIDEST * span:
        low, high = max(low, min(kept) - span), min(high, max(kept) + span)
    if high == low:
        room = abs(high) * 0.1 or 1.0
        low, high = low - room, high + room
    room = 0.02 * (high - low)
    return Scale(low - room, high + room, start, end)
