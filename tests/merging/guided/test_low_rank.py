"""Factors of a change, against numpy's SVD, an eigenvalue problem in the inputs' metric, and what must hold of any best fit.

python -m pytest tests/merging/guided/test_low_rank.py
"""

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.merging.guided.low_rank import low_rank_factors, rank_of


def drawn(seed, rows=6, channels=8, tokens=30):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(tokens, channels, generator=generator, dtype=torch.float64)
    inputs = inputs @ torch.diag(torch.logspace(0, -2, channels, dtype=torch.float64))
    return torch.randn(rows, channels, generator=generator, dtype=torch.float64), inputs


def test_the_rank_is_that_of_as_many_numbers():
    assert rank_of((100, 300), 0.1) == 8  # 8 (100 + 300) of 3000
    assert rank_of((10, 10), 1e-6) == 1
    assert rank_of((4, 1000), 0.99) == 4
    for shape in ((64, 64), (64, 172), (172, 64)):
        assert abs(rank_of(shape, 0.2) * sum(shape) / (shape[0] * shape[1]) - 0.2) < 0.5 * sum(shape) / 64**2


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), rank=st.integers(1, 6))
def test_without_inputs_it_is_the_truncated_svd(seed, rank):
    change, _ = drawn(seed)
    for gram in (None, torch.zeros(8, 8)):
        left, right = low_rank_factors(change, rank, gram)
        u, s, v = numpy.linalg.svd(change.numpy())
        numpy.testing.assert_allclose((left @ right).numpy(), (u[:, :rank] * s[:rank]) @ v[:rank], atol=1e-10)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), rank=st.integers(1, 6), ridge=st.sampled_from([1e-6, 1e-3, 1.0]))
def test_with_inputs_it_projects_outputs_on_their_main_directions(seed, rank, ridge):
    """X = P D, with P on the k largest eigenvectors of D (C + r 1) D': no SVD and no root of C."""
    change, inputs = drawn(seed)
    gram = inputs.T @ inputs / len(inputs)
    left, right = low_rank_factors(change, rank, gram, ridge)
    regular = gram + ridge * gram.diagonal().mean() * torch.eye(8, dtype=torch.float64)
    _, vectors = numpy.linalg.eigh((change @ regular @ change.T).numpy())
    main = vectors[:, ::-1][:, :rank]
    numpy.testing.assert_allclose((left @ right).numpy(), main @ main.T @ change.numpy(), atol=1e-6)


def test_outputs_are_nearer_than_those_of_the_plain_svd():
    change, inputs = drawn(3)
    gram = inputs.T @ inputs / len(inputs)
    misses = [
        float(((left @ right - change) @ inputs.T).norm())
        for left, right in (low_rank_factors(change, 2, gram, 1e-9), low_rank_factors(change, 2))
    ]
    assert misses[0] < 0.8 * misses[1]


def test_what_does_not_fit_is_refused():
    change, inputs = drawn(1)
    gram = inputs.T @ inputs
    with pytest.raises(ValueError, match="fit together"):
        low_rank_factors(change, 2, gram[:5, :5])
    with pytest.raises(ValueError, match="not finite"):
        low_rank_factors(change, 2, gram * float("nan"))
    with pytest.raises(ValueError, match="far from definite"):
        low_rank_factors(change, 2, 1.5 * torch.eye(8, dtype=torch.float64) - 1)
