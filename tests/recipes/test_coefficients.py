"""The coefficient table: budgets, controls, summaries."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.refusals import refused
from utils.recipes.coefficients import (
    by_component,
    by_depth,
    coefficient_table,
    mean_density,
    uniform_control,
    with_mean_density,
)


def _table(density, params, model="x", weight=1.0) -> pd.DataFrame:
    count = len(density)
    return pd.DataFrame(
        {
            "model": model,
            "tensor": [f"t{i}" for i in range(count)],
            "layer": range(count),
            "component": "q",
            "density": density,
            "weight": weight,
            "params": params,
        }
    )


rows = st.lists(st.tuples(st.floats(0, 1), st.integers(1, 10**9)), min_size=1, max_size=20)


def test_rows_are_ordered_by_component_then_layer():
    density = pd.DataFrame({"q": [0.1, 0.2], "v": [0.3, 0.4]})
    names = {(layer, name): f"blocks.{layer}.{name}.weight" for layer in (0, 1) for name in ("q", "v")}
    table = coefficient_table("x", density, names, {"blocks.0.q.weight": 6})
    assert table["tensor"].tolist() == [names[0, "q"], names[1, "q"], names[0, "v"], names[1, "v"]]
    assert table["density"].tolist() == [0.1, 0.2, 0.3, 0.4]
    assert table["weight"].tolist() == [1.0] * 4
    assert table["params"].tolist() == [6, 0, 0, 0]
    assert coefficient_table("x", density, names, {}, as_weights=True)["weight"].tolist() == [0.1, 0.2, 0.3, 0.4]


def test_the_mean_is_over_parameters():
    assert mean_density(_table([0.2, 0.8], [300, 100])) == pytest.approx(0.35)
    assert mean_density(_table([0.2, 0.8], [300, 0])) is None


@given(rows, st.floats(1e-6, 1))
def test_the_budget_is_hit_and_scaling_is_the_only_change(items, budget):
    density, params = np.array([item[0] for item in items]), np.array([item[1] for item in items])
    assume(not ((density > 0) & (density < 1e-9)).any())
    reachable = np.average(density > 0, weights=params)
    table = _table(density, params)
    if budget > reachable:
        with refused("mean-density-unreachable"):
            with_mean_density(table, budget)
        return
    scaled = with_mean_density(table, budget)
    assert abs(mean_density(scaled) - budget) < 1e-9
    result = scaled["density"].to_numpy()
    assert ((result >= 0) & (result <= 1)).all()
    free = (result < 1) & (density > 0)
    if free.any():  # one factor for all that are not at 1, and those at 1 would be at least 1 with it
        factors = result[free] / density[free]
        assert np.allclose(factors, factors[0], rtol=1e-9)
        assert (density[result == 1] * factors[0] >= 1 - 1e-9).all()
    pd.testing.assert_frame_equal(scaled.drop(columns="density"), table.drop(columns="density"))


def test_the_budget_is_per_expert_and_can_carry_the_weights():
    table = pd.concat([_table([0.2, 0.4], [1, 1], "a"), _table([0.8, 0.9], [1, 3], "b")])
    scaled = with_mean_density(table, 0.1, as_weights=True)
    for _, part in scaled.groupby("model"):
        assert mean_density(part) == pytest.approx(0.1, abs=1e-12)
    assert (scaled["weight"] == scaled["density"]).all()


def test_a_full_budget_keeps_everything():
    assert (with_mean_density(_table([0.2, 0.9], [5, 1]), 1.0)["density"] == 1).all()


@given(rows)
def test_the_uniform_control_has_the_same_mean(items):
    table = _table([item[0] for item in items], [item[1] for item in items])
    control = uniform_control(table)
    assert control["density"].nunique() == 1
    assert mean_density(control) == pytest.approx(mean_density(table), rel=1e-12, abs=1e-300)
    assert control["tensor"].tolist() == table["tensor"].tolist()


def test_the_uniform_control_levels_the_weights_too():
    table = _table([0.2, 0.4], [1, 3]).assign(weight=[0.2, 0.4])
    assert uniform_control(table)["weight"].tolist() == pytest.approx([0.35, 0.35])


@pytest.mark.parametrize("change", [lambda table: with_mean_density(table, 0.5), uniform_control])
def test_without_sizes_there_is_no_mean(change):
    with refused("tensor-sizes-unknown"):
        change(_table([0.2, 0.4], [10, 0]))


def test_depth_is_per_layer_when_shallow_and_thirds_when_deep():
    assert by_depth(_table([0.2, 0.4], [1, 1])) == [("0", 0.2), ("1", 0.4)]
    deep = by_depth(_table([i / 100 for i in range(32)], [1] * 32))
    assert [label for label, _ in deep] == ["0-10", "11-20", "21-31"]
    assert deep[0][1] == pytest.approx(0.05)


def test_component_means_are_weighted_and_in_order():
    table = _table([0.2, 0.6, 0.5], [1, 3, 1]).assign(component=["v", "v", "q"])
    assert by_component(table) == [("v", pytest.approx(0.5)), ("q", pytest.approx(0.5))]
