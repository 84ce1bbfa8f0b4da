"""Recipes: the released code's YAML, accepted and merged by stock mergekit."""

from pathlib import Path

import pandas as pd
import pytest
import yaml

from tests.refusals import refused
from utils.pair.config import ModelEntry
from utils.recipes.coefficients import COLUMNS
from utils.recipes.method_rules import DENSITY_METHODS
from utils.recipes.naming import Naming
from utils.recipes.recipe import (
    RecipeSettings,
    check_file_names,
    model_key,
    recipe,
    recipe_bytes,
    recipe_name,
)

BASE, MATH, CODE = (ModelEntry(f"models/{name}", name) for name in ("base", "math", "code"))


def _table(densities, weight=1.0) -> pd.DataFrame:
    rows = [
        (expert, f"model.layers.{layer}.mlp.up_proj.weight", layer, "up_proj", value, weight, 100)
        for expert in ("math", "code")
        for layer, value in enumerate(densities)
    ]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _naming(table) -> Naming:
    filters = {name: name.removesuffix(".weight") for name in table["tensor"]}
    return Naming({}, filters, {}, None, "")


def _recipe(method="ties", densities=(0.25, 0.5, 0.75), experts=(MATH, CODE), **settings):
    table = _table(densities)
    values = RecipeSettings(DENSITY_METHODS[method], BASE, experts, settings.pop("parameters", {}), **settings)
    return recipe(table, _naming(table), values)


def test_keys_come_in_the_released_codes_order():
    result = _recipe(parameters={"normalize": True})
    assert list(result) == ["models", "merge_method", "base_model", "parameters", "dtype", "tokenizer_source"]
    assert result["models"][0] == {"model": "models/base"}
    assert result["models"][1] == {
        "model": "models/math",
        "parameters": {
            "density": [
                {"filter": "model.layers.0.mlp.up_proj", "value": 0.25},
                {"filter": "model.layers.1.mlp.up_proj", "value": 0.5},
                {"filter": "model.layers.2.mlp.up_proj", "value": 0.75},
                {"value": 1},
            ],
            "weight": [{"value": 1}],
        },
    }


def test_filters_stand_in_the_order_in_which_they_were_proven():
    table = _table((0.25, 0.5), weight=0.5)
    naming = _naming(table)
    turned = Naming({}, dict(reversed(naming.filters.items())), {}, None, "", before=("vision.",))
    settings = RecipeSettings(DENSITY_METHODS["ties"], BASE, (MATH,), {}, as_weights=True)
    entry = recipe(table, turned, settings)["models"][1]["parameters"]
    order = ["vision.", *reversed(naming.filters.values())]
    assert [(item.get("filter"), item["value"]) for item in entry["density"]] == [
        *zip(order, (1.0, 0.5, 0.25), strict=True),
        (None, 1),
    ]
    assert [item.get("filter") for item in entry["weight"]] == [*order, None]


def test_lambda_and_the_dtypes_have_their_places():
    parameters = {"normalize": True, "lambda": 2}
    assert _recipe(dtype="float32")["dtype"] == "float32" and _recipe()["dtype"] == "bfloat16"
    result = _recipe(parameters=parameters, lambda_=0.5, out_dtype="float32")
    assert result["parameters"] == {"normalize": True, "lambda": 0.5}
    assert parameters["lambda"] == 2  # the config's own mapping is left alone
    assert list(result)[-3:] == ["dtype", "out_dtype", "tokenizer_source"]


def test_weights_are_written_only_if_asked_for():
    table = _table((0.25, 0.5), weight=0.5)
    settings = RecipeSettings(DENSITY_METHODS["ties"], BASE, (MATH,), {}, as_weights=True)
    entry = recipe(table, _naming(table), settings)["models"][1]["parameters"]
    assert [item["value"] for item in entry["weight"]] == [0.5, 0.5, 1]


@pytest.mark.parametrize(("method", "name"), [("della", "epsilon"), ("breadcrumbs_ties", "gamma")])
def test_extra_parameters_have_the_densities_filters(method, name):
    parameters = _recipe(method, densities=(0.0, 0.999, 1.0))["models"][1]["parameters"]
    assert [item.get("filter") for item in parameters[name]] == [item.get("filter") for item in parameters["density"]]
    default = DENSITY_METHODS[method].extra_default
    assert parameters[name][1]["value"] < default
    assert parameters[name][-1] == {"value": default}


def test_the_configs_extra_parameter_is_the_one_aimed_at():
    values = _recipe("della", parameters={"epsilon": 0.05})["models"][1]["parameters"]["epsilon"]
    assert [item["value"] for item in values] == [0.05] * 4


