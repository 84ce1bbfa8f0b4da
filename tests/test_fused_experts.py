"""Experts that are stored each on its own are merged so; with --fused_experts stacked, with stock mergekit's bits."""

import pytest
import torch

from tests.refusals import refused
from tests.tiny_merges import assert_same_tensors, merge_here, merge_stock, recipe
from tests.tiny_mixtures import save_mixtures, weights
from utils.merging.planning import plan_recipe
from utils.merging.recipe_file import read_recipe
from utils.merging.resources import memory_estimate
from utils.merging.settings import MergeSettings
from utils.models.opening import open_checkpoint
from utils.models.stored_layout import stored_layout
from utils.models.weight_source import build_skeleton


@pytest.fixture(scope="module")
def mixtures(tmp_path_factory):
    return save_mixtures(tmp_path_factory.mktemp("fused"))


def selected(base, experts, density, weight):
    """TIES without normalization of some tensors, written out: the largest entries, the majority's sign."""
    kept = []
    for expert in experts:
        delta = (expert - base).flatten()
        order = delta.abs().argsort(descending=True, stable=True)[: int(density * delta.numel())]
        kept.append(weight * torch.zeros_like(delta).index_copy(0, order, delta[order]).view_as(base))
    total = sum(kept)
    return base + sum(torch.where(torch.sign(one) == torch.sign(total), one, 0) for one in kept)


def test_each_expert_on_its_own_or_all_stacked(mixtures):
    data = recipe(mixtures, "ties", dtype="float32")
    data["parameters"] = {**data.get("parameters", {}), "normalize": False}
    for entry in data["models"][1:]:
        entry["parameters"] = {"weight": 0.5, "density": 0.3}
    base, code, math = (weights(mixtures / name) for name in ("base", "code", "math"))
    apart = weights(merge_here(mixtures, data, "apart"))
    stacked = merge_here(mixtures, data, "stacked", fused_experts=True)
    assert_same_tensors(stacked, merge_stock(mixtures, data))
    for name in base:
        wanted = selected(base[name], [code[name], math[name]], 0.3, 0.5)
        torch.testing.assert_close(apart[name], wanted, rtol=0, atol=1e-6)
    checkpoint = open_checkpoint(str(mixtures / "base"))
    layout = stored_layout(build_skeleton(checkpoint, torch.float32, False), checkpoint)
    down = next(name for name in layout.conversions if name.endswith("down_proj"))
    stacks = [layout.conversions[down].convert(dict(one))[down] for one in (base, code, math)]
    wanted = selected(stacks[0], stacks[1:], 0.3, 0.5)
    torch.testing.assert_close(weights(stacked)[down], wanted, rtol=0, atol=1e-6)
    assert not torch.equal(wanted, layout.conversions[down].convert(dict(apart))[down])


def test_linear_methods_are_the_same_either_way(mixtures):
    data = recipe(mixtures, "task_arithmetic", dtype="float32")
    apart = weights(merge_here(mixtures, data, "linear_apart"))
    stacked = weights(merge_here(mixtures, data, "linear_stacked", fused_experts=True))
    checkpoint = open_checkpoint(str(mixtures / "base"))
    layout = stored_layout(build_skeleton(checkpoint, torch.float32, False), checkpoint)
    for name, value in stacked.items():
        one = layout.conversions.get(name)
        assert torch.equal(value, apart[name] if one is None else one.convert(dict(apart))[name])


@pytest.mark.parametrize("out_dtype", [None, "bfloat16"])
def test_stacked_experts_count_in_what_is_planned(mixtures, out_dtype):
    data = recipe(mixtures, "ties", dtype="float32") | ({"out_dtype": out_dtype} if out_dtype else {})
    for entry in data["models"][1:]:
        entry["parameters"] = {"weight": 0.5, "density": 0.3}
    output = f"counted_{out_dtype}"
    written = weights(merge_here(mixtures, data, output, fused_experts=True))
    settings = MergeSettings(mixtures / output, mixtures / f"{output}.yaml", device="cpu", fused_experts=True)
    planned = plan_recipe(settings, read_recipe(settings.merge_config), lambda line: None)
    assert planned.plan.params == sum(value.numel() for value in written.values())
    assert planned.plan.nbytes == sum(value.nbytes for value in written.values())
    largest = max(value.numel() for value in written.values() if value.ndim == 3)
    inputs = 3 * 4 * largest  # float32 stacks of three models, which no file holds
    assert memory_estimate(planned.plan, planned.division, planned.settings) > inputs


def test_values_of_stacked_experts_are_checked_and_counted(mixtures):
    """The class alone knows their shapes; a method that would stop at their numbers is refused before weights are read."""

    def with_density(method, density):
        data = recipe(mixtures, method, dtype="float32")
        for entry in data["models"][1:]:
            conditions = [{"filter": "experts", "value": density}, {"value": 1.0}]
            entry["parameters"] = {"weight": 0.5, "density": conditions}
        return data

    with refused("recipe-bad-value"):
        merge_here(mixtures, with_density("della", 0.9), "della", fused_experts=True)
    output = merge_here(mixtures, with_density("ties", 0.2), "sparse", fused_experts=True)
    numbers = {name: value.numel() for name, value in weights(output).items()}
    inside = [name for name in numbers if "experts" in name]
    mean = 1 - 0.8 * sum(numbers[name] for name in inside) / sum(numbers.values())
    card = (output / "README.md").read_text()
    assert inside and f"| `code` | {mean:.3f} | 0.200 | 1.000 | {len(inside)} of {len(numbers)} |" in card
