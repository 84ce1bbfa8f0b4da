"""A recipe made in memory is the one that command 2 writes; nothing is written or printed on the way.

python -m pytest tests/guidance/test_guided_recipe.py
"""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
import yaml

from tests.refusals import refused
from tests.tiny_pairs import CALIBRATION, contents, save_pair, write_config
from tests.tiny_recipes import decide_here, measure_here, own_defaults
from utils.guidance.guided_recipe import control_recipe, guided_recipe, weight_filters
from utils.guidance.measured_pair import open_measured
from utils.guidance.method import guidance_methods
from utils.guidance.recipe_choices import RecipeOptions, settle
from utils.guidance.recipe_files import recipe_files
from utils.pair.config import read_pair_config
from utils.recipes.routers import RouterChoice

GUIDANCE = tuple(guidance_methods())


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    folder = save_pair(tmp_path_factory.mktemp("pair"))
    write_config(folder, {"calibration": CALIBRATION, "global_parameters": {"normalize": True}})
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in ("lewis", "saliency_budget"):
            measure_here(name, f"dfs_{name}")
        measure_here("gram_mean", "dfs_gram_mean", accept_useless_text=True)
    return folder


def options_of(name, merge_method=None, own=None, **asked):
    return RecipeOptions(guidance_methods()[name], own_defaults(name) | (own or {}), merge_method, **asked)


