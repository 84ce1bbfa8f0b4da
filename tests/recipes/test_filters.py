"""Filters: each hits its own tensor and nothing else, by mergekit's own matching."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.refusals import refused
from tests.selected import few
from tests.tiny_checkpoints import FAMILIES, LAYERS, block_prefix, save_tiny
from utils.errors import UserError
from utils.guidance.lewis.naming import found_names
from utils.models.architecture import plan_architecture
from utils.models.opening import open_checkpoint
from utils.recipes.filters import (
    NamedTensor,
    as_planned,
    coverage,
    exact_filters,
    name_template,
    planned_tensors,
)


def _mergekit_hits(filters, name):
    """Which entry of a filter list mergekit itself applies to a tensor name."""
    from mergekit.config import ConditionalParameter, evaluate_setting

    setting = [ConditionalParameter(filter=text, value=i) for i, text in enumerate(filters)]
    return evaluate_setting(name, [*setting, ConditionalParameter(value=-1)], validate=float)


@pytest.mark.parametrize("family", few(FAMILIES, "llama", "gemma3", "gpt2", "gpt_neox", "phi3_tied"))
def test_every_family(family, tmp_path):
    base = open_checkpoint(str(save_tiny(family, tmp_path)))
    plan = plan_architecture(base)
    tensors = planned_tensors(plan, base)
    assert {tensor.name: tensor.params for tensor in tensors} == {
        name: math.prod(header.shape) for name, header in base.tensors.items()
    }
    paths = FAMILIES[family][2]
    names = found_names(tensors, LAYERS, paths, {}, "model")
    assert names == {
        (layer, path): f"{block_prefix(family)}.{layer}.{path}.weight" for path in paths for layer in range(LAYERS)
    }
    filters, before = exact_filters(list(names.values()), [tensor.name for tensor in tensors], "model")
    assert before == ()
    expected = {target: i for i, target in enumerate(filters)}
    expected |= {target.removesuffix("weight") + "bias": i for i, target in enumerate(filters)}
    for name in base.tensors:
        assert _mergekit_hits(filters.values(), name) == expected.get(name, -1), name
    covered = coverage(filters, tensors)
    assert covered.all_tensors == len(base.tensors)
    assert covered.tensors == sum(name in expected for name in base.tensors)
    uncovered = {tensor.name for rest in covered.uncovered.values() for tensor in rest}
    assert uncovered == {name for name in base.tensors if name not in expected}


def test_layer_1_does_not_hit_layer_11():
    names = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(12)]
    filters, _ = exact_filters(names, names, "model")
    assert [_mergekit_hits(filters.values(), name) for name in names] == list(range(12))


def test_a_name_that_begins_like_another_gets_a_dot():
    names = ["model.layers.0.mlp.gate.weight", "model.layers.0.mlp.gate.bias", "model.layers.0.mlp.gate_proj.weight"]
    filters, _ = exact_filters([names[0]], names, "model")
    assert list(filters.values()) == ["model.layers.0.mlp.gate."]
    both, _ = exact_filters([names[0], names[2]], names, "model")
    assert [_mergekit_hits(both.values(), name) for name in names] == [0, 0, 1]


def test_a_second_tower_whose_names_end_alike_is_kept_out_by_filters_before():
    targets = [f"layers.{layer}.wo.weight" for layer in range(2)]
    names = [*targets, *(f"vision.{name}" for name in targets), "vision.norm.weight", "layers.0.wo.bias"]
    filters, before = exact_filters(targets, names, "model")
    assert before == ("vision.",)
    hits = [_mergekit_hits([*before, *filters.values()], name) for name in names]
    assert hits == [1, 2, 0, 0, 0, 1]


def test_a_name_within_a_longer_one_gets_no_density_of_it():
    names = ["layers.0.wo.weight", "layers.0.mix.layers.0.wo.weight"]
    filters, before = exact_filters(names[:1], names, "model")
    assert [_mergekit_hits([*before, *filters.values()], name) for name in names] == [1, 0]
    assert coverage(filters, [NamedTensor(name, 2, 1) for name in names], before).tensors == 1


def test_two_towers_that_are_both_measured_are_kept_apart_by_order():
    targets = [
        "layers.0.wo.weight",
        "layers.0.mix.layers.0.wo.weight",
        "vision.layers.0.wo.weight",
        "layers.1.wo.weight",
    ]
    names = [*targets, "vision.layers.0.wo.bias", "layers.1.wo.bias", "audio.layers.1.wo.weight"]
    filters, before = exact_filters(targets, names, "model")
    assert before == ("audio.",)
    values = dict(zip(targets, range(4), strict=True))
    order = [*before, *filters.values()]
    owner = {place + 1: values[target] for place, target in enumerate(filters)} | {0: -1}
    assert [owner[_mergekit_hits(order, name)] for name in names] == [0, 1, 2, 3, 2, 3, -1]
    assert [target for target in filters if len(target) < 20] == [targets[0], targets[3]]  # as they were otherwise


parts = st.lists(st.sampled_from(["a", "b", "ab", "1"]), min_size=1, max_size=3).map(".".join)
tensor_names = st.builds(lambda stem, end: stem + end, parts, st.sampled_from([".weight", ".weight", ".bias", ""]))


@given(st.lists(tensor_names, min_size=1, max_size=9, unique=True), st.integers(1, 6))
def test_by_the_plain_definition_every_name_is_hit_by_its_own_filter_or_it_is_an_error(names, count):
    targets = names[:count]
    try:
        filters, before = exact_filters(targets, names, "model")
    except UserError:
        return
    assert sorted(filters) == sorted(targets)
    for name in names:
        first = next((target for target, text in filters.items() if text in name), None)
        if any(text in name for text in before):
            first = None
        weights = [f"{name.removesuffix('bias')}weight", name.removesuffix(".bias")] if name.endswith(".bias") else []
        assert first == name if name in filters else first in (None, *weights)


def test_other_tensors_of_a_component_are_not_guided_silently():
    names = ["model.layers.0.q.weight", "model.layers.0.q.weight_scale"]
    with refused("filter-inexact"):
        exact_filters(names[:1], names, "model")


def test_a_tensor_that_is_not_merged_is_an_error():
    with refused("filter-inexact"):
        exact_filters(["model.layers.0.q.weight"], ["model.layers.1.q.weight"], "model")


def test_two_components_cannot_mean_one_tensor():
    with refused("filter-of-two"):
        exact_filters(["a.0.q.weight", "a.0.q.weight"], ["a.0.q.weight"], "model")


def test_recorded_names_must_be_the_models(tmp_path):
    base = open_checkpoint(str(save_tiny("llama", tmp_path)))
    plan = plan_architecture(base)
    with refused("tensor-not-in-model"):
        as_planned({(0, "q"): "elsewhere.0.q.weight"}, plan, "model")


def test_templates_collapse_the_layer():
    assert name_template("model.layers.12.mlp.experts.3.w1.weight") == "model.layers.*.mlp.experts.3.w1.weight"
