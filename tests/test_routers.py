"""Routers of mixtures through commands 1, 2 and 3: the base's unless asked otherwise, bit for bit."""

import json
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml

from tests.commands_here import done_here, refused_here
from tests.tiny_mixtures import save_mixtures, weights
from tests.tiny_recipes import decide_here, measure_here
from utils.commands.merge import merge
from utils.merging.settings import MergeSettings

ROUTERS = [f"model.layers.{layer}.mlp.gate.weight" for layer in range(4)]


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> Path:
    folder = save_mixtures(tmp_path_factory.mktemp("mixtures"))
    done_here("lewis_importance.py", "--config", "pair.yaml", "--out_dir", "dfs", cwd=folder)
    return folder


@pytest.mark.parametrize("guidance", ["lewis", "saliency_budget", "gram_mean"])
def test_experts_with_few_tokens_are_counted_in_both_reports(measured, guidance):
    own = () if guidance == "lewis" else ("--accept_useless_text",)
    asked = ("--config", "pair.yaml", "--guidance", guidance, *own)
    out = f"dfs_few_{guidance}"
    said = done_here("lewis_importance.py", *asked, "--out_dir", out, "--expert_tokens", "1000", cwd=measured).stdout
    table = pd.read_csv(measured / out / "expert_tokens.csv")
    assert table.columns.tolist() == ["model", "layer", "experts", "expert", "tokens"]
    assert (table["experts"] == "mlp.experts").all() and len(table) == 2 * 4 * 4
    routing = pd.read_csv(measured / out / "routing.csv").set_index(["model", "layer"])
    for place, counted in table.groupby(["model", "layer"])["tokens"].sum().items():  # each token has two experts
        assert counted == 2 * routing.loc[place, "tokens"]
    own = table[table["model"] == "math"]["tokens"]
    line = f"math: {(own < 1000).sum()} of {len(own)} experts of its mixtures were given fewer than 1000 tokens of the text"
    assert f"\n{line} ({(own == 0).sum()} none) and are taken towards" in said
    recipe = ("--delta_dfs_in_dir", out, "--config_file", "pair.yaml", "--out_dir", f"few_{guidance}")
    decided = done_here("lewis_merge.py", *recipe, "--guidance", guidance, cwd=measured)
    assert f"\nexperts:  {line}" in decided.stdout
    if guidance == "lewis":
        norms = pd.read_csv(measured / out / "norms.csv")
        down = norms[(norms["model"] == "math") & norms["component"].str.match(r".*experts.*down_proj$")]
        assert sorted(down["tokens"]) == sorted(own)
        asked = (*asked, "--out_dir", f"dfs_all_{guidance}", "--expert_tokens", "0")
        assert "were given fewer than" not in done_here("lewis_importance.py", *asked, cwd=measured).stdout


def merged(folder: Path, name: str, *flags: object) -> tuple[dict, str]:
    """The tensors of a merge by a recipe that is made with these flags, and what command 2 printed."""
    arguments = ("--delta_dfs_in_dir", "dfs", "--config_file", "pair.yaml", "--out_dir", name, "--dtype", "float32")
    done = done_here("lewis_merge.py", *arguments, *flags, cwd=folder)
    (recipe,) = (folder / name).glob("*.yaml")
    done_here("utils/merger.py", "--merge_config", recipe, "--output_path", f"{name}_merged", cwd=folder)
    return dict(weights(folder / f"{name}_merged")), done.stdout


def test_whose_tokens_keep_their_experts_is_measured_and_said(measured):
    table = pd.read_csv(measured / "dfs" / "routing.csv")
    assert table.columns.tolist() == ["model", "layer", "mixture", "tokens", "chosen", "same", "common"]
    assert set(zip(table["model"], table["layer"], strict=True)) == {
        (name, i) for name in ("code", "math") for i in range(4)
    }
    assert (table["mixture"] == "mlp").all() and (table["chosen"] == 2).all() and table["same"].between(0, 1).all()
    _, said = merged(measured, "said")
    for name, own in table.groupby("model"):
        share = f"{name}: {own['same'].mean():.1%} of its tokens keep their 2 experts with the base's router (least "
        assert f"\n{'':<10}{share}{own['same'].min():.1%}, in layer {own.loc[own['same'].idxmin(), 'layer']})" in said


def test_a_table_of_routers_that_was_edited_is_refused(measured, tmp_path):
    here = shutil.copytree(measured, tmp_path / "copy")
    table = here / "dfs" / "routing.csv"
    table.write_text(table.read_text().replace("mlp", "ffn"))
    arguments = ("--delta_dfs_in_dir", "dfs", "--config_file", "pair.yaml", "--out_dir", "edited")
    refused_here("dataframes-edited", "lewis_merge.py", *arguments, cwd=here)


@pytest.mark.parametrize(
    ("guidance", "more"),
    [
        ("sens_merging", ()),
        ("gram_mean", ()),
        ("saliency_budget", ("--gradient_at", "expert")),
        ("saliency_budget", ("--gradient_at", "base")),
        ("submodule_linearity", ("--no-nonlinearity",)),
        ("tuned", ("--tune_steps", "1")),
    ],
)
def test_all_guidances_agree_on_their_routers(measured, guidance, more):
    out = f"dfs_{guidance}{''.join(more[1:])}"
    asked = ("--config", "pair.yaml", "--out_dir", out, "--guidance", guidance, "--accept_useless_text", *more)
    said = done_here("lewis_importance.py", *asked, cwd=measured).stdout
    ours, theirs = (pd.read_csv(measured / name / "routing.csv") for name in ("dfs", out))
    assert theirs.equals(ours)
    assert "math: " in said and "of its tokens keep their 2 experts" in said


