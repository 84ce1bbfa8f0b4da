"""Accuracy by the local task files: answers run against their tests, numbers found in text, and the whole way offline.

python -m pytest tests/evaluation/test_accuracy.py
"""

import itertools
import json
import os
from pathlib import Path

import pandas as pd
import pytest

from tests.commands_here import run_here
from tests.conftest import ROOT
from tests.refusals import refusal_code, refused
from tests.tiny_evaluations import pair_keys, save_evaluated_pair, task_file
from tests.tiny_merges import recipe, write_recipe
from tests.tiny_pairs import write_config
from utils.evaluation.accuracy.pass_at_k import pass_at_1, pass_at_k, passes, run_side_by_side
from utils.evaluation.lm_eval_scores import COLUMNS, FIGURES, Accuracy, joined

TASKS = ROOT / "utils/evaluation/accuracy"
TESTS = "assert double(3) == 6\nassert double(0) == 0"
RIGHT, WRONG = "def double(x):\n    return x + x", "def double(x):\n    return x * x"


def test_a_metric_has_one_unit_for_all_candidates():
    """One candidate's numbers happen to lie between 0 and 1."""
    samples = pd.DataFrame([], columns=list(COLUMNS))
    rows = [("a", "t", "m", "none", 0.5, True, True), ("b", "t", "m", "none", 7.0, True, False)]
    rows += [(name, "t", "acc", "none", 0.5, True, True) for name in "ab"]
    found = [Accuracy(samples, pd.DataFrame([r for r in rows if r[0] == n], columns=list(FIGURES))) for n in "ab"]
    assert joined(found).figures["share"].tolist() == [False, True, False, True]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (RIGHT, True),
        (WRONG, False),
        ("def double(x) return 2 * x", False),
        (f"import os\n{WRONG}\nos._exit(0)", False),
        (f"import sys\n{WRONG}\nsys.exit(0)", False),
        (f"{RIGHT}\nprint('noise')", True),
        (f"import os\n{RIGHT}\nassert 'HOME' not in os.environ and not os.listdir('.')[1:]", True),
        ("double = lambda x: input() or 2 * x", False),  # there is nothing to read
    ],
)
def test_an_answer_passes_if_it_gets_to_the_end_of_its_tests(answer, expected):
    assert passes(answer, TESTS) is expected
    assert pass_at_1([TESTS], [answer]) == expected


def test_an_answer_that_does_not_end_is_ended():
    assert not passes(f"{RIGHT}\nimport time\ntime.sleep(60)", TESTS, seconds=0.5)


def test_answers_are_run_side_by_side_before_the_metric_asks_for_one(tmp_path):
    """Each answer waits for the files of all others, so that none passes alone."""
    count = min(2, len(os.sched_getaffinity(0)))
    wait = (
        "import pathlib, time\n"
        "folder = pathlib.Path({folder!r})\n"
        "(folder / '{number}').touch()\n"
        "end = time.time() + 5\n"
        "while len(list(folder.iterdir())) < {count} and time.time() < end:\n"
        "    time.sleep(0.01)\n"
        "assert len(list(folder.iterdir())) >= {count}\n"
    )
    answers = [[wait.format(folder=str(tmp_path), number=number, count=count)] for number in range(count)]
    rows = [{"test_list": [f"assert {number} == {number}"]} for number in range(count)]
    assert run_side_by_side(answers, rows) == answers
    for file in tmp_path.iterdir():
        file.unlink()  # an answer that ran again would find itself alone
    assert [pass_at_1(row["test_list"][0], [own]) for row, own in zip(rows, answers, strict=True)] == [1.0] * count


