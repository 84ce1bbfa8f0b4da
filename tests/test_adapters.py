"""A model with an adapter as expert, in commands 1 and 2 and in the evaluator: as if peft had merged it."""

import shutil

import numpy as np
import pandas as pd
import pytest
import yaml

from tests.commands_here import done_here
from tests.tiny_adapters import in_float32, save_adapter, save_merged
from tests.tiny_pairs import contents, save_pair, save_tokenizer, write_config


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """`pair.yaml` has an adapter as its expert, `merged.yaml` what peft merges of it, both of type code."""
    folder = save_pair(tmp_path_factory.mktemp("adapters"))
    in_float32(folder / "base")
    save_adapter(folder / "base", folder / "adapter", use_rslora=True)
    save_tokenizer(save_merged(folder / "base", folder / "adapter", folder / "merged"))
    for name, path in (("merged", "./merged"), ("pair", "./base+./adapter"), ("alone", "./adapter")):
        models = [{"name": "./base", "type": "base"}, {"name": path, "type": "code"}]
        write_config(folder, {"model_info": models})
        shutil.copy(folder / "pair.yaml", folder / f"{name}_.yaml")
    config = folder / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace(str(folder / "base"), "./base"))
    return folder


@pytest.mark.parametrize("guidance", ["lewis", "saliency_budget", "submodule_linearity"])
def test_measured_as_what_peft_merges(pair, guidance):
    found = {}
    before = contents(pair / "base")
    for name in ("merged", "pair", "alone"):
        out = f"{name}_{guidance}"
        done_here(
            "lewis_importance.py", "--config", f"{name}_.yaml", "--out_dir", out, "--guidance", guidance, cwd=pair
        )
        found[name] = {file.name: pd.read_csv(file) for file in sorted((pair / out).glob("*.csv"))}
    assert contents(pair / "base") == before
    for name in ("pair", "alone"):
        for file, wanted in found["merged"].items():
            for column in wanted.select_dtypes("number"):
                np.testing.assert_allclose(found[name][file][column], wanted[column], rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["pair", "alone"])
def test_the_recipe_names_model_and_adapter_as_mergekit_does(pair, name):
    done_here("lewis_importance.py", "--config", f"{name}_.yaml", "--out_dir", f"{name}_d", cwd=pair)
    flags = ("--delta_dfs_in_dir", f"{name}_d", "--config_file", f"{name}_.yaml", "--out_dir", f"{name}_r")
    done_here("lewis_merge.py", *flags, "--dtype", "float32", cwd=pair)
    (recipe,) = (pair / f"{name}_r").glob("*.yaml")
    assert yaml.safe_load(recipe.read_text())["models"][1]["model"] == "./base+./adapter"
    done_here("utils/merger.py", "--merge_config", recipe, "--output_path", f"{name}_m", cwd=pair)


def test_evaluated_as_what_peft_merges(pair):
    done_here(
        "utils/evaluator.py", "--config", "pair_.yaml", "--out_dir", "scores", "./base+./adapter", "./merged", cwd=pair
    )
    scores = pd.read_csv(pair / "scores" / "scores.csv")
    losses = scores[scores["measure"] == "loss"].set_index("candidate")["value"]
    assert losses["code"] == losses["adapter"] != losses["base"]
    assert losses["adapter"] == pytest.approx(losses["merged"], rel=1e-6)
