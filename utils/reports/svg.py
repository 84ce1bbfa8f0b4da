"""The few shapes that the pictures are made of, in percent of the width and pixels of the height; names are escaped.

A picture fills the width it is given while its text keeps its size, so nothing is scaled and nothing overflows.
Colors come from the style sheet by class, for light, dark and print.
"""

from collections.abc import Iterable

from markupsafe import Markup

from utils.reports.values import Role

# One shape per role, so that nothing depends on color alone. Each is drawn around its own origin.
_SHAPES = {
    "base": "M-4.5-4.5h9v9h-9z",
    "expert": "M0-6L5.6 4.4H-5.6z",
    "control": "M0-6L6 0 0 6-6 0z",
    "candidate": "M-5 0a5 5 0 1 0 10 0a5 5 0 1 0-10 0z",
    "worst": "M-4-5L0 3 4-5",
    "pruned": "M-3.2 0a3.2 3.2 0 1 0 6.4 0a3.2 3.2 0 1 0-6.4 0z",
    "failed": "M-4-4L4 4M-4 4L4-4",
    "chosen": "M-8 0a8 8 0 1 0 16 0a8 8 0 1 0-16 0z",
    "beyond-right": "M-3-5L4 0-3 5z",
    "beyond-left": "M3-5L-4 0 3 5z",
    "beyond-up": "M-5 3L0-4 5 3z",
    "beyond-down": "M-5-3L0 4 5-3z",
}


def definitions() -> Markup:
    """The shapes, once per page; `mark` refers to them."""
    paths = Markup().join(Markup('<path id="mark-{}" d="{}"/>').format(name, d) for name, d in _SHAPES.items())
    return Markup('<svg class="definitions" width="0" height="0" aria-hidden="true"><defs>{}</defs></svg>').format(
        paths
    )


def mark(shape: "Role | str", x: float, y: str | float, style: str = "") -> Markup:
    """One of the shapes, its middle at `x` percent and `y` pixels (or a percentage as text)."""
    return Markup('<use href="#mark-{}" x="{}%" y="{}" class="{}"/>').format(shape, _short(x), _y(y), style or shape)


def line(x1: float, y1: str | float, x2: float, y2: str | float, style: str) -> Markup:
    """A straight line; x in percent."""
    return Markup('<line x1="{}%" y1="{}" x2="{}%" y2="{}" class="{}"/>').format(
        _short(x1), _y(y1), _short(x2), _y(y2), style
    )


def text(x: float, y: str | float, words: str, anchor: str = "middle", style: str = "") -> Markup:
    """A label; x in percent."""
    return Markup('<text x="{}%" y="{}" text-anchor="{}" class="{}">{}</text>').format(
        _short(x), _y(y), anchor, style, words
    )


def picture(parts: Iterable[Markup], height: int, title: str, description: str, name: str) -> Markup:
    """A whole picture with its name and description for those who do not see it; `name` is unique on the page."""
    return Markup(
        '<svg class="picture" width="100%" height="{height}" role="img" aria-labelledby="{name}-t {name}-d">'
        '<title id="{name}-t">{title}</title><desc id="{name}-d">{description}</desc>{parts}</svg>'
    ).format(height=height, name=name, title=title, description=description, parts=Markup().join(parts))


def strip(parts: Iterable[Markup]) -> Markup:
    """A picture inside one table cell whose numbers stand beside it."""
    return Markup('<svg class="strip" aria-hidden="true">{}</svg>').format(Markup().join(parts))


def _short(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _y(value: str | float) -> str:
    return value if isinstance(value, str) else _short(value)
