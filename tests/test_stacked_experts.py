"""Experts that a checkpoint stores stacked are measured and merged each on their own, and written stacked again."""

import itertools
import json
import random
import re

import pytest
import torch
from safetensors.torch import load_file

from tests.commands_here import done_here
from tests.selected import few
from tests.tiny_merges import merge_here, recipe, write_recipe
from tests.tiny_mixtures import save_mixtures, save_stacked, weights
from utils.guidance.method import guidance_methods
from utils.merging.pieces.finished import FinishedTensors
from utils.merging.planning import plan_recipe
from utils.merging.recipe_file import read_recipe
from utils.merging.run import run_merge
from utils.merging.settings import MergeSettings
from utils.models.experts_apart import with_experts_apart
from utils.models.headers import read_headers
from utils.models.opening import open_checkpoint
from utils.models.stored_layout import stored_layout
from utils.models.weight_source import build_skeleton

LINEAR = ("linear", "task_arithmetic")
BY_RANK = ("ties", "breadcrumbs", "breadcrumbs_ties", "sce")
OTHERS = ("slerp", "nuslerp", "multislerp", "model_stock", "karcher")
STACK = re.compile(r"experts\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight")


@pytest.fixture(scope="module")
def apart(tmp_path_factory):
    return save_mixtures(tmp_path_factory.mktemp("apart"), num_hidden_layers=2)


@pytest.fixture(scope="module")
def stacked(apart, tmp_path_factory):
    return save_stacked(apart, tmp_path_factory.mktemp("stacked"))


def stacked_name(name):
    """What a tensor stored apart is called where experts are stacked."""
    found = STACK.search(name)
    if not found:
        return name
    expert, part = found.groups()
    own = f"down_proj.{expert}" if part == "down_proj" else f"gate_up_proj.{expert}.{part}"
    return name.replace(found[0], f"experts.{own}.weight")


def as_stacked(folder, merged):
    """Tensors that are stored apart, by transformers' own conversion to the names and shapes of the stacked form."""
    checkpoint = open_checkpoint(str(folder / "base"))
    layout = stored_layout(build_skeleton(checkpoint, torch.float32, False), checkpoint)
    found = {header.name: merged[header.name] for header in layout.direct.values()}
    for one in layout.converted:
        found |= one.convert(dict(merged))
    return found


def numbers(names, seed, low):
    drawn = random.Random(seed)
    return [{"filter": name, "value": round(drawn.uniform(low, 1), 3)} for name in names] + [{"value": 0.5}]


def guided(folder, method, names):
    """A recipe with a density and a weight of its own for each expert's matrix, as far as the method has them."""
    keys = {"dtype": "float32", "base_model": str(folder / "base") if method not in ("linear", "karcher") else None}
    data = recipe(folder, method, experts=("code",) if method == "slerp" else ("code", "math"), **keys)
    for seed, one in enumerate(data["models"]):
        one.pop("parameters", None)
        of_base = method != "linear" and one["model"] == str(folder / "base")
        if method not in ("slerp", "sce", "model_stock", "karcher") and not of_base:
            one["parameters"] = {"weight": numbers(names, seed, 0.1)}
        if method in ("ties", "breadcrumbs", "breadcrumbs_ties") and not of_base:
            one["parameters"]["density"] = numbers(names, seed + 9, 0.0)
    shared = {"sce": {"select_topk": numbers(names, 5, 0.1)}, "slerp": {"t": numbers(names, 5, 0.1)}}
    data["parameters"] = shared.get(method, {})
    return {**data, "models": data["models"][1:] if method in ("nuslerp", "multislerp") else data["models"]}


METHODS = (*LINEAR, *BY_RANK, *OTHERS)


