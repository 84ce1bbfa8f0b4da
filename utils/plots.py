"""The pictures. matplotlib is imported on demand and draws off screen; equal input gives equal bytes."""

import importlib.util
import io
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from utils.errors import UserError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MAX_WRITTEN_LAYERS = 40  # up to here each cell holds its number; beyond, the color bar alone
_INCH_PER_LAYER = 0.27
_INCH_PER_COLUMN = 0.78
_INCH_PER_LETTER = 0.082  # of a title, on average
_LEAST_SPREAD = 0.2  # of the color scale, relative to the numbers on it
_DPI = 120
_STYLES = ("-", "--", ":")


def require_matplotlib(flag: str) -> None:
    """Raise a `UserError` that names `flag` if matplotlib is not installed. Imports nothing."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError(f"{flag} needs matplotlib: pip install matplotlib, or leave the flag out", "no-matplotlib")


def heatmap(table: "pd.DataFrame", title: str, low: float, high: float, label: str = "density") -> bytes:
    """A layer x component heatmap of one expert's densities, or of any such table, as a PNG.

    Args:
        table: rows are layers (top to bottom), by what to call them; columns components. A cell that is NaN stays empty.
        title: may hold line breaks; longer lines are broken to fit.
        low, high: the ends of the color scale.
        label: what the numbers are.
    """
    layers, columns = table.shape
    written = layers <= _MAX_WRITTEN_LAYERS
    longest = max(len(str(name)) for name in table.columns)
    width = max(max(_INCH_PER_COLUMN, 0.085 * longest) * columns + 2.0, 5.2)
    lines = _broken(title, width)
    height = (_INCH_PER_LAYER if written else 0.12) * layers + 1.3 + 0.2 * len(lines)
    figure = _figure(width, max(height, 2.8), lines)
    axes = figure.add_subplot()
    high = high if high > low else low + 1e-6  # a constant table still needs a scale
    image = axes.imshow(table.to_numpy(dtype="float64"), vmin=low, vmax=high, cmap="viridis", aspect="auto")
    axes.set_ylabel("layer")
    axes.set_xticks(range(columns), [str(name) for name in table.columns], fontsize=8)
    step = 1 if written else 5
    axes.set_yticks(range(0, layers, step), [str(name) for name in table.index[::step]], fontsize=8)
    axes.tick_params(length=0)
    if written:
        _write_cells(axes, table, low, high)
    bar = figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02, aspect=max(20.0, 3 * height))
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=8)
    return _png(figure)


def curves(
    table: "pd.DataFrame",
    title: str,
    across: str,
    label: str,
    *,
    reference: tuple[float, str] | None = None,
    half: "pd.DataFrame | None" = None,
    whole: bool = False,
) -> bytes:
    """Lines, one for each column, as a PNG.

    Args:
        table: rows are places along the axis, in their order (numbers); a cell that is NaN has no point.
        title: longer lines are broken to fit.
        across, label: what the places and the values are.
        whole: the places are whole numbers, such as layers.
        reference: a level line and what it is.
        half: as `table`, half the widths of intervals drawn about the points; infinite ones are left out.
    """
    import numpy as np

    width, beside = 8.0, 2.2  # of all, and of the legend's column, where the title does not go
    lines = _broken(title, width - beside)
    figure = _figure(width, 4.2 + 0.2 * len(lines), lines)
    axes = figure.add_subplot()
    places = np.asarray(table.index, dtype="float64")
    apart = min(0.5, 0.08 * len(table.columns)) if half is not None else 0.0  # so that intervals do not hide each other
    for place, name in enumerate(table.columns):
        at = places + apart * (place / max(1, len(table.columns) - 1) - 0.5)
        bars = None if half is None else np.where(np.isfinite(half[name]), half[name], 0.0)
        axes.errorbar(at, table[name].to_numpy(dtype="float64"), yerr=bars, marker="o", markersize=3, linewidth=1.2,
                      capsize=2, label=str(name), color=f"C{place % 10}", linestyle=_STYLES[place // 10 % len(_STYLES)])  # fmt: skip
    if reference is not None:
        value, what = reference
        axes.axhline(value, color="black", linestyle="--", linewidth=1.2, label=f"{what}: {value:.3g}")
    axes.set_xlabel(across)
    axes.set_ylabel(label, fontsize=9)
    axes.xaxis.get_major_locator().set_params(integer=whole)
    axes.grid(alpha=0.25)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return _png(figure)


def color_range(low: float, high: float) -> tuple[float, float]:
    """The ends of a color scale on which nearly equal numbers look it: at least a fifth of their size apart."""
    middle, half = (low + high) / 2, (high - low) / 2
    half = max(half, _LEAST_SPREAD / 2 * max(abs(low), abs(high)))
    return middle - half, middle + half


def _broken(title: str, inches: float) -> list[str]:
    """The lines of a title, broken to fit a width."""
    letters = int(inches / _INCH_PER_LETTER)
    return [part for line in title.splitlines() for part in textwrap.wrap(line, letters)]


def _figure(width: float, height: float, title: Sequence[str]) -> "Figure":
    """An empty figure of so many inches, with a title at its left end."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle("\n".join(title), fontsize=10, x=0.02, ha="left")
    return figure


def _png(figure: "Figure") -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _write_cells(axes: "Axes", table: "pd.DataFrame", low: float, high: float) -> None:
    import numpy as np

    values = table.to_numpy(dtype="float64")
    spread = float(np.nanmax(values) - np.nanmin(values))
    decimals = 3 if 0 < spread < 0.1 else 2
    for (layer, column), value in np.ndenumerate(values):
        if np.isnan(value):
            continue
        color = "black" if (value - low) / (high - low) > 0.55 else "white"
        axes.text(column, layer, f"{value:.{decimals}f}", ha="center", va="center", fontsize=8, color=color)
