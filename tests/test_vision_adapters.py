"""A model with a vision tower and an adapter as expert, in all commands and by every guidance: as if peft had merged it."""

import shutil

import numpy as np
import pandas as pd
import pytest
import torch

from tests.architectures.shrinking import save_changed, tiny_model
from tests.architectures.sweep import read_rows
from tests.commands_here import done_here
from tests.tiny_adapters import measured_and_merged, save_adapter, save_merged
from tests.tiny_merges import tensors
from tests.tiny_pairs import save_rows, save_tokenizer, write_config
from utils.guidance.method import guidance_methods

FEW = {"tuned": ("--tune_steps", "1")}
METHODS = [one if one == "lewis" else pytest.param(one, marks=pytest.mark.slow) for one in sorted(guidance_methods())]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """`both.yaml` has an adapter as expert code, `merged.yaml` what peft merges of it."""
    folder = tmp_path_factory.mktemp("vision")
    model = tiny_model({row.label: row for row in read_rows()}["llava:image-text"])
    model.save_pretrained(folder / "base")
    save_changed(model, folder / "math", 2)
    adapter = save_adapter(folder / "base", folder / "adapter", r=4, use_rslora=True)
    save_merged(folder / "base", adapter, folder / "merged")
    for name in ("base", "math", "merged"):
        save_tokenizer(folder / name, size=90)
    save_rows(folder)
    for name, path in (("merged", "./merged"), ("both", "./base+./adapter")):
        models = [
            {"name": "./base", "type": "base"},
            {"name": path, "type": "code"},
            {"name": "./math", "type": "math"},
        ]
        write_config(folder, {"model_info": models})
        shutil.copy(folder / "pair.yaml", folder / f"{name}.yaml")
    return folder


@pytest.mark.parametrize("guidance", METHODS)
def test_measured_decided_and_merged_as_what_peft_merges(pair, guidance):
    tables, merged = {}, {}
    useless = () if guidance == "lewis" else ("--accept_useless_text",)
    for name in ("merged", "both"):
        config = f"{name}_{guidance}.yaml"
        shutil.copy(pair / f"{name}.yaml", pair / config)
        flags = (*useless, *FEW.get(guidance, ()))
        tables[name], merged[name] = measured_and_merged(pair, config, guidance, flags)
    for file, wanted in tables["merged"].items():
        for column in wanted.select_dtypes("number"):
            np.testing.assert_allclose(tables["both"][file][column], wanted[column], rtol=2e-3, atol=1e-6)
    base = tensors(pair / "base")
    assert merged["both"].keys() == merged["merged"].keys() == base.keys()
    for name, value in merged["both"].items():
        torch.testing.assert_close(value, merged["merged"][name], rtol=0, atol=1e-6, msg=name)
    vision = [name for name in base if "vision_tower" in name and "q_proj.weight" in name]
    stays = guidance == "submodule_linearity"  # which leaves what text does not reach as the base has it
    assert vision and all(torch.equal(merged["both"][name], base[name]) == stays for name in vision)


def test_evaluated_as_what_peft_merges(pair):
    rows = ("--validation_rows", 2, "--test_rows", 4, "--no-samples", "--no-controls")
    models = ("./base+./adapter", "./merged")
    done_here("utils/evaluator.py", "--config", "both.yaml", "--out_dir", "s", *rows, *models, cwd=pair)
    scores = pd.read_csv(pair / "s" / "scores.csv")
    losses = scores[scores["measure"] == "loss"].set_index("candidate")["value"]
    assert losses["code"] == losses["adapter"] != losses["base"]
    assert losses["adapter"] == pytest.approx(losses["merged"], rel=1e-6)
