"""Sens-Merging from text to merged model: measured numbers against plain passes, weights against the formulas, bad input.

python -m pytest tests/guidance/sens_merging/test_commands.py
"""

import io
import json
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from tests.commands_here import done_here, refused_here
from tests.conftest import ROOT
from tests.plain_gradients import plain_gradients
from tests.selected import few
from tests.tiny_checkpoints import drop_head, poison, save_tiny
from tests.tiny_merges import assert_same_tensors, merge_here, merge_stock, tensors
from tests.tiny_pairs import CALIBRATION, pair_settings, sample_ids, save_pair, save_tokenizer, write_config
from utils.guidance.sens_merging.method import METHOD

FAMILIES = ("llama", "gemma3", "phi3", "gpt2")
SENSITIVITY, DISTANCES, TENSORS, LOSSES, OUTSIDE = (
    f"sens_merging_{name}.csv" for name in ("sensitivity", "distances", "tensors", "losses", "outside")
)
RECIPE = "pair_generated_{method}_{tags}sens_merging_merge_config.yaml"


class Pair:
    """A folder with a pair of models, and the two commands run in it, inside this process."""

    def __init__(self, folder: Path):
        self.folder = folder

    def call(self, script, *arguments, refused=""):
        """What the command prints; with a code, the message with which it refuses."""
        if refused:
            return refused_here(refused, script, *arguments, cwd=self.folder)
        done = done_here(script, *arguments, cwd=self.folder)
        return done.stdout + done.stderr

    def measure(self, *more, refused=""):
        flags = ("--config", "pair.yaml", "--out_dir", "dfs", "--guidance", "sens_merging", "--device", "cpu")
        return self.call("lewis_importance.py", *flags, "--accept_useless_text", *more, refused=refused)

    def decide(self, *more, refused=""):
        flags = ("--delta_dfs_in_dir", "dfs", "--config_file", "pair.yaml", "--out_dir", "out")
        return self.call(
            "lewis_merge.py", *flags, "--accept_edited", "--guidance", "sens_merging", *more, refused=refused
        )

    def recipe(self, method="task_arithmetic", tags=""):
        return yaml.safe_load((self.folder / "out" / RECIPE.format(method=method, tags=tags)).read_text())

    def table(self, name):
        return pd.read_csv(self.folder / "dfs" / name, keep_default_na=False)

    def edit(self, name, change):
        change(self.table(name)).to_csv(self.folder / "dfs" / name, index=False)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The families, measured in float32 on texts of their own, each made when it is first asked for."""
    made = {}

    def get(family):
        if family not in made:
            folder = save_pair(tmp_path_factory.mktemp(family) / "pair", family)
            write_config(folder, {"calibration": CALIBRATION})
            made[family] = folder, Pair(folder).measure("--dtype", "float32")
        return made[family]

    return get


@pytest.fixture
def pair(saved, tmp_path):
    return Pair(shutil.copytree(saved("llama")[0], tmp_path / "pair"))


def logits(folder, samples):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return torch.cat([model(input_ids=torch.tensor([ids])).logits[0] for ids in samples]).double()


@pytest.mark.parametrize("family", few(FAMILIES, "gemma3", "gpt2"))
def test_what_is_measured_equals_plain_passes_over_whole_models(saved, family):
    folder, said = saved(family)
    found = {name: pd.read_csv(folder / "dfs" / name, keep_default_na=False) for name in METHOD.files(None)}
    for expert, other in (("code", "math"), ("math", "code")):
        samples = sample_ids(folder, expert)
        model, losses, gradients = plain_gradients(folder / expert, samples)
        parameters = dict(model.named_parameters())
        sums = [0.0, 0.0]
        for (name, _), gradient in gradients.items():
            for layer in (0, 1):
                if any(f".{blocks}.{layer}." in name for blocks in ("layers", "h")):
                    sums[layer] += float((parameters[name].detach().double() * gradient.double()).abs().sum())
        own = found[SENSITIVITY][found[SENSITIVITY]["model"] == expert]
        assert own["layer"].tolist() == [0, 1]
        np.testing.assert_allclose(own["sensitivity"], np.array(sums) / len(samples), rtol=5e-5)
        loss = found[LOSSES].set_index("model")["loss"][expert]
        assert loss == pytest.approx(np.mean(losses), rel=1e-5) and f"{expert}: loss {loss:.4f}" in said

        there = sample_ids(folder, other)
        gaps = (logits(folder / expert, there) - logits(folder / other, there)).square().sum(-1).sqrt()
        row = found[DISTANCES].set_index(["model", "other"]).loc[expert, other]
        assert row["distance"] == pytest.approx(float(gaps.mean()), rel=2e-5)
        assert row["tokens"] == sum(map(len, there)) == len(gaps)


@pytest.mark.parametrize("family", few(FAMILIES, "gemma3", "gpt2"))
def test_every_stored_tensor_is_listed_once_with_its_size(saved, family):
    folder, _ = saved(family)
    table = pd.read_csv(folder / "dfs" / TENSORS, keep_default_na=False).set_index("tensor")
    stored = tensors(folder / "base")
    assert sorted(table.index) == sorted(stored)
    assert all(table["params"][name] == value.numel() for name, value in stored.items())
    for name, row in table.iterrows():
        in_block = [layer for layer in (0, 1) if f"layers.{layer}." in name or f".h.{layer}." in f".{name}"]
        assert [row["layer"]] == in_block or (not in_block and row["layer"] in (-1, 2)), name
        assert bool(row["component"]) == (bool(in_block) and name.endswith("weight") and stored[name].ndim == 2), name
    layers = table["layer"]
    embedding, norm = (
        ("transformer.wte", "transformer.ln_f") if family == "gpt2" else ("model.embed_tokens", "model.norm")
    )
    assert layers[f"{embedding}.weight"] == -1 and layers[f"{norm}.weight"] == 2


def derived(folder, temperature, alignment="distance"):
    """The weight of each (expert, layer), from the tables by the formulas."""
    table = pd.read_csv(folder / "dfs" / SENSITIVITY).pivot(index="model", columns="layer", values="sensitivity")
    alpha = table.div(np.sqrt((table**2).sum(axis=1)), axis=0)
    tau = pd.read_csv(folder / "dfs" / DISTANCES).groupby("model")["distance"].sum()
    tau = tau / tau.sum()
    if alignment == "similarity":
        tau = (1 - tau) / (len(tau) - 1)
    powers = np.exp(alpha.mul(tau, axis=0) / temperature)
    return len(tau) * powers / powers.sum(axis=0)


@pytest.mark.parametrize("family", few(FAMILIES, "gemma3", "gpt2"))
def test_the_merged_model_is_what_the_formulas_say(saved, tmp_path, monkeypatch, family):
    """Every tensor of the merge, against theta0 + 0.4 sum of T sigma_t(l) delta_t computed densely; ours and stock's."""
    pair = Pair(shutil.copytree(saved(family)[0], tmp_path / "pair"))
    said = pair.decide("--temperature", 0.05)
    weights = derived(pair.folder, 0.05)
    assert abs(weights.to_numpy() - 1).max() > 0.02  # else the test would say little
    low, high = weights.to_numpy().min(), weights.to_numpy().max()
    assert f"{low:.4f} to {high:.4f}, {low - 1:+.1%} to {high - 1:+.1%} around uniform" in said
    data = pair.recipe(tags="temperature0.05_") | {"dtype": "float32"}
    monkeypatch.chdir(pair.folder)
    ours, stock = merge_here(tmp_path, data), merge_stock(tmp_path, data)
    assert_same_tensors(ours, stock)
    base, merged = tensors(pair.folder / "base"), tensors(stock)
    assert set(base) <= set(merged)
    listed = pair.table(TENSORS).set_index("tensor")["layer"]
    for name, value in base.items():
        expected = value.double()
        for expert in ("code", "math"):
            layer = listed[name]
            factor = weights.loc[expert, layer] if layer in (0, 1) else 1.0
            expected = expected + 0.4 * factor * (tensors(pair.folder / expert)[name].double() - value.double())
        torch.testing.assert_close(merged[name].double(), expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


def test_flags_change_the_weights_and_the_name(pair):
    pair.decide()
    pair.decide("--alignment", "similarity", "--temperature", 0.3, "--lambda", 0.7)
    for tags, temperature, alignment, lambda_ in (
        ("", METHOD.decide_flags[0].default, "distance", 0.4),
        ("temperature0.3_similarity_lambda0.7_", 0.3, "similarity", 0.7),
    ):
        recipe, weights = pair.recipe(tags=tags), derived(pair.folder, temperature, alignment)
        assert recipe["parameters"]["lambda"] == lambda_ and recipe["parameters"]["normalize"] is False
        for model in recipe["models"][1:]:
            values = {item.get("filter"): item["value"] for item in model["parameters"]["weight"]}
            for layer in (0, 1):
                expected = weights.loc[model["model"].removeprefix("./"), layer]
                assert values[f"model.layers.{layer}."] == pytest.approx(expected, rel=1e-12)
            assert values["model.embed_tokens."] == values["lm_head."] == values["model.norm."] == 1.0


def test_each_expert_is_said_with_its_own_text_and_so_are_few_samples(pair, saved):
    note = "nsamples 4; the authors of sens_merging measure on 100"
    said = pair.decide()
    assert "code on rows.jsonl (text '{answer}')\n" in said
    assert "math on rows.jsonl (text '{question} {answer}')\n" in said
    assert f"note:     {note}\n" in said and f"note: {note}\n" in saved("llama")[1]


@pytest.mark.parametrize("family", ["llama", "gemma3"])  # a head of its own; tied
def test_what_lies_outside_as_layers_of_its_own(saved, tmp_path, family):
    pair = Pair(shutil.copytree(saved(family)[0], tmp_path / "pair"))
    pair.decide("--outside", "layers", "--temperature", 0.05)
    table = pair.table(OUTSIDE).pivot(index="model", columns="tensor", values="sensitivity")
    listed = pair.table(TENSORS)
    outside = set(listed.loc[~listed["layer"].isin([0, 1]) | (listed["tensor"] == "model.norm.weight"), "tensor"])
    assert set(table.columns) == outside and len(outside) == (3 if family == "llama" else 2)
    inside = pair.table(SENSITIVITY).pivot(index="model", columns="layer", values="sensitivity")
    both = pd.concat([inside, table], axis=1)
    alpha = both.div(np.sqrt((both**2).sum(axis=1)), axis=0)
    tau = pair.table(DISTANCES).groupby("model")["distance"].sum()
    powers = np.exp(alpha.mul(tau / tau.sum(), axis=0) / 0.05)
    weights = len(tau) * powers / powers.sum(axis=0)
    for model in pair.recipe(tags="temperature0.05_outside_layers_")["models"][1:]:
        own = weights.loc[model["model"].removeprefix("./")]
        values = {item.get("filter"): item["value"] for item in model["parameters"]["weight"]}
        for layer in (0, 1):
            assert values[f"model.layers.{layer}."] == pytest.approx(own[layer], rel=1e-9)
        for tensor in outside:
            assert values[tensor.removesuffix("weight")] == pytest.approx(own[tensor], rel=1e-9)


def test_each_factor_alone_has_its_recipe(pair):
    for factors in ("sensitivity", "scaling"):
        said = pair.decide("--factors", factors, "--temperature", 0.2)
        assert f"{factors} alone" in said
    found = []
    for factors in ("sensitivity", "scaling"):
        model = pair.recipe(tags=f"temperature0.2_{factors}_")["models"][1]
        values = {item.get("filter"): item["value"] for item in model["parameters"]["weight"]}
        found.append([values[f"model.layers.{layer}."] for layer in (0, 1)])
    assert found[1][0] == found[1][1] != 1.0 and found[0][0] != found[0][1]


def test_a_folder_of_an_earlier_version_is_read_but_for_layers_outside(pair):
    pair.decide()
    now = pair.recipe()
    (pair.folder / "dfs" / OUTSIDE).unlink()
    pair.decide("--overwrite")
    assert pair.recipe() == now
    pair.decide("--outside", "layers", refused="outside-not-measured")


@pytest.mark.parametrize("method", ["ties", "dare_ties", "dare_linear"])
def test_methods_with_densities_keep_one_share_everywhere(pair, method, monkeypatch):
    pair.decide("--merge_method", method, "--mean_density", 0.3)
    recipe = pair.recipe(method, "mean0.3_")
    assert recipe["parameters"]["normalize"] is False
    for model in recipe["models"][1:]:
        *guided, rest = model["parameters"]["density"]
        assert {item["value"] for item in guided} == {0.3} and rest == {"value": 1} and len(guided) == 14
        assert len(model["parameters"]["weight"]) == 6  # two blocks, three tensors outside, the bare value
    monkeypatch.chdir(pair.folder)
    assert tensors(merge_here(pair.folder, recipe))


def test_identical_experts_get_exactly_uniform_weights(pair):
    shutil.rmtree(pair.folder / "math")
    shutil.copytree(pair.folder / "code", pair.folder / "math")
    write_config(pair.folder)  # one text
    shutil.rmtree(pair.folder / "dfs")
    said = pair.measure()
    assert "several share one" in said
    assert (pair.table(DISTANCES)["distance"] == 0).all()
    assert "1.0000 to 1.0000, +0.0% to +0.0% around uniform" in pair.decide()
    weights = [item["value"] for model in pair.recipe()["models"][1:] for item in model["parameters"]["weight"]]
    assert set(weights) == {1.0}


def test_three_experts_and_one_left_out_of_the_merge(pair):
    save_tokenizer(save_tiny("llama", pair.folder / "law", seed=7, layers=2))
    models = [*pair_settings()["model_info"], {"name": "./law", "type": "law"}]
    write_config(pair.folder, {"model_info": models, "calibration": CALIBRATION})
    shutil.rmtree(pair.folder / "dfs")
    pair.measure()
    assert len(pair.table(DISTANCES)) == 6 and len(pair.table(SENSITIVITY)) == 6
    pair.decide("--temperature", 0.2)
    weights = derived(pair.folder, 0.2)
    for model in pair.recipe(tags="temperature0.2_")["models"][1:]:
        values = {item.get("filter"): item["value"] for item in model["parameters"]["weight"]}
        assert values["model.layers.1."] == pytest.approx(weights.loc[model["model"].removeprefix("./"), 1], rel=1e-12)
    shutil.rmtree(pair.folder / "out")
    two = {"model_info": models, "calibration": CALIBRATION, "target_model_names": {"code": "./code", "math": "./math"}}
    write_config(pair.folder, two)
    pair.decide("--temperature", 0.2)
    merged = pair.recipe(tags="temperature0.2_")["models"]
    assert [model["model"] for model in merged] == ["./base", "./code", "./math"]
    total = sum(model["parameters"]["weight"][0]["value"] for model in merged[1:])
    assert total == pytest.approx(2)  # weighed against each other, without the third


def test_a_larger_vocabulary_is_compared_where_both_have_one(pair):
    save_tokenizer(save_tiny("llama", pair.folder / "code", seed=1, layers=2, vocab_size=104))
    shutil.rmtree(pair.folder / "dfs")
    said = pair.measure("--dtype", "float32")
    assert "./code and ./math have 104 and 96 logits; the first 96 were compared" in said
    samples = sample_ids(pair.folder, "math")
    ours, theirs = logits(pair.folder / "code", samples)[:, :96], logits(pair.folder / "math", samples)
    found = pair.table(DISTANCES).set_index(["model", "other"])["distance"]["code", "math"]
    assert found == pytest.approx(float((ours - theirs).square().sum(-1).sqrt().mean()), rel=2e-5)


def test_measuring_side_by_side_gives_the_same_bytes(pair):
    before = {name: (pair.folder / "dfs" / name).read_bytes() for name in METHOD.files(None)}
    shutil.rmtree(pair.folder / "dfs")
    pair.measure("--dtype", "float32", "--devices", "cpu,cpu")
    after = {name: (pair.folder / "dfs" / name).read_bytes() for name in METHOD.files(None)}
    assert after[TENSORS] == before[TENSORS]
    for name in (SENSITIVITY, DISTANCES):
        column = "sensitivity" if name == SENSITIVITY else "distance"
        old = pd.read_csv(io.BytesIO(before[name]))[column]
        np.testing.assert_allclose(pair.table(name)[column], old, rtol=1e-5)


def test_each_command_says_what_to_type_next(saved, tmp_path):
    folder = shutil.copytree(saved("llama")[0], tmp_path / "pair")
    shutil.rmtree(folder / "dfs")
    flags = ("--config", "pair.yaml", "--out_dir", "run/dfs", "--guidance", "sens_merging", "--accept_useless_text")
    said = done_here("lewis_importance.py", *flags, cwd=folder).stdout
    for script in ("lewis_merge.py", "utils/merger.py"):
        words = shlex.split(said.split("next:")[-1].split("\nor,")[0].replace("\\\n", " "))
        assert words[0] == sys.executable and (folder / words[1]).resolve() == ROOT / script
        said = done_here(script, *words[2:], cwd=folder).stdout
    (merged,) = (folder / "run/merged_models").iterdir()
    assert tensors(merged).keys() == tensors(folder / "base").keys()


# --- bad input --------------------------------------------------------------------------------------------------------


def test_one_expert_is_too_few(pair, unread):
    write_config(pair.folder, {"model_info": pair_settings()["model_info"][:2]})
    pair.measure("--overwrite", refused="guidance-few-experts")
    pair.decide(refused="guidance-few-experts")


def test_experts_that_split_text_differently_cannot_be_compared(pair, unread):
    save_tokenizer(pair.folder / "math", bos=False)
    pair.measure("--overwrite", refused="tokenizer-differs")


def test_a_text_that_is_missing(pair, unread):
    write_config(pair.folder, {"calibration": CALIBRATION | {"math": {"path": "nothing.jsonl"}}})
    pair.measure("--overwrite", refused="text-missing")


def test_an_expert_without_a_head(pair, unread):
    drop_head(pair.folder / "math")
    pair.measure("--overwrite", refused="model-no-head")


def test_a_sample_without_a_next_token(pair, unread):
    for name in ("base", "code", "math"):
        save_tokenizer(pair.folder / name, bos=False)
    (pair.folder / "rows.jsonl").write_text('{"question": "?", "answer": "x"}\n' * 12)
    pair.measure("--overwrite", refused="text-too-short")


def test_weights_that_are_not_finite(pair):
    poison(pair.folder / "math", "model.layers.1.mlp.up_proj.weight")
    pair.measure("--overwrite", refused="measured-not-finite")


@pytest.mark.parametrize(
    ("name", "change", "code"),
    [
        (SENSITIVITY, lambda t: t.drop(index=1), "table-row-missing"),
        (SENSITIVITY, lambda t: t[t["layer"] == 0], "table-row-missing"),
        (SENSITIVITY, lambda t: pd.concat([t, t.tail(1)]), "table-row-twice"),
        (SENSITIVITY, lambda t: t.replace({"layer": {1: 2}}), "several"),
        (SENSITIVITY, lambda t: t.replace({"model": {"math": "law"}}), "table-unknown-expert"),
        (SENSITIVITY, lambda t: t.assign(sensitivity=-1.0), "table-bad-value"),
        (DISTANCES, lambda t: t.head(1), "table-row-missing"),
        (DISTANCES, lambda t: t.assign(other=t["model"]), "several"),
        (DISTANCES, lambda t: t.replace({"other": {"math": "law"}}), "table-unknown-expert"),
        (DISTANCES, lambda t: t.assign(distance=float("nan")), "table-bad-value"),
        (DISTANCES, lambda t: pd.concat([t, t]), "table-row-twice"),
        (
            TENSORS,
            lambda t: t[t["tensor"] != "model.layers.1.mlp.up_proj.weight"],
            "table-row-missing",
        ),
        (TENSORS, lambda t: t[t["layer"] != 1], "table-row-missing"),
        (TENSORS, lambda t: pd.concat([t, t.tail(1)]), "table-row-twice"),
        (TENSORS, lambda t: t.assign(params=0), "table-bad-value"),
        (TENSORS, lambda t: t.assign(layer=t["layer"] - 1), "table-bad-value"),
        (TENSORS, lambda t: t.assign(component=""), "table-row-missing"),
        (TENSORS, lambda t: t.assign(tensor=t["tensor"] + "s"), "tensor-not-in-model"),
    ],
)
def test_edited_tables_are_refused(pair, name, change, code):
    pair.edit(name, change)
    said = pair.decide(refused=code)
    assert name in said or "measured" in said


def test_several_problems_are_reported_at_once(pair):
    pair.edit(SENSITIVITY, lambda t: t.drop(index=1))
    pair.edit(DISTANCES, lambda t: t.head(1))
    said = pair.decide(refused="table-row-missing")
    assert SENSITIVITY in said and DISTANCES in said


@pytest.mark.parametrize("name", [SENSITIVITY, DISTANCES, TENSORS])
def test_a_missing_table(pair, name):
    (pair.folder / "dfs" / name).unlink()
    assert name in pair.decide(refused="table-missing")


def test_dataframes_of_another_method_or_config(pair):
    path = pair.folder / "dfs/manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"guidance": "lewis"}))
    pair.decide(refused="dataframes-other-guidance")
    path.write_text(json.dumps(manifest))
    shutil.copytree(pair.folder / "math", pair.folder / "maths")
    models = [*pair_settings()["model_info"][:2], {"name": "./maths", "type": "math"}]
    write_config(pair.folder, {"model_info": models, "calibration": CALIBRATION})
    pair.decide(refused="measured-other-model")


@pytest.mark.parametrize(
    ("flags", "code"),
    [
        (("--temperature", 0), "flag-invalid"),
        (("--temperature", "nan"), "flag-invalid"),
        (("--alignment", "closeness"), "flag-invalid"),
        (("--merge_method", "della"), "merge-method-unfit"),
        (("--gamma", 0.3), "flag-no-effect"),
    ],
)
def test_wrong_flags(pair, flags, code):
    pair.decide(*flags, refused=code)


def test_gradients_come_block_by_block_from_the_last_to_the_first(pair, monkeypatch):
    from utils.guidance.sens_merging.sensitivities import SensitivityObserver

    seen, add = [], SensitivityObserver.gradient

    def noting(self, name, parameter, gradient, sample):
        seen.append(self.layers.get(name, "outside"))
        add(self, name, parameter, gradient, sample)

    monkeypatch.setattr(SensitivityObserver, "gradient", noting)
    pair.measure("--overwrite", "--dtype", "bfloat16", "--devices", "cpu")
    own, outside = 4 * 9, 4 * 3  # samples x parameters of a block, and of what lies outside
    assert seen == [*[1] * own, *[0] * own, *["outside"] * outside] * 2  # two experts, one after the other
