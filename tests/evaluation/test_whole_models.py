"""Whole models in memory: what they answer, and their accuracy with lm-eval, against models that were written.

python -m pytest tests/evaluation/test_whole_models.py
"""

import itertools
from pathlib import Path

import pandas as pd
import pytest
import torch

from tests.refusals import refused
from tests.tiny_evaluations import save_evaluated_pair, task_file
from tests.tiny_merges import merge_here, recipe
from utils.evaluation.answers import greedy_answers, prompts_of
from utils.evaluation.candidates import Candidate
from utils.evaluation.entries import Preparing
from utils.evaluation.tasks import Row, Task
from utils.evaluation.whole_models import whole_model
from utils.merging.settings import MergeSettings


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Path:
    return save_evaluated_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture
def preparing() -> Preparing:
    settings = MergeSettings(Path("unwritten"), Path("recipe"), device="cpu", quiet=True)
    return Preparing(torch.device("cpu"), "float32", settings)


def test_a_recipes_model_answers_as_the_written_one_does_in_plain_transformers(pair, preparing, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    data = recipe(pair)
    rows = [Row("test", "1", "what is it? ", "x"), Row("test", "2", "and then ", "y")]
    with whole_model(Candidate("one", recipe=data), preparing) as whole:
        found = greedy_answers(whole, rows, 6)
    folder = merge_here(tmp_path, data)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for row, answer in zip(rows, found, strict=True):
        ids = tokenizer(row.prompt)["input_ids"]
        for _ in range(6):  # greedy by hand
            token = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
            ids.append(token)
            if token == model.generation_config.eos_token_id:
                break
        expected = tokenizer.decode(ids[len(tokenizer(row.prompt)["input_ids"]) :], skip_special_tokens=True)
        assert answer == expected
    assert all(value.device.type == "meta" for value in whole.model.parameters())


def test_prompts_come_from_the_tasks_in_turn():
    rows = [Row("test", str(n), f"q{n}", "a") for n in range(3)]
    tasks = [
        Task("one", 8, tuple(rows)),
        Task("two", 8, tuple(rows[:2])),
        Task("none", 8, (Row("test", "4", "", "t"),)),
    ]
    assert [(name, row.place) for name, row in prompts_of(tasks, 4)] == [
        ("one", "0"), ("two", "0"), ("one", "1"), ("two", "1"),
    ]  # fmt: skip


def test_mcnemar_pairs_by_document_and_prompt():
    from utils.evaluation.lm_eval_scores import COLUMNS, compare

    rows = [("a", "t", "acc", "none", f"d{n}", "p", float(n < 6)) for n in range(8)]
    rows += [
        ("b", "t", "acc", "none", f"d{n}", "p", float(n >= 6)) for n in reversed(range(7))
    ]  # another order, one less
    found = compare(pd.DataFrame(rows, columns=list(COLUMNS)), "a", "b")
    flips = [sum(signs) for signs in itertools.product((0, 1), repeat=7)]
    assert found == {("t", "acc", "none"): pytest.approx(sum(one in (0, 1, 6, 7) for one in flips) / 2**7)}


def test_accuracy_of_a_recipe_is_that_of_the_written_model(pair, preparing, tmp_path):
    pytest.importorskip("lm_eval", reason="lm-eval is optional: pip install -r requirements-eval.txt")
    from utils.evaluation.lm_eval_scores import accuracy, compare, find_tasks

    tasks = find_tasks([str(task_file(tmp_path))], confirmed=False)
    data = recipe(pair)
    candidates = Candidate("recipe", recipe=data), Candidate("written", model=str(merge_here(tmp_path, data)))
    tables = []
    for one in candidates:
        with whole_model(one, preparing) as whole:
            tables.append(accuracy(one.name, whole, tasks, batch_size=8))
    mine, other = (one.samples["value"].tolist() for one in tables)
    assert mine == other and len(mine) == 10
    (figures,) = tables[0].figures.itertuples(index=False, name=None)
    assert figures == ("recipe", "tiny_choice", "acc", "none", pytest.approx(sum(mine) / 10), True, True)
    both = pd.concat([one.samples for one in tables])
    assert compare(both, "recipe", "written") == {("tiny_choice", "acc", "none"): 1.0}


def test_tasks_that_run_code_or_have_no_data_are_refused_before_a_model_is_loaded(tmp_path):
    pytest.importorskip("lm_eval", reason="lm-eval is optional: pip install -r requirements-eval.txt")
    from utils.evaluation.lm_eval_scores import find_tasks

    unsafe = task_file(tmp_path, "tiny_unsafe", "unsafe_code: true")
    with refused("lm-eval-unsafe-code"):
        find_tasks([str(unsafe)], confirmed=False)
    assert find_tasks([str(unsafe)], confirmed=True).unsafe == ("tiny_unsafe",)
    unnamed = tmp_path / "unnamed.yaml"
    unnamed.write_text("output_type: multiple_choice")
    with refused("lm-eval-no-name"):
        find_tasks([str(unnamed)], confirmed=True)
    unnamed.unlink()
    (tmp_path / "rows.jsonl").unlink()
    with refused("lm-eval-no-data"):
        find_tasks([str(unsafe)], confirmed=True)


@pytest.mark.slow  # reads all of lm-eval's own tasks
def test_a_task_that_is_unknown_or_whose_data_are_not_here(tmp_path, monkeypatch):
    pytest.importorskip("lm_eval", reason="lm-eval is optional: pip install -r requirements-eval.txt")
    from utils.evaluation.lm_eval_scores import find_tasks

    with refused("lm-eval-unknown-task"):
        find_tasks(["no_such_task"], confirmed=False)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    with refused("lm-eval-no-data"):
        find_tasks(["gsm8k"], confirmed=False)
