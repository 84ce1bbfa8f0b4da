"""Task files of strangers for lm-eval: nothing in them runs unasked, and nothing in them grows.

python -m pytest tests/evaluation/test_lm_eval_code.py
"""

import pytest

from tests.refusals import refused
from tests.tiny_evaluations import task_file

pytest.importorskip("lm_eval", reason="lm-eval is optional: pip install -r requirements-eval.txt")
from lm_eval.tasks import TaskManager

from utils.evaluation.lm_eval_code import code_in
from utils.evaluation.lm_eval_scores import find_tasks

EVIL = "from pathlib import Path\n\n\ndef run(docs):\n    (Path(__file__).parent / 'ran').touch()\n    return docs\n"
FUNCTION = "process_docs: !function evil.run"
BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.fixture(autouse=True)
def evil(tmp_path):
    (tmp_path / "evil.py").write_text(EVIL)
    return tmp_path / "ran"


@pytest.mark.parametrize("depth", [0, 2])
def test_functions_beside_a_task_file_run_only_if_that_was_asked_for(tmp_path, evil, depth):
    task = task_file(tmp_path, "tiny_function", "include: more_1.yaml" if depth else FUNCTION)
    for number in range(1, depth + 1):
        below = FUNCTION if number == depth else f"include: more_{number + 1}.yaml"
        (tmp_path / f"more_{number}.yaml").write_text(below)
    with refused("lm-eval-unsafe-code"):
        find_tasks([str(task)], confirmed=False)
    assert not evil.exists()
    find_tasks([str(task)], confirmed=True)
    assert evil.exists()


def test_a_group_counts_with_its_tasks(tmp_path, evil):
    task_file(tmp_path, "tiny_function", FUNCTION)
    (tmp_path / "group.yaml").write_text("group: tiny_group\ntask:\n  - tiny_function\n")
    index = TaskManager(include_path=[str(tmp_path)], include_defaults=False).task_index
    (code,) = code_in(["tiny_group"], index)
    assert "process_docs: !function evil.run" in code
    assert not evil.exists()


@pytest.mark.parametrize(
    "metric", ["metric: acc\n    hf_evaluate: true", "metric: ./evil.py", "metric: somebody/metric"]
)
def test_a_metric_that_is_a_script_is_refused(tmp_path, metric):
    task = task_file(tmp_path, "tiny_metric")
    task.write_text(task.read_text() + f"\nmetric_list:\n  - {metric}\n")
    with refused("lm-eval-unsafe-code"):
        find_tasks([str(task)], confirmed=False)


def test_templates_see_the_row_alone(tmp_path):
    import lm_eval.utils
    from jinja2.exceptions import SecurityError

    find_tasks([str(task_file(tmp_path))], confirmed=False)
    assert lm_eval.utils.apply_template("{{ question | regex_replace('a', 'b') }}\n", {"question": "aa"}) == "bb\n"
    with pytest.raises(SecurityError):
        lm_eval.utils.apply_template("{{ ''.__class__.__mro__ }}", {})


@pytest.mark.parametrize("more", [BOMB, "x: &x [*x]", "x: " + "[" * 99 + "]" * 99])
def test_what_grows_is_refused(tmp_path, more):
    with refused("lm-eval-unreadable"):
        find_tasks([str(task_file(tmp_path, more=more))], confirmed=False)


def test_another_file_of_the_same_name_is_not_taken(tmp_path, evil):
    wanted = task_file(tmp_path, "tiny_choice")
    (tmp_path / "a.yaml").write_text(wanted.read_text() + f"\n{FUNCTION}\n")
    with refused("lm-eval-name-twice"):
        find_tasks([str(wanted)], confirmed=True)
    assert not evil.exists()