@pytest.mark.parametrize(
    ("method", "fast"),
    few(
        (case for case in itertools.product(METHODS, (True, False)) if case[1] or case[0] not in OTHERS),
        *((method, True) for method in ("linear", "ties", "sce", "slerp", "model_stock", "karcher")),
        (LINEAR[0], False),
        (BY_RANK[0], False),
    ),
)
def test_the_same_bits_as_where_experts_lie_apart(apart, stacked, method, fast):
    names = [name for name in weights(apart / "base") if STACK.search(name)]
    one = merge_here(apart, guided(apart, method, names), f"{method}_{fast}", fast_selection=fast)
    own = guided(stacked, method, [stacked_name(name) for name in names])
    other = merge_here(stacked, own, f"{method}_{fast}", fast_selection=fast)
    wanted, found = as_stacked(apart, weights(one)), weights(other)
    assert set(found) == set(weights(stacked / "base")) == set(wanted)
    for name, value in found.items():
        assert torch.equal(value, wanted[name]), name


def test_a_base_with_stacks_and_an_expert_without(apart, stacked):
    mixed = guided(stacked, "ties", [])
    mixed["models"][1]["model"] = str(apart / "code")
    plain = weights(merge_here(stacked, guided(stacked, "ties", []), "plain"))
    found = weights(merge_here(stacked, mixed, "mixed"))
    assert set(found) == set(plain)
    assert all(torch.equal(value, plain[name]) for name, value in found.items())


def test_a_filter_for_the_stack_hits_every_expert(stacked):
    filters = [{"filter": f"layers.{layer}.mlp.experts.gate_up_proj", "value": 0.0} for layer in range(2)]
    data = guided(stacked, "task_arithmetic", [])
    for one in data["models"][1:]:
        one["parameters"]["weight"] = [*filters, {"value": 1}]
    found, base = weights(merge_here(stacked, data, "by_stack")), weights(stacked / "base")
    for name, value in found.items():
        assert torch.equal(value, base[name]) == ("gate_up_proj" in name), name


@pytest.mark.parametrize("fast", [True, False])
def test_progress_counts_the_tensors_of_the_result_on_either_path(stacked, capsys, tmp_path, fast):
    path = write_recipe(tmp_path / "counted.yaml", guided(stacked, "ties", []))
    settings = MergeSettings(tmp_path / "counted", path, device="cpu", fast_selection=fast)
    run_merge(plan_recipe(settings, read_recipe(path), lambda line: None), tmp_path)
    said, all_of_them = capsys.readouterr(), len(weights(stacked / "base"))
    assert ("all tensors by mergekit" in said.out) != fast
    assert f"tensor {all_of_them} of {all_of_them}" in said.err


def test_a_merge_that_was_killed_goes_on_with_stacks(stacked, monkeypatch):
    monkeypatch.chdir(stacked)
    path = write_recipe(stacked / "resumed.yaml", guided(stacked, "ties", []))
    settings = MergeSettings(stacked / "resumed", path, device="cpu", quiet=True)
    planned = plan_recipe(settings, read_recipe(path), lambda line: None)
    folder, noted = stacked / "resumed", stacked / "noted"
    folder.mkdir()
    run_merge(planned, folder, FinishedTensors(noted, "request"))
    file = folder / "model.safetensors"
    wanted, (request, *names) = file.read_bytes(), noted.read_text().splitlines()
    assert {json.loads(line)[0] for line in names} == set(weights(folder))
    noted.write_text("\n".join([request, *names[::2]]) + "\n")
    finished = FinishedTensors(noted, "request")
    left = bytearray(wanted)
    for name, header in read_headers(folder, "killed").items():
        if name not in finished.sums:
            left[header.start : header.start + header.nbytes] = bytes(header.nbytes)
    file.write_bytes(left)
    run_merge(planned, folder, finished)
    assert file.read_bytes() == wanted


@pytest.mark.parametrize("row", ["gpt_oss:causal", "qwen3_vl_moe:image-text", "granitemoe:causal"])
def test_slices_are_the_file_s_own_bytes(tmp_path, row):
    folder = (
        save_mixtures(tmp_path, *row.split(":"), num_hidden_layers=2)
        if "vl" not in row
        else save_mixtures(tmp_path, *row.split(":"))
    )
    checkpoint = with_experts_apart(open_checkpoint(str(folder / "base")))
    assert checkpoint.stacks
    assert {header.name for header in checkpoint.stored.values()} == set(weights(folder / "base"))
    for name, value in weights(folder / "base").items():
        if name in checkpoint.stacks:
            assert len(checkpoint.stacks[name].slices) == len(value)
            for header, matrix in zip(checkpoint.stacks[name].slices, value, strict=True):
                with open(header.file, "rb") as file:
                    file.seek(header.start)
                    assert file.read(header.nbytes) == matrix.contiguous().numpy().tobytes()


