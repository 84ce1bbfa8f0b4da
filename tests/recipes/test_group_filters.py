"""Filters of groups: mergekit's own matching gives every tensor the value of its group."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.refusals import refused
from tests.selected import few
from tests.tiny_checkpoints import FAMILIES, save_tiny
from utils.errors import UserError
from utils.models.architecture import plan_architecture
from utils.models.opening import open_checkpoint
from utils.recipes.group_filters import group_filters


def _values_by_mergekit(filters, values, name):
    from mergekit.config import ConditionalParameter, evaluate_setting

    entries = [ConditionalParameter(filter=text, value=values[target]) for target, text in filters.items()]
    return evaluate_setting(name, [*entries, ConditionalParameter(value=-1)], validate=float)


def _check(groups, names):
    numbers = {group: place for place, group in enumerate(dict.fromkeys(groups.values()))}
    values = {name: numbers[group] for name, group in groups.items()}
    filters = group_filters(groups, names, "model")
    assert set(filters) == set(groups)
    for name in names:
        assert _values_by_mergekit(filters, values, name) == values.get(name, -1)
    return filters


@pytest.mark.parametrize(
    ("family", "depth"),
    few(
        itertools.product(FAMILIES, (1, 2, 9)),
        *((family, 2) for family in FAMILIES),
        *((family, depth) for family in ("llama", "gpt2", "gpt_neox") for depth in (1, 9)),
    ),
)
def test_every_family_by_block_part_and_tensor(family, depth, tmp_path):
    base = open_checkpoint(str(save_tiny(family, tmp_path)))
    names = [tensor.name for tensor in plan_architecture(base).tensors]

    def group(name):
        parts = name.split(".")
        number = next((place for place, part in enumerate(parts) if part.isdigit()), None)
        return name if number is None else tuple(parts[: number + depth])

    filters = _check({name: group(name) for name in names}, names)
    if depth == 1:  # a block is one filter
        blocks = {text for name, text in filters.items() if any(part.isdigit() for part in name.split("."))}
        assert len(blocks) == len({group(name) for name in names if group(name) != name})


def test_a_block_is_one_filter_that_ends_with_a_dot():
    names = [f"model.layers.{layer}.{part}.weight" for layer in (1, 10) for part in ("mlp.up", "attn.q", "norm")]
    filters = _check({name: name.split(".")[2] for name in names}, names)
    assert set(filters.values()) == {"model.layers.1.", "model.layers.10."}


def test_names_that_begin_alike_are_distinguished():
    names = ["a.weight", "a.weight_scale", "b.a.weight"]
    with refused("filter-inexact"):  # `a.weight` is inside `b.a.weight`
        group_filters({"a.weight": 1}, names, "model")
    _check({name: name for name in names}, names)


words = st.lists(st.sampled_from("ab1"), min_size=1, max_size=4).map(".".join)


@given(st.dictionaries(words, st.integers(0, 2), min_size=1, max_size=12))
def test_either_every_name_gets_its_group_or_it_is_an_error(groups):
    try:
        _check(groups, list(groups))
    except UserError as error:
        assert "hits it" in str(error)
