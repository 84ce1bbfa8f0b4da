"""Plans of many recipes of the same models.

python -m pytest tests/merging/test_planning.py
"""

import os

import pytest

from tests.tiny_merges import recipe, save_models, write_recipe
from utils.merging import planning
from utils.merging.planning import SharedPlans, plan_recipe
from utils.merging.recipe_file import read_recipe
from utils.merging.settings import MergeSettings


@pytest.fixture
def plan(tmp_path):
    save_models(tmp_path)

    def planned(shared=None, **keys):
        written = write_recipe(tmp_path / "recipe.yaml", recipe(tmp_path, "task_arithmetic", **keys))
        settings = MergeSettings(tmp_path / "merged", written, device="cpu", quiet=True)
        return plan_recipe(settings, read_recipe(written), lambda line: None, shared)

    return planned


def changes_of(planned) -> list[tuple]:
    """What a merge would do to each tensor, as plain values."""
    return [(one.name, one.shape, one.dtype, dict(one.task.parameters.items())) for one in planned.plan.tensors]


def test_names_and_tokens_are_planned_once_for_recipes_that_differ_in_numbers(plan, tmp_path, monkeypatch):
    asked = []
    vocabulary = planning.plan_vocabulary
    monkeypatch.setattr(
        planning, "plan_vocabulary", lambda *given, **named: asked.append(given) or vocabulary(*given, **named)
    )
    shared = SharedPlans()
    first, second = (plan(shared, parameters={"lambda": scale}) for scale in (0.3, 0.6))
    assert len(asked) == 1
    alone = plan(parameters={"lambda": 0.6})
    assert changes_of(second) == changes_of(alone) != changes_of(first)
    before = len(asked)
    plan(shared, tokenizer_source="union")
    assert len(asked) == before + 1
    os.utime(tmp_path / "code/model.safetensors", ns=(1, 1))
    plan(shared, parameters={"lambda": 0.3})
    assert len(asked) == before + 2
