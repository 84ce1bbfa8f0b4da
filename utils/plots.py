"""The pictures. matplotlib is imported on demand and draws off screen; equal input gives equal bytes."""

import importlib.util
import io
from typing import TYPE_CHECKING

from utils.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

_MAX_WRITTEN_LAYERS = 40  # up to here each cell holds its number; beyond, the color bar alone
_INCH_PER_LAYER = 0.27
_INCH_PER_COLUMN = 0.78
_DPI = 120


def require_matplotlib(flag: str) -> None:
    """Raise a `UserError` that names `flag` if matplotlib is not installed. Imports nothing."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError(f"{flag} needs matplotlib: pip install matplotlib, or leave the flag out")


def heatmap(table: "pd.DataFrame", title: str, low: float, high: float, label: str = "density") -> bytes:
    """A layer x component heatmap of one expert's densities, or of any such table, as a PNG.

    Args:
        table: rows are layers (top to bottom), columns components.
        title: may hold line breaks.
        low, high: the ends of the color scale.
        label: what the numbers are.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    layers, columns = table.shape
    written = layers <= _MAX_WRITTEN_LAYERS
    longest = max(len(str(name)) for name in table.columns)
    width = max(_INCH_PER_COLUMN, 0.085 * longest) * columns + 2.0
    height = (_INCH_PER_LAYER if written else 0.12) * layers + 1.5 + 0.2 * title.count("\n")
    figure = Figure(figsize=(max(width, 5.2), max(height, 2.8)), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    high = high if high > low else low + 1e-6  # a constant table still needs a scale
    image = axes.imshow(table.to_numpy(dtype="float64"), vmin=low, vmax=high, cmap="viridis", aspect="auto")
    axes.set_title(title, fontsize=10)
    axes.set_ylabel("layer")
    axes.set_xticks(range(columns), [str(name) for name in table.columns], fontsize=8)
    step = 1 if written else 5
    axes.set_yticks(range(0, layers, step), [str(layer) for layer in range(0, layers, step)], fontsize=8)
    axes.tick_params(length=0)
    if written:
        _write_cells(axes, table, low, high)
    bar = figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02, aspect=max(20.0, 3 * height))
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _write_cells(axes, table: "pd.DataFrame", low: float, high: float) -> None:
    for column, name in enumerate(table.columns):
        for layer, value in enumerate(table[name]):
            bright = (value - low) / (high - low) > 0.55
            color = "black" if bright else "white"
            axes.text(column, layer, f"{value:.2f}", ha="center", va="center", fontsize=8, color=color)
