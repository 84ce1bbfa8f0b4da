"""What is estimated for a tensor whose method cannot be gone with stand-ins.

python -m pytest tests/merging/test_method_memory.py
"""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.tiny_merges import recipe, save_models, write_recipe
from utils.merging.method_memory import MethodMemory
from utils.merging.planning import plan_recipe
from utils.merging.recipe_file import read_recipe
from utils.merging.settings import MergeSettings


@pytest.fixture
def plan(tmp_path):
    save_models(tmp_path)
    path = write_recipe(tmp_path / "recipe.yaml", recipe(tmp_path, "dare_linear"))
    asked = MergeSettings(Path("unused"), path, device="cpu")
    return plan_recipe(asked, read_recipe(path), lambda line: None).plan


def estimates(plan) -> dict[str, int]:
    needed = MethodMemory(plan, False)
    return {tensor.name: needed.of(tensor) for tensor in plan.tensors}


@pytest.mark.parametrize("error", [ValueError, TypeError, IndexError, RuntimeError, ZeroDivisionError, AssertionError])
def test_a_method_that_refuses_stand_ins_leaves_inputs_and_result(plan, monkeypatch, error):
    before = estimates(plan)

    def refuse(task, tensors):
        raise error("not such tensors")

    monkeypatch.setattr(type(plan.tensors[0].task), "execute", refuse)
    for tensor in plan.tensors:
        least = tensor.nbytes + tensor.params * 2  # the result in the inputs' dtype, and in the output's
        assert least <= MethodMemory(plan, False).of(tensor) <= before[tensor.name]


def test_memory_that_runs_out_is_no_refusal(plan, monkeypatch):
    def exhaust(task, tensors):
        raise MemoryError

    monkeypatch.setattr(type(plan.tensors[0].task), "execute", exhaust)
    with pytest.raises(MemoryError):
        estimates(plan)


def test_parameters_may_be_lists(plan):
    needed = MethodMemory(plan, False)
    for tensor in plan.tensors:
        parameters = {**dict(tensor.task.parameters.items()), "names": ["one", {"two": 3}]}
        other = replace(tensor, task=tensor.task.model_copy(update={"parameters": parameters}))
        assert needed.of(other) >= 2 * tensor.nbytes
