"""Benchmarks of settings: what they compare, and one seed from end to end.

python -m pytest tests/benchmarks/test_quality_settings.py -m ""
"""

import argparse
import csv
import math

import pytest

from benchmarks import gram_settings, tuned_settings
from benchmarks.quality_contenders import in_rounds, tuned
from benchmarks.quality_merges import Judge
from benchmarks.quality_models import Training
from benchmarks.quality_settings import TRAININGS, Asked, judge_settings
from benchmarks.quality_settings_report import markdown
from demo.small_model import Shape
from tests.benchmarks.published_sets import write_sets


@pytest.mark.parametrize("settings", [gram_settings.settings(["gsm8k", "mbpp"]), tuned_settings.settings()])
def test_every_setting_has_a_line_of_its_own(settings):
    keys = [(one.contender, one.variant.setting) for one in settings]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("path", [gram_settings.RESULTS, tuned_settings.RESULTS], ids=lambda path: path.stem)
def test_the_tables_in_the_tree_are_those_of_their_lines(path):
    with open(path, newline="", encoding="utf-8") as file:
        assert path.with_suffix(".md").read_text() == markdown(list(csv.DictReader(file))) + "\n"


@pytest.mark.slow
def test_settings_are_judged_on_both_splits_and_found_again(tmp_path, monkeypatch):
    tiny = Training(
        Shape(vocabulary=512, hidden=32, intermediate=64, blocks=2, heads=2), window=64, base_steps=30, expert_steps=60
    )
    monkeypatch.setitem(TRAININGS, "tiny", tiny)
    write_sets(tmp_path, rows=240)
    asked = argparse.Namespace(
        data=tmp_path, size="tiny", seeds="0", experts=2, rows="8,70", only="gram;tuned", device="cpu", first=None
    )
    asked.work, asked.results = tmp_path / "work", tmp_path / "lines.csv"
    settings = [
        Asked("gram_mean", in_rounds(1, {"ridge": 1e-5})),
        Asked("tuned", tuned(in_rounds(2), {"tune_steps": 2})),
        Asked("never", in_rounds(3)),
    ]
    assert judge_settings(asked, settings, "test")
    with open(asked.results, newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    places = {(one["rows"], one["contender"], one["setting"], one["split"], one["task"]) for one in lines}
    assert len(lines) == len(places) == 2 * 2 * 2 * 2
    assert {one[1:3] for one in places} == {("gram_mean", "ridge 1e-05"), ("tuned", "tune_steps 2")}
    assert all(0 < float(one["kept"]) < 1.5 for one in lines)
    monkeypatch.setattr(Judge, "split_losses", lambda *args: pytest.fail("judged again"))
    assert judge_settings(asked, settings, "test")


def line(seed, contender, setting, split, kept):
    own = {"size": "small", "experts": "2", "rows": "48", "seed": str(seed), "contender": contender}
    return [own | {"setting": setting, "split": split, "task": task, "kept": str(kept + more)}
            for task, more in (("a", 0.1), ("b", -0.1))]  # fmt: skip


def test_settings_are_compared_with_the_first_of_their_contender_or_the_start():
    gram = [row for seed in (0, 1) for setting, more in (("ridge 1", 0.0), ("ridge 2", 0.1 + 0.02 * seed))
            for split in ("validation", "test") for row in line(seed, "gram", setting, split, 0.5 + more)]  # fmt: skip
    first, second = markdown(gram).splitlines()[-2:]
    assert first == "| gram | ridge 1 | 50.0% | 50.0% | 40.0% | the first |"
    half = 12.706204736 * math.sqrt(2) / math.sqrt(2)  # Student's t with 1 degree of freedom, differences 10 and 12
    assert second.startswith("| gram | ridge 2 | 61.0% | 61.0% | 51.0% | ")
    assert f"+11.0 points, 95 % interval {11 - half:+.1f} to {11 + half:+.1f}, 2 seeds" in second
    tuned_lines = [row for split in ("validation", "test") for name in ("start: gram", "tuned")
                   for row in line(0, name, "", split, 0.5)]  # fmt: skip
    assert "says nothing certain: +0.0" in markdown(tuned_lines).splitlines()[-1]
