"""--portable: the recipe that stock mergekit runs, run by it, has the bits of command 3's."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from tests.commands_here import done_here, refused_here
from tests.tiny_merges import assert_same_tensors, merge_stock, tensors
from tests.tiny_mixtures import save_mixtures, save_stacked, weights
from tests.tiny_pairs import save_pair
from utils.evaluation.candidates import read_candidate
from utils.evaluation.entries import Preparing
from utils.merging.settings import MergeSettings

DECIDE = ("--delta_dfs_in_dir", "dfs", "--config_file", "pair.yaml", "--out_dir", "recipes", "--dtype", "float32")


@pytest.fixture(scope="module")
def apart(tmp_path_factory):
    folder = save_mixtures(tmp_path_factory.mktemp("apart"), num_hidden_layers=2)
    done_here("lewis_importance.py", "--config", "pair.yaml", "--out_dir", "dfs", cwd=folder)
    return folder


@pytest.fixture(scope="module")
def stacked(apart, tmp_path_factory):
    folder = save_stacked(apart, tmp_path_factory.mktemp("stacked"))
    done_here("lewis_importance.py", "--config", "pair.yaml", "--out_dir", "dfs", cwd=folder)
    return folder


def made(folder, *flags):
    """The two recipes that command 2 writes by some flags, the guided one first, and what it prints."""
    out = folder / "recipes"
    done = done_here("lewis_merge.py", *DECIDE, "--portable", "--overwrite", *flags, cwd=folder)
    names = [line.removeprefix("wrote ").strip() for line in done.stdout.splitlines() if line.startswith("wrote ")]
    recipes = [folder / name for name in names if name.endswith(".yaml")]
    portable = next(path for path in recipes if "_portable_" in path.name)
    (guided,) = (path for path in recipes if path != portable)
    assert guided.parent == portable.parent == out
    return guided, portable, done.stdout


def run_both(folder, portable, monkeypatch, **flags):
    """The portable recipe merged by stock mergekit and by command 3."""
    monkeypatch.chdir(folder)  # recipes name models as the pair config does
    merge_stock(folder, yaml.safe_load(portable.read_text()), f"{portable.stem}_stock")
    words = [word for name, value in flags.items() for word in (f"--{name}", value)]
    arguments = ("--merge_config", portable, "--output_path", f"{portable.stem}_here", "--device", "cpu", *words)
    done_here("utils/merger.py", *arguments, cwd=folder)
    return folder / f"{portable.stem}_here", folder / f"{portable.stem}_stock"


@pytest.mark.parametrize("method", ["ties", "dare_ties"])
def test_a_mixture_stored_apart(apart, method, monkeypatch):
    guided, portable, said = made(apart, "--merge_method", method, "--apply_lewis_to_weights")
    assert guided.read_text().startswith("# for utils/merger.py alone: tensors are called")
    assert portable.read_text().startswith("# for stock mergekit-yaml, and utils/merger.py --fused_experts; ")
    assert "next (not mergekit-yaml):" in said and f"mergekit-yaml recipes/{portable.name}" in said
    assert json.loads(portable.with_name(f"{portable.stem}.manifest.json").read_text())["control"] == "portable"
    assert_same_tensors(*run_both(apart, portable, monkeypatch, fused_experts=True))


@pytest.mark.parametrize(
    ("guidance", "own", "flags", "instead"),
    [
        ("saliency_budget", (), ("--merge_method", "guided_mean", "--mean_density", "0.5"), "breadcrumbs"),
        ("submodule_linearity", ("--no-nonlinearity",), (), "task_arithmetic"),
    ],
)
def test_other_guidances_of_a_mixture_stored_apart(apart, guidance, own, flags, instead, monkeypatch):
    asked = ("--guidance", guidance, "--accept_useless_text", *own)
    done_here("lewis_importance.py", "--config", "pair.yaml", "--out_dir", guidance, *asked, cwd=apart)
    decide = ("--delta_dfs_in_dir", guidance, "--config_file", "pair.yaml", "--out_dir", f"{guidance}_recipes")
    done_here("lewis_merge.py", *decide, "--guidance", guidance, "--dtype", "float32", "--portable", *flags, cwd=apart)
    (portable,) = (apart / f"{guidance}_recipes").glob("*_portable_*.yaml")
    assert yaml.safe_load(portable.read_text())["merge_method"] == instead
    assert_same_tensors(*run_both(apart, portable, monkeypatch, fused_experts=True, fast_selection=False))


def test_its_numbers_are_the_means_of_the_experts(apart):
    guided, portable, _ = made(apart, "--merge_method", "ties", "--gamma", "0.2")

    def densities(path):
        entries = yaml.safe_load(path.read_text())["models"][1]["parameters"]["density"]
        return {one["filter"]: one["value"] for one in entries if "filter" in one}

    ours, theirs = densities(guided), densities(portable)
    own = [value for name, value in ours.items() if "layers.1.mlp.experts" in name and "down_proj" not in name]
    assert len(own) == 8
    assert theirs["model.layers.1.mlp.experts.gate_up_proj"] == pytest.approx(sum(own) / len(own))
    assert theirs["model.layers.1.self_attn.q_proj"] == ours["model.layers.1.self_attn.q_proj"]


def test_stacked_experts(stacked, apart, monkeypatch):
    guided, portable, said = made(stacked, "--merge_method", "ties")
    assert guided.read_text().startswith("# for utils/merger.py alone: each of the stacked experts")
    assert "merge with utils/merger.py: each of the stacked experts" in said
    ours, stock = run_both(stacked, portable, monkeypatch, fused_experts=True)
    assert_same_tensors(ours, stock)
    assert set(weights(stock)) == set(weights(stacked / "base"))
    _, same, _ = made(apart, "--merge_method", "ties")
    assert yaml.safe_load(same.read_text()) == yaml.safe_load(portable.read_text())
    command = ("utils/merger.py", "--merge_config", portable, "--device", "cpu", "--output_path")
    assert "merged stacked (--fused_experts)" in done_here(*command, "as_recorded", cwd=stacked).stdout
    assert_same_tensors(stacked / "as_recorded", stock)
    # without the flag or the manifest a filter for a stack acts on each expert
    portable.with_name(f"{portable.stem}.manifest.json").unlink()
    done_here(*command, "each", cwd=stacked)
    assert not torch.equal(*(tensors(one)["model.layers.0.mlp.experts.down_proj"] for one in (stacked / "each", stock)))


def test_biases_of_stacks_take_the_weights_of_their_matrices(tmp_path, monkeypatch):
    """A stack's name is the beginning of its biases' name."""
    folder = save_mixtures(tmp_path / "biased", "gpt_oss", num_hidden_layers=2)
    done_here("lewis_importance.py", "--config", "pair.yaml", "--out_dir", "dfs", cwd=folder)
    _, portable, _ = made(folder, "--merge_method", "ties", "--apply_lewis_to_weights")
    values = [
        one for one in yaml.safe_load(portable.read_text())["models"][1]["parameters"]["weight"] if "filter" in one
    ]
    stack = "model.layers.1.mlp.experts.gate_up_proj"
    found = [next(one["value"] for one in values if one["filter"] in name) for name in (stack, f"{stack}_bias")]
    assert found[0] == found[1]
    assert_same_tensors(*run_both(folder, portable, monkeypatch, fused_experts=True))


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = save_pair(tmp_path_factory.mktemp("dense"))
    flags = ("--guidance", "gram_mean", "--accept_useless_text")
    done_here("lewis_importance.py", "--config", "pair.yaml", "--out_dir", "dfs", *flags, cwd=folder)
    return folder


@pytest.mark.parametrize("flags", [(), ("--mean_density", "0.3")])
def test_a_method_of_this_project_s_gives_way_to_mergekit_s(dense, flags, monkeypatch):
    guided, portable, said = made(dense, "--guidance", "gram_mean", *flags)
    assert "mergekit-yaml does not know gram_mean" in guided.read_text().splitlines()[0]
    data = yaml.safe_load(portable.read_text())
    assert data["merge_method"] == ("breadcrumbs" if flags else "task_arithmetic")
    shares = [one["parameters"]["weight"][-1]["value"] for one in data["models"][1:]]
    assert sum(shares) == pytest.approx(1)
    assert f"{data['merge_method']} in place of gram_mean" in said
    assert ("--no-fast_selection gives the same bits" in said) == bool(flags)
    # changes of models in bfloat16 tie in magnitude, where mergekit's sort keeps any
    assert_same_tensors(*run_both(dense, portable, monkeypatch, fast_selection=False))


def test_refused_where_there_is_nothing_to_gain_or_stock_loses_tensors(tmp_path):
    folder = save_pair(tmp_path / "plain")
    done_here("lewis_importance.py", "--config", "pair.yaml", "--out_dir", "dfs", cwd=folder)
    refused_here("flag-no-effect", "lewis_merge.py", *DECIDE, "--portable", cwd=folder)
    assert not list((folder / "recipes").glob("*"))
    folder = save_mixtures(tmp_path / "deepseek", "deepseek_v3")
    done_here("lewis_importance.py", "--config", "pair.yaml", "--out_dir", "dfs", cwd=folder)
    refused_here("recipe-not-portable", "lewis_merge.py", *DECIDE, "--portable", cwd=folder)


def test_it_is_scored_as_it_is_merged(apart, stacked, monkeypatch):
    """Each way of storing experts: the planned merge of the candidate has the tensors of stock mergekit's model."""
    for folder in (apart, stacked):
        _, portable, _ = made(folder, "--merge_method", "ties", "--gamma", "0.35")
        monkeypatch.chdir(folder)
        candidate = read_candidate(str(portable))
        assert candidate.fused_experts
        settings = MergeSettings(Path("unwritten"), Path("recipe"), device="cpu", quiet=True)
        planned = Preparing(torch.device("cpu"), "auto", settings).plan(candidate)
        stock = {tensor.name for tensor in planned.plan.tensors if "experts" in tensor.name}
        assert planned.settings.fused_experts and len(stock) == 4  # two stacks in each of two layers
