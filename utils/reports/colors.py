"""A color scale that grows evenly from dark to bright and is told apart by color-blind readers, and text upon it."""

# Nine points of matplotlib's "cividis" scale (Nunez, Anderton and Renslow 2018), evenly spaced.
_STOPS = (
    (0, 34, 78),
    (26, 56, 111),
    (67, 78, 108),
    (97, 101, 111),
    (125, 124, 120),
    (155, 148, 118),
    (188, 174, 108),
    (222, 201, 88),
    (254, 232, 56),
)


def color_at(share: float) -> tuple[int, int, int]:
    """The color for 0..1, linear between the points; red, green and blue from 0 to 255."""
    at = min(max(share, 0.0), 1.0) * (len(_STOPS) - 1)
    first = min(int(at), len(_STOPS) - 2)
    part = at - first
    low, high = _STOPS[first], _STOPS[first + 1]
    return tuple(round(a + part * (b - a)) for a, b in zip(low, high, strict=True))


def luminance(color: tuple[int, int, int]) -> float:
    """Relative luminance of an sRGB color, 0 to 1 (WCAG 2.2)."""
    linear = [each / 12.92 if each <= 0.04045 else ((each + 0.055) / 1.055) ** 2.4 for each in (c / 255 for c in color)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def text_on(color: tuple[int, int, int]) -> str:
    """Which of "dark" and "bright" text has the higher contrast on a color; it is at least 4.5 on any."""
    return "dark" if luminance(color) > 0.179 else "bright"


def hexadecimal(color: tuple[int, int, int]) -> str:
    """A color as the style sheet writes it."""
    return "#" + "".join(f"{each:02x}" for each in color)
