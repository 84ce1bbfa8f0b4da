"""Rows of the quality benchmark on other text: a third task, too little text, text of other tasks.

python -m pytest tests/benchmarks/test_quality_text_rows.py
"""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import quality_third
from benchmarks.calibration_text import HALF, OWN, SWAPPED, other_texts
from benchmarks.quality_clock import OutOfTimeError
from benchmarks.quality_models import Training, train_or_find
from benchmarks.quality_texts import TaskTexts, Texts
from benchmarks.quality_third import TASK, train_or_find_third
from demo.small_model import Shape

TINY = Training(Shape(300, 16, 32, 1, 2), window=16, base_steps=2, expert_steps=2, tied=False)


def texts() -> Texts:
    tasks = {
        name: TaskTexts(
            tuple(f"{name} has seven {n} of them" for n in range(12)), tuple(f"{name} {n}" for n in range(8)), (), ()
        )
        for name in ("one", "two", TASK)
    }
    return Texts(tuple(row for own in tasks.values() for row in own.train), tasks, "a test")


def test_calibration_rows_are_of_each_tasks_own_or_of_the_next_ones():
    found = {text: other_texts(texts(), 4, text).tasks for text in (OWN, HALF, SWAPPED)}
    assert found[OWN]["one"].calibration == ("one 0", "one 1", "one 2", "one 3")
    assert found[HALF]["one"].calibration == ("one 0", "one 1", "two 2", "two 3")
    assert found[SWAPPED]["two"].calibration == ("python 0", "python 1", "python 2", "python 3")
    assert found[SWAPPED]["two"].train == texts().tasks["two"].train


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
