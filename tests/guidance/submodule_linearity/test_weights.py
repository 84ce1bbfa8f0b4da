"""The closed form against what it promises: nothing near it is better, and odd inputs give sane weights."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from utils.guidance.submodule_linearity.method import WEIGHTINGS
from utils.guidance.submodule_linearity.weights import Misfit, best_uniform_weight, merging_weights, misfit


def features(experts, tokens=30, width=4, seed=0, spread=1.0):
    """What each expert changes on each task: [task, expert, tokens, width], alike on all tasks but not the same."""
    random = np.random.default_rng(seed)
    common = random.normal(size=(1, experts, tokens, width))
    sizes = np.exp(spread * random.normal(size=(experts, experts, 1, 1)))
    return sizes * (common + random.normal(size=(experts, experts, tokens, width)))


def grams(changes):
    return np.einsum("tmnw,tsnw->tms", changes, changes) / changes.shape[2]


def missed(changes, weights, weighting):
    """The objective from the changes themselves, without Gram matrices."""
    total = whole = 0.0
    for task, own in enumerate(changes):
        size = np.square(own[task]).sum() if weighting == "equal" else 1.0
        total += np.square(np.einsum("s,snw->nw", weights, own) - own[task]).sum() / size
        whole += np.square(own[task]).sum() / size
    return total / whole


@given(st.integers(1, 4), st.integers(0, 10_000), st.sampled_from(WEIGHTINGS))
def test_no_perturbation_is_better(experts, seed, weighting):
    changes = features(experts, seed=seed)
    fit = misfit([grams(changes)], weighting)
    weights = merging_weights(fit, ridge=0.0)
    least = missed(changes, weights, weighting)
    assert fit.missed(weights) == pytest.approx(least, rel=1e-6, abs=1e-9)
    assert fit.missed(np.zeros(experts)) == pytest.approx(1.0)
    random = np.random.default_rng(seed)
    for _ in range(200):
        other = weights + random.normal(size=experts) * 10 ** random.uniform(-4, 0)
        assert missed(changes, other, weighting) >= least - 1e-9


@given(st.integers(2, 4), st.integers(0, 10_000), st.sampled_from(WEIGHTINGS), st.sampled_from([0.0, 1e-6, 0.3]))
def test_the_order_of_experts_does_not_matter(experts, seed, weighting, ridge):
    own = grams(features(experts, seed=seed))
    order = np.random.default_rng(seed).permutation(experts)
    weights = merging_weights(misfit([own], weighting), ridge)
    shuffled = merging_weights(misfit([own[np.ix_(order, order, order)]], weighting), ridge)
    np.testing.assert_allclose(shuffled, weights[order], rtol=1e-7, atol=1e-9)


@given(st.integers(2, 4), st.integers(0, 10_000), st.floats(1e-3, 1e3))
def test_the_scale_of_a_task_matters_only_if_it_is_to(experts, seed, factor):
    own = grams(features(experts, seed=seed))
    scaled = own.copy()
    scaled[0] *= factor
    equal = [merging_weights(misfit([one], "equal"), 0.01) for one in (own, scaled)]
    np.testing.assert_allclose(*equal, rtol=1e-7, atol=1e-9)
    raw = [merging_weights(misfit([one], "raw"), 0.01) for one in (own, own * factor)]
    np.testing.assert_allclose(*raw, rtol=1e-7, atol=1e-9)


def test_raw_listens_more_to_the_task_with_larger_changes():
    own = grams(features(2, seed=3, spread=0.0))
    scaled = own.copy()
    scaled[0] *= 100
    weights = merging_weights(misfit([scaled], "raw"), 0.0)
    assert weights[0] > merging_weights(misfit([scaled], "equal"), 0.0)[0] and weights[0] == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("ridge", [0.0, 1e-6, 10.0])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_one_expert_gets_one(ridge, weighting):
    assert merging_weights(misfit([np.full((1, 1, 1), 3e-9)], weighting), ridge) == pytest.approx([1.0], abs=1e-12)


@pytest.mark.parametrize("ridge", [0.0, 1e-6, 10.0])
@pytest.mark.parametrize("experts", [2, 3, 5])
def test_identical_experts_share_equally(ridge, experts):
    own = np.ones((experts, experts, experts)) * np.arange(1, experts + 1)[:, None, None]
    weights = merging_weights(misfit([own], "equal"), ridge)
    assert weights == pytest.approx([1 / experts] * experts, abs=1e-9)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("ridge", [0.0, 1e-6, 0.1])
def test_an_expert_equal_to_the_base_gets_nothing_and_disturbs_nobody(weighting, ridge):
    changes = features(3, seed=1)
    changes[:, 1] = 0
    three = merging_weights(misfit([grams(changes)], weighting), ridge)
    two = merging_weights(misfit([grams(changes[np.ix_([0, 2], [0, 2])])], weighting), ridge)
    assert three[1] == 0
    assert three[[0, 2]] == pytest.approx(two, rel=1e-9)


def test_nothing_changes_at_all():
    fit = misfit([np.zeros((2, 2, 2))], "equal")
    assert merging_weights(fit, 1e-6).tolist() == [0, 0] and fit.missed(np.ones(2)) == 0
    assert best_uniform_weight([fit]) == 0


def test_a_large_ridge_gives_equal_shares_and_a_small_one_the_closed_form():
    fit = misfit([grams(features(3, seed=5))], "equal")
    assert merging_weights(fit, 1e9) == pytest.approx([1 / 3] * 3, abs=1e-6)
    assert merging_weights(fit, 1e-6) == pytest.approx(np.linalg.solve(fit.A, fit.b), rel=1e-3)
    ridge = 0.2 * np.trace(fit.A) / 3
    system = fit.A + ridge * np.eye(3)
    assert merging_weights(fit, 0.2) == pytest.approx(np.linalg.solve(system, fit.b + ridge / 3), rel=1e-9)


def test_weights_are_clipped():
    fit = Misfit(np.diag([1.0, 2.0, 1.0]), np.array([-0.2, 1.8, 0.3]), 3.0)
    assert merging_weights(fit, 0.0) == pytest.approx([-0.2, 0.9, 0.3])
    assert merging_weights(fit, 0.0, clip=0.5) == pytest.approx([0, 0.5, 0.3])


def test_two_uses_count_alike_whatever_their_scales():
    first, second = grams(features(2, seed=7)), grams(features(2, seed=8))
    for weighting in WEIGHTINGS:
        weights = merging_weights(misfit([first, second], weighting), 0.0)
        scaled = merging_weights(misfit([1e6 * first, second], weighting), 0.0)
        np.testing.assert_allclose(scaled, weights, rtol=1e-9)
        one, other = (misfit([use], weighting) for use in (first, second))
        np.testing.assert_allclose((one.A + other.A) @ weights, one.b + other.b, rtol=1e-9)


@given(st.integers(1, 3), st.integers(0, 1000))
def test_the_best_uniform_weight_is_the_best(experts, seed):
    fits = [misfit([grams(features(experts, seed=seed + part))], "equal") for part in range(3)]
    best = best_uniform_weight(fits)

    def mean(weight):
        return np.mean([fit.missed(np.full(experts, weight)) for fit in fits])

    assert all(mean(best) <= mean(best + step) + 1e-12 for step in np.linspace(-0.5, 0.5, 21))
