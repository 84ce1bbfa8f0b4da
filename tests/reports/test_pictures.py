"""Geometry: marks, lines and cells lie where the values say, computed here from the scale's two ends alone."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.reports.document import read
from utils.reports.colors import color_at, hexadecimal, luminance, text_on
from utils.reports.dots import axis, bar_strip, dot_strip
from utils.reports.heatmap import draw_heatmap, value_range
from utils.reports.lines import best_so_far, draw_front, draw_history
from utils.reports.plain_tables import front_table, history_table, importance_table
from utils.reports.scale import Scale
from utils.reports.values import Estimate, Front, FrontPoint, Heatmap, History, Importance, Role, Trial, TrialState

SCALE = Scale(0.0, 2.0, 0.0, 100.0)


def at(element, name: str = "x") -> float:
    return float(element.attributes[name].removesuffix("%"))


def test_a_dot_and_its_interval():
    drawn = read(dot_strip(SCALE, Estimate(1.0, 0.5, 1.75), Role.CONTROL, {"base-line": 0.25, "reference": 9.0}))
    (mark,) = drawn.all("use")
    guide, interval = drawn.all("line")
    assert at(mark) == 50.0 and mark.attributes["href"] == "#mark-control"
    assert (at(interval, "x1"), at(interval, "x2")) == (25.0, 87.5)
    assert at(guide, "x1") == at(guide, "x2") == 12.5 and "base-line" in guide.classes  # the reference lies outside


@pytest.mark.parametrize(("value", "shape", "place"), [(5.0, "beyond-right", 100.0), (-5.0, "beyond-left", 0.0)])
def test_a_value_outside_is_an_arrow_at_the_edge(value, shape, place):
    (mark,) = read(dot_strip(SCALE, Estimate(value), Role.CANDIDATE, {})).all("use")
    assert mark.attributes["href"] == f"#mark-{shape}" and at(mark) == place


def test_what_is_not_known_is_not_drawn():
    drawn = read(dot_strip(SCALE, Estimate(None, float("nan"), 1.0), Role.CANDIDATE, {"reference": None}))
    assert not drawn.all("use") and not drawn.all("line")


def test_a_bar_starts_at_zero():
    bar, zero = read(bar_strip(SCALE, 0.5)).all("line")
    assert (at(bar, "x1"), at(bar, "x2")) == (0.0, 25.0) and at(zero, "x1") == 0.0


def test_an_axis_says_where_its_ticks_are():
    for percent, factor in ((False, 1.0), (True, 100.0)):
        drawn = read(axis(SCALE, percent))
        for tick, label in zip(drawn.all("line"), drawn.all("text"), strict=True):
            assert float(label.text.rstrip("%")) / factor == pytest.approx(at(tick, "x1") / 50.0)


def test_every_cell_of_a_heatmap_has_its_color_and_number():
    cells = ((0.1, 0.2, None), (0.4, 0.9, 0.5))
    heatmap = Heatmap("code", "density", ("0", "1"), ("q", "k", "v"), cells)
    assert value_range([heatmap]) == (0.1, 0.9)
    drawn = read(draw_heatmap(heatmap, 0.1, 0.9, "h"))
    rectangles = drawn.all("rect")
    assert [rect.one("title").text for rect in rectangles] == [
        "layer 0, q: 0.100", "layer 0, k: 0.200", "layer 1, q: 0.400", "layer 1, k: 0.900", "layer 1, v: 0.500",
    ]  # fmt: skip
    assert rectangles[0].attributes["fill"] == hexadecimal(color_at(0.0))
    assert rectangles[3].attributes["fill"] == hexadecimal(color_at(1.0))
    assert at(rectangles[0]) == at(rectangles[2]) < at(rectangles[1]) == at(rectangles[3]) < at(rectangles[4])
    assert at(rectangles[0], "y") < at(rectangles[2], "y")
    numbers = [text.text for text in drawn.all("text", "cell")]
    assert numbers == ["0.10", "0.20", "0.40", "0.90", "0.50"]


def test_many_cells_are_drawn_in_units_of_rows_and_columns():
    cells = tuple(tuple((row + column) / 120 for column in range(20)) for row in range(100))
    heatmap = Heatmap("code", "density", tuple(map(str, range(100))), tuple(f"c{i}" for i in range(20)), cells)
    drawn = read(draw_heatmap(heatmap, 0.0, 1.0, "h")).one("svg", "cells")
    assert drawn.attributes["viewbox"] == "0 0 20 100"
    found = {}
    for path in drawn.all("path"):
        for square in path.attributes["d"].split("M")[1:]:
            column, row = map(int, square.removesuffix("h1v1h-1z").split())
            found[row, column] = path.attributes["fill"]
    assert len(found) == 2000
    for (row, column), fill in found.items():
        seen = [int(fill[index : index + 2], 16) for index in (1, 3, 5)]
        assert max(abs(a - b) for a, b in zip(seen, color_at(cells[row][column]), strict=True)) <= 6


def test_colors_grow_brighter_and_text_can_be_read_on_all_of_them():
    shades = [color_at(index / 200) for index in range(201)]
    bright = [luminance(shade) for shade in shades]
    assert all(after >= before - 2e-3 for before, after in itertools.pairwise(bright))
    for shade in shades:
        light = luminance(shade)
        contrast = (light + 0.05) / 0.05 if text_on(shade) == "dark" else 1.05 / (light + 0.05)
        assert contrast >= 4.5


TRIALS = (
    Trial(0, 0.2, known=True),
    Trial(1, 0.1),
    Trial(2, 0.9, TrialState.PRUNED),
    Trial(3, None, TrialState.FAILED),
    Trial(4, 0.5),
    Trial(5, 0.4),
)


def test_the_best_so_far_counts_complete_trials():
    assert best_so_far(History("gain", TRIALS)) == [(0, 0.2), (4, 0.5)]
    assert best_so_far(History("loss", TRIALS, higher_is_better=False)) == [(0, 0.2), (1, 0.1)]


def test_trials_lie_in_order_and_by_value():
    drawn = read(draw_history(History("gain", TRIALS, reference=0.3), "history"))
    marks = drawn.all("use")
    assert [mark.attributes["href"] for mark in marks] == [
        "#mark-control", "#mark-candidate", "#mark-beyond-up", "#mark-failed", "#mark-candidate", "#mark-candidate",
    ]  # fmt: skip
    steps = {round(at(after) - at(before), 1) for before, after in itertools.pairwise(marks)}
    assert len(steps) == 1
    height = {trial.number: at(mark, "y") for trial, mark in zip(TRIALS, marks, strict=True)}
    slope = (height[0] - height[1]) / (0.2 - 0.1)  # pixels for one unit, from two trials
    assert slope < 0
    for number, value in ((4, 0.5), (5, 0.4)):
        assert height[number] == pytest.approx(height[1] + slope * (value - 0.1), abs=0.1)
    reference = drawn.one("line", "reference")
    assert at(reference, "y1") == pytest.approx(height[1] + slope * 0.2, abs=0.1)
    level, upright, last = drawn.all("line", "best")
    assert at(level, "x2") == at(upright, "x1") == at(last, "x1") == at(marks[4])
    assert at(last, "y1") == height[4]


def test_a_trial_far_below_is_an_arrow_at_the_edge():
    trials = [Trial(number, 0.5 + 0.01 * number) for number in range(9)]
    far = [Trial(9, -40.0, TrialState.PRUNED), Trial(10, -50.0, known=True)]
    marks = read(draw_history(History("gain", (*trials, *far)), "history")).all("use")
    assert [mark.attributes["href"] for mark in marks[-3:]] == [
        "#mark-candidate",
        "#mark-beyond-down",
        "#mark-beyond-down",
    ]
    assert [mark.attributes["class"] for mark in marks[-2:]] == ["pruned", "control"]
    points = [FrontPoint(f"trial {one.number}", one.value, 1.1 - one.value) for one in trials]
    points.append(FrontPoint("trial 9", -40.0, 0.55))
    drawn = read(draw_front(Front("code", "math", tuple(points)), "front")).all("use")
    assert [mark.attributes["href"] for mark in drawn].count("#mark-beyond-left") == 1


def test_a_front_joins_what_nothing_beats_on_both():
    points = (FrontPoint("a", 0.1, 0.9), FrontPoint("b", 0.5, 0.5, True), FrontPoint("c", 0.2, 0.2))
    drawn = read(draw_front(Front("math", "code", points), "front"))
    first, second = drawn.all("line", "front")
    marks = {use.attributes["href"]: use for use in drawn.all("use", "pruned")}
    assert set(marks) == {"#mark-pruned"}
    full = sorted(drawn.all("use", "candidate"), key=at)
    ring = drawn.one("use", "chosen")
    assert (at(ring), at(ring, "y")) == (at(full[1]), at(full[1], "y"))
    # up to the first point's x at the height of the second: (0.1, 0.5) is reached by both
    assert (at(first, "x2"), at(first, "y2")) == (at(full[0]), at(full[1], "y"))
    assert (at(second, "x2"), at(second, "y2")) == (at(full[1]), at(full[1], "y"))


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=30), st.booleans())
def test_nobody_beats_those_on_the_front_and_somebody_beats_the_others(places, higher):
    points = tuple(FrontPoint(str(index), float(x), float(y)) for index, (x, y) in enumerate(places))
    edge = Front("x", "y", (*points, FrontPoint("?", None, 1.0)), higher_is_better=higher).unbeaten

    def beats(one: FrontPoint, other: FrontPoint) -> bool:
        ahead = [(one.x - other.x) * (1 if higher else -1), (one.y - other.y) * (1 if higher else -1)]
        return min(ahead) >= 0 and max(ahead) > 0

    for point in points:
        assert (point in edge) == (not any(beats(other, point) for other in points))
    assert [point.x for point in edge] == sorted(point.x for point in edge)


def test_tables_below_the_pictures():
    table = history_table(History("gain", TRIALS, percent=True))
    assert [row.name for row in table.rows] == list("012345")
    assert table.rows[0].cells[:2] == ("20.0%", "complete, known by hand") and table.rows[3].cells[0] == "\N{EN DASH}"
    shares = importance_table(Importance("fANOVA", (("a", 0.2), ("b", 0.8), ("c", float("nan")))))
    assert [(row.name, row.cells[1]) for row in shares.rows] == [("b", "80.0%"), ("a", "20.0%")]
    front = front_table(Front("x", "y", (FrontPoint("beaten", 0.1, 0.1), FrontPoint("best", 0.2, 0.2))))
    assert [row.name for row in front.rows] == ["best", "beaten"]