@pytest.mark.parametrize("answers", [1, 4, 6])
def test_pass_at_k_is_the_share_of_draws_with_one_that_passes(answers):
    for passed, k in itertools.product(range(answers + 1), range(1, answers + 1)):
        draws = list(itertools.combinations([True] * passed + [False] * (answers - passed), k))
        assert pass_at_k(answers, passed, k) == pytest.approx(sum(map(any, draws)) / len(draws))
    assert pass_at_1(TESTS, [[RIGHT, WRONG, WRONG, RIGHT]]) == 0.5
    with pytest.raises(ValueError, match="cannot be estimated"):
        pass_at_k(answers, 0, answers + 1)


MATH = [
    {"question": f"What is {n} and {n}?", "answer": f"We add.\n#### {2 * n}"} for n in (500, 21, 7)
]  # the test rows; the train rows are others
CODE = [
    {"task_id": 11 + n, "text": f"Double it, {n}.", "code": RIGHT, "test_list": TESTS.split("\n")} for n in range(2)
]
SHOWN = [{"task_id": n, "text": f"Example {n}.", "code": "x = 1", "test_list": ["assert x"]} for n in (1, 2, 3, 4, 5)]
COMPLETE = [
    {
        "task_id": "H/0",
        "prompt": "def double(x):\n",
        "test": "def check(f):\n    assert f(3) == 6",
        "entry_point": "double",
    }
]


def write_data(folder):
    """The three data sets as JSON lines, where the task files look for them."""
    train = [{"question": f"Count to {n}.", "answer": f"#### {n}"} for n in range(1, 9)]
    files = {
        "gsm8k/train": train, "gsm8k/test": MATH, "mbpp/prompt": SHOWN, "mbpp/test": CODE, "humaneval/test": COMPLETE,
    }  # fmt: skip
    for name, rows in files.items():
        path = folder / f"data/{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def answered(names, answer):
    """Values by task, metric and filter where a model gives these answers to these prompts; and the prompts."""
    from lm_eval import simple_evaluate
    from lm_eval.api.model import LM

    from utils.evaluation.lm_eval_scores import find_tasks

    prompts = []

    class Canned(LM):
        """Answers every prompt by a function."""

        def generate_until(self, requests, disable_tqdm=False):
            prompts.extend(request.args[0] for request in requests)
            return [answer(request.args[0]) for request in requests]

        def loglikelihood(self, requests, disable_tqdm=False):
            raise AssertionError("these tasks generate; nothing asks for likelihoods")

        loglikelihood_rolling = loglikelihood

    tasks = find_tasks([str(TASKS / f"{name}.yaml") for name in names], confirmed=True)
    found = simple_evaluate(
        model=Canned(),
        tasks=list(tasks.names),
        task_manager=tasks.manager,
        bootstrap_iters=0,
        confirm_run_unsafe_code=True,
    )
    values = {
        (task, key): value
        for task, own in found["results"].items()
        for key, value in own.items()
        if isinstance(value, float)
    }
    return values, prompts


@pytest.fixture
def data(tmp_path, monkeypatch):
    pytest.importorskip("lm_eval", reason="lm-eval is optional: pip install -r requirements-eval.txt")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path)
    return tmp_path


def test_gsm8k_strict_match_wants_the_mark_and_flexible_extract_the_last_number(data):
    answers = {"500": "So #### 1,000", "21": "That is 42.", "7": "It is #### 15"}
    values, prompts = answered(["gsm8k"], lambda prompt: answers[prompt.rsplit("What is ")[-1].split(" ")[0]])
    assert values["gsm8k_file", "exact_match,strict-match"] == pytest.approx(1 / 3)
    assert values["gsm8k_file", "exact_match,flexible-extract"] == pytest.approx(2 / 3)
    assert all(prompt.count("Question:") == 6 and prompt.count("#### ") == 5 for prompt in prompts)


def test_mbpp_and_humaneval_run_what_is_answered(data):
    def answer(prompt):
        if "[BEGIN]" in prompt:
            return RIGHT if "Double it, 0." in prompt else WRONG
        return "    return 2 * x"

    values, prompts = answered(["mbpp", "humaneval"], answer)
    assert values["mbpp_file", "pass_at_1,none"] == 0.5
    assert values["humaneval_file", "pass_at_1,completed"] == 1.0
    shown = [prompt for prompt in prompts if "[BEGIN]" in prompt]
    assert all(
        prompt.count("x = 1\n[DONE]") == 3 and "Example 4." in prompt and "Example 1." not in prompt for prompt in shown
    )


