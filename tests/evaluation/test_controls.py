"""The uniform merges of mixtures have the routers that guided recipes have.

python -m pytest tests/evaluation/test_controls.py
"""

import torch

from tests.tiny_merges import merge_here
from tests.tiny_mixtures import save_mixtures, weights
from tests.tiny_pairs import write_config
from utils.evaluation.controls import uniform_controls
from utils.pair.config import read_pair_config
from utils.recipes.naming import LocalModels
from utils.recipes.routers import usual_routers


def test_uniform_merges_of_mixtures_keep_the_bases_router(tmp_path, monkeypatch):
    folder = save_mixtures(tmp_path, num_hidden_layers=2)
    monkeypatch.chdir(folder)
    config = read_pair_config(folder / "pair.yaml")
    routers = usual_routers(LocalModels(config.base, config.experts_to_merge))
    assert routers.said.startswith("the base's, 2 tensors")
    base = weights(folder / "base")
    for kind, candidates in uniform_controls(config, "float32", routers).items():
        merged = weights(merge_here(folder, candidates[0].recipe, kind.replace(" ", "_")))
        kept = {name for name, value in merged.items() if torch.equal(value, base[name])}
        assert kept == {f"model.layers.{layer}.mlp.gate.weight" for layer in range(2)}


def test_a_dense_pairs_uniform_merges_say_nothing_of_routers(golden, monkeypatch):
    monkeypatch.chdir(golden)
    config = read_pair_config(golden / "sparsity50" / "pair.yaml")
    routers = usual_routers(LocalModels(config.base, config.experts_to_merge))
    grid = uniform_controls(config, "float32", routers)
    assert not routers.said and grid == uniform_controls(config, "float32")
    assert grid["TIES"][0].recipe["models"][1]["parameters"]["weight"] == 1.0


def test_uniform_merges_are_of_the_experts_to_merge(tmp_path):
    names = [{"name": f"m/{name}", "type": name} for name in ("base", "code", "math", "law")]
    targets = {"law": "m/law", "code": "m/code"}
    config = read_pair_config(write_config(tmp_path, {"model_info": names, "target_model_names": targets}))
    for candidates in uniform_controls(config, "float32").values():
        assert [entry["model"] for entry in candidates[0].recipe["models"]] == ["m/base", "m/law", "m/code"]
