"""Held-out rows: apart from calibration and from each other, and which of their tokens count.

python -m pytest tests/evaluation/test_tasks.py
"""

import itertools
import json
from pathlib import Path

import pytest

from tests.refusals import refused
from tests.tiny_evaluations import TEXT, pair_keys, write_rows
from tests.tiny_pairs import ASKING_CHAT, BOS_CHAT, save_tokenizer, write_config
from utils.evaluation import tasks as module
from utils.evaluation.encoding import encode_task
from utils.evaluation.tasks import Row, Task, evaluation_rows, prove_apart
from utils.pair.calibration import choose_samples
from utils.pair.config import read_pair_config


def pair(folder: Path, rows: int = 40, **changes):
    for name, word in (("code", "double"), ("math", "twice")):
        if not (folder / f"{name}.jsonl").exists():
            write_rows(folder / f"{name}.jsonl", word, rows)
    return read_pair_config(write_config(folder, {**pair_keys(folder), **changes}))


def texts(task: Task, part: str) -> set[str]:
    return {task.rows[number].prompt + task.rows[number].answer for number in task.part(part)}


@pytest.fixture
def tokenizer(tmp_path):
    from transformers import AutoTokenizer

    numbers = itertools.count()
    return lambda **keys: AutoTokenizer.from_pretrained(save_tokenizer(tmp_path / f"tokenizer{next(numbers)}", **keys))


def test_calibration_validation_and_test_share_no_row(tmp_path):
    config = pair(tmp_path, nsamples=10)
    found = evaluation_rows(config, validation=8, test=16)
    assert [task.name for task in found] == ["code", "math"]
    for task in found:
        calibration = {sample.text for sample in choose_samples(config.text_of(task.name), 10)}
        validation, test = texts(task, "validation"), texts(task, "test")
        assert (len(validation), len(test), len(calibration)) == (8, 16, 10)
        assert not validation & test and not calibration & (validation | test)
        assert task.experts == (task.name,)


def test_the_same_config_gives_the_same_rows(tmp_path):
    config = pair(tmp_path)
    assert [task.digest for task in evaluation_rows(config)] == [task.digest for task in evaluation_rows(config)]
    other = pair(tmp_path, seed=7, evaluation={}, calibration={})
    assert evaluation_rows(other)[0].digest != evaluation_rows(config)[0].digest


def test_a_text_that_stands_twice_is_in_one_part_only(tmp_path):
    lines = [json.dumps({"question": f"q{n % 20}", "answer": f"a{n % 20}"}) for n in range(80)]
    (tmp_path / "code.jsonl").write_text("\n".join(lines))
    task, _ = evaluation_rows(pair(tmp_path), validation=5, test=10)
    assert len(texts(task, "validation")) == 5 and len(texts(task, "test")) == 10
    assert "left out" in task.summary


def test_small_texts_are_shared_in_proportion_and_too_small_ones_refused(tmp_path):
    task, _ = evaluation_rows(pair(tmp_path, rows=40, nsamples=10), validation=100, test=200)
    assert (len(task.part("validation")), len(task.part("test"))) == (10, 20)
    with refused("evaluation-no-rows"):
        evaluation_rows(pair(tmp_path, nsamples=38), validation=100, test=200)


def test_without_evaluation_every_experts_text_is_a_task(tmp_path):
    first, second = evaluation_rows(pair(tmp_path, evaluation={}))
    assert (first.name, second.name) == ("code", "math")
    (shared,) = evaluation_rows(pair(tmp_path, evaluation={}, calibration={}))
    assert shared.experts == ("code", "math")


def test_an_expert_that_is_not_merged_has_no_task_unless_it_is_asked_for(tmp_path):
    merged = {"target_model_names": {"math": str(tmp_path / "math")}}
    (task,) = evaluation_rows(pair(tmp_path, evaluation={}, **merged))
    assert (task.name, task.experts) == ("math", ("math",))
    (task,) = evaluation_rows(pair(tmp_path, evaluation={}, calibration={}, **merged))
    assert (task.name, task.experts) == ("math", ("math",))
    assert [task.experts for task in evaluation_rows(pair(tmp_path, **merged))] == [("code",), ("math",)]


@pytest.mark.parametrize("name", ["general", "all tasks"])
def test_names_that_tables_have_for_something_else_are_refused(tmp_path, name):
    evaluation = {name: {"path": str(tmp_path / "code.jsonl"), "text": TEXT}}
    with refused("evaluation-reserved-name"):
        evaluation_rows(pair(tmp_path, evaluation=evaluation))


def test_another_split_where_there_is_one(tmp_path, monkeypatch):
    """Splits of a hub data set stand in for those that a network would give."""
    rows = {
        split: [{"text": f"{split} {n}", "code": "x"} for n in range(30)] for split in ("train", "validation", "test")
    }

    def load(path, name=None, split=None):
        return rows[split]

    import datasets

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda path, name: list(rows))
    config = pair(tmp_path, dataset="mbpp", calibration={}, evaluation={})
    (task,) = evaluation_rows(config, validation=6, test=9)
    assert {row.place.split(":")[0] for row in task.rows if row.part == "test"} == {"test"}
    assert {row.place.split(":")[0] for row in task.rows if row.part == "validation"} == {"validation"}
    assert all(row.answer == "x" and row.prompt for row in task.rows)  # mbpp's own answer
    del rows["validation"]
    (task,) = evaluation_rows(config, validation=6, test=9)
    assert {row.place.split(":")[0] for row in task.rows} == {"test"} and len(task.rows) == 15