@pytest.mark.parametrize(
    ("entry", "key"),
    [
        (ModelEntry("org/model", "x"), "org/model"),
        (ModelEntry("org/model", "x", "abc123"), "org/model@abc123"),
        (ModelEntry("./a+b", "x"), {"model": {"path": "./a+b"}}),
        (ModelEntry("./a@b", "x"), {"model": {"path": "./a@b"}}),
    ],
)
def test_mergekit_reads_the_models_that_are_meant(entry, key, tmp_path, monkeypatch):
    from mergekit.common import ModelReference

    monkeypatch.chdir(tmp_path)
    (tmp_path / "a+b").mkdir()
    assert model_key(entry) == key
    reference = ModelReference.model_validate(yaml.safe_load(recipe_bytes({"model": key}))["model"])
    assert (reference.model.path, reference.model.revision, reference.lora) == (entry.name, entry.revision, None)


@pytest.mark.parametrize(
    ("name", "revision", "key"),
    [
        ("org/model+./adapter", None, "org/model+./adapter"),
        ("org/model+org/adapter", "abc", "org/model@abc+org/adapter"),
        ("./a@b+./c", None, {"model": {"path": "./a@b"}, "lora": "./c"}),
    ],
)
def test_mergekit_reads_model_and_adapter(name, revision, key):
    from mergekit.common import ModelReference

    assert model_key(ModelEntry(name, "x", revision)) == key
    reference = ModelReference.model_validate(yaml.safe_load(recipe_bytes({"model": key}))["model"])
    assert f"{reference.model.path}+{reference.lora.path}" == name
    assert reference.model.revision == revision


def test_a_home_folder_is_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert model_key(ModelEntry("~/model", "x")) == str(tmp_path / "model")


def test_file_names():
    config = Path("configs/gemma_2b.yaml")
    assert recipe_name(config, (0.3, 0.8), "ties") == "gemma_2b_0.3_0.8_generated_ties_merge_config.yaml"
    name = recipe_name(config, (0.0, 1.0), "dare_ties", ("clip", "mean0.1", "uniform"))
    assert name == "gemma_2b_0.0_1.0_generated_dare_ties_clip_mean0.1_uniform_merge_config.yaml"
    check_file_names([name], config)
    with refused("file-name-too-long"):
        check_file_names([recipe_name(Path("x" * 240 + ".yaml"), (0.3, 0.8), "ties")], config)


def _merge(data, folder, golden, monkeypatch):
    """Run stock mergekit on a recipe and return the merged tensors."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge
    from safetensors.torch import load_file

    monkeypatch.chdir(golden)  # the recipes' model paths are relative to it
    configuration = MergeConfiguration.model_validate(yaml.safe_load(recipe_bytes(data)))
    options = MergeOptions(write_model_card=False, random_seed=0, quiet=True)
    run_merge(configuration, str(folder), options)
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("method", DENSITY_METHODS)
def test_stock_mergekit_runs_every_method_at_extreme_densities(method, golden, tmp_path, monkeypatch):
    import torch
    from safetensors.torch import load_file

    data = _recipe(method, densities=(0.0, 1e-3, 0.9999), lambda_=0.5, out_dtype="float32")
    merged = _merge(data, tmp_path / "merged", golden, monkeypatch)
    base = load_file(golden / "models" / "base" / "model.safetensors")
    assert set(merged) == set(base)
    assert all(tensor.isfinite().all() for tensor in merged.values())
    untouched = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(merged[untouched], base[untouched].float())  # density 0 keeps the base
    assert not torch.equal(
        merged["model.layers.2.mlp.up_proj.weight"], base["model.layers.2.mlp.up_proj.weight"].float()
    )


def test_densities_do_what_they_say_in_a_merge(golden, tmp_path, monkeypatch):
    """One expert, TIES without division: exactly the asked share of a tensor's entries moves."""
    from safetensors.torch import load_file

    data = _recipe(densities=(0.1, 0.5, 0.9), experts=(MATH,), parameters={"normalize": False}, dtype="float32")
    merged = _merge(data, tmp_path / "merged", golden, monkeypatch)
    base = load_file(golden / "models" / "base" / "model.safetensors")
    for layer, density in enumerate((0.1, 0.5, 0.9)):
        name = f"model.layers.{layer}.mlp.up_proj.weight"
        moved = (merged[name] != base[name].float()).float().mean().item()
        assert moved == pytest.approx(density, abs=0.03)  # entries whose delta is exactly 0 cannot move
