"""tuned on mixtures of experts: routers while tuning are those that the recipe writes.

python -m pytest tests/guidance/tuned/test_mixtures.py
"""

import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml

from tests.refusals import refused
from tests.tiny_merges import merge_here
from tests.tiny_mixtures import save_mixtures
from tests.tiny_pairs import CALIBRATION, sample_ids, write_config
from tests.tiny_recipes import decide_here, measure_here, read_here

USELESS = {"accept_useless_text": True}
TUNED = {"tune_steps": 1, "tune_level": "block", **USELESS}


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> Path:
    folder = save_mixtures(tmp_path_factory.mktemp("mixtures"), num_hidden_layers=2)
    write_config(folder, {"calibration": CALIBRATION})
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        measure_here("gram_mean", "grams", expert_tokens=0, **USELESS)  # else routers change losses by too little
    return folder


@pytest.fixture
def pair(measured, tmp_path, monkeypatch) -> Path:
    folder = shutil.copytree(measured, tmp_path / "pair")
    monkeypatch.chdir(folder)
    return folder


def loss(model: Path, ids: list[int]) -> float:
    """The mean loss per token, by transformers."""
    from transformers import AutoModelForCausalLM

    found = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = found(torch.tensor([ids])).logits[0, :-1].double()
    return float(-logits.log_softmax(-1)[range(len(ids) - 1), ids[1:]].mean())


def merged_loss(recipe: dict, name: str, ids: list[int]) -> float:
    return loss(merge_here(Path(), {**recipe, "dtype": "float32", "out_dtype": "float32"}, name), ids)


@pytest.mark.parametrize(("guidance", "router"), [("", None), ("gram_mean", None), ("gram_mean", "merge")])
def test_what_is_written_is_what_was_tuned(pair, guidance, router, capsys):
    start = str(decide_here("gram_mean", "grams", "start", router=router)[0]) if guidance else None
    measure_here("tuned", "tuned", start_recipe=start, **TUNED)
    (path,) = decide_here("tuned", "tuned")
    recipe, steps = read_here(path), pd.read_csv("tuned/tuned_steps.csv")
    filters = [one["filter"] for one in recipe["models"][1]["parameters"]["weight"] if one["value"] == 0]
    assert bool(filters) == (router is None)
    held = steps[(steps["samples"] == "held_out") & (steps["kept"] == 1) & (steps["task"] == "code")]["loss"].item()
    ids = sample_ids(pair, "code", "grams")[-1]
    assert merged_loss(recipe, "merged", ids) == pytest.approx(held, rel=2e-6)
    for model in recipe["models"][1:]:
        own = model["parameters"]
        other = {"filter": "mlp.gate.weight", "value": 0.0}
        own["weight"] = [one for one in own["weight"] if one.get("filter") not in filters]
        own["weight"] = [other, *own["weight"]] if router else own["weight"]
    assert merged_loss(recipe, "other", ids) != pytest.approx(
        held, rel=2e-6
    )  # so that the routers can be told from these
    with refused("router-unfit"):
        decide_here("tuned", "tuned", "other", router="base" if router else "merge")


def test_a_start_may_leave_nothing_but_routers_to_the_base(pair):
    (path,) = decide_here("gram_mean", "grams", "start")
    recipe = yaml.safe_load(path.read_text())
    for model in recipe["models"][1:]:
        model["parameters"]["weight"].insert(0, {"filter": "embed_tokens", "value": 0.0})
    path.write_text(yaml.safe_dump(recipe))
    with refused("tuned-start-weight"):
        measure_here("tuned", "tuned", start_recipe=str(path), **TUNED)