def test_the_proof_finds_a_row_in_two_parts():
    row = Row("test", "row:1", "", "a text")
    prove_apart([Task("a", 8, (row,)), Task("b", 8, (row,))])
    with refused("evaluation-rows-overlap"):
        prove_apart([Task("a", 8, (row,)), Task("b", 8, (Row("validation", "row:9", "a ", "text"),))])


@pytest.mark.parametrize(
    ("text", "answer", "prompt", "scored"),
    [
        (TEXT, "{answer}", "q1 ", "a1"),
        (TEXT, " {answer}", "q1", " a1"),
        ("{question}", "\n{answer}!", "q1", "\na1!"),
        (TEXT, None, "", "q1 a1"),
    ],
)
def test_what_counts(tmp_path, text, answer, prompt, scored):
    lines = [json.dumps({"question": f"q{n}", "answer": f"a{n}"}) for n in range(40)]
    (tmp_path / "code.jsonl").write_text("\n".join(lines))
    own = {"path": str(tmp_path / "code.jsonl"), "text": text} | ({"answer": answer} if answer else {})
    (task,) = evaluation_rows(pair(tmp_path, evaluation={"code": own}))
    row = next(row for row in task.rows if row.place == "row:1")
    assert (row.prompt, row.answer) == (prompt, scored)


def test_an_answer_in_the_middle_of_the_text_is_refused(tmp_path):
    own = {"path": str(tmp_path / "code.jsonl"), "text": "{answer} {question}", "answer": "{answer}"}
    with refused("evaluation-answer-not-last"):
        evaluation_rows(pair(tmp_path, evaluation={"code": own}))


def test_only_tokens_of_the_answer_are_scored(tokenizer):
    task = Task("a", 64, (Row("test", "1", "what? ", "it is."), Row("test", "2", "", "all of it")))
    first, second = encode_task(task, tokenizer(), "model")
    assert (len(first.ids), first.first, first.tokens) == (1 + 6 + 6, 7, 6)
    assert (second.first, second.tokens) == (1, 9)  # behind BOS
    first, second = encode_task(task, tokenizer(bos=False), "model")
    assert (first.first, second.first, second.tokens) == (6, 1, 8)  # nothing stands before the first token


def test_answers_beyond_the_sequence_do_not_count(tokenizer):
    task = Task("a", 8, (Row("test", "1", "a long question ", "yes"), Row("test", "2", "so? ", "yes it is")))
    first, second = encode_task(task, tokenizer(), "model")
    assert (first.tokens, second.tokens, len(second.ids)) == (0, 3, 8)
    with refused("evaluation-nothing-scored"):
        encode_task(Task("a", 8, task.rows[:1]), tokenizer(), "model")


def test_chat_answers_are_scored_behind_the_generation_prompt(tokenizer):
    messages = ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"})
    task = Task("a", 64, (Row("test", "1", "", "", messages),))
    made = tokenizer(chat_template=ASKING_CHAT)
    (row,) = encode_task(task, made, "model")
    prompt = made("<s><|user|>hi</s><|assistant|>", add_special_tokens=False)["input_ids"]
    assert row.ids[: row.first] == prompt and made.decode(row.ids[row.first :]).replace(" ", "") == "ho</s>"
    plain = tokenizer(chat_template=BOS_CHAT)  # no generation prompt: the role counts with the answer
    (row,) = encode_task(task, plain, "model")
    assert plain.decode(row.ids[row.first :]).replace(" ", "") == "<|assistant|>ho</s>"
    with refused("evaluation-no-chat-template"):
        encode_task(task, tokenizer(), "model")
    with refused("evaluation-no-answer"):
        encode_task(Task("a", 64, (Row("test", "1", "", "", messages[:1]),)), made, "model")


def test_a_task_without_data_is_refused(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    own = {"path": str(tmp_path / "empty.jsonl"), "text": "{question}"}
    with refused("evaluation-no-rows"):
        evaluation_rows(pair(tmp_path, evaluation={"code": own}))
    with refused("text-missing"):
        evaluation_rows(pair(tmp_path, evaluation={"code": {**own, "path": str(tmp_path / "absent.jsonl")}}))


def test_a_text_of_a_third_kind(tmp_path):
    write_rows(tmp_path / "prose.jsonl", "thrice", 40)
    *_, last = evaluation_rows(pair(tmp_path, general={"path": str(tmp_path / "prose.jsonl"), "text": TEXT}))
    assert last.name == module.GENERAL and not last.measures_gain and last.experts == ()


def test_without_a_text_for_losses_they_are_of_each_experts_own(tmp_path):
    """Where `evaluation` names tasks of lm-eval's alone."""
    own = evaluation_rows(pair(tmp_path, evaluation={}))
    alone = evaluation_rows(pair(tmp_path, evaluation={"math": {"lm_eval": ["gsm8k"]}, "more": {"lm_eval": "mbpp"}}))
    assert [task.digest for task in alone] == [task.digest for task in own]
    beside = {"path": str(tmp_path / "math.jsonl"), "text": TEXT}
    assert [
        task.name for task in evaluation_rows(pair(tmp_path, evaluation={"more": {"lm_eval": "x"}, "math": beside}))
    ] == ["math"]
