"""Which recipes stock mergekit runs, by their method and by how their models are planned."""

from types import SimpleNamespace

import pytest

from utils.models.planned_tensors import ADJUSTED, DEFINITION, INFERENCE, STORED
from utils.recipes.method_rules import DENSITY_METHODS, OWN_METHODS
from utils.recipes.stock import models_against_stock, reason_against_stock


def written(origin, stacks=()):
    return SimpleNamespace(
        base=SimpleNamespace(stacks=stacks), plan=SimpleNamespace(origin=origin, reason="it asks\nfor x")
    )


@pytest.mark.parametrize("origin", [DEFINITION, INFERENCE])
def test_models_as_mergekit_plans_them(origin):
    assert models_against_stock(written(origin)) == models_against_stock(None) == ""
    assert reason_against_stock(DENSITY_METHODS["ties"], written(origin)) == ""
    for method in OWN_METHODS.values():
        assert method.name in reason_against_stock(method, written(origin))


def test_models_that_it_would_lose_parts_of_or_stop_at():
    reasons = [models_against_stock(one) for one in (written(STORED), written(STORED, ("stack",)), written(ADJUSTED))]
    assert len(set(reasons)) == 3 and all(reasons)
    assert "it asks for x" in reasons[2]
