"""Rows that were seen before: by calibration, however it calls the text, by a measurement, by a search.

python -m pytest tests/evaluation/test_seen_rows.py
"""

import pytest

from tests.refusals import refused
from tests.tiny_evaluations import pair_keys, write_rows
from tests.tiny_pairs import write_config
from utils.evaluation.seen_rows import doubt_chosen_rows, refuse_measured_rows
from utils.evaluation.tasks import VALIDATION, evaluation_rows
from utils.pair.calibration import row_order
from utils.pair.config import read_pair_config


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Calibration calls its texts otherwise than evaluation does, and puts answers behind questions otherwise."""
    monkeypatch.chdir(tmp_path)
    keys = pair_keys(tmp_path)
    for name, word in (("code", "double"), ("math", "twice")):
        write_rows(tmp_path / f"{name}.jsonl", word, 40)
        keys["calibration"][name] |= {"path": f"./{name}.jsonl"}
        keys["evaluation"][name] |= {"text": "{question}"}
    return read_pair_config(write_config(tmp_path, keys | {"nsamples": 10}))


def record(config, count: int) -> dict:
    """What a manifest says of a text of which so many rows were measured."""
    source = config.text_of("code")
    rows = row_order(source, 40)[:count]
    return {"path": source.path, "subset": None, "split": None, "seed": source.seed, "rows": rows}


def test_calibration_rows_are_left_out_however_the_path_is_written(config):
    task, _ = evaluation_rows(config, validation=100, test=200)
    assert len(task.rows) == 30
    assert {row.number for row in task.rows}.isdisjoint(row_order(config.text_of("code"), 40)[:10])


def test_what_was_measured_on_rows_of_a_task_is_refused(config):
    tasks = evaluation_rows(config)
    refuse_measured_rows(tasks, record(config, 10), "it")
    with refused("evaluation-rows-measured") as said:
        refuse_measured_rows(tasks, [record(config, 13)], "recipe best")
    assert "recipe best was measured on 3 of the 30 rows of task code" in str(said.value)
    other = record(config, 40) | {"path": "elsewhere.jsonl"}
    for samples in (None, "text", [3, {"path": 4}], {"path": "code.jsonl", "rows": "all"}, other):
        refuse_measured_rows(tasks, samples, "it")


def test_rows_that_a_search_chose_on_are_said(config):
    tasks = evaluation_rows(config, validation=5, test=20)
    assert len(tasks[0].part(VALIDATION)) == 5
    (said,) = doubt_chosen_rows(tasks, {"validation_rows": {"code": 8, "math": 5}}, "recipe best")
    assert "on 8 validation rows of code, of which up to 3 are test rows" in said and "--validation_rows 8" in said
    for search in (None, {}, {"validation_rows": 3}, {"validation_rows": {"code": "all"}}):
        assert not list(doubt_chosen_rows(tasks, search, "recipe best"))
