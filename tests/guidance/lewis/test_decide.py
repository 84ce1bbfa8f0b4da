"""LEWIS, decide half: norms -> deltas -> densities, against the released code's files and closed forms."""

import json
from pathlib import Path

import pandas as pd
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from utils.guidance.lewis.deltas import delta_table
from utils.guidance.lewis.densities import densities, share_at_bounds

EXPERTS = ("math", "code")


def _components(folder: Path) -> list[str]:
    return yaml.safe_load((folder / "pair.yaml").read_text())["components"]


def _deltas(folder: Path, expert: str) -> pd.DataFrame:
    frame = pd.read_csv(folder / f"{expert}_delta.csv")
    frame.columns = _components(folder)
    return frame


def _golden_norms(folder: Path) -> pd.DataFrame:
    rows = []
    for model, norms in json.loads((folder / "norms.json").read_text()).items():
        for key, value in norms.items():  # Layer_<module path>_<block>
            path, layer = key.removeprefix("Layer_").rsplit("_", 1)
            rows.append((model, int(layer), path.rsplit(".", 1)[-1], value))
    return pd.DataFrame(rows, columns=["model", "layer", "component", "norm"])


@pytest.mark.parametrize("setting", ["sparsity0", "sparsity50"])
@pytest.mark.parametrize("expert", EXPERTS)
def test_the_released_codes_deltas_come_out(golden, setting, expert):
    folder = golden / setting
    table = delta_table(_golden_norms(folder), expert, "base", _components(folder))
    # The last bit is numpy's, whose releases add up in different orders.
    pd.testing.assert_frame_equal(table, _deltas(folder, expert), rtol=1e-15, atol=0.0)


@pytest.mark.parametrize("setting", ["sparsity0", "sparsity50"])
@pytest.mark.parametrize("expert", EXPERTS)
def test_the_released_codes_densities_come_out_bit_for_bit(golden, setting, expert):
    folder = golden / setting
    recipe = yaml.safe_load((folder / "pair_0.3_0.8_generated_ties_merge_config.yaml").read_text())
    entry = next(model for model in recipe["models"] if model["model"] == f"models/{expert}")
    expected = [item["value"] for item in entry["parameters"]["density"][:-1]]
    density = densities(_deltas(folder, expert), 0.3, 0.8)
    assert [value for component in density.columns for value in density[component]] == expected


def test_delta_table_by_hand():
    norms = pd.DataFrame(
        [("base", 1, "q", 5.0), ("base", 0, "q", 2.0), ("x", 0, "q", 5.0), ("x", 1, "q", 4.0)]
        + [("base", layer, "v", 7.0) for layer in (0, 1)]
        + [("x", layer, "v", 7.0) for layer in (0, 1)],
        columns=["model", "layer", "component", "norm"],
    )
    table = delta_table(norms, "x", "base", ["v", "q"])
    assert list(table.columns) == ["v", "q"]
    assert table["q"].tolist() == [0.75, 0.25]
    assert table["v"].tolist() == [0.0, 0.0]  # an untouched component, not NaN


@pytest.mark.parametrize("norm", [float("nan"), float("inf")])
def test_delta_table_refuses_what_is_not_finite(norm):
    norms = pd.DataFrame([("base", 0, "q", norm), ("x", 0, "q", 1.0)], columns=["model", "layer", "component", "norm"])
    with pytest.raises(ValueError, match="not finite"):
        delta_table(norms, "x", "base", ["q"])


def test_delta_table_refuses_layers_that_only_one_model_has():
    norms = pd.DataFrame(
        [("base", 0, "q", 1.0), ("x", 0, "q", 1.0), ("x", 1, "q", 1.0)],
        columns=["model", "layer", "component", "norm"],
    )
    with pytest.raises(ValueError, match="same layers"):
        delta_table(norms, "x", "base", ["q"])


tables = st.integers(1, 6).flatmap(
    lambda layers: st.lists(st.lists(st.floats(0, 1), min_size=layers, max_size=layers), min_size=1, max_size=4).map(
        lambda columns: pd.DataFrame({f"c{i}": column for i, column in enumerate(columns)})
    )
)
bounds = st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted)
ULP = 2e-16


@given(tables, bounds, st.sampled_from(["minmax", "clip"]))
def test_densities_are_within_bounds_and_keep_the_order(table, limits, bound):
    gamma, epsilon = limits
    density = densities(table, gamma, epsilon, bound)
    values = density.to_numpy().ravel()
    assert density.shape == table.shape
    assert ((values >= gamma - ULP) & (values <= epsilon + ULP)).all()
    order = table.map(lambda value: round(value, 5)).to_numpy().ravel()
    for i in range(len(values)):
        assert (values[order >= order[i]] >= values[i] - ULP).all()


@given(tables, bounds, st.sampled_from(["minmax", "clip"]), st.randoms())
def test_densities_do_not_depend_on_the_order_of_layers(table, limits, bound, random):
    rows = list(range(len(table)))
    random.shuffle(rows)
    shuffled = table.iloc[rows].reset_index(drop=True)
    expected = densities(table, *limits, bound).iloc[rows].reset_index(drop=True)
    pd.testing.assert_frame_equal(densities(shuffled, *limits, bound), expected, check_exact=True)


def test_minmax_reaches_both_bounds_and_clip_is_relative_to_the_largest():
    table = pd.DataFrame({"q": [0.1, 0.2, 0.7], "v": [0.0, 0.35, 0.65]})
    minmax = densities(table, 0.3, 0.8)
    assert minmax.min(axis=None) == 0.3 and minmax.max(axis=None) == pytest.approx(0.8)
    assert minmax.loc[1, "v"] == pytest.approx(0.55)  # half way: 0.35 of 0.7
    clip = densities(table, 0.3, 0.8, "clip")
    assert clip["q"].tolist() == [0.3, 0.3, 0.8]
    assert clip.loc[1, "v"] == pytest.approx(0.5)
    assert share_at_bounds(clip, 0.3, 0.8) == (pytest.approx(3 / 6), pytest.approx(2 / 6))


@pytest.mark.parametrize("bound", ["minmax", "clip"])
@pytest.mark.parametrize("value", [0.0, 0.25])
def test_equal_deltas_get_the_middle(bound, value):
    assert (densities(pd.DataFrame({"q": [value, value]}), 0.2, 0.6, bound) == 0.4).all(axis=None)


def test_deltas_are_rounded_to_five_decimals_first():
    table = pd.DataFrame({"q": [0.1000001, 0.1000049, 0.3]})
    density = densities(table, 0.0, 1.0)
    assert density["q"].tolist() == [0.0, 0.0, 1.0]


def test_an_unknown_bound_is_refused():
    with pytest.raises(ValueError, match="bound"):
        densities(pd.DataFrame({"q": [0.1]}), 0.3, 0.8, "softmax")