CASES = {
    "lewis": ("lewis", {}),
    "lewis, scaled": ("lewis", {"mean_density": 0.2, "lambda_": 0.4, "merge_method": "della"}),
    "saliency": ("saliency_budget", {"mean_density": 0.3, "out_dtype": "float32"}),
    "saliency mask": ("saliency_budget", {"own": {"mask": "saliency"}, "mean_density": 0.3}),
    "saliency mean": ("saliency_budget", {"merge_method": "guided_mean", "dtype": "float32"}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_recipe_in_memory_is_the_one_that_is_written(case, pair, capfd):
    name, asked = CASES[case]
    before, config = contents(pair), read_pair_config("pair.yaml")
    measured = open_measured(config, guidance_methods()[name], Path(f"dfs_{name}"))
    made = guided_recipe(measured, settle(config, options_of(name, **asked)))
    control = control_recipe(measured, made, "uniform")
    assert contents(pair) == before and capfd.readouterr() == ("", "")
    files = recipe_files(measured, made) | recipe_files(measured, made, control)
    asked = {**asked, **asked.get("own", {})}
    asked.pop("own", None)
    written = decide_here(name, f"dfs_{name}", control="uniform", **asked)
    assert [path.name for path in written] == [made.name, control.name]
    assert {path.name: path.read_bytes() for path in Path("out").iterdir()} == files
    assert yaml.safe_load(written[0].read_text()) == made.data
    assert all((Path("out") / file).read_bytes() == content for file, content in made.vectors.items())


def test_one_opened_measurement_serves_many_recipes(pair, monkeypatch):
    """The manifest is read and the merge planned once; each recipe has the name it is given."""
    from utils.recipes import naming

    plans, plan = [], naming.plan_architecture
    monkeypatch.setattr(naming, "plan_architecture", lambda *args, **keys: plans.append(args) or plan(*args, **keys))
    config = read_pair_config("pair.yaml")
    measured = open_measured(config, guidance_methods()["saliency_budget"], Path("dfs_saliency_budget"))
    Path("dfs_saliency_budget/manifest.json").unlink()
    asked = options_of("saliency_budget", "guided_mean")
    for number, lambda_ in enumerate((0.3, 0.7, 1.0)):
        made = guided_recipe(
            measured, settle(config, dataclasses.replace(asked, lambda_=lambda_)), name=f"trial_{number}.yaml"
        )
        assert made.data["parameters"]["lambda"] == lambda_
        assert set(made.vectors) == {f"trial_{number}_{expert}_saliency.safetensors" for expert in CALIBRATION}
        assert {m["parameters"]["saliency"] for m in made.data["models"][1:]} == set(made.vectors)
    assert len(plans) == 1


def test_what_changes_a_recipe_is_in_its_name(pair):
    config = read_pair_config("pair.yaml")
    measured = open_measured(config, guidance_methods()["lewis"], Path("dfs_lewis"))

    def name(**asked):
        return guided_recipe(measured, settle(config, options_of("lewis", **asked))).name

    weights = {"apply_lewis_to_weights": True}
    plain = "pair_0.3_0.8_generated_ties_merge_config.yaml"
    assert name() == name(own=weights) == plain  # the released code's two names
    changes = [
        {"lambda_": 0.4}, {"lambda_": 0.5}, {"lambda_": 0.4, "own": weights}, {"dtype": "float32"},
        {"out_dtype": "float32"}, {"mean_density": 0.5}, {"own": {"bound": "clip"}},
        {"own": {"bound": "clip", **weights}}, {"own": {"gamma": 0.2}}, {"merge_method": "della"},
    ]  # fmt: skip
    names = [name(**asked) for asked in changes]
    assert len({*names, plain}) == len(changes) + 1
    assert name(lambda_=0.4, dtype="float32", own=weights) == (
        "pair_0.3_0.8_generated_ties_lambda0.4_dtype_float32_weights_merge_config.yaml"
    )


def test_the_manifest_says_what_the_recipe_was_made_of(pair):
    (path,) = decide_here("saliency_budget", "dfs_saliency_budget", mask="saliency", lambda_=0.5)
    found = json.loads(path.with_name(path.name.replace(".yaml", ".manifest.json")).read_text())
    source = Path("dfs_saliency_budget/manifest.json").read_bytes()
    measurement = json.loads(source)
    assert found["recipe"] == {"name": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    assert len(found["vectors"]) == 2
    for name, digest in found["vectors"].items():
        assert hashlib.sha256((path.parent / name).read_bytes()).hexdigest() == digest
    assert (found["guidance"], found["guidance_options"]) == ("saliency_budget", {"mask": "saliency"})
    assert found["measure_options"] == measurement["guidance_options"]
    assert (found["merge_method"], found["lambda"], found["control"]) == ("guided_ties", 0.5, None)
    assert found["samples"] == measurement["samples"] and found["options"]["nsamples"] == 4
    assert found["measurement"] == {
        "sha256": hashlib.sha256(source).hexdigest(),
        "versions": measurement["versions"],
        "models": [
            {"model": f"./{one['type']}", "revision": None, "adapter": None, "sample_sha256": one["sample_sha256"]}
            for one in measurement["models"]
        ],
    }
    assert "torch" in found["versions"]


@pytest.mark.parametrize(("guidance", "place"), [("saliency_budget", "."), ("gram_mean", "../dfs_gram_mean")])
def test_a_moved_recipe_finds_its_vectors(guidance, place, pair):
    """Vectors are named relative to the recipe: the folder may move, and the merge may start anywhere."""
    from tests.tiny_merges import tensors
    from utils.commands.merge import merge
    from utils.merging.settings import MergeSettings

    method = {"saliency_budget": "guided_mean"}.get(guidance)
    (path,) = decide_here(guidance, f"dfs_{guidance}", merge_method=method)
    named = [model["parameters"]["saliency"] for model in yaml.safe_load(path.read_text())["models"][1:]]
    assert {str(Path(name).parent) for name in named} == {place}
    merge(MergeSettings(Path("first"), path, device="cpu", quiet=True))
    Path("elsewhere").mkdir()
    for folder in ("out", f"dfs_{guidance}"):
        shutil.move(folder, "elsewhere")
    merge(MergeSettings(Path("second"), "elsewhere" / path, device="cpu", quiet=True))
    first, second = tensors(Path("first")), tensors(Path("second"))
    assert all(bool((first[name] == second[name]).all()) for name in first)


def test_a_plot_draws_what_there_is_of_a_mean(pair):
    """Whole deltas have no densities; where the changes lie that matter is drawn instead."""
    pytest.importorskip("matplotlib")
    (path,) = decide_here("saliency_budget", "dfs_saliency_budget", merge_method="guided_mean", plot=True)
    pictures = sorted(file.name for file in Path("out").glob("*.png"))
    assert pictures == [f"{path.stem}_{expert}_saliency.png" for expert in ("code", "math")]


@pytest.mark.parametrize(
    ("name", "asked", "code"),
    [
        ("lewis", {"merge_method": "slerp"}, "merge-method-unfit"),
        ("lewis", {"merge_method": "tise"}, "merge-method-unknown"),
        ("lewis", {"merge_method": "guided_mean"}, "merge-method-unfit"),
        ("sens_merging", {"merge_method": "della"}, "merge-method-unfit"),
        ("sens_merging", {"mean_density": 0.5}, "flag-no-effect"),
        ("saliency_budget", {"merge_method": "guided_mean", "own": {"mask": "saliency"}}, "flag-no-effect"),
        ("saliency_budget", {"merge_method": "della", "own": {"mask": "saliency"}}, "flag-no-effect"),
    ],
)
def test_what_needs_no_measurement_is_refused_without_one(name, asked, code, pair):
    with refused(code):
        settle(read_pair_config("pair.yaml"), options_of(name, **asked))


def test_a_name_that_is_tied_to_another_has_its_weight_beside():
    """A head that the merge writes since one expert has one, where the base's is the embeddings."""
    names = ["model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"]
    table = pd.DataFrame({"tensor": [names[0], names[2]], "weight": [0.5, 0.25]})
    filters = weight_filters(table, RouterChoice(), names, "here", {names[1]: names[0]})
    assert filters.keys() == set(names)
    assert weight_filters(table, RouterChoice(), [names[0], names[2]], "here").keys() == {names[0], names[2]}
