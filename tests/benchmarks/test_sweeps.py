"""What the sweeps of the quality benchmark's pairs make of their figures; the figures themselves take models."""

import pytest

from benchmarks import budget_sweep, sens_ablation
from benchmarks.held_out import mean_and_interval


def test_a_table_has_a_row_for_each_contender_and_a_column_for_each_density():
    rows = [
        (seed, task, density, name, share + 0.1 * seed)
        for seed in (0, 1)
        for task in ("math", "code")
        for density in budget_sweep.DENSITIES
        for name, share in (("uniform", density / 2), ("LEWIS", density / 4))
    ]
    lines = budget_sweep.table(rows)
    assert len(lines) == 4 and lines[0].count("|") == len(budget_sweep.DENSITIES) + 2
    assert lines[2].startswith("| uniform | 7.5% | 10.0% |") and lines[3].endswith("| 30.0% |")
    pytest.importorskip("matplotlib")
    assert budget_sweep.picture(rows)[:4] == b"\x89PNG"


def test_differences_are_paired_by_seed_and_uniform_merges_are_their_own_controls():
    contenders = sens_ablation.contenders()
    assert all(against in contenders for against, _ in contenders.values())
    rows = [
        (seed, name, part, task, 0.2 + 0.1 * seed + (0.0 if name == against else 0.01))
        for seed in (0, 1)
        for name, (against, _) in contenders.items()
        for part in ("validation", "test")
        for task in ("math", "code")
    ]
    lines = sens_ablation.markdown(rows).splitlines()
    assert "| TIES, uniform | 25.0% | 25.0% | the control |" in lines
    assert "| TIES, both, temperature 0.1 | 26.0% | 26.0% | +1.00 ± 0.00 |" in lines


def test_the_interval_of_a_mean():
    assert mean_and_interval([1.0]) == (1.0, float("inf"))
    mean, half = mean_and_interval([1.0, 3.0])
    assert mean == 2.0 and half == pytest.approx(12.706, rel=1e-3)
