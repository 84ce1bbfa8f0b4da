"""A layer x component heatmap: one rectangle per cell, its number upon it where there is room, and the color scale."""

from collections.abc import Iterable
from dataclasses import replace

from markupsafe import Markup

from utils.reports import svg
from utils.reports.colors import color_at, hexadecimal, text_on
from utils.reports.formats import UNKNOWN, number
from utils.reports.values import Heatmap, is_known

MOST_ROWS, MOST_COLUMNS = 256, 64  # beyond, a part is drawn, which is said
_WRITTEN_ROWS, _WRITTEN_COLUMNS = 40, 16
_LEFT, _RIGHT = 9.0, 91.0
_SHADES = 64
_EVERY, _MOST_LABELS = (2, 5, 10, 20), 24  # which layers are labeled where there are many
_LONGEST_LABEL = 18
_LETTER, _SLOPE = 6.2, 0.64  # width of a letter in pixels; sine of the 40 degrees that labels are turned by


def cut_heatmap(heatmap: Heatmap) -> tuple[Heatmap, str]:
    """The part of a heatmap that is drawn, and a sentence about what is left out, if anything."""
    rows, columns = len(heatmap.layers), len(heatmap.components)
    if rows <= MOST_ROWS and columns <= MOST_COLUMNS:
        return heatmap, ""
    part = replace(
        heatmap,
        layers=heatmap.layers[:MOST_ROWS],
        components=heatmap.components[:MOST_COLUMNS],
        cells=tuple(row[:MOST_COLUMNS] for row in heatmap.cells[:MOST_ROWS]),
    )
    shown = f"{len(part.layers)} of {rows} layers and {len(part.components)} of {columns} components"
    return part, f"Shown are the first {shown}; the recipe holds all of them."


def value_range(heatmaps: Iterable[Heatmap]) -> tuple[float, float]:
    """The least and the greatest known number of several heatmaps, which then share one color scale."""
    known = [value for heatmap in heatmaps for row in heatmap.cells for value in row if is_known(value)]
    return (min(known), max(known)) if known else (0.0, 1.0)


def draw_heatmap(heatmap: Heatmap, low: float, high: float, name: str) -> Markup:
    """The picture; `low` and `high` are the ends of the color scale and `name` is unique on the page."""
    rows, columns = len(heatmap.layers), len(heatmap.components)
    written = rows <= _WRITTEN_ROWS and columns <= _WRITTEN_COLUMNS
    height = 19 if written else 9
    width = (_RIGHT - _LEFT) / max(columns, 1)
    longest = max((min(len(each), _LONGEST_LABEL) for each in heatmap.components), default=0)
    top = round(14 + longest * _LETTER * _SLOPE)
    parts = [_column_label(_LEFT + width * (i + 0.5), top, label) for i, label in enumerate(heatmap.components)]
    every = 1 if written else next((each for each in _EVERY if rows <= each * _MOST_LABELS), rows)
    for row, label in list(enumerate(heatmap.layers))[::every]:
        parts.append(svg.text(_LEFT - 1, top + (row + 0.5) * height + 4, _shortened(label), "end"))
    if written:
        parts += _written_cells(heatmap, low, high, top, height)
    else:
        parts.append(_small_cells(heatmap, low, high, top, height))
    total = top + rows * height + 4
    description = (
        f"{heatmap.quantity} of {rows} layers, from top to bottom, and {columns} components; "
        f"the scale goes from {number(low, 3)} to {number(high, 3)}"
    )
    return svg.picture(parts, total, f"{heatmap.title}: {heatmap.quantity}", description, name)


def draw_color_scale(low: float, high: float, quantity: str, name: str) -> Markup:
    """The color scale from `low` to `high`."""
    steps = _SHADES
    parts = []
    for step in range(steps):
        x = 2 + 96 * step / steps
        parts.append(_rectangle(x, 2, 96 / steps + 0.4, 10, hexadecimal(color_at((step + 0.5) / steps))))
    for share, anchor in ((0.0, "start"), (0.5, "middle"), (1.0, "end")):
        parts.append(svg.text(2 + 96 * share, 26, number(low + share * (high - low), 2), anchor))
    description = f"dark is {number(low, 2)}, bright is {number(high, 2)}"
    return svg.picture(parts, 30, f"color scale of {quantity}", description, name)


def _written_cells(heatmap: Heatmap, low: float, high: float, top: int, height: int) -> list[Markup]:
    """A rectangle per cell with its number upon it; a dash where there is none."""
    width = (_RIGHT - _LEFT) / len(heatmap.components)
    parts = []
    for row, layer in enumerate(heatmap.layers):
        for column, component in enumerate(heatmap.components):
            value = heatmap.cells[row][column]
            x, y = _LEFT + width * column, top + row * height
            if not is_known(value):
                parts.append(svg.text(x + width / 2, y + height / 2 + 4, UNKNOWN))
                continue
            color = color_at(_share(value, low, high))
            where = f"layer {layer}, {component}: {number(value, 3)}"
            parts.append(_rectangle(x, y, width, height, hexadecimal(color), where))
            style = f"cell {text_on(color)}"
            parts.append(svg.text(x + width / 2, y + height / 2 + 4, number(value, 2), "middle", style))
    return parts


def _small_cells(heatmap: Heatmap, low: float, high: float, top: int, height: int) -> Markup:
    """Many cells in little room: one path per color, in units of a column and a row."""
    squares: dict[int, list[str]] = {}
    for row, values in enumerate(heatmap.cells):
        for column, value in enumerate(values):
            if is_known(value):
                shade = min(int(_share(value, low, high) * _SHADES), _SHADES - 1)
                squares.setdefault(shade, []).append(f"M{column} {row}h1v1h-1z")
    paths = Markup().join(
        Markup('<path fill="{}" d="{}"/>').format(hexadecimal(color_at((shade + 0.5) / _SHADES)), "".join(found))
        for shade, found in sorted(squares.items())
    )
    rows, columns = len(heatmap.layers), len(heatmap.components)
    return Markup(
        '<svg class="cells" x="{}%" y="{}" width="{}%" height="{}" viewBox="0 0 {} {}" preserveAspectRatio="none">{}</svg>'
    ).format(_LEFT, top, _RIGHT - _LEFT, rows * height, columns, rows, paths)


def _share(value: float, low: float, high: float) -> float:
    return (value - low) / (high - low) if high > low else 0.5


def _rectangle(x: float, y: float, width: float, height: float, fill: str, title: str = "") -> Markup:
    said = Markup("<title>{}</title>").format(title) if title else Markup()
    return Markup('<rect x="{:.2f}%" y="{}" width="{:.2f}%" height="{}" fill="{}">{}</rect>').format(
        x, y, width, height, fill, said
    )


def _column_label(x: float, top: int, label: str) -> Markup:
    words = Markup("<title>{}</title>{}").format(label, _shortened(label))
    return Markup('<svg x="{:.2f}%" y="{}" overflow="visible"><text transform="rotate(-40)">{}</text></svg>').format(
        x, top - 5, words
    )


def _shortened(label: str) -> str:
    return label if len(label) <= _LONGEST_LABEL else label[: _LONGEST_LABEL - 1] + "…"
