"""The quality benchmark's text: splits that share nothing, in either layout of the data."""

from pathlib import Path

import pytest

from benchmarks.quality_texts import Row, TaskTexts, Texts, TextSizes, assert_disjoint, separate, texts_of_seed
from tests.benchmarks.published_sets import write_sets
from tests.refusals import refused

SIZES = TextSizes(base_prose=5, base_code=5, base_rows=6, calibration=4, validation=3, test=5)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder laid out as the published sets, in which rows of train come back in the held-out splits."""
    write_sets(tmp_path)
    return tmp_path


@pytest.mark.parametrize("seed", [0, 1])
def test_splits_of_published_data_share_no_row(data, seed):
    texts = texts_of_seed(data, SIZES, seed)
    assert_disjoint(texts)
    training = [*texts.base, *(row for task in texts.tasks.values() for row in task.train)]
    held_out = {row.casefold() for task in texts.tasks.values() for row in (*task.test, *task.validation)}
    questions = {row.splitlines()[0].strip().casefold() for row in held_out}
    answers = {row.strip().split("\n", 1)[1].split("\nassert")[0].casefold() for row in held_out}
    assert training and len(held_out) == 16
    for row in training:
        question, answer = row.split("\n", 1)
        assert question.strip().casefold() not in questions
        assert answer.strip().split("\nassert")[0].casefold() not in answers


def test_held_out_text_does_not_depend_on_the_seed_but_training_does(data):
    first, second = (texts_of_seed(data, SIZES, seed).tasks for seed in (0, 1))
    for name in first:
        assert (first[name].test, first[name].validation) == (second[name].test, second[name].validation)
        assert first[name].calibration != second[name].calibration
        assert first[name].train != second[name].train


def test_the_same_seed_gives_the_same_text(data):
    assert texts_of_seed(data, SIZES, 3) == texts_of_seed(data, SIZES, 3)


def test_without_data_the_example_is_used_and_its_splits_share_no_row():
    texts = texts_of_seed(None, SIZES, 0)
    assert_disjoint(texts)
    assert set(texts.tasks) == {"math", "code"}
    assert all(
        part for task in texts.tasks.values() for part in (task.train, task.calibration, task.validation, task.test)
    )


@pytest.mark.parametrize("into", ["train", "calibration", "validation"])
def test_a_leak_is_noticed(into):
    parts = {"train": ("a b",), "calibration": ("c",), "validation": ("d",), "test": ("e F",)}
    assert_disjoint(Texts((), {"task": TaskTexts(**parts)}, ""))
    with pytest.raises(AssertionError):
        assert_disjoint(Texts((), {"task": TaskTexts(**{**parts, into: ("x", "E  f")})}, ""))


def test_earlier_parts_keep_a_row_and_later_ones_lose_it():
    one, same_question, other = Row("q", "a"), Row("Q ", "b"), Row("r", "c")
    assert separate([[one, one], [same_question, other], [other]]) == [[one], [other], []]


def test_missing_and_malformed_data_are_named(tmp_path, data):
    with refused("data-unreadable"):
        texts_of_seed(tmp_path / "nothing", SIZES, 0)
    (data / "mbpp" / "test.jsonl").write_text('{"prompt": "another layout"}\n')
    with refused("data-malformed"):
        texts_of_seed(data, SIZES, 0)
