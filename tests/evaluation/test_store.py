"""Losses on disk: those that are as they were left are used again, all others are computed again.

python -m pytest tests/evaluation/test_store.py
"""

import math

import pandas as pd
import pytest

from utils.evaluation.store import LossStore


def test_what_a_killed_run_was_writing_is_swept(tmp_path):
    store = LossStore(tmp_path / "losses")
    store.sweep()  # a folder that is not there yet
    store.keep_record("kept", {"one": 1})
    (tmp_path / "losses/tmp12_3ab45.part").write_text('{"two"')
    (tmp_path / "losses/mine.part").write_text("of somebody else")
    store.sweep()
    assert sorted(path.name for path in (tmp_path / "losses").iterdir()) == ["kept.json", "mine.part"]


def losses_of(*rows: tuple) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["row", "nll", "tokens"]).astype({"nll": "float64"})


@pytest.mark.parametrize(
    ("change", "there"),
    [
        (lambda text: text, True),
        (lambda text: text.replace("1.5", "1.6"), False),
        (lambda text: text[:-9], False),
        (lambda text: "[]", False),
        (lambda text: "{}", False),
    ],
)
def test_losses_that_are_not_as_they_were_left_are_computed_again_and_said(tmp_path, capsys, change, there):
    store = LossStore(tmp_path)
    store.keep("key", {"candidate": "one"}, losses_of((7, 1.5, 3), (8, float("nan"), 2)))
    path = tmp_path / "key.json"
    path.write_text(change(path.read_text()))
    found = store.find("key", [8, 7])
    assert (found is not None) == there
    assert capsys.readouterr().err.count("not as it was left") == (not there)
    if there:
        assert found[7] == (1.5, 3) and math.isnan(found[8][0])
        assert store.find("key", [7]) is None and store.find("other", [7]) is None


@pytest.mark.parametrize("losses", [[[7, "1.5", 3]], [[7, 1.5, 3.0]], [[7, 1.5]], [[[7], 1.5, 3]], {"7": 1}, 5])
def test_losses_of_another_form_are_not_there(tmp_path, losses):
    store = LossStore(tmp_path)
    store.keep_record("key", {"losses": losses})
    assert store.find("key", [7]) is None