ACCEPTED = dict.fromkeys(guidance_methods(), ("--accept_useless_text",)) | {
    "lewis": (),
    "tuned": ("--accept_useless_text", "--tune_steps", "1"),
}


FAST = ("lewis", "gram_mean")  # densities, vectors and matrices


@pytest.mark.parametrize(
    "guidance", [pytest.param(one, marks=[] if one in FAST else pytest.mark.slow) for one in sorted(guidance_methods())]
)
def test_every_guidance_sees_the_same_experts(apart, stacked, guidance):
    merged = []
    for folder in (apart, stacked):
        flags = ("--guidance", guidance, *ACCEPTED.get(guidance, ()))
        done_here("lewis_importance.py", "--config", "pair.yaml", "--out_dir", guidance, *flags, cwd=folder)
        decide = ("--delta_dfs_in_dir", guidance, "--config_file", "pair.yaml", "--out_dir", f"{guidance}_recipe")
        done_here("lewis_merge.py", *decide, "--guidance", guidance, "--dtype", "float32", cwd=folder)
        (made,) = (folder / f"{guidance}_recipe").glob("*.yaml")
        out = f"{guidance}_merged"
        done_here("utils/merger.py", "--merge_config", made, "--output_path", out, "--device", "cpu", cwd=folder)
        merged.append(weights(folder / out))
    wanted, found = as_stacked(apart, merged[0]), merged[1]
    assert set(found) == set(wanted)
    for name, value in found.items():
        torch.testing.assert_close(value, wanted[name], rtol=0, atol=1e-6)


def test_biases_of_stacked_experts_have_vectors_of_their_own(tmp_path):
    """One stack [experts, width] in the checkpoint, merged by the mean of each expert's own squared gradients."""
    folder = save_mixtures(tmp_path, "gpt_oss", num_hidden_layers=2)
    asked = ("--guidance", "saliency_budget")
    more = ("--config", "pair.yaml", "--out_dir", "dfs", "--accept_useless_text")
    done_here("lewis_importance.py", *asked, *more, cwd=folder)
    decide = ("--delta_dfs_in_dir", "dfs", "--config_file", "pair.yaml", "--out_dir", "recipes")
    done_here("lewis_merge.py", *decide, *asked, "--merge_method", "guided_mean", "--dtype", "float32", cwd=folder)
    (made,) = (folder / "recipes").glob("*.yaml")
    done_here("utils/merger.py", "--merge_config", made, "--output_path", "merged", "--device", "cpu", cwd=folder)
    name, vectors = "model.layers.1.mlp.experts.down_proj", {}
    for model in ("code", "math"):
        vectors |= {(model, key): one.double() for key, one in weights_of(made, model).items()}
    before, after = weights(folder / "base"), weights(folder / "merged")
    for expert in range(4):
        shares = [vectors[model, f"{name}.{expert}.bias"] for model in ("code", "math")]
        shares = [(one / one.mean()).sqrt() if one.any() else one for one in shares]
        floor = 0.1 * sum(one.mean() for one in shares) / 2
        changes = [
            (weights(folder / model)[f"{name}_bias"] - before[f"{name}_bias"])[expert] for model in ("code", "math")
        ]
        wanted = sum(s * c.double() for s, c in zip(shares, changes, strict=True)) / (sum(shares) + floor)
        found = (after[f"{name}_bias"] - before[f"{name}_bias"])[expert].double()
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)


def weights_of(recipe_path, model):
    """The vectors of an expert that lie beside a recipe, of parameters with one axis."""
    file = recipe_path.with_name(f"{recipe_path.stem}_{model}_saliency.safetensors")
    return {key.removesuffix(".axis0"): value for key, value in load_file(file).items()}
