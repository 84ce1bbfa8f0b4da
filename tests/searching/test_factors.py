"""Factors on a recipe's weights, tensor by tensor against what mergekit's own filters would give."""

import copy

import hypothesis.strategies as st
import pytest
from hypothesis import given

from tests.refusals import refused
from utils.searching.factors import Blocks, by_depth, lines_factors, spread, weighed

INSIDE = [f"model.layers.{i}.{part}.weight" for i in range(12) for part in ("mlp.up", "attn.q")]
NAMES = (*INSIDE, "model.embed.weight", "lm_head.weight")
BLOCKS = Blocks(tuple(f"model.layers.{i}." for i in range(12)), NAMES)


def recipe(first, second):
    return {
        "models": [
            {"model": "base"},
            {"model": "a", "parameters": {"weight": first}},
            {"model": "b", "parameters": {"weight": second}},
        ],
        "merge_method": "task_arithmetic",
    }


def value(items, name):
    """As mergekit reads a list: the first entry whose filter the name holds, or that has none."""
    for item in items:
        if "filter" not in item or item["filter"] in name:
            return item["value"]
    return None


WEIGHTS = st.lists(
    st.tuples(st.sampled_from([name.removesuffix(".weight") for name in NAMES]), st.floats(0.1, 2.0)), max_size=6
)


@given(WEIGHTS, WEIGHTS, st.lists(st.floats(0.2, 3.0), min_size=12, max_size=12))
def test_each_tensor_gets_its_weight_times_its_blocks_factor(first, second, factors):
    lists = [[*({"filter": text, "value": v} for text, v in own), {"value": 0.7}] for own in (first, second)]
    data = recipe(*lists)
    before = copy.deepcopy(data)
    found = by_depth(data, factors, BLOCKS)
    assert data == before
    for entry, items in zip(found["models"][1:], lists, strict=True):
        for name in NAMES:
            block = int(name.split(".")[2]) if "layers" in name else None
            wanted = value(items, name) * (1 if block is None else factors[block])
            assert value(entry["parameters"]["weight"], name) == pytest.approx(wanted, rel=1e-15)


def test_a_filter_over_several_blocks_takes_no_factor():
    with refused("search-depth-filter"):
        by_depth(recipe([{"filter": "mlp.up", "value": 2.0}, {"value": 1}], [{"value": 1}]), [1.0] * 11 + [2.0], BLOCKS)


def test_each_expert_gets_its_own_factor():
    found = weighed(recipe([{"filter": "attn.q", "value": 2.0}, {"value": 1.0}], [{"value": 0.5}]), [0.5, 3.0])
    assert found["models"][1]["parameters"]["weight"] == [{"filter": "attn.q", "value": 1.0}, {"value": 0.5}]
    assert found["models"][2]["parameters"]["weight"] == [{"value": 1.5}]


@given(st.integers(1, 40))
def test_lines_grow_threefold_and_keep_the_mean(count):
    factors = lines_factors(count)
    assert sum(factors) / count == pytest.approx(1.0)
    assert count == 1 or factors[-1] == pytest.approx(3 * factors[0])


@given(st.integers(1, 8), st.integers(8, 60))
def test_groups_are_neighbors_of_like_size(groups, count):
    found = spread([float(place) for place in range(groups)], count)
    assert found == sorted(found) and set(found) == set(map(float, range(groups)))
    sizes = [found.count(float(place)) for place in range(groups)]
    assert max(sizes) - min(sizes) <= 1


def test_a_recipe_that_has_a_filter_per_block_gains_none():
    """mergekit would never reach it, and command 3 refuses filters that hit nothing."""
    weights = [{"filter": text, "value": 2.0} for text in BLOCKS.filters]
    found = by_depth(recipe([*weights, {"value": 1.0}], [{"value": 1.0}]), [0.5] * 12, BLOCKS)
    assert found["models"][1]["parameters"]["weight"] == [
        *({"filter": text, "value": 1.0} for text in BLOCKS.filters),
        {"value": 1.0},
    ]
