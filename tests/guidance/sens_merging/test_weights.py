"""Sens-Merging's formulas against a plain re-derivation, and where they are delicate.

python -m pytest tests/guidance/sens_merging/test_weights.py
"""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from utils.guidance.sens_merging.method import ALIGNMENTS
from utils.guidance.sens_merging.weights import (
    alignment_factors,
    layer_weights,
    normalized_sensitivities,
    weighing,
)


def derived(sensitivities, distances, temperature, alignment):
    """The formulas of arXiv 2502.12420, one number at a time."""
    experts, layers = len(sensitivities), len(sensitivities[0])
    sums = [sum(distances[t][u] for u in range(experts) if u != t) for t in range(experts)]
    tau = [own / sum(sums) for own in sums]
    if alignment == "similarity":
        tau = [(1 - factor) / sum(1 - other for other in tau) for factor in tau]
    weights = []
    for t in range(experts):
        row = []
        for layer in range(layers):
            scores = [
                tau[u] * sensitivities[u][layer] / math.sqrt(sum(value**2 for value in sensitivities[u])) / temperature
                for u in range(experts)
            ]
            row.append(experts * math.exp(scores[t]) / sum(map(math.exp, scores)))
        weights.append(row)
    return weights


def weights_of(sensitivities, distances, temperature=1.0, alignment="distance"):
    factors = alignment_factors(np.array(distances, dtype=float), alignment)
    return layer_weights(normalized_sensitivities(np.array(sensitivities, dtype=float)), factors, temperature)


positive = st.floats(1e-3, 1e3)
tables = st.tuples(st.integers(2, 3), st.integers(1, 5)).flatmap(
    lambda shape: st.tuples(
        arrays(float, shape, elements=positive), arrays(float, (shape[0], shape[0]), elements=positive)
    )
)


@given(tables, st.floats(0.05, 10), st.sampled_from(ALIGNMENTS))
def test_weights_follow_the_formulas(table, temperature, alignment):
    sensitivities, distances = table
    expected = derived(sensitivities.tolist(), distances.tolist(), temperature, alignment)
    np.testing.assert_allclose(weights_of(sensitivities, distances, temperature, alignment), expected, rtol=1e-12)


def test_by_hand():
    """Two experts, two layers: alpha (0.6, 0.8) and (1, 0), tau 1/4 and 3/4."""
    weights = weights_of([[3.0, 4.0], [7.0, 0.0]], [[99.0, 1.0], [3.0, 99.0]])
    first = 2 / (1 + math.exp(0.75 * 1 - 0.25 * 0.6))
    second = 2 / (1 + math.exp(0 - 0.25 * 0.8))
    np.testing.assert_allclose(weights, [[first, second], [2 - first, 2 - second]], rtol=1e-14)


@given(tables, st.sampled_from([1e-300, 1e-3, 1.0, 1e300]), st.sampled_from(ALIGNMENTS))
def test_any_temperature_gives_finite_weights_with_a_mean_of_one(table, temperature, alignment):
    weights = weights_of(*table, temperature, alignment)
    assert np.isfinite(weights).all() and (weights >= 0).all()
    np.testing.assert_allclose(weights.mean(axis=0), 1.0, rtol=1e-14)


@pytest.mark.parametrize("scale", [1e-300, 1e300])
def test_sizes_do_not_matter(scale):
    rng = np.random.default_rng(0)
    sensitivities, distances = rng.random((3, 4)), rng.random((3, 3))
    plain = weights_of(sensitivities, distances)
    np.testing.assert_allclose(weights_of(sensitivities * scale, distances * scale), plain, rtol=1e-12)


@pytest.mark.parametrize("experts", [2, 3, 7, 49])
@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_identical_experts_get_exactly_one(experts, alignment):
    same = np.tile(np.random.default_rng(1).random(5), (experts, 1))
    assert (weights_of(same, np.zeros((experts, experts)), alignment=alignment) == 1).all()


def test_experts_that_depend_on_nothing_are_said_apart_by_nothing():
    assert (weights_of(np.zeros((2, 3)), [[0, 1], [3, 0]]) == 1).all()


def test_the_two_alignments_favor_opposite_experts():
    distances = np.array([[0.0, 1.0, 2.0], [6.0, 0.0, 3.0], [2.0, 2.0, 0.0]])
    far, near = (alignment_factors(distances, alignment) for alignment in ALIGNMENTS)
    assert far.argmax() == near.argmin() == 1 and far.argmin() == near.argmax() == 0
    assert far.sum() == pytest.approx(1) == near.sum()
    two = distances[:2, :2]
    np.testing.assert_allclose(alignment_factors(two, "similarity"), alignment_factors(two)[::-1])


@given(tables)
def test_the_order_of_experts_does_not_matter(table):
    sensitivities, distances = table
    order = np.arange(len(sensitivities))[::-1]
    turned = weights_of(sensitivities[order], distances[np.ix_(order, order)])
    np.testing.assert_allclose(turned[order], weights_of(sensitivities, distances), rtol=1e-12)


def test_a_high_temperature_levels_and_a_low_one_chooses():
    sensitivities, distances = [[1.0, 2.0], [2.0, 1.0]], [[0.0, 1.0], [1.0, 0.0]]
    assert abs(weights_of(sensitivities, distances, 1e6) - 1).max() < 1e-6
    np.testing.assert_allclose(weights_of(sensitivities, distances, 1e-6), [[0, 2], [2, 0]], atol=1e-12)


def test_an_unknown_alignment_is_refused():
    with pytest.raises(ValueError, match="alignment"):
        alignment_factors(np.zeros((2, 2)), "closeness")


def test_each_factor_alone():
    """Sensitivity alone: distances do not matter; scaling alone: sensitivities do not, and all layers are alike."""
    sensitivities, distances = np.array([[3.0, 4.0], [7.0, 0.0]]), np.array([[0.0, 1.0], [3.0, 0.0]])
    other = distances.T
    alone = [layer_weights(*weighing(sensitivities, one, "distance", "sensitivity"), 1.0) for one in (distances, other)]
    np.testing.assert_array_equal(*alone)
    first = 2 / (1 + math.exp(0.5 * 1 - 0.5 * 0.6))
    assert alone[0][0, 0] == pytest.approx(first, rel=1e-14)
    scaled = layer_weights(*weighing(sensitivities, distances, "distance", "scaling"), 1.0)
    expected = 2 / (1 + math.exp((0.75 - 0.25) / math.sqrt(2)))
    np.testing.assert_allclose(scaled[0], [expected, expected], rtol=1e-14)
    both = layer_weights(*weighing(sensitivities, distances, "distance", "both"), 1.0)
    np.testing.assert_allclose(both, weights_of(sensitivities, distances), rtol=1e-14)
