"""From values to places in a picture: a linear scale in percent of the width, its ticks, and a range that holds."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from utils.reports.formats import number
from utils.reports.values import is_known

_STEPS = (1.0, 2.0, 2.5, 5.0, 10.0, 20.0)
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

    def ticks(self, most: int = 6, least_step: float = 0.0) -> list[tuple[float, str]]:
        """Round values inside the range, at most `most`, each with its label; all labels have the same decimals."""
        power = 10.0 ** math.floor(math.log10((self.high - self.low) / most))
        for step in (max(each * power, least_step) for each in _STEPS):
            first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
            if last - first < most:
                break
        exponent = math.floor(math.log10(step) + 1e-9)
        whole = abs(step / 10.0**exponent - 2.5) > 1e-6  # 2.5 and 0.25 need one digit more than their power of ten
        decimals = max(0, -exponent + (not whole))
        return [(index * step, number(index * step, decimals)) for index in range(first, last + 1)]


def scale_for(
    values: Iterable[float | None],
    keep: Iterable[float | None] = (),
    start: float = 4.0,
    end: float = 96.0,
    margin: float = 0.02,
) -> Scale:
    """A scale over the finite values. Where a few lie far beyond those in `keep`, they are left outside.

    Args:
        values: everything that is drawn.
        keep: what must be told apart well, such as the base, the experts and the best.
        start, end: where the range begins and ends in the picture.
        margin: room at both ends, as a share of the range.
    """
    known = [value for value in values if is_known(value)] or [0.0, 1.0]
    kept = [value for value in keep if is_known(value)]
    low, high = min([*known, *kept]), max([*known, *kept])
    if kept and (span := max(kept) - min(kept)) > 0 and high - low > _WIDEST * span:
        low, high = max(low, min(kept) - span), min(high, max(kept) + span)
    if high == low:
        beyond = abs(high) * 0.1 or 1.0
        low, high = low - beyond, high + beyond
    beyond = margin * (high - low)
    return Scale(low - beyond, high + beyond, start, end)
