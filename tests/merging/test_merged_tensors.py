"""Tensors merged in memory, some at a time, against the model that command 3 writes by the same recipe."""

import gc
import itertools
import shutil
import weakref
from pathlib import Path

import pytest
import torch

from tests.refusals import refused
from tests.selected import few
from tests.tiny_merges import merge_here, recipe, save_models, tensors, write_recipe
from utils.merging.merged_tensors import merged_tensors, prepare
from utils.merging.pieces.cuts import Cut, KnownCuts
from utils.merging.planning import PlannedMerge, plan_recipe
from utils.merging.recipe_file import read_recipe
from utils.merging.settings import MergeSettings


def planned(path: Path, data, **settings) -> PlannedMerge:
    asked = MergeSettings(Path("unused"), write_recipe(path, data), device="cpu", **settings)
    return plan_recipe(asked, read_recipe(asked.merge_config), lambda line: None)


def in_blocks(names: list[str]) -> list[list[str]]:
    """Names as a pass over a model needs them: embeddings, then a block at a time, then the rest."""
    found: dict[str, list[str]] = {"model.embed": []}
    for name in names:
        block = ".".join(name.split(".")[:3]) if ".layers." in name else "model.embed" if "embed" in name else "rest"
        found.setdefault(block, []).append(name)
    return list(found.values())


def assert_equals_written(found: dict[str, torch.Tensor], folder: Path) -> None:
    written = tensors(folder)
    assert sorted(found) == sorted(written)
    for name, tensor in found.items():
        assert tensor.dtype == written[name].dtype and torch.equal(tensor, written[name]), name


METHODS = ("ties", "breadcrumbs", "task_arithmetic", "linear", "dare_ties", "della", "sce")


@pytest.mark.parametrize(
    ("method", "dtype"),
    few(
        itertools.product(METHODS, ("bfloat16", "float32")),
        *((method, "bfloat16") for method in METHODS if method not in ("linear", "della")),
        ("linear", "float32"),
        ("della", "float32"),
    ),
)
def test_every_block_has_the_bits_of_the_written_model(llamas, tmp_path, method, dtype):
    data = recipe(llamas, method, dtype=dtype)
    if method == "sce":
        for model in data["models"]:
            model.pop("parameters", None)
    merged = merge_here(tmp_path, data, random_seed=7)
    plan = planned(tmp_path / "recipe.yaml", data, random_seed=7)
    work = prepare(plan)
    blocks = in_blocks([tensor.name for tensor in plan.plan.tensors])
    assert len(blocks) > 3
    found = {}
    for names in reversed(blocks):  # in no order that a merge would take
        (some,) = merged_tensors([work], names)
        assert list(some) == names or set(some) == set(names)
        found |= some
    assert_equals_written(found, merged)


def test_several_recipes_over_the_same_models_share_a_call(llamas, tmp_path):
    recipes = [
        recipe(llamas),
        recipe(llamas, "task_arithmetic", dtype="float32", out_dtype="bfloat16"),
        recipe(llamas, "dare_linear"),
        recipe(llamas, "ties", parameters={"rescale": True}),  # takes norms of whole tensors: left to mergekit
        recipe(llamas, "ties", experts=("code",)),
    ]
    plans = [planned(tmp_path / f"{place}.yaml", data) for place, data in enumerate(recipes)]
    works = [prepare(plan) for plan in plans]
    found: list[dict[str, torch.Tensor]] = [{} for _ in works]
    for names in in_blocks([tensor.name for tensor in plans[0].plan.tensors]):
        for before, some in zip(found, merged_tensors(works, names), strict=True):
            before |= some
    for place, data in enumerate(recipes):
        assert_equals_written(found[place], merge_here(tmp_path, data, f"merged_{place}"))


@pytest.mark.parametrize(
    ("method", "dtype"),
    few(
        itertools.product(("ties", "breadcrumbs"), ("bfloat16", "float32")),
        ("ties", "bfloat16"),
        ("breadcrumbs", "float32"),
    ),
)
def test_cuts_that_are_known_are_not_searched_again(llamas, tmp_path, method, dtype):
    class Counted(KnownCuts):
        def of(self, keys):
            found = super().of(keys)
            recalled.append(found is not None)
            return found

    data = [recipe(llamas, method, dtype=dtype, parameters={"lambda": scale}) for scale in (1.0, 0.4)]
    data[1]["models"][1]["parameters"]["density"] = 0.35  # another cut of the first expert alone
    known, recalled = Counted(), []
    for place, one in enumerate([*data, data[0]]):
        plan = planned(tmp_path / f"{place}.yaml", one)
        (found,) = merged_tensors([prepare(plan)], [tensor.name for tensor in plan.plan.tensors], known)
        assert_equals_written(found, merge_here(tmp_path, one, f"merged_{place}"))
    third = len(recalled) // 3
    assert not any(recalled[:third]) and all(recalled[2 * third :])
    assert sum(recalled[third : 2 * third]) * 2 == third