@pytest.mark.slow
def test_the_whole_way_offline(data):
    """Three tasks for base, experts and a recipe by the evaluator's command, with code only if that is confirmed."""
    save_evaluated_pair(data)
    write_recipe(data / "merged.yaml", recipe(data))
    few = {"gsm8k": "num_fewshot: 1", "mbpp": "num_fewshot: 1", "humaneval": "num_fewshot: 0"}
    for name, line in few.items():
        short = "generation_kwargs: {until: [stop], max_gen_toks: 4, do_sample: false}"
        (data / f"{name}.yaml").write_text(f"include: {TASKS / name}.yaml\ntask: short_{name}\n{line}\n{short}\n")
    keys = pair_keys(data)
    keys["evaluation"]["math"]["lm_eval"] = [str(data / "gsm8k.yaml")]
    keys["evaluation"]["code"]["lm_eval"] = [str(data / f"{name}.yaml") for name in ("mbpp", "humaneval")]
    write_config(data, keys)
    words = (
        "--config",
        "pair.yaml",
        "--out_dir",
        "out",
        "--validation_rows",
        2,
        "--test_rows",
        2,
        "--no-samples",
        "--no-controls",
    )
    unconfirmed = run_here("utils/evaluator.py", *words, "merged.yaml", cwd=data)
    assert refusal_code(unconfirmed) == "lm-eval-unsafe-code"
    done = run_here("utils/evaluator.py", *words, "--confirm_run_unsafe_code", "merged.yaml", cwd=data)
    assert done.returncode == 0, done.stderr
    scores = pd.read_csv(data / "out/scores.csv")
    found = scores[scores["measure"].str.contains("exact_match|pass_at_1")]
    assert set(found["candidate"]) == {"base", "code", "math", "merged"} and len(found) == 4 * (2 + 1 + 1)
    assert found["value"].between(0, 1).all()


def test_the_digest_of_a_task_holds_its_documents_what_it_includes_and_its_functions(data, monkeypatch):
    from utils.evaluation.lm_eval_scores import find_tasks

    (data / "text.py").write_text("from sibling import asked\n\n\ndef text(doc):\n    return asked(doc)\n")
    (data / "sibling.py").write_text("def asked(doc):\n    return doc['question']\n")
    monkeypatch.syspath_prepend(data)
    task = task_file(data)
    task.write_text(task.read_text().replace('doc_to_text: "{{question}}"', "doc_to_text: !function text.text"))
    (data / "whole.yaml").write_text(f"include: {task.name}\ntask: whole\n")

    def digest():
        return find_tasks([str(data / "whole.yaml")], confirmed=True).digest

    seen = [digest()]
    assert digest() == seen[0]
    for path, old, new in (
        (data / "rows.jsonl", "is 3 even", "is 13 even"),
        (task, "metric: acc", "metric: acc_norm"),
        (data / "sibling.py", "doc['question']", "doc['question'] + ' '"),
    ):
        path.write_text(path.read_text().replace(old, new))
        seen.append(digest())
    assert len(set(seen)) == len(seen)


def test_a_task_file_that_is_none(tmp_path):
    pytest.importorskip("lm_eval", reason="lm-eval is optional: pip install -r requirements-eval.txt")
    from utils.evaluation.lm_eval_scores import find_tasks

    with refused("lm-eval-unreadable"):
        find_tasks([str(tmp_path / "absent.yaml")], confirmed=True)
    Path(tmp_path / "odd.yaml").write_text("a: [")
    with refused("lm-eval-unreadable"):
        find_tasks([str(tmp_path / "odd.yaml")], confirmed=True)
