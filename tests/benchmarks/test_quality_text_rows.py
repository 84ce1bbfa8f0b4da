"""Rows of the quality benchmark on other text: a third task, too little text, text of other tasks.

python -m pytest tests/benchmarks/test_quality_text_rows.py
"""

from dataclasses import dataclass, replace

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import quality_third
from benchmarks.quality_clock import OutOfTimeError
from benchmarks.quality_models import Training, train_or_find
from benchmarks.quality_more_text import ELSEWHERE, HALF, OWN, SWAPPED, text_of_kind, with_more_calibration
from benchmarks.quality_sheet import Sheet
from benchmarks.quality_texts import TaskTexts, Texts, TextSizes, assert_disjoint, texts_of_seed
from benchmarks.quality_third import TASK, train_or_find_third
from demo.small_model import Shape
from tests.benchmarks.published_sets import write_sets
from tests.refusals import refused

TINY = Training(Shape(300, 16, 32, 1, 2), window=16, base_steps=2, expert_steps=2, tied=False)


@dataclass(frozen=True)
class Row:
    """A line of a sheet."""

    seed: int
    text: str
    kept: float


def texts() -> Texts:
    tasks = {
        name: TaskTexts(
            tuple(f"{name} has seven {n} of them" for n in range(12)), tuple(f"{name} {n}" for n in range(8)), (), ()
        )
        for name in ("one", "two", TASK)
    }
    return Texts(tuple(row for own in tasks.values() for row in own.train), tasks, "a test")


def test_calibration_rows_are_of_each_tasks_own_or_of_the_next_ones():
    found = {text: text_of_kind(texts(), text, 4, None, 0).tasks for text in (OWN, HALF, SWAPPED)}
    assert found[OWN]["one"].calibration == ("one 0", "one 1", "one 2", "one 3")
    assert found[HALF]["one"].calibration == ("one 0", "one 1", "two 2", "two 3")
    assert found[SWAPPED]["two"].calibration == ("python 0", "python 1", "python 2", "python 3")
    assert found[SWAPPED]["two"].train == texts().tasks["two"].train


def test_further_calibration_rows_are_in_no_other_part_and_text_of_another_source_in_none(tmp_path):
    write_sets(tmp_path, rows=240)
    sizes = TextSizes(base_prose=2, base_code=2, base_rows=6, calibration=4, validation=3)
    own = texts_of_seed(tmp_path, sizes, 0)
    more = with_more_calibration(own, 30, tmp_path, 0)
    assert_disjoint(more)
    for name, task in more.tasks.items():
        assert task.calibration[:4] == own.tasks[name].calibration and len(task.calibration) == 30
        assert replace(task, calibration=()) == replace(own.tasks[name], calibration=())
    with refused("quality-too-few-rows"):
        with_more_calibration(own, 5000, tmp_path, 0)
    elsewhere = text_of_kind(own, ELSEWHERE, 3, tmp_path, 0)
    assert_disjoint(elsewhere)
    assert "def " in elsewhere.tasks["mbpp"].calibration[0] and "Question" in elsewhere.tasks["gsm8k"].calibration[0]


def test_a_sheet_goes_on_with_what_others_wrote(tmp_path):
    key = ("seed", "text")
    first, second = (Sheet(tmp_path / "out" / "lines.csv", Row, key) for _ in range(2))
    first.add(Row(0, "own, short", 0.5), Row(0, "own, short", 0.25))
    assert second.has(seed=0, text="own, short") and not second.has(seed=1, text="own, short")
    second.add(Row(1, "other", 1.0))
    assert first.path.read_text().splitlines() == [
        "seed,text,kept",
        '0,"own, short",0.5',
        '0,"own, short",0.25',
        "1,other,1.0",
    ]
    with pytest.raises(ValueError, match="other columns"):
        Sheet(first.path, Training, ())


def test_a_third_expert_is_trained_from_the_same_base_and_goes_on_where_it_was_cut(tmp_path, monkeypatch):
    two = replace(texts(), tasks={name: own for name, own in texts().tasks.items() if name != TASK})
    trained = train_or_find(TINY, two, 0, tmp_path)
    with pytest.raises(OutOfTimeError):
        train_or_find_third(trained, TINY, texts(), 0, "cpu", until=0.0)
    found = train_or_find_third(trained, TINY, texts(), 0, "cpu", until=0.0)
    assert list(found.experts) == ["one", "two", TASK] and found.base == trained.base
    base, own = (load_file(path / "model.safetensors") for path in (found.base, found.experts[TASK]))
    assert base.keys() == own.keys() and "lm_head.weight" in own
    assert any(not torch.equal(base[name], own[name]) for name in base)
    monkeypatch.setattr(quality_third, "fit", lambda *args, **kwargs: pytest.fail("trained again"))
    assert train_or_find_third(trained, TINY, texts(), 0, "cpu") == found
