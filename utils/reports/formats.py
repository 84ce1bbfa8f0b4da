"""Numbers as people read them: a real minus sign, as many digits as tell values apart, a dash for what is not known."""

import math
from collections.abc import Iterable

from utils.reports.values import Estimate, is_known

UNKNOWN = "–"  # noqa: RUF001
_MINUS = "−"  # noqa: RUF001
_SMALLEST_P = 0.001


def number(value: float | None, decimals: int, *, signed: bool = False) -> str:
    """A number with a fixed count of decimals, and its sign where `signed`; infinity as a symbol."""
    if value is None or math.isnan(value):
        return UNKNOWN
    if math.isinf(value):
        return f"{_MINUS if value < 0 else '+' if signed else ''}∞"
    text = f"{abs(value):.{decimals}f}"
    negative = value < 0 and float(text) != 0
    return (_MINUS if negative else "+" if signed and float(text) != 0 else "") + text


def percent(share: float | None, decimals: int = 1, *, signed: bool = False) -> str:
    """A share as a percentage: 0.531 is 53.1%."""
    shown = number(None if share is None else 100 * share, decimals, signed=signed)
    return shown if shown == UNKNOWN else f"{shown}%"


def interval(estimate: Estimate, decimals: int, *, scale: float = 1.0, signed: bool = False) -> str:
    """The ends of an interval times `scale`, or nothing where they are not known."""
    if not estimate.bounded:
        return ""
    low, high = (number(scale * end, decimals, signed=signed) for end in (estimate.low, estimate.high))
    return f"{low} to {high}"


def p_value(p: float | None) -> str:
    """A p value with three decimals, or as below the smallest that is told apart."""
    if not is_known(p):
        return ""
    shown = f"< {_SMALLEST_P}" if p < _SMALLEST_P else f"{p:.3f}"
    return f"p {shown}".replace(" ", "\N{NO-BREAK SPACE}")


def decimals_for(values: Iterable[float | None], digits: int = 3) -> int:
    """How many decimals show the spread of some values with about `digits` significant digits; at most 6."""
    known = [value for value in values if is_known(value)]
    spread = max(known) - min(known) if known else 0.0
    return _decimals(spread or max(map(abs, known), default=0.0), digits)


def decimals_within(estimates: Iterable[Estimate], otherwise: int) -> int:
    """How many decimals show half an interval, a narrow one of several, with two significant digits; at most 6."""
    halves = sorted((each.high - each.low) / 2 for each in estimates if each.bounded)
    return _decimals(halves[len(halves) // 4], 2) if halves else otherwise


def _decimals(size: float, digits: int) -> int:
    return 1 if size == 0 else min(max(digits - 1 - math.floor(math.log10(size)), 0), 6)


def duration(seconds: float | None) -> str:
    """Wall time in the two largest units that matter: 47 s, 12 min 5 s, 3 h 20 min."""
    if not is_known(seconds):
        return ""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"


def count(value: int | None) -> str:
    """A count with a thin space between thousands."""
    return UNKNOWN if value is None else f"{value:,}".replace(",", "\N{NARROW NO-BREAK SPACE}")
