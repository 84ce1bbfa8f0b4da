"""The quality benchmark's comparisons, tables, rows and picture."""

import csv
import math
from dataclasses import replace

import pytest

from benchmarks.quality_contenders import CONTROLS as OF_THE_BENCHMARK
from benchmarks.quality_report import ONE, TWO, Figure, compare, draw, markdown, read_figures, write_figures
from tests.conftest import ROOT

RESULTS = ROOT / "benchmarks" / "results"
CONTROLS = {ONE: "uniform", TWO: "uniform"}


def figures(experiment=TWO, budget=None):
    """Three seeds, two tasks; `guided` keeps 0.1, 0.2 and 0.3 more of the mean than the control."""
    rows = []
    for seed in range(3):
        for task, share in (("a", 0.2), ("b", 0.6)):
            row = Figure(experiment, "small", seed, "uniform", budget, task, share + seed, 3.0, None, "0.3")
            rows += [
                row,
                replace(row, contender="guided", kept=row.kept + 0.1 * (seed + 1) + (0.05 if task == "a" else -0.05)),
            ]
    return rows


def test_pairs_are_seeds_and_tasks_are_averaged_first():
    control, guided = compare(figures(), CONTROLS)
    assert control.interval is None and control.words == "the control"
    assert (control.kept, control.least) == (pytest.approx(1.4), pytest.approx(1.2))
    assert (guided.kept, guided.least) == (pytest.approx(1.6), pytest.approx(1.45))
    half = 4.302652729 * 0.1 / math.sqrt(3)
    assert (guided.interval.low, guided.interval.high) == (pytest.approx(0.2 - half), pytest.approx(0.2 + half))
    assert guided.interval.seeds == 3


def test_budgets_and_sizes_are_kept_apart():
    rows = [*figures(ONE, 0.1), *(replace(row, budget=0.4) for row in figures(ONE, 0.1))]
    rows += [replace(row, size="medium") for row in rows]
    assert len(compare(rows, CONTROLS)) == 8


def test_of_a_run_that_was_cut_the_seeds_count_that_have_all_tasks():
    control, guided = compare(figures()[:-1], CONTROLS)
    assert (guided.interval.seeds, guided.interval.mean) == (2, pytest.approx(0.15))
    assert guided.kept == pytest.approx((0.4 + 0.1 + 1.4 + 0.2) / 2) and control.kept == pytest.approx(1.4)
    assert compare([row for row in figures() if row.contender == "guided"], CONTROLS) == []
    one_task = [replace(row, size="medium") for row in figures() if row.task == "b"]
    assert compare([*figures(), *one_task], CONTROLS) == compare(figures(), CONTROLS)
    half = [row for row in figures() if row.contender == "uniform" or row.task == "b"]
    assert [row.contender for row in compare(half, CONTROLS)] == ["uniform"]


def test_unpaired_and_repeated_rows_are_refused():
    rows = [replace(row, seed=9) if row.contender == "guided" else row for row in figures()[:4]]
    with pytest.raises(ValueError, match="same tasks of any seed"):
        compare(rows, CONTROLS)
    with pytest.raises(ValueError, match="twice"):
        compare([*figures(), figures()[0]], CONTROLS)


def test_tables_say_the_verdict():
    text = markdown(compare([*figures(), *figures(ONE, 0.1)], CONTROLS))
    assert "**two experts, small**" in text and "| density |" in text
    assert "| 0.1 | guided | 160.0% | 145.0% | no difference seen: +20.0 points" in text


def has_figures(path):
    return path.with_suffix(".md").exists() and path.read_text().startswith("experiment,")


@pytest.mark.parametrize("path", sorted(filter(has_figures, RESULTS.glob("**/*.csv"))), ids=lambda path: path.stem)
def test_the_tables_in_the_tree_are_those_of_their_rows(path):
    assert path.with_suffix(".md").read_text() == markdown(compare(read_figures(path), OF_THE_BENCHMARK)) + "\n"


def test_rows_come_back_from_the_file(tmp_path):
    write_figures(tmp_path / "deep" / "rows.csv", figures())
    with open(tmp_path / "deep" / "rows.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12 and rows[1]["contender"] == "guided" and float(rows[1]["kept"]) == figures()[1].kept


def test_the_picture_is_a_png(tmp_path):
    rows = [row for budget in (0.05, 0.1) for row in figures(ONE, budget)]
    path = draw(compare([*rows, *figures()], CONTROLS), tmp_path / "quality.png")
    assert path.read_bytes().startswith(b"\x89PNG")
