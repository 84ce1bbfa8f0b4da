"""The heatmap: a readable PNG, the same bytes for the same numbers."""

import struct
import sys

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.refusals import refused
from tests.selected import few
from utils.plots import color_range, curves, heatmap, require_matplotlib

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
    assert _texts(monkeypatch, 40) == [f"{value:.2f}" for value in frame.to_numpy().ravel()]


def test_deep_models_get_the_color_bar_alone(monkeypatch):
    assert _texts(monkeypatch, 41) == []


@pytest.mark.parametrize("layers", few([1, 3, 40, 80, 126], 1, 126))
def test_pictures_grow_with_the_model_but_stay_handy(layers):
    width, height = _size(heatmap(_frame(layers), "math\nbounds", 0.3, 0.8))
    assert 500 <= width <= 2000 and 300 <= height <= 2500


def test_small_differences_are_written_and_empty_cells_are_not(monkeypatch):
    from matplotlib.axes import Axes

    drawn = []
    monkeypatch.setattr(Axes, "text", lambda self, x, y, s, **more: drawn.append(s))
    heatmap(pd.DataFrame({"q": [0.995, 1.004], "other": [np.nan, 1.0]}), "math", *color_range(0.995, 1.004))
    assert drawn == ["0.995", "1.004", "1.000"]


@given(st.floats(-2, 2), st.floats(0, 3))
def test_nearly_equal_numbers_share_a_color(low, spread):
    ends = color_range(low, low + spread)
    assert ends[0] <= low + 1e-12 and ends[1] >= low + spread - 1e-12
    assert ends[1] - ends[0] == pytest.approx(max(spread, 0.2 * max(abs(low), abs(low + spread))))


@pytest.mark.parametrize("layers", [3, 80])
def test_long_titles_are_not_cut_off(layers, kept_figures):
    words = "weight per part in closed form, each task counting alike, ridge 0.1 towards equal shares"
    heatmap(_frame(layers, ("q",)), f"{words}\n{words}; {words}", 0.3, 0.8)
    (figure,) = kept_figures
    box = figure.texts[0].get_window_extent(figure.canvas.get_renderer())
    assert box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
    assert box.y0 >= figure.axes[0].get_window_extent().y1  # and covers nothing
    assert " ".join(figure.texts[0].get_text().split()).count(words) == 3


@pytest.fixture
def kept_figures(monkeypatch):
    """The figures that are saved."""
    from matplotlib.figure import Figure

    saved, original = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **keys: saved.append(self) or original(self, *args, **keys)
    )
    return saved


def test_colors_differ_in_brightness_and_not_in_hue_alone(kept_figures):
    heatmap(_frame(3, ("q",)), "math", 0.3, 0.8)
    colors = kept_figures[0].axes[0].images[0].get_cmap()(np.linspace(0, 1, 64))[:, :3]
    assert (np.diff(colors @ [0.2126, 0.7152, 0.0722]) > 0).all()


def test_cell_texts_do_not_overlap(kept_figures):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    heatmap(_frame(40, ("attention.query_key_value", "mlp.dense_4h_to_h", "q")), "math", 0.3, 0.8)
    (figure,) = kept_figures
    renderer = FigureCanvasAgg(figure).get_renderer()
    axes = figure.axes[0]
    for texts in (axes.texts, axes.get_xticklabels(), axes.get_yticklabels()):
        boxes = [text.get_window_extent(renderer) for text in texts]
        assert len(boxes) >= 3
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[i + 1 :])


def test_a_constant_table_can_be_drawn():
    _size(heatmap(pd.DataFrame({"q": [0.5, 0.5]}), "math", 0.5, 0.5))


def test_a_missing_matplotlib_is_said(monkeypatch):
    require_matplotlib("--plot")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with refused("no-matplotlib"):
        require_matplotlib("--plot")


def test_curves_have_a_line_for_each_column_the_reference_and_intervals(kept_figures):
    table, half = _frame(6), _frame(6) / 10
    table.iloc[2, 0], half.iloc[3, 1] = np.nan, np.inf
    pictures = [
        curves(table, "math", "layer", "weight", reference=(0.5, "uniform"), half=half, whole=True) for _ in "ab"
    ]
    assert pictures[0] == pictures[1] and _size(pictures[0])[0] > 500
    axes = kept_figures[0].axes[0]
    assert [text.get_text() for text in kept_figures[0].legends[0].get_texts()] == ["uniform: 0.5", *table.columns]
    assert axes.get_xlabel() == "layer" and len(axes.containers) == 2
    drawn = axes.containers[1].lines[0].get_ydata()
    assert drawn == pytest.approx(table["down_proj"].to_numpy())
