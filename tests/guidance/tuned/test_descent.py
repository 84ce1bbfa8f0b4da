"""The descent's arithmetic: what is lost, how losses weigh, which table is kept; which parameters share a coefficient."""

import copy

import pytest
import torch

from utils.guidance.tuned.descent import Asked, descend, loss_weights, share_lost
from utils.guidance.tuned.slopes import group_numbers

EXPERTS, GAINS = (1.0, 2.0), (0.5, 0.25)
NO_LOSS = (0.0, 0.0), (0.0, 0.0)


def test_the_share_lost_is_one_minus_the_share_kept():
    assert share_lost((1.5, 2.25), EXPERTS, GAINS, worst=False) == pytest.approx(1.0)  # as the base
    assert share_lost((1.0, 2.0), EXPERTS, GAINS, worst=False) == pytest.approx(0.0)
    assert share_lost((1.25, 2.0), EXPERTS, GAINS, worst=False) == pytest.approx(0.25)
    assert 0.4 < share_lost((1.25, 2.0), EXPERTS, GAINS, worst=True) <= 0.5  # nearly the largest
    assert share_lost((1.25, 2.125), EXPERTS, GAINS, worst=True) == pytest.approx(0.5)


@pytest.mark.parametrize("worst", [False, True])
def test_losses_weigh_by_what_the_share_lost_changes_with_them(worst):
    losses, h = (1.2, 2.2), 1e-3
    for task, weight in enumerate(loss_weights(losses, EXPERTS, GAINS, worst)):
        ends = [[loss + sign * h * (place == task) for place, loss in enumerate(losses)] for sign in (1, -1)]
        above, below = (share_lost(end, EXPERTS, GAINS, worst) for end in ends)
        assert weight == pytest.approx((above - below) / (2 * h), rel=1e-2)


def quadratic(middle, scale=1.0):
    """Losses whose minimum is at a table of `middle`, and their slope."""

    def losses(table):
        return [float(scale * (row - middle).square().sum()) for row in table]

    def slope(table, weigh):
        weights = torch.tensor(weigh(losses(table)), dtype=torch.float64)
        return losses(table), weights[:, None] * 2 * scale * (table - middle)

    return losses, slope


def test_the_descent_finds_a_minimum_and_says_every_step():
    losses, slope = quadratic(0.5)
    found = descend((2, 3), Asked(40, 0.05, 0.0, False), NO_LOSS, (1.0, 1.0), slope, losses)
    assert float((found.coefficients - 0.5).abs().max()) < 0.15
    assert found.steps[0].held_out == pytest.approx((0.75, 0.75)) and found.steps[0].losses == found.steps[0].held_out
    assert found.steps[-1].losses is None and found.best == min(
        range(len(found.steps)), key=lambda number: found.steps[number].lost
    )


def test_shares_lost_are_from_the_experts_losses_on_the_same_samples():
    losses, slope = quadratic(0.5)
    found = descend((2, 3), Asked(0, 0.05, 0.0, False), ((0.0, 0.0), (0.5, 0.25)), (1.0, 1.0), slope, losses)
    assert found.steps[0].lost == pytest.approx(0.75 - (0.5 + 0.25) / 2)


def test_the_start_is_kept_where_held_out_samples_get_worse_and_the_descent_ends_early():
    _, slope = quadratic(0.0)
    held_out, _ = quadratic(2.0)
    found = descend((2, 1), Asked(30, 0.1, 0.0, True), NO_LOSS, (1.0, 1.0), slope, held_out)
    assert found.best == 0 and bool((found.coefficients == 1).all())
    assert len(found.steps) == 4


@pytest.mark.parametrize("cut", [1, 4])
def test_a_descent_that_is_cut_goes_on_to_the_same_end(cut):
    losses, slope = quadratic(0.5)
    arguments = (2, 3), Asked(12, 0.05, 0.1, False), NO_LOSS, (1.0, 1.0), slope, losses
    whole, states = descend(*arguments), []

    class Killed(Exception):
        pass

    def keep(state):
        states.append(copy.deepcopy(state))
        if len(states) == cut:
            raise Killed

    with pytest.raises(Killed):
        descend(*arguments, None, keep)
    found = descend(*arguments, states[-1])
    assert torch.equal(found.coefficients, whole.coefficients) and (found.best, found.steps) == (
        whole.best,
        whole.steps,
    )


def test_a_pull_keeps_coefficients_near_the_start():
    losses, slope = quadratic(0.0, scale=1e-3)
    free, held = (
        descend((2, 2), Asked(60, 0.05, pull, False), NO_LOSS, (1.0, 1.0), slope, losses) for pull in (0.0, 10.0)
    )
    assert float(free.coefficients.max()) < 0.3 and float(held.coefficients.min()) > 0.8


def test_levels_say_which_parameters_share_a_coefficient():
    names = ["e.weight", "m.h.0.attn.q.weight", "m.h.0.attn.k.weight", "m.h.0.norm.weight", "m.h.1.attn.q.weight", "n"]
    stored = [[name] for name in names]
    assert group_numbers(names, stored, "tensor", "m.h") == [0, 1, 2, 3, 4, 5]
    assert group_numbers(names, stored, "part", "m.h") == [0, 1, 1, 2, 3, 4]
    assert group_numbers(names, stored, "block", "m.h") == [0, 1, 1, 1, 2, 3]
    assert group_numbers(names, stored, "expert", "m.h") == [0] * 6
    stored[1] = stored[2] = ["qk.weight"]
    assert group_numbers(names, stored, "tensor", "m.h") == [0, 1, 1, 2, 3, 4]
