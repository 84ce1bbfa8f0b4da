"""The non-linearity score against functions whose score is known."""

import numpy as np
import pytest
import torch

from utils.guidance.submodule_linearity.nonlinearity import GRID, distance_sums, nonlinearity


def score(*texts):
    """The score from outputs on the grid, of one micro-batch or of several."""
    return nonlinearity(sum(map(distance_sums, texts)))


def outputs(function, delta):
    return [function(a * delta) for a in GRID]


def test_a_linear_part_scores_zero():
    inputs, delta = torch.randn(7, 3), torch.randn(3, 4)
    assert score(outputs(lambda change: inputs @ (torch.ones(3, 4) + change), delta)) < 1e-12


def test_a_square_scores_what_the_formula_says():
    found = score([torch.full((5, 1), a**2) for a in GRID])
    grid = np.array(GRID)
    first, second = np.meshgrid(grid, grid)
    expected = np.mean((np.abs(first**2 - second**2) - np.abs(first - second)) ** 2)
    assert found == pytest.approx(expected, rel=1e-5) and expected > 0.01


def test_distances_are_per_token_means_and_pads_do_not_count():
    real = [torch.tensor([[3 * a, 4 * a], [0.0, a**3]]) for a in GRID]
    padded = [torch.cat([rows, torch.zeros(4, 2)]) for rows in real]
    assert score(padded) == pytest.approx(score(real), rel=1e-12)
    distance = [[float((one - other).norm(dim=1).mean()) for other in real] for one in real]
    expected = np.mean(
        [
            (distance[i][j] / distance[-1][0] - abs(GRID[i] - GRID[j])) ** 2
            for i in range(len(GRID))
            for j in range(len(GRID))
        ]
    )
    assert score(real) == pytest.approx(expected, rel=1e-5)
    assert score([rows[:1] for rows in real], [rows[1:] for rows in real]) == pytest.approx(expected, rel=1e-5)


def test_no_change_scores_zero():
    assert score([torch.ones(3, 2)] * len(GRID)) == 0.0
