"""A model with an adapter as expert, in all commands and by every guidance: as if peft had merged it."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from tests.commands_here import done_here
from tests.selected import few
from tests.tiny_adapters import in_float32, measured_and_merged, save_adapter, save_merged
from tests.tiny_merges import tensors
from tests.tiny_pairs import contents, save_pair, save_tokenizer, write_config
from utils.evaluation.candidates import read_candidate, refuse_other_models
from utils.guidance.method import guidance_methods
from utils.pair.config import read_pair_config


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """`pair.yaml` has an adapter as its expert, `merged.yaml` what peft merges of it, both of type code."""
    folder = save_pair(tmp_path_factory.mktemp("adapters"))
    for name in ("base", "math"):
        in_float32(folder / name)
    save_adapter(folder / "base", folder / "adapter", use_rslora=True)
    save_tokenizer(save_merged(folder / "base", folder / "adapter", folder / "merged"))
    for name, path in (("merged", "./merged"), ("pair", "./base+./adapter"), ("alone", "./adapter")):
        models = [{"name": f"./{one}", "type": one} for one in ("base", "math")]
        models.insert(1, {"name": path, "type": "code"})
        write_config(folder, {"model_info": models})
        shutil.copy(folder / "pair.yaml", folder / f"{name}_.yaml")
    config = folder / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace(str(folder / "base"), "./base"))
    return folder


FLAGS = dict.fromkeys(guidance_methods(), ("--accept_useless_text",)) | {
    "lewis": (),
    "tuned": ("--accept_useless_text", "--tune_steps", "1"),
}


@pytest.mark.parametrize("guidance", few(sorted(guidance_methods()), "lewis", "gram_mean", "tuned"))
def test_measured_decided_and_merged_as_what_peft_merges(pair, guidance):
    tables, merged = {}, {}
    before = contents(pair / "base")
    for name in ("merged", "pair"):
        config = f"{name}_{guidance}.yaml"
        shutil.copy(pair / f"{name}_.yaml", pair / config)
        tables[name], merged[name] = measured_and_merged(pair, config, guidance, FLAGS.get(guidance, ()))
    assert contents(pair / "base") == before
    for file, wanted in tables["merged"].items():
        for column in wanted.select_dtypes("number"):
            np.testing.assert_allclose(tables["pair"][file][column], wanted[column], rtol=2e-3, atol=1e-6)
    base, changed = tensors(pair / "base"), 0
    assert merged["pair"].keys() == merged["merged"].keys() == base.keys()
    for name, value in merged["pair"].items():
        torch.testing.assert_close(value, merged["merged"][name], rtol=0, atol=1e-6, msg=name)
        changed += not torch.equal(value, base[name])
    assert changed


def test_an_adapter_s_folder_alone_is_measured_alike(pair):
    for name in ("pair", "alone"):
        done_here("lewis_importance.py", "--config", f"{name}_.yaml", "--out_dir", f"{name}_norms", cwd=pair)
    one, other = (pd.read_csv(pair / f"{name}_norms" / "norms.csv") for name in ("pair", "alone"))
    pd.testing.assert_frame_equal(one, other)


@pytest.mark.parametrize("name", ["pair", "alone"])
def test_the_recipe_names_model_and_adapter_as_mergekit_does(pair, name):
    done_here("lewis_importance.py", "--config", f"{name}_.yaml", "--out_dir", f"{name}_d", cwd=pair)
    flags = ("--delta_dfs_in_dir", f"{name}_d", "--config_file", f"{name}_.yaml", "--out_dir", f"{name}_r")
    done_here("lewis_merge.py", *flags, "--dtype", "float32", cwd=pair)
    (recipe,) = (pair / f"{name}_r").glob("*.yaml")
    assert yaml.safe_load(recipe.read_text())["models"][1]["model"] == "./base+./adapter"
    done_here("utils/merger.py", "--merge_config", recipe, "--output_path", f"{name}_m", cwd=pair)


def test_evaluated_as_what_peft_merges(pair):
    rows = ("--validation_rows", 2, "--test_rows", 4, "--no-samples", "--no-controls")
    models = ("./base+./adapter", "./merged")
    done_here("utils/evaluator.py", "--config", "pair_.yaml", "--out_dir", "scores", *rows, *models, cwd=pair)
    scores = pd.read_csv(pair / "scores" / "scores.csv")
    losses = scores[scores["measure"] == "loss"].set_index("candidate")["value"]
    assert losses["code"] == losses["adapter"] != losses["base"]
    assert losses["adapter"] == pytest.approx(losses["merged"], rel=1e-6)


def test_a_recipe_names_an_adapter_that_lies_beside_it(pair, tmp_path, monkeypatch):
    """Read from another folder, the recipe and the pair's config lead to the same files."""
    recipe = {
        "models": [{"model": "./base"}, {"model": "./base+./adapter", "parameters": {"weight": 0.5}}],
        "merge_method": "task_arithmetic",
        "base_model": "./base",
        "dtype": "float32",
    }
    (pair / "half.yaml").write_text(yaml.safe_dump(recipe))
    settings = yaml.safe_load((pair / "pair_.yaml").read_text())
    settings["model_info"] = [
        {**one, "name": "+".join(str(pair / part) for part in one["name"].split("+"))} for one in settings["model_info"]
    ]
    (tmp_path / "elsewhere.yaml").write_text(yaml.safe_dump(settings))
    monkeypatch.chdir(tmp_path)
    config, candidate = read_pair_config(Path("elsewhere.yaml")), read_candidate(str(pair / "half.yaml"))
    refuse_other_models(candidate, config)
    assert [one["model"] for one in candidate.merge_recipe().data["models"]] == [
        str(pair / "base"),
        f"{pair / 'base'}+{pair / 'adapter'}",
    ]
