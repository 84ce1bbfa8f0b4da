"""K-FAC's formulas, by dense Kronecker products and by what a quadratic form loses."""

import pytest
import torch

from benchmarks.quality_curvature import Curvature, curvature_mean, curvature_svd, shared_ranks


def drawn(seed, *shapes):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def curvatures(seed, count, out, width):
    found = (drawn(seed + number, (3 * out, out), (3 * width, width)) for number in range(count))
    return [Curvature(g.T @ g, x.T @ x) for g, x in found]


def damped(matrix, damping):
    return matrix + damping * matrix.diagonal().mean() * torch.eye(len(matrix), dtype=matrix.dtype)


@pytest.mark.parametrize("count", [2, 3])
def test_a_curvature_mean_is_what_the_dense_system_says(count):
    changes, weights = drawn(1, *[(4, 6)] * count), [2.0, 0.5, 1.0][:count]
    own, damping = curvatures(2, count, 4, 6), 0.1
    system, right = 0, 0
    for change, one, weight in zip(changes, own, weights, strict=True):
        dense = weight * torch.kron(damped(one.outputs, damping), damped(one.inputs, damping))
        system, right = system + dense, right + dense @ change.flatten()
    wanted = torch.linalg.solve(system, right).reshape(4, 6)
    torch.testing.assert_close(curvature_mean(changes, own, weights, damping), wanted, rtol=1e-6, atol=1e-7)


def test_a_curvature_mean_of_one_expert_is_that_expert():
    (change,) = drawn(3, (4, 6))
    torch.testing.assert_close(curvature_mean([change], curvatures(4, 1, 4, 6), [3.0], 0.1), change)


def lost(changes, found, own, damping):
    missed = [one - other for one, other in zip(changes, found, strict=True)]
    return sum(
        float((damped(c.outputs, damping) * (m @ damped(c.inputs, damping) @ m.T)).sum())
        for m, c in zip(missed, own, strict=True)
    )


def test_a_curvature_svd_loses_the_gains_of_the_ranks_left_out_and_less_than_a_plain_svd():
    changes, damping = [10 * drawn(5, (5, 8))[0], *drawn(6, (7, 4))], 0.1
    own = [*curvatures(7, 1, 5, 8), *curvatures(8, 1, 7, 4)]
    found = curvature_svd(changes, own, 0.6, damping)
    ranks = [int(torch.linalg.matrix_rank(one)) for one in found]
    assert sum(rank * sum(one.shape) for rank, one in zip(ranks, found, strict=True)) <= 0.6 * 68
    assert 0 < sum(ranks) < 9
    plain = []
    for rank, change in zip(ranks, changes, strict=True):
        left, values, right = torch.linalg.svd(change, full_matrices=False)
        plain.append(left[:, :rank] * values[:rank] @ right[:rank])
    assert lost(changes, found, own, damping) < lost(changes, plain, own, damping)
    whole = curvature_svd(changes, own, 100.0, damping)
    for one, other in zip(whole, changes, strict=True):
        torch.testing.assert_close(one, other)


def test_ranks_go_where_they_gain_most_for_their_numbers():
    gains = [torch.tensor([10.0, 1.0]), torch.tensor([8.0, 6.0, 0.1])]
    assert shared_ranks(gains, [10, 4], 4) == [0, 1]
    assert shared_ranks(gains, [10, 4], 18) == [1, 2]
    assert shared_ranks(gains, [10, 4], 1000) == [2, 3]
