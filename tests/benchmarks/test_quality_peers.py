"""The peers' formulas: what each one says of itself holds, and model folders hold what the formulas give."""

import pytest
import torch

from benchmarks.quality_peer_models import merged_tensors
from benchmarks.quality_peers import (
    fisher_average,
    isotropic,
    redundancy_free,
    regression_mean,
    task_singular_vectors,
    truncated_svd,
    wanda,
)


def drawn(seed, *shapes):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize(("density", "rank"), [(0.1, 1), (0.5, 4), (1.0, 8)])
def test_a_truncated_svd_is_the_nearest_of_its_rank(density, rank):
    (change,) = drawn(1, (12, 24))
    found = truncated_svd(change, density)
    values = torch.linalg.svdvals(change)
    assert int(torch.linalg.matrix_rank(found)) == rank
    assert float((change - found).norm()) == pytest.approx(float(values[rank:].norm()))


def test_an_isotropic_sum_has_one_singular_value_and_the_sums_directions():
    changes = drawn(2, (5, 9), (5, 9))
    found = isotropic(changes)
    values = torch.linalg.svdvals(found)
    torch.testing.assert_close(values, torch.full_like(values, float(torch.linalg.svdvals(sum(changes)).mean())))
    product = found @ sum(changes).T
    torch.testing.assert_close(product, product.T)  # the same singular vectors
    assert bool((torch.linalg.eigvalsh(product) > 0).all())


def test_task_singular_vectors_keep_tasks_that_do_not_meet_and_one_task_whole():
    (change,) = drawn(3, (6, 7))
    torch.testing.assert_close(task_singular_vectors([change]), change)
    first, second = torch.zeros(6, 8, dtype=torch.float64), torch.zeros(6, 8, dtype=torch.float64)
    first[:3, :3], second[3:, 3:6] = (part for part in drawn(4, (3, 3), (3, 3)))
    torch.testing.assert_close(task_singular_vectors([first, second]), first + second)


def test_a_peers_model_has_the_formula_in_its_layers_and_the_rest_elsewhere():
    base, *experts = (
        {"a.q_proj.weight": a, "embed.weight": b, "norm.weight": c}
        for a, b, c in (drawn(s, (4, 4), (9, 4), (4,)) for s in (5, 6, 7))
    )
    found = merged_tensors(base, experts, lambda name, own: isotropic(own), lambda name, own: sum(own) / 2)
    changes = [one["a.q_proj.weight"] - base["a.q_proj.weight"] for one in experts]
    torch.testing.assert_close(found["a.q_proj.weight"], base["a.q_proj.weight"] + isotropic(changes))
    for name in ("embed.weight", "norm.weight"):
        torch.testing.assert_close(found[name], (experts[0][name] + experts[1][name]) / 2)


def weighted_errors(merged, changes, metrics, weights):
    return sum(w * metric(merged - change) for w, change, metric in zip(weights, changes, metrics, strict=True))


def test_a_fisher_average_is_where_the_weighted_errors_are_least():
    *changes, F, G = drawn(8, (4, 6), (4, 6), (4, 6), (4, 6))
    squares, weights = [F.square(), 30 * G.square()], [2.0, 0.5]
    metrics = [lambda d, F=F: (F / F.mean() * d.square()).sum() for F in squares]
    found = fisher_average(changes, squares, weights).requires_grad_()
    weighted_errors(found, changes, metrics, weights).backward()
    assert float(found.grad.abs().max()) < 1e-12
    blind = fisher_average(changes, [torch.zeros(4, 6)] * 2, [3.0, 1.0])
    torch.testing.assert_close(blind, 0.75 * changes[0] + 0.25 * changes[1])


def test_a_regression_mean_is_the_least_squares_answer_on_the_inputs_themselves():
    *changes, x, y = drawn(9, (3, 5), (3, 5), (40, 5), (3, 5))  # fewer inputs than channels at one of them
    weights = [0.5, 2.0]
    grams = [x.T @ x / len(x), y.T @ y / len(y)]
    found = regression_mean(changes, grams, weights)
    rows = [(w / len(z)) ** 0.5 * z for w, z in zip(weights, (x, y), strict=True)]
    asked = torch.cat([z @ d.T for z, d in zip(rows, changes, strict=True)])
    torch.testing.assert_close(found, torch.linalg.lstsq(torch.cat(rows), asked).solution.T)


def test_a_regression_mean_without_what_inputs_have_in_common_weighs_columns():
    *changes, s, t = drawn(10, (3, 5), (3, 5), (5,), (5,))
    grams = [torch.outer(s, s), torch.outer(t, t)]
    found = regression_mean(changes, grams, [1.0, 1.0], off_diagonal=0.0)
    torch.testing.assert_close(found, (changes[0] * s**2 + changes[1] * t**2) / (s**2 + t**2))


def test_directions_without_inputs_get_nothing():
    (change,) = drawn(11, (3, 4))
    gram = torch.diag(torch.tensor([1.0, 2.0, 0.0, 0.0], dtype=torch.float64))
    found = regression_mean([change], [gram], [1.0])
    torch.testing.assert_close(found, change * torch.tensor([1.0, 1.0, 0.0, 0.0]))


def test_redundancy_free_steps_end_where_the_closed_form_says():
    changes = drawn(12, (3, 4), (3, 4))
    grams = [d.T @ d / d.square().sum() for d in changes]
    best = sum(d @ C for d, C in zip(changes, grams, strict=True)) @ torch.linalg.pinv(sum(grams))
    found = redundancy_free(changes, steps=4000, rate=1e-2)
    missed = [found - best, sum(changes) - best]
    error = [sum((m @ C @ m.T).trace() for C in grams) for m in missed]
    assert float(error[0]) < 1e-3 * float(error[1])
    torch.testing.assert_close(redundancy_free(changes, steps=0), sum(changes))


def test_wanda_keeps_the_largest_of_each_row():
    change, s = drawn(14, (6, 10), (10,))
    found = wanda(change, s.square(), 0.3)
    for row, kept in zip(change, found, strict=True):
        order = sorted(range(10), key=lambda j: -abs(float(row[j])) * abs(float(s[j])))
        assert sorted(kept.nonzero().flatten().tolist()) == sorted(order[:3])
        assert torch.equal(kept[kept != 0], row[kept != 0])
