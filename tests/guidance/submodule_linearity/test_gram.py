"""Gram matrices against double precision done the plain way."""

import pytest
import torch

from tests.refusals import refused
from utils.guidance.submodule_linearity.gram import TriangularRoot, gram_matrix, gram_of_linear_maps, token_rows


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("entries", [1, 4096, 300_001])
def test_gram_matrix_is_that_of_double_precision(entries):
    changes = [normal(entries, seed=seed) + 0.1 * normal(entries, seed=9) for seed in range(3)]
    flat = torch.stack(changes).double()
    found = gram_matrix([change.view(-1, 1) for change in changes])
    assert found.dtype == torch.float64 and torch.equal(found, found.T)
    torch.testing.assert_close(found, flat @ flat.T, rtol=1e-6, atol=1e-6 * entries**0.5)


def test_linear_maps_by_the_root_equal_features_and_the_trace_formula():
    inputs = normal(500, 8) * torch.logspace(-3, 3, 8)  # columns of very different sizes
    maps = [normal(12, 8, seed=seed) for seed in (1, 2, 3)]
    root = TriangularRoot()
    for rows in inputs.split(7):
        root.add(rows)
    assert root.value().shape[0] <= 500
    (found,) = gram_of_linear_maps(([one[:5] for one in maps], [one[5:] for one in maps]), [root.value()])
    features = torch.stack([(inputs.double() @ one.double().T).flatten() for one in maps])
    torch.testing.assert_close(found, features @ features.T, rtol=1e-5, atol=0)
    second_moment = inputs.double().T @ inputs.double()
    traces = [[torch.trace(m.double() @ second_moment @ s.double().T) for s in maps] for m in maps]
    torch.testing.assert_close(found, torch.tensor(traces, dtype=torch.float64), rtol=1e-5, atol=0)


def test_the_root_stays_small_and_keeps_what_squares_would_lose():
    root = TriangularRoot()
    inputs = torch.cat([1e5 + normal(20_000, 1), 1e-3 * normal(20_000, 1, seed=1)], dim=1)
    for rows in inputs.split(1000):
        root.add(rows)
    assert root.value().shape == (2, 2)
    change = torch.tensor([[0.0, 1.0]])
    expected = inputs[:, 1].double().square().sum()
    assert float(gram_of_linear_maps([[change]], [root.value()])) == pytest.approx(float(expected), rel=1e-3)


def test_token_rows_finds_the_tokens_wherever_they_are():
    samples, length = 2, 5
    plain = normal(samples, length, 6)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]], dtype=torch.bool)
    expected = (plain * mask[..., None]).reshape(10, 6)
    heads = plain.view(samples, length, 3, 2)
    assert torch.equal(token_rows(plain, samples, length, mask, "x"), expected)
    assert torch.equal(token_rows(plain.reshape(10, 6), samples, length, mask, "x"), expected)
    assert torch.equal(token_rows(heads, samples, length, mask, "x"), expected)
    assert torch.equal(token_rows(heads.transpose(1, 2), samples, length, mask, "x"), expected)
    shared = token_rows(plain[:1], samples, length, mask, "x")
    assert torch.equal(shared, (plain[:1].expand(2, 5, 6) * mask[..., None]).reshape(10, 6))
    alike = token_rows(plain[:, :1], samples, length, mask, "x")
    assert torch.equal(alike, (plain[:, :1].expand(2, 5, 6) * mask[..., None]).reshape(10, 6))


def test_pads_do_not_count_even_if_they_are_not_numbers():
    output = torch.full((1, 3, 2), float("nan"))
    output[0, 0] = 1.0
    rows = token_rows(output, 1, 3, torch.tensor([[True, False, False]]), "x")
    assert rows.tolist() == [[1, 1], [0, 0], [0, 0]]


def test_what_is_not_per_token_is_refused():
    with refused("model-unsupported", "router gives [2, 7, 3] for 2 samples of 5 tokens"):
        token_rows(torch.zeros(2, 7, 3), 2, 5, None, "router")