def test_a_folder_without_the_table_is_said_to_lack_it(measured, tmp_path):
    here = shutil.copytree(measured, tmp_path / "copy")
    manifest = json.loads((here / "dfs" / "manifest.json").read_text())
    del manifest["files"]["routing.csv"]
    (here / "dfs" / "manifest.json").write_text(json.dumps(manifest))
    (here / "dfs" / "routing.csv").unlink()
    _, said = merged(here, "lacking")
    assert "with the base's router was not measured" in said


@pytest.fixture(scope="module")
def default(measured):
    """The tensors of a merge without a flag, and what command 2 printed."""
    return merged(measured, "default")


def test_the_base_s_router_is_the_default(measured, default):
    tensors, said = default
    base = weights(measured / "base")
    assert "routers:  the base's, 4 tensors" in said
    assert re.search(r"\n  but routers, as said above: [0-9.]+%, model\.layers\.\*\.mlp\.gate\.weight \(x4\)\n", said)
    assert "other matrices" not in said
    assert "mergekit-yaml calls some otherwise" in said  # experts are stored apart
    assert all(torch.equal(tensors[name], base[name]) for name in ROUTERS)
    assert not any(torch.equal(tensors[name], base[name]) for name in base if "experts" in name)
    asked, _ = merged(measured, "asked", "--router", "base")
    assert all(torch.equal(asked[name], value) for name, value in tensors.items())


def test_merged_routers_are_merged_like_the_rest(measured, default):
    tensors, said = merged(measured, "merged", "--router", "merge")
    assert "routers:  merged like everything else" in said
    base, (rest, _) = weights(measured / "base"), default
    assert not any(torch.equal(tensors[name], base[name]) for name in ROUTERS)
    assert all(torch.equal(tensors[name], rest[name]) for name in base if name not in ROUTERS)


def test_a_weight_of_their_own_scales_their_changes(measured):
    flags = ("--merge_method", "dare_linear", "--router", "weight:0.25")
    tensors, _ = merged(measured, "weighed", *flags)
    base, code, math = (weights(measured / name) for name in ("base", "code", "math"))
    for name in ROUTERS:
        wanted = base[name] + 0.25 * (code[name] - base[name]) + 0.25 * (math[name] - base[name])
        assert torch.allclose(tensors[name], wanted, rtol=0, atol=1e-6)


def test_a_weight_that_is_divided_by_itself_is_refused(measured):
    flags = (
        "--delta_dfs_in_dir",
        "dfs",
        "--config_file",
        "pair.yaml",
        "--out_dir",
        "refused",
        "--router",
        "weight:0.5",
    )
    refused_here("flag-no-effect", "lewis_merge.py", *flags, cwd=measured)
    refused_here("flag-invalid", "lewis_merge.py", *flags[:-1], "half", cwd=measured)


def test_routers_change_alike_in_the_recipes_beside_a_guided_one_that_averages(tmp_path, monkeypatch):
    """A factor of changes that are averaged is half that weight for each of two experts."""
    save_mixtures(tmp_path, num_hidden_layers=1)
    monkeypatch.chdir(tmp_path)
    measure_here("gram_mean")
    base, code, math = (weights(Path(name))[ROUTERS[0]] for name in ("base", "code", "math"))
    wanted = base + 0.25 * (code - base) + 0.25 * (math - base)
    _, *beside = decide_here("gram_mean", control="uniform", portable=True, router=0.5, dtype="float32")
    for number, path in enumerate(beside):
        fused = "portable" in path.name
        output = Path(f"merged{number}")
        merge(MergeSettings(output, path, device="cpu", quiet=True, fused_experts=fused))
        assert torch.allclose(weights(output)[ROUTERS[0]], wanted, rtol=0, atol=1e-6), path
    assert len(beside) == 2


@pytest.mark.usefixtures("default")
def test_stock_mergekit_reads_the_same_filters(measured):
    (recipe,) = (measured / "default").glob("*.yaml")
    weight = yaml.safe_load(recipe.read_text())["models"][1]["parameters"]["weight"]
    assert weight == [
        *({"filter": f"model.layers.{layer}.mlp.gate.", "value": 0.0} for layer in range(4)),
        {"value": 1},
    ]


def test_routers_that_all_models_share_are_left_alone(tmp_path):
    from safetensors.torch import save_file

    folder = save_mixtures(tmp_path)
    base = weights(folder / "base")
    for name in ("code", "math"):
        shared = {**weights(folder / name), **{router: base[router] for router in ROUTERS}}
        save_file(shared, folder / name / "model.safetensors", {"format": "pt"})
    done_here("lewis_importance.py", "--config", "pair.yaml", "--out_dir", "dfs", cwd=folder)
    _, said = merged(folder, "shared")
    assert "routers:  all models share one" in said
    (recipe,) = (folder / "shared").glob("*.yaml")
    assert "mlp.gate." not in recipe.read_text().split("weight:")[1].split("- filter")[0]


def test_routers_are_known_from_the_measurement_where_the_models_are_not_here(measured, tmp_path):
    here = shutil.copytree(measured, tmp_path / "copy")
    for name in ("base", "code", "math"):
        shutil.rmtree(here / name)
    manifest = json.loads((here / "dfs" / "manifest.json").read_text())
    assert manifest["routers"] == ROUTERS
    arguments = ("--delta_dfs_in_dir", "dfs", "--config_file", "pair.yaml", "--out_dir", "away")
    done = done_here("lewis_merge.py", *arguments, cwd=here)
    assert "routers:  the base's, 4 tensors" in done.stdout
    (recipe,) = (here / "away").glob("*.yaml")
    weight = yaml.safe_load(recipe.read_text())["models"][1]["parameters"]["weight"]
    assert weight == [*({"filter": name, "value": 0.0} for name in ROUTERS), {"value": 1}]