@pytest.mark.parametrize("dtype", few(["bfloat16", "float32"], "bfloat16"))
def test_cuts_of_several_recipes_are_searched_together(llamas, tmp_path, dtype):
    class Noted(KnownCuts):
        def keep(self, keys, cuts):
            together.append(len(keys))
            super().keep(keys, cuts)

    data = [recipe(llamas, dtype=dtype) for _ in range(6)]
    for place, one in enumerate(data):
        one["models"][1]["parameters"]["density"] = 0.2 + 0.1 * place
        one["models"][2]["parameters"]["density"] = 0.9 - 0.1 * (place % 3)
    together, known = [], Noted()
    plans = [planned(tmp_path / f"{place}.yaml", one) for place, one in enumerate(data)]
    names = [tensor.name for tensor in plans[0].plan.tensors]
    found = merged_tensors([prepare(plan) for plan in plans], names, known)
    for place, one in enumerate(data):
        assert_equals_written(found[place], merge_here(tmp_path, one, f"merged_{place}"))
    assert {2, 3, 4} <= set(together) and 6 not in together  # few at a time: tables take memory


def test_the_newest_cuts_are_kept():
    known = KnownCuts()
    for number in range(known.MOST + 3):
        known.keep([number], [Cut(number, 1)])
    assert known.of([2]) is None and known.of([3, known.MOST + 2]) == [Cut(3, 1), Cut(known.MOST + 2, 1)]


def test_an_aligned_vocabulary(llamas, tmp_path):
    for name in ("base", "code", "math"):
        shutil.copytree(llamas / name, tmp_path / name)
    data = recipe(tmp_path, tokenizer={"source": "union", "pad_to_multiple_of": 64})
    plan = planned(tmp_path / "recipe.yaml", data)
    work = prepare(plan)
    (found,) = merged_tensors([work], [tensor.name for tensor in plan.plan.tensors])
    assert_equals_written(found, merge_here(tmp_path, data))


def test_padding_rows_are_cut_off_in_pieces(tmp_path):
    """Embeddings with more rows than tokens, merged by several recipes at a time, one of which cuts none off."""
    save_models(tmp_path, vocab_size=128)
    data = [recipe(tmp_path, tokenizer_source="base"), recipe(tmp_path, "task_arithmetic", tokenizer_source="union")]
    data.append({**data[0], "tokenizer_source": None})
    plans = [planned(tmp_path / f"{place}.yaml", one) for place, one in enumerate(data)]
    assert all(not plan.division.left for plan in plans)
    names = [tensor.name for tensor in plans[0].plan.tensors]
    found = merged_tensors([prepare(plan) for plan in plans], names, KnownCuts(), [torch.float32] * 3)
    rows = [one["model.embed_tokens.weight"].shape[0] for one in found]
    assert rows == [96, 96, 128] and all(value.dtype == torch.float32 for value in found[0].values())
    for place, one in enumerate(data):
        written = merge_here(tmp_path, one, f"merged_{place}")
        rounded = {name: value.to(torch.bfloat16) for name, value in found[place].items()}
        assert_equals_written(rounded, written)


def test_drawing_leaves_the_callers_own_numbers_alone(llamas, tmp_path):
    plan = planned(tmp_path / "recipe.yaml", recipe(llamas, "dare_ties"))
    work = prepare(plan)
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    merged_tensors([work], ["model.layers.0.mlp.down_proj.weight"])
    assert torch.equal(torch.rand(3), expected)


def test_a_tensor_that_is_not_finite_and_a_method_that_samples_are_refused(llamas, tmp_path):
    data = recipe(llamas, dtype="float16", parameters={"lambda": 1e30})
    plan = planned(tmp_path / "recipe.yaml", data)
    work = prepare(plan)
    with refused("merge-not-finite"):
        merged_tensors([work], ["model.layers.0.mlp.down_proj.weight"])
    with pytest.raises(KeyError):
        merged_tensors([work], ["model.layers.99.mlp.down_proj.weight"])
    sampling = recipe(llamas, "arcee_fusion", ("code",))
    for model in sampling["models"]:
        model.pop("parameters", None)
    plan = planned(tmp_path / "other.yaml", sampling)
    with refused("merge-draws"):
        prepare(plan)


@pytest.mark.parametrize("method", ["ties", "dare_ties"])
def test_nothing_holds_what_was_merged(llamas, tmp_path, method):
    """No circle of objects: those wait until Python looks for them, and a block after the other would pile up."""
    work, name = prepare(planned(tmp_path / "r.yaml", recipe(llamas, method))), "model.layers.1.mlp.down_proj.weight"
    merged_tensors([work], [name])
    gc.collect()
    gc.disable()
    try:
        (found,) = merged_tensors([work], [name])
        held = weakref.ref(found[name].untyped_storage())
        assert held() is not None
        del found
        assert held() is None
    finally:
        gc.enable()
