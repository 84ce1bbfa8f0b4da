"""Axes around a picture of points: where a pair of values lies, ticks, grid and the names of both axes."""

from collections.abc import Iterable
from dataclasses import dataclass

from markupsafe import Markup

from utils.reports import svg
from utils.reports.scale import Scale, scale_for

HEIGHT = 300
LEFT, RIGHT = 11.0, 98.0  # percent of the width
TOP, BOTTOM = 30.0, HEIGHT - 44.0  # pixels
_MARGIN = 0.06
_MOST_TICKS = 8


def across(values: Iterable[float | None], keep: Iterable[float | None] = ()) -> Scale:
    """A scale from left to right."""
    return scale_for(values, keep, LEFT, RIGHT, _MARGIN)


def up(values: Iterable[float | None], keep: Iterable[float | None] = ()) -> Scale:
    """A scale from bottom to top."""
    return scale_for(values, keep, BOTTOM, TOP, _MARGIN)


@dataclass(frozen=True)
class Frame:
    """Two scales with the names of what they measure; a percentage is a share times 100, `x_whole` a count."""

    across: Scale
    up: Scale
    x_name: str
    y_name: str
    x_percent: bool = False
    y_percent: bool = False
    x_whole: bool = False

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Percent from the left and pixels from the top."""
        return self.across.place(x), self.up.place(y)

    def beyond(self, x: float, y: float) -> str:
        """The shape of an arrow to a pair of values that lies outside, on whose edge it is drawn; empty inside."""
        upright = {-1: "beyond-down", 1: "beyond-up"}.get(self.up.beyond(y), "")
        return upright or {-1: "beyond-left", 1: "beyond-right"}.get(self.across.beyond(x), "")

    def draw(self) -> list[Markup]:
        """Grid, ticks and names."""
        parts = []
        for value, label in _ticks(self.up, self.y_percent):
            y = self.up.place(value)
            parts.append(svg.line(LEFT, y, RIGHT, y, "grid"))
            parts.append(svg.text(LEFT - 1, y + 4, label, "end"))
        for value, label in _ticks(self.across, self.x_percent, self.x_whole):
            x = self.across.place(value)
            parts.append(svg.line(x, BOTTOM, x, BOTTOM + 5, "tick"))
            parts.append(svg.text(x, BOTTOM + 18, label))
        parts.append(svg.line(LEFT, BOTTOM, RIGHT, BOTTOM, "axis-line"))
        parts.append(svg.text(1, 14, f"↑ {self.y_name}", "start", "axis-name"))
        parts.append(svg.text(RIGHT, HEIGHT - 6, f"{self.x_name} →", "end", "axis-name"))
        return parts

    def zeros(self) -> list[Markup]:
        """Lines at zero of both scales, where they are inside."""
        parts = []
        if self.up.beyond(0.0) == 0:
            parts.append(svg.line(LEFT, self.up.place(0.0), RIGHT, self.up.place(0.0), "guide zero"))
        if self.across.beyond(0.0) == 0:
            x = self.across.place(0.0)
            parts.append(svg.line(x, TOP, x, BOTTOM, "guide zero"))
        return parts


def _ticks(scale: Scale, percent: bool, whole: bool = False) -> list[tuple[float, str]]:
    if not percent:
        return scale.ticks(_MOST_TICKS, least_step=1.0 if whole else 0.0)
    hundredfold = Scale(100 * scale.low, 100 * scale.high)
    return [(value / 100, f"{label}%") for value, label in hundredfold.ticks(_MOST_TICKS)]
