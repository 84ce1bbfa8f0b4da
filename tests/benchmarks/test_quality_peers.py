"""The peers' formulas: what each one says of itself holds, and model folders hold what the formulas give."""

import pytest
import torch

from benchmarks.quality_peer_models import peer_weights
from benchmarks.quality_peers import isotropic, task_singular_vectors, truncated_svd


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


def test_a_peers_model_has_the_formula_in_its_layers_and_the_mean_elsewhere():
    base, one, two = ({"a.q_proj.weight": a, "norm.weight": b} for a, b in (drawn(s, (4, 4), (4,)) for s in (5, 6, 7)))
    found = peer_weights(base, [one, two], isotropic, 0.5)
    layer = base["a.q_proj.weight"] + 0.5 * isotropic(
        [x["a.q_proj.weight"] - base["a.q_proj.weight"] for x in (one, two)]
    )
    torch.testing.assert_close(found["a.q_proj.weight"], layer.bfloat16())
    torch.testing.assert_close(found["norm.weight"], ((one["norm.weight"] + two["norm.weight"]) / 2).bfloat16())
