"""Dots and lines: one value per row with its interval, on a scale that all rows of a table share."""

from collections.abc import Mapping

from markupsafe import Markup

from utils.reports import svg
from utils.reports.scale import Scale
from utils.reports.values import Estimate, Role, is_known

_MIDDLE = 15  # pixels: level with the first line of text beside it


def dot_strip(
    scale: Scale,
    estimate: Estimate,
    role: Role,
    guides: Mapping[str, float | None],
    worst: float | None = None,
) -> Markup:
    """One row: guides from top to bottom, the interval as a line, the value as the role's shape.

    Args:
        guides: style name -> value of a vertical line ("zero", "reference"); those not known or outside are left out.
        worst: a second value, drawn as a hollow wedge above the line.
    """
    parts = [_guide(scale, style, value) for style, value in guides.items() if _inside(scale, value)]
    if estimate.bounded:
        low, high = sorted((scale.place(estimate.low), scale.place(estimate.high)))
        parts.append(svg.line(low, _MIDDLE, high, _MIDDLE, f"interval {role}"))
    if is_known(worst):
        parts.append(svg.mark("worst", scale.place(worst), _MIDDLE))
    if estimate.known:
        side = scale.beyond(estimate.value)
        shape = {0: role, 1: "beyond-right", -1: "beyond-left"}[side]
        parts.append(svg.mark(shape, scale.place(estimate.value), _MIDDLE, str(role)))
    return svg.strip(parts)


def bar_strip(scale: Scale, value: float) -> Markup:
    """One row: a bar from zero to the value."""
    zero = scale.place(0.0)
    parts = [svg.line(zero, _MIDDLE, scale.place(value), _MIDDLE, "bar"), _guide(scale, "zero", 0.0)]
    return svg.strip(parts)


def axis(scale: Scale, percent: bool = False) -> Markup:
    """The ticks of such a table, above its first row."""
    ticks = Scale(100 * scale.low, 100 * scale.high, scale.start, scale.end) if percent else scale
    parts = []
    for value, label in ticks.ticks():
        x = ticks.place(value)
        parts.append(svg.line(x, 17, x, 22, "tick"))
        parts.append(svg.text(x, 12, f"{label}%" if percent else label))
    return Markup('<svg class="axis" height="22" aria-hidden="true">{}</svg>').format(Markup().join(parts))


def _guide(scale: Scale, style: str, value: float) -> Markup:
    x = scale.place(value)
    return svg.line(x, 0, x, "100%", f"guide {style}")


def _inside(scale: Scale, value: float | None) -> bool:
    return is_known(value) and scale.beyond(value) == 0
