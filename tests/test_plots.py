"""The heatmap: a readable PNG, the same bytes for the same numbers."""

import struct
import sys

import numpy as np
import pandas as pd
import pytest

from utils.errors import UserError
from utils.plots import heatmap, require_matplotlib

pytest.importorskip("matplotlib")


def _frame(layers, columns=("q_proj", "down_proj")):
    generator = np.random.default_rng(0)
    return pd.DataFrame({name: generator.uniform(0.3, 0.8, layers) for name in columns})


def _size(png):
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", png[16:24])


def test_equal_input_gives_equal_bytes_without_dates_or_versions():
    first, second = (heatmap(_frame(4), "math", 0.3, 0.8) for _ in range(2))
    assert first == second
    assert b"tEXt" not in first and b"tIME" not in first
    assert first != heatmap(_frame(4) * 0.9, "math", 0.3, 0.8)


def _texts(monkeypatch, layers, title="math"):
    """Every text that is drawn into the picture's cells."""
    from matplotlib.axes import Axes

    drawn = []
    original = Axes.text
    monkeypatch.setattr(Axes, "text", lambda self, x, y, s, **more: drawn.append(s) or original(self, x, y, s, **more))
    heatmap(_frame(layers), title, 0.3, 0.8)
    return drawn


def test_cells_hold_their_densities_up_to_forty_layers(monkeypatch):
    frame = _frame(40)
    assert _texts(monkeypatch, 40) == [f"{value:.2f}" for name in frame for value in frame[name]]


def test_deep_models_get_the_color_bar_alone(monkeypatch):
    assert _texts(monkeypatch, 41) == []


@pytest.mark.parametrize("layers", [1, 3, 40, 80, 126])
def test_pictures_grow_with_the_model_but_stay_handy(layers):
    width, height = _size(heatmap(_frame(layers), "math\nbounds", 0.3, 0.8))
    assert 500 <= width <= 2000 and 300 <= height <= 2500


def test_cell_texts_do_not_overlap():
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    saved = []
    original = Figure.savefig

    def keep(self, *arguments, **options):
        saved.append(self)
        return original(self, *arguments, **options)

    Figure.savefig = keep
    try:
        heatmap(_frame(40, ("attention.query_key_value", "mlp.dense_4h_to_h", "q")), "math", 0.3, 0.8)
    finally:
        Figure.savefig = original
    figure = saved[0]
    renderer = FigureCanvasAgg(figure).get_renderer()
    axes = figure.axes[0]
    for texts in (axes.texts, axes.get_xticklabels(), axes.get_yticklabels()):
        boxes = [text.get_window_extent(renderer) for text in texts]
        assert len(boxes) >= 3
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[i + 1 :])


def test_a_constant_table_can_be_drawn():
    _size(heatmap(pd.DataFrame({"q": [0.5, 0.5]}), "math", 0.5, 0.5))


def test_a_missing_matplotlib_is_told(monkeypatch):
    require_matplotlib("--plot")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="--plot needs matplotlib: pip install"):
        require_matplotlib("--plot")
