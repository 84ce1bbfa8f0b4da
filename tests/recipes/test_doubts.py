"""Doubts about recipes that are sound."""

import dataclasses
import shutil
from pathlib import Path

import pandas as pd
import pytest

from tests.tiny_checkpoints import save_tiny
from utils.models.opening import open_checkpoint
from utils.pair.config import ModelEntry
from utils.recipes.coefficients import COLUMNS
from utils.recipes.doubts import cancelled_weights, doubts
from utils.recipes.method_rules import DENSITY_METHODS, OWN_METHODS, TASK_ARITHMETIC
from utils.recipes.recipe import RecipeSettings

BASE, MATH, CODE = (ModelEntry(f"models/{name}", name) for name in ("base", "math", "code"))
METHODS = {**DENSITY_METHODS, **OWN_METHODS, "task_arithmetic": TASK_ARITHMETIC}


def table(weight):
    rows = [(expert, f"t{layer}", layer, "q", 0.5, weight, 100) for expert in ("math", "code") for layer in range(2)]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def of(method, weight=1.0, experts=(MATH, CODE), checkpoints=(), **settings):
    settings = {"parameters": {}, **settings}
    return doubts(RecipeSettings(METHODS[method], BASE, experts, **settings), table(weight), checkpoints)


@pytest.mark.parametrize(
    ("method", "settings", "times"),
    [
        ("task_arithmetic", {}, "2 times"),
        ("task_arithmetic", {"lambda_": 0.8}, "1.6 times"),
        ("task_arithmetic", {"lambda_": 0.4}, None),
        ("task_arithmetic", {"lambda_": 1.0, "weight": 0.5, "as_weights": True}, None),  # solved for: sums to 1
        ("task_arithmetic", {"experts": (MATH,)}, None),
        ("dare_ties", {}, "2 times"),
        ("dare_ties", {"parameters": {"lambda": 0.3}}, None),
        ("dare_linear", {"parameters": {"normalize": True}}, None),  # divided by both
        ("ties", {"parameters": {"normalize": False}}, "2 times"),
        ("ties", {}, "divides only where experts change an entry in the same direction"),
        ("ties", {"lambda_": 0.35}, None),
        ("guided_ties", {}, "divides only where"),
        ("guided_mean", {}, None),
    ],
)
def test_several_experts_added_up_in_full(method, settings, times):
    said = of(method, **settings)
    assert len(said) == (times is not None)
    if times:
        assert times in said[0] and "a lambda of 0.2 to 0.4" in said[0] and "--lambda" in said[0]


def test_the_range_is_what_validation_chose_in_the_benchmarks():
    """Of the merges that add experts up, one factor on all of it; not what grows with depth or solves for its weights."""
    from tests.conftest import ROOT

    rows = pd.read_csv(ROOT / "benchmarks/results/quality.csv")
    rows = rows[rows["experiment"] == "two experts"]
    adding = rows[
        rows["contender"].str.contains("task arithmetic|TIES|Sens-Merging|LEWIS|saliency budget|saliency mask")
    ]
    scale = (
        adding["setting"]
        .str.extract(r"lambda ([\d.]+)")[0]
        .fillna(adding["setting"].str.extract(r"weight ([\d.]+)")[0])
    )
    assert (scale.astype(float).min(), scale.astype(float).max()) == (0.2, 0.4)


@pytest.mark.parametrize(
    ("method", "experts", "parameters", "cancel"),
    [
        ("ties", (MATH,), {}, True),
        ("ties", (MATH,), {"normalize": False}, False),
        ("ties", (MATH, CODE), {}, False),
        ("dare_ties", (MATH,), {}, False),
        ("dare_ties", (MATH,), {"normalize": True}, True),
    ],
)
def test_weights_that_cancel(method, experts, parameters, cancel):
    settings = RecipeSettings(METHODS[method], BASE, experts, parameters, as_weights=True)
    assert bool(cancelled_weights(settings, "weights")) is cancel
    assert not cancelled_weights(dataclasses.replace(settings, as_weights=False), "weights")


@pytest.mark.parametrize(
    ("dtype", "out_dtype", "said"),
    [
        ("bfloat16", "float32", "every merged entry is a bfloat16 number"),
        ("bfloat16", "float16", "--dtype float16 merges in it"),
        ("float16", "bfloat16", ""),
        ("float32", "bfloat16", ""),
        ("float32", "float32", ""),
        ("bfloat16", None, ""),
    ],
)
def test_a_file_wider_than_its_numbers(dtype, out_dtype, said):
    found = of("dare_linear", experts=(MATH,), dtype=dtype, out_dtype=out_dtype)
    assert len(found) == bool(said) and said in "".join(found)


def test_models_in_float32_merged_in_less(tmp_path):
    from safetensors.torch import load_file, save_file

    stored = save_tiny("llama", tmp_path / "bfloat16")
    finer = Path(shutil.copytree(stored, tmp_path / "float32"))
    tensors = {name: tensor.float() for name, tensor in load_file(finer / "model.safetensors").items()}
    save_file(tensors, finer / "model.safetensors", metadata={"format": "pt"})
    checkpoints = [open_checkpoint(str(folder)) for folder in (finer, stored)]
    quiet = {"experts": (MATH,), "checkpoints": checkpoints}
    (said,) = of("dare_linear", **quiet)
    assert f"{tmp_path}/float32: stored in float32, merged in bfloat16" in said and "--dtype float32 keeps them" in said
    assert "bfloat16:" not in said
    assert of("dare_linear", dtype="float32", **quiet) == []
    assert of("dare_linear", experts=(MATH,), checkpoints=checkpoints[1:]) == []
