"""The method table agrees with the installed mergekit, and its extra parameters are accepted by it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.refusals import refused
from utils.recipes.global_parameters import check_global_parameters, known_parameters, normalizes
from utils.recipes.method_rules import (
    DENSITY_METHODS,
    GUIDED_MEAN,
    GUIDED_TIES,
    OTHER_METHODS,
    OWN_METHODS,
    TASK_ARITHMETIC,
    counterpart,
    density_method,
    extra_value,
    weight_method,
)


def test_the_table_is_mergekits():
    from mergekit.merge_methods.generalized_task_arithmetic import GeneralizedTaskArithmeticMerge
    from mergekit.merge_methods.registry import registered_methods

    known = {method.spec.name: method for method in registered_methods()}
    assert set(DENSITY_METHODS) | set(OTHER_METHODS) <= set(known)
    stock = {name for name, method in known.items() if method.__class__.__module__.startswith("mergekit.")}
    assert stock <= set(DENSITY_METHODS) | set(OTHER_METHODS), "mergekit has a method this project does not know"
    for name, ours in DENSITY_METHODS.items():
        method = known[name]
        assert isinstance(method, GeneralizedTaskArithmeticMerge) and method.sparsification_method is not None
        assert ours.votes == (method.consensus_method is not None)
        specs = {parameter.name: parameter for parameter in method.spec.parameters}
        extras = set(specs) - {"density", "weight", "normalize", "int8_mask", "rescale", "lambda"}
        assert extras == ({ours.extra} if ours.extra else set())
        assert specs["normalize"].default == ours.normalize
        if ours.extra:
            assert specs[ours.extra].default == ours.extra_default
    for name in set(OTHER_METHODS) - {"task_arithmetic"}:
        assert "density" not in {parameter.name for parameter in known[name].spec.parameters}
    assert known["task_arithmetic"].sparsification_method is None


@given(st.floats(0, 1), st.sampled_from([0.0, 0.01, 0.15, 0.5, 0.99]))
def test_dellas_epsilon_fits_every_density(density, wanted):
    epsilon = extra_value(DENSITY_METHODS["della"], density, wanted)
    assert 0 <= epsilon <= wanted
    if 0 < density < 1:
        assert density - epsilon > 0 and density + epsilon < 1


@given(st.floats(0, 1), st.sampled_from([0.0, 0.01, 0.5]))
def test_breadcrumbs_gamma_leaves_space_for_the_density(density, wanted):
    gamma = extra_value(DENSITY_METHODS["breadcrumbs"], density, wanted)
    assert 0 <= gamma <= wanted
    if 0 < density < 1:
        assert density + gamma <= 1 + 1e-15


@pytest.mark.parametrize("density", [1e-6, 0.05, 0.15, 0.5, 0.85, 0.999, 1 - 2**-53])
def test_mergekit_accepts_dellas_values(density):
    import torch
    from mergekit.sparsify import RescaleNorm, della_magprune

    for dtype in (torch.bfloat16, torch.float32):
        epsilon = extra_value(DENSITY_METHODS["della"], density, 0.15)
        kept = della_magprune(torch.randn(8, 32, dtype=dtype), density, epsilon, RescaleNorm.l1)
        assert kept.isfinite().all()


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("dare-ties", "merge-method-unknown", "did you mean 'dare_ties'"),
        ("TIES", "merge-method-unknown", ""),
        ("brute_force", "merge-method-unknown", "known: ties"),
        ("task_arithmetic", "merge-method-unfit", "ignores densities"),
        ("linear", "merge-method-unfit", ""),
        ("slerp", "merge-method-unfit", ""),
        ("", "merge-method-unknown", ""),
    ],
)
def test_methods_that_would_not_use_densities_are_refused(name, code, words):
    with refused(code, words):
        density_method(name)


@pytest.mark.parametrize(
    ("parameters", "code", "words"),
    [
        ({"normalise": True}, "global-parameter-unknown", "did you mean 'normalize'"),
        ({"densty": 0.5}, "global-parameter-unknown", ""),
        ({"density": 0.5}, "global-parameter-no-effect", "set per tensor"),
        ({"weight": 1}, "global-parameter-no-effect", ""),
        ({"epsilon": 0.1}, "global-parameter-unknown", ""),
        ({"normalize": "yes"}, "global-parameter-value", "true or false"),
        ({"int8_mask": 1}, "global-parameter-value", ""),
        ({"lambda": "big"}, "global-parameter-value", "must be a number"),
        ({"lambda": [{"filtre": "x", "value": 1}]}, "global-parameter-value", ""),
    ],
)
def test_global_parameters_that_mergekit_would_ignore_are_refused(parameters, code, words):
    with refused(code, words):
        check_global_parameters(DENSITY_METHODS["ties"], parameters, "pair.yaml")


def test_all_wrong_global_parameters_are_reported_at_once():
    with refused("global-parameter-unknown", "2 problems") as caught:
        check_global_parameters(DENSITY_METHODS["della"], {"epsilon": 2, "gamma": 0.1}, "pair.yaml")
    assert set(caught.value.codes) == {"global-parameter-unknown", "global-parameter-value"}


def test_what_mergekit_knows_is_accepted():
    check_global_parameters(DENSITY_METHODS["ties"], {"normalize": True, "int8_mask": True, "lambda": 0.5}, "pair.yaml")
    check_global_parameters(DENSITY_METHODS["ties"], {"lambda": [0.5, 1], "rescale": False}, "pair.yaml")
    check_global_parameters(
        DENSITY_METHODS["ties"], {"lambda": [{"filter": "mlp", "value": 0.5}, {"value": 1}]}, "pair.yaml"
    )
    check_global_parameters(DENSITY_METHODS["della"], {"epsilon": 0.1}, "pair.yaml")


@pytest.mark.parametrize(("name", "parameters", "expected"), [
    ("ties", {}, True), ("dare_ties", {}, False), ("ties", {"normalize": False}, False),
    ("dare_ties", {"normalize": True}, True),
])  # fmt: skip
def test_normalize_falls_back_to_the_methods_default(name, parameters, expected):
    assert normalizes(DENSITY_METHODS[name], parameters) is expected


# --- this project's own -----------------------------------------------------------------------------------------------


def test_the_table_of_own_methods_is_what_is_registered():
    from utils.mergekit_api import merge_method
    from utils.merging.guided.methods import register_methods

    register_methods()
    for name, rule in OWN_METHODS.items():
        specs = {one.name: one for one in merge_method(name).spec.parameters}
        assert set(specs) == {*rule.shared, "weight", "density", "saliency", *(["factor"] if "factor" in specs else [])}
        assert all(specs[number.name].default == number.default for number in rule.numbers)
        assert all(number.allows(number.default) for number in rule.numbers)
        assert "normalize" not in specs or specs["normalize"].default == rule.normalize


@pytest.mark.parametrize("look_up", [density_method, weight_method])
@pytest.mark.parametrize(("name", "words"), [("guided_mean", "vectors that --guidance saliency_budget measures"),
                                             ("guided_ties", "--mask saliency")])  # fmt: skip
def test_own_methods_are_for_the_guidance_that_has_vectors(look_up, name, words):
    with refused("merge-method-unfit", words):
        look_up(name)


@pytest.mark.parametrize(
    ("parameters", "code"),
    [
        ({"power": 0}, "global-parameter-value"),
        ({"power": 1.01}, "global-parameter-value"),
        ({"power": True}, "global-parameter-value"),
        ({"floor": -1}, "global-parameter-value"),
        ({"floor": float("inf")}, "global-parameter-value"),
        ({"flor": 0.1}, "global-parameter-unknown"),
        ({"normalize": True}, "global-parameter-unknown"),
        ({"lambda": float("nan")}, "global-parameter-value"),
    ],
)
def test_numbers_outside_their_range_are_refused(parameters, code):
    with refused(code):
        check_global_parameters(GUIDED_MEAN, parameters, "pair.yaml")


def test_only_switches_that_are_mergekits_are_left_out():
    given = {"normalize": True, "int8_mask": True, "rescale": False, "lambda": 0.5, "power": 1, "flor": 2}
    assert known_parameters(GUIDED_MEAN, given) == {"lambda": 0.5, "power": 1, "flor": 2}
    assert known_parameters(GUIDED_TIES, {"normalize": True, "int8_mask": True}) == {"normalize": True}
    check_global_parameters(GUIDED_MEAN, {"lambda": 0.5, "power": 1, "floor": [0.1, 0.2]}, "pair.yaml")


def test_counterparts_are_mergekits():
    from dataclasses import replace

    assert counterpart(replace(GUIDED_MEAN, keeps=""), GUIDED_MEAN) is TASK_ARITHMETIC
    assert counterpart(GUIDED_MEAN, GUIDED_MEAN).name == "breadcrumbs"
    assert counterpart(GUIDED_TIES, DENSITY_METHODS["ties"]) is DENSITY_METHODS["ties"]
    assert counterpart(TASK_ARITHMETIC, TASK_ARITHMETIC) is TASK_ARITHMETIC
