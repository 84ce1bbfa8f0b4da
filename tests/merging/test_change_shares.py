"""How much of each expert's change is in a merge: known by hand, and against the model that command 3 writes.

python -m pytest tests/merging/test_change_shares.py
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny_merges import merge_here, recipe, save_models, tensors, write_recipe
from utils.merging.change_shares import change_shares, share_of_change
from utils.merging.planning import PlannedMerge, plan_recipe
from utils.merging.recipe_file import read_recipe
from utils.merging.settings import MergeSettings

MATRIX = "model.layers.1.mlp.up_proj.weight"
OTHER = "model.layers.0.self_attn.q_proj.weight"


def planned(path: Path, data: dict) -> PlannedMerge:
    settings = MergeSettings(Path("unused"), write_recipe(path, data), device="cpu")
    return plan_recipe(settings, read_recipe(settings.merge_config), lambda line: None)


def test_task_arithmetic_of_orthogonal_changes_has_lambda_of_each():
    base = torch.randn(1100, 1000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)  # two parts
    one, two = torch.zeros_like(base), torch.zeros_like(base)
    one[::2], two[1::2] = base[1::2], base[::2] * 3
    merged = base + 0.4 * (one + two)
    assert share_of_change(merged, base, base + one) == pytest.approx(0.4, rel=1e-12)
    assert share_of_change(merged, base, base + two) == pytest.approx(0.4, rel=1e-12)
    assert share_of_change(base - one, base, base + one) == pytest.approx(-1, rel=1e-12)
    assert share_of_change(base + two, base, base + one) == 0
    assert share_of_change(base + one, base, base) is None


def test_it_is_the_factor_that_comes_nearest():
    """Least squares, of tensors in the dtypes that checkpoints have."""
    draw = torch.Generator().manual_seed(2)
    base, expert, merged = (torch.randn(37, 53, generator=draw) for _ in range(3))
    base, expert = base.bfloat16(), expert.half()
    change, made = ((one.double() - base.double()).reshape(-1, 1) for one in (expert, merged))
    assert share_of_change(merged, base, expert) == pytest.approx(float(torch.linalg.lstsq(change, made).solution))


@pytest.mark.parametrize("method", ["task_arithmetic", "dare_ties"])
def test_shares_are_those_of_the_written_model(tmp_path, method):
    """By tensors merged here, and by mergekit's executor with its random numbers; one matrix code has left as it was."""
    folder = save_models(tmp_path / "models")
    before = load_file(folder / "base/model.safetensors")
    changed = load_file(folder / "code/model.safetensors") | {MATRIX: before[MATRIX]}
    save_file(changed, folder / "code/model.safetensors", metadata={"format": "pt"})
    data = recipe(folder, method, dtype="float32")
    written, code, math = tensors(merge_here(tmp_path, data)), changed, load_file(folder / "math/model.safetensors")
    found = change_shares(planned(tmp_path / "mine.yaml", data), {MATRIX, OTHER})
    assert [set(one) for one in found] == [{OTHER}, {MATRIX, OTHER}]
    for shares, expert in zip(found, (code, math), strict=True):
        for name, share in shares.items():
            change, made = (one[name].double() - before[name].double() for one in (expert, written))
            assert share == pytest.approx(float((change * made).sum() / change.square().sum()), rel=1e-9)
