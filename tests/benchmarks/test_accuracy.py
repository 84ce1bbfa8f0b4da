"""The accuracy benchmark: its texts share nothing, its table says what the evaluator wrote, its stages wait for each other.

python -m pytest tests/benchmarks/test_accuracy.py -m ""
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from benchmarks.accuracy_report import figures, markdown
from benchmarks.accuracy_stages import Stage, Stages
from benchmarks.accuracy_texts import assert_apart, file_of, pair_config, prompt, rows_of, taken_first, write_texts
from benchmarks.quality_texts import FILES
from tests.conftest import ROOT
from utils.evaluation.tasks import evaluation_rows
from utils.pair.config import read_pair_config


def gsm8k(name: str, number: int) -> dict:
    return {"question": f"How many {name} are {number}?", "answer": f"{name} {number}\n#### {number}"}


def mbpp(name: str, number: int) -> dict:
    code = f"def {name}_{number}():\r\n\treturn {number}"
    return {"text": f"Write {name} {number}.", "code": code, "test_list": [f"assert {name}_{number}() == {number}"]}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder laid out as the published sets; a test row comes back in train, and a prompt is too long."""
    for task, make in (("gsm8k", gsm8k), ("mbpp", mbpp)):
        (tmp_path / task).mkdir()
        for split in FILES[task]:
            rows = [make(split, number) for number in range(400 if (task, split) == ("gsm8k", "train") else 40)]
            rows += [make("test", 2)] if split == "train" else []
            if (task, split) == ("mbpp", "test"):
                rows[1]["test_list"] *= 100
            (tmp_path / task / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_nothing_that_is_trained_on_is_measured_or_judged_on(data):
    tasks = rows_of(data, seed=0)
    assert_apart(tasks)
    assert [len(rows.test) for rows in tasks.values()] == [40, 39]
    assert [len(rows.calibration) for rows in tasks.values()] == [48, 48] and tasks["mbpp"].train
    leaked = replace(tasks["mbpp"], train=(*tasks["mbpp"].train, tasks["mbpp"].test[0]))
    with pytest.raises(AssertionError, match="held out"):
        assert_apart({**tasks, "mbpp": leaked})


def test_the_evaluator_takes_the_rows_for_choosing_first(data, tmp_path):
    """By the evaluator's own reading of the files."""

    tasks = rows_of(data, seed=0, train=4, test=6)
    write_texts(tasks, tmp_path / "texts")
    models = {"base": "base", "gsm8k": "math", "mbpp": "code"}
    models = {name: ROOT / "tests/golden/models" / folder for name, folder in models.items()}
    config = pair_config(models, tmp_path / "texts", dict.fromkeys(tasks, Path("x.yaml")), "</s>", 4, 64)
    (tmp_path / "pair.yaml").write_text(json.dumps(config))
    for task in evaluation_rows(read_pair_config(tmp_path / "pair.yaml"), validation=6, test=6):
        own = tasks[task.name]
        for part, rows in (("validation", own.validation), ("test", own.test)):
            found = [(task.rows[number].prompt, task.rows[number].answer) for number in task.part(part)]
            assert found == [(prompt(row), row.answer + "</s>") for row in rows]
    lines = [json.loads(line) for line in file_of(tmp_path / "texts", "mbpp", "test").read_text().splitlines()]
    assert [line["test_list"] for line in lines] == [list(row.checks) for row in tasks["mbpp"].test]
    assert sorted(taken_first([1, 2], [3])) == [1, 2, 3]


def test_a_table_has_a_row_for_each_model(tmp_path):
    rows = []
    for name, role, loss, kept, right in (
        ("base", "base", 2.0, 0.0, 0.01),
        ("task arithmetic 0.5", "control", 1.5, 0.5, 0.02),
        ("pair_generated", "candidate", 1.2, 0.8, 0.05),
    ):
        for task in ("gsm8k", "mbpp"):
            rows.append((name, role, task, "loss", loss, None))
            rows.append((name, role, task, "gain_kept", kept, None))
        rows.append((name, role, "all tasks", "gain_kept", kept, None))
        rows.append((name, role, "gsm8k_own_format", "exact_match, strict-match", right, 0.25))
        rows.append((name, role, "gsm8k_own_format", "exact_match, flexible-extract", 2 * right, 0.5))
        rows.append((name, role, "mbpp_own_format", "pass_at_1", right, None))
    scores = pd.DataFrame(rows, columns=["candidate", "role", "task", "measure", "value", "p"])
    table = figures(scores, ["ours"])
    assert table["model"].tolist() == ["base", "task arithmetic 0.5", "ours"]
    ours = table.iloc[-1]
    assert (ours["gsm8k_loss"], ours["mean_kept"], ours["gsm8k_flexible"], ours["gsm8k_flexible_p"]) == (
        1.2,
        0.8,
        0.1,
        0.5,
    )
    text = markdown(table, "task arithmetic 0.5", ["a fact"], {"base": 3.0})
    assert "| ours | 1.2000 (80.0%) | 1.2000 (80.0%) | 80.0% | 5.0% (p 0.250) | 10.0% (p 0.500) | 5.0% |" in text


def stage(folder: Path, name: str, code: str, *needs: str) -> Stage:
    return Stage(name, needs, lambda: ("-c", code), lambda: (folder / name).exists())


def test_stages_wait_for_what_they_need_and_what_fails_stops_no_other(tmp_path):
    def touch(name: str, *needed: str) -> str:
        return f"import os, pathlib; os.chdir({str(tmp_path)!r}); " + "".join(
            f"assert os.path.exists({one!r}); " for one in needed
        ) + f"pathlib.Path({name!r}).touch()"  # fmt: skip

    stages = [
        stage(tmp_path, "third", touch("third", "first"), "second"),
        stage(tmp_path, "second", touch("second", "first"), "first"),
        stage(tmp_path, "first", touch("first")),
        stage(tmp_path, "bad", "raise SystemExit(3)"),
        stage(tmp_path, "after bad", touch("after bad"), "bad"),
        stage(tmp_path, "cut", "raise SystemExit(75)"),
    ]
    runner = Stages(tmp_path, {}, 3, None)
    found = runner.run(stages, lambda name: [stage(tmp_path, "last", touch("last"))] if name == "third" else [])
    assert found.done == ["first", "second", "third", "last"]
    assert (found.failed, sorted(found.left)) == (["bad"], ["after bad", "cut"])
    assert set(runner.seconds) == {"first", "second", "third", "last", "bad", "cut"}
    later = Stages(tmp_path, {}, 3, time.time() - 1)  # what is there is done, and nothing is begun
    assert sorted(later.run(stages, lambda name: []).done) == ["first", "second", "third"]


@pytest.mark.slow
def test_the_whole_benchmark_cut_and_gone_on_with(tmp_path):
    pytest.importorskip("lm_eval", reason="lm-eval is optional: pip install -r requirements-eval.txt")
    if "LEWIS_TEST_DATA" not in os.environ:
        pytest.skip("LEWIS_TEST_DATA is not set")
    words = [sys.executable, ROOT / "benchmarks/accuracy.py", "--data", Path(os.environ["LEWIS_TEST_DATA"]) / "data"]
    words += ["--base", ROOT / "tests/golden/models/base", "--rows", 24, "--test_rows", 8, "--new_tokens", 8]
    words += ["--batch", 4, "--rate", 1e-3, "--at_once", 2, "--lanes", 2]
    words += ["--work", tmp_path / "work", "--results", tmp_path / "results"]
    words = [str(word) for word in words]
    cut = subprocess.run([*words, "--minutes", "0.05"], capture_output=True, text=True)
    assert cut.returncode == 75, cut.stderr
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(tmp_path / "results/accuracy.csv").set_index("model")
    assert table["role"].value_counts().to_dict() == {"base": 1, "expert": 2, "control": 2, "candidate": 4}
    assert table[["gsm8k_strict", "gsm8k_flexible", "mbpp_pass_at_1"]].notna().all(axis=None)
    assert table.loc["expert of GSM8K", "gsm8k_kept"] == 1.0 and table.loc["base", "mean_kept"] == 0.0
    again = subprocess.run([*words, "--minutes", "0"], capture_output=True, text=True)
    assert again.returncode == 0 and "evaluate" not in again.stderr
