"""Saliency budget from text to merged model: against plain autograd and dense merges, and how it refuses.

python -m pytest tests/guidance/saliency_budget/test_commands.py
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from tests.commands_here import done_here, refused_here
from tests.plain_gradients import plain_squares
from tests.refusals import refused
from tests.selected import few
from tests.tiny_checkpoints import drop_head, poison
from tests.tiny_merges import tensors, without_ties
from tests.tiny_pairs import TEXTS, sample_ids, write_config
from tests.tiny_recipes import decide_here, measure_here, pairs_by_family, read_here
from utils.commands.merge import merge
from utils.errors import UserError
from utils.merging.settings import MergeSettings
from utils.recipes.saliency_vectors import open_vectors, vector_file_bytes

GUIDANCE = "saliency_budget"
FAMILIES = ("llama", "gemma3", "phi3", "gpt2")
STEM = "pair_generated_ties{}_saliency_budget_merge_config.yaml"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """Pairs by family, each expert with a text of its own."""
    return pairs_by_family(tmp_path_factory.mktemp, global_parameters={"normalize": True})


@pytest.fixture
def pair(pristine, tmp_path, monkeypatch):
    """A pair of one's own, as the current folder; if asked, no two changes in a tensor are of one magnitude."""

    def enter(family: str = "llama", ties: bool = True) -> Path:
        folder = shutil.copytree(pristine(family), tmp_path / "pair")
        monkeypatch.chdir(folder)
        before = tensors(folder / "base")
        for file in () if ties else [folder / name / "model.safetensors" for name in TEXTS]:
            own = load_file(file)
            parted = {key: without_ties(before[key], value, torch.bfloat16) for key, value in own.items()}
            save_file(parted, file, metadata={"format": "pt"})
        return folder

    return enter


def measured(point="both", out="dfs", power=0.5, **settings):
    return measure_here(GUIDANCE, out, gradient_at=point, saliency_power=power, **settings)


def decided(mask="magnitude", out="out", **settings):
    return read_here(decide_here(GUIDANCE, out=out, mask=mask, **settings)[0])


def merged(recipe, name, **keys):
    Path(f"{name}.yaml").write_text(yaml.safe_dump({**recipe, **keys}, sort_keys=False))
    merge(MergeSettings(output_path=Path(name), merge_config=Path(f"{name}.yaml"), device="cpu", quiet=True))
    return tensors(Path(name))


def fisher(expert, point):
    """F of every parameter, with all gradients of the whole model held."""
    models = {"base": ["base"], "expert": [expert], "both": ["base", expert]}[point]
    found = [plain_squares(Path(model), sample_ids(Path(), expert))[1] for model in models]
    return {name: sum(squares[name] for squares in found) for name in found[0]}


def densities(recipe, expert=0):
    return {item["filter"]: item["value"] for item in recipe["models"][1 + expert]["parameters"]["density"][:-1]}


# --- measured and decided, family by family ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "point", "power"),
    few(
        [*((family, "both", 0.5) for family in FAMILIES), ("llama", "base", 0.3), ("llama", "expert", 1)],
        *((family, "both", 0.5) for family in ("gemma3", "gpt2")),
        ("llama", "base", 0.3),
        ("llama", "expert", 1),
    ),
)
def test_what_is_measured_and_decided_is_what_plain_autograd_gives(family, point, power, pair):
    pair(family)
    measured(point, power=power)
    rows = pd.read_csv("dfs/saliency_budget_tensors.csv")
    base = tensors(Path("base"))
    budget = 0.23
    recipe = decided(mean_density=budget)
    for place, expert in enumerate(TEXTS):
        squares, own = fisher(expert, point), tensors(Path(expert))
        table = rows[rows["model"] == expert].set_index("tensor")
        linear = [name for name in base if base[name].ndim == 2 and any(part in name for part in ("layers.", ".h."))]
        assert sorted(table.index) == sorted(linear)
        vectors = open_vectors(Path(f"dfs/{expert}_saliency.safetensors"))
        saliency = {}
        for name in linear:
            change = own[name].double() - base[name].double()
            saliency[name] = (change**2 * squares[name].double() ** power).numpy().ravel()
            assert table.loc[name, "delta_norm"] == pytest.approx(float(change.norm()), rel=1e-6)
            assert table.loc[name, "params"] == change.numel()
            assert table.loc[name, "changed"] == int(change.count_nonzero())
            axis0, axis1 = vectors.vectors(name)  # axes as stored: GPT-2 stores [in, out]
            assert (len(axis0), len(axis1)) == base[name].shape
            assert axis0.numpy() == pytest.approx(squares[name].sum(1).numpy(), rel=2e-3)
            share = squares[name].sum(0) / squares[name].sum()
            assert axis1.numpy() == pytest.approx(share.numpy(), rel=2e-3, abs=1e-9)
        others = [name for name in base if name not in linear]
        assert {*linear, *others} == set(base) and any(base[name].ndim == 1 for name in others)
        assert vectors.of_these(base) == list(base)
        for name in others:  # norms, biases, embeddings; the head, or its part in the embedding it is tied to
            axes, scale = vectors.vectors(name), float(squares[name].max())
            expected = [squares[name]]
            if base[name].ndim == 2:
                expected = [squares[name].sum(1), squares[name].sum(0) / squares[name].sum()]
                scale = float(expected[0].max())
            assert len(axes) == len(expected) and scale > 0
            for axis, right in zip(axes, expected, strict=True):
                torch.testing.assert_close(axis, right, rtol=2e-3, atol=1e-5 * scale)
        everything = np.sort(np.concatenate(list(saliency.values())))[::-1]
        threshold = everything[round(budget * len(everything)) - 1]
        found = densities(recipe, place)
        assert len(found) == len(linear)
        for name in linear:
            expected = (saliency[name] >= threshold).mean()
            assert found[name.removesuffix(".weight")] == pytest.approx(expected, abs=0.02)
        sizes = [table.loc[f"{text}.weight", "params"] for text in found]
        assert np.average(list(found.values()), weights=sizes) == pytest.approx(budget, abs=1e-9)
        assert max(found.values()) > 1.3 * budget  # there is something to tell apart


@pytest.mark.parametrize("family", few(FAMILIES, "gemma3", "gpt2"))
def test_a_merge_by_saliency_is_the_dense_one_and_the_plain_recipe_is_for_stock_mergekit(family, pair):
    pair(family, ties=False)
    measured()
    recipe = decided("saliency", mean_density=0.1, lambda_=0.8)
    assert recipe["merge_method"] == "guided_ties" and recipe["parameters"] == {"normalize": True, "lambda": 0.8}
    result = merged(recipe, "by_saliency", dtype="float32")
    base, experts = tensors(Path("base")), [tensors(Path(name)) for name in TEXTS]
    files = [load_file(model["parameters"]["saliency"]) for model in recipe["models"][1:]]
    for name, before in base.items():
        if f"{name}.axis0" not in files[0]:
            continue
        for axis in (f"{name}.axis0", f"{name}.axis1"):  # of F^0.5
            torch.testing.assert_close(files[0][axis], load_file("dfs/code_saliency.safetensors")[axis] ** 0.5)
        kept = []
        for place, (expert, file) in enumerate(zip(experts, files, strict=True)):
            change = expert[name].float() - before.float()
            worth = change.double() ** 2 * torch.outer(file[f"{name}.axis0"], file[f"{name}.axis1"]).double()
            density = densities(recipe, place)[name.removesuffix(".weight")]
            k = max(int(density > 0), int(density * worth.numel()))
            mask = torch.zeros(worth.numel()).index_fill_(0, worth.flatten().topk(k).indices, 1)
            kept.append(change * mask.view_as(change))
        agree = [one.sign() == torch.where(sum(kept) >= 0, 1.0, -1.0) for one in kept]
        mixed = sum(one * where for one, where in zip(kept, agree, strict=True))
        expected = before.float() + 0.8 * mixed / sum(agree).clamp(min=1)
        torch.testing.assert_close(result[name].float(), expected, rtol=1e-5, atol=1e-6)
    assert any(float((result[name] - base[name].float()).abs().max()) > 0.01 for name in base)
    plain_recipe = decided(mean_density=0.1)
    assert plain_recipe["merge_method"] == "ties" and densities(plain_recipe) == densities(recipe)
    assert "saliency" not in plain_recipe["models"][1]["parameters"]
    ours, theirs = merged(plain_recipe, "plain"), stock(plain_recipe)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    ("power", "gradient"), [(0.5, "the squared gradient to the power 0.5"), (1, "the squared gradient")]
)
def test_the_card_says_the_power_that_entries_are_chosen_by(power, gradient, pair):
    pair()
    measured("base", power=power)
    recipe = decided("saliency", mean_density=0.1)
    merged(recipe, "by_saliency")
    card = Path("by_saliency/README.md").read_text()
    assert f"the entries of largest saliency (change squared, times {gradient}) in " in card


def stock(recipe):
    from tests.tiny_merges import merge_stock

    return tensors(merge_stock(Path(), recipe))


def test_with_constant_vectors_the_merge_is_that_by_magnitude(pair):
    pair("gpt2", ties=False)
    measured()
    for name in TEXTS:
        file = Path(f"dfs/{name}_saliency.safetensors")
        found = open_vectors(file)
        names = [name for name in tensors(Path("base")) if name in found]
        ones = {key: tuple(torch.full_like(axis, 3e-7) for axis in found.vectors(key)) for key in names}
        file.write_bytes(vector_file_bytes(ones))
    ours, theirs = (merged(decided(mask, mean_density=0.1), mask) for mask in ("saliency", "magnitude"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_an_expert_equal_to_the_base_gets_the_budget_everywhere(pair, capfd):
    folder = pair()
    shutil.copy(folder / "base/model.safetensors", folder / "code/model.safetensors")
    measured()
    assert "./code has exactly the base's weights in all that was measured" in capfd.readouterr().err
    for mask in ("magnitude", "saliency"):
        recipe = decided(mask, out=mask, mean_density=0.25)
        assert list(densities(recipe, 0).values()) == pytest.approx([0.25] * 14)
        assert max(densities(recipe, 1).values()) > 0.4


def test_more_budget_never_means_less(pair):
    pair()
    measured("base")
    before = dict.fromkeys(densities(decided()), 0.0)
    for budget in (0.01, 0.1, 0.4, 0.75, 1.0):
        now = densities(decided(out=f"out{budget}", mean_density=budget))
        assert all(now[name] >= before[name] for name in now)
        before = now
    assert set(before.values()) == {1.0}


def test_side_by_side_gives_the_same(pair):
    pair()
    alone, together = measured(out="dfs"), measured(out="dfs2", device="cpu", devices="cpu,cpu")
    ours, theirs = (load_file(folder / "math_saliency.safetensors") for folder in (alone, together))
    assert all(torch.allclose(ours[key], theirs[key], rtol=1e-4) for key in ours)


# --- the commands -----------------------------------------------------------------------------------------------------

DECIDE = (
    "--delta_dfs_in_dir",
    "dfs",
    "--config_file",
    "pair.yaml",
    "--out_dir",
    "out",
    "--guidance",
    "saliency_budget",
)


def test_the_three_commands(pair):
    folder = pair("gpt2")
    write_config(folder)  # one text for both experts

    def run(script, *arguments):
        ended = done_here(script, *arguments, cwd=folder)
        return ended

    flags = ("--guidance", "saliency_budget", "--accept_useless_text")
    ended = run("lewis_importance.py", "--config", "pair.yaml", "--out_dir", "dfs", *flags)
    assert "gradients: at the base and at each expert, added up" in ended.stdout
    assert "code: loss" in ended.stdout and "of the variance of log F" in ended.stdout
    assert "means each expert to be measured on text of its own" in ended.stderr
    assert "--guidance saliency_budget --merge_method guided_mean" in ended.stdout.replace("\\\n    ", "")
    assert json.loads((folder / "dfs/manifest.json").read_text())["guidance_options"] == {
        "accept_useless_text": True,
        "expert_tokens": 32,
        "gradient_at": "both",
        "saliency_power": 0.5,
    }
    ended = run("lewis_merge.py", *DECIDE, "--mask", "saliency", "--control", "uniform", "--plot")
    assert "mean 0.4; --mean_density sets another" in ended.stdout
    assert "needs this project's utils/merger.py" in ended.stdout
    names = {path.name for path in (folder / "out").iterdir()}
    guided = STEM.format("_saliency_mask")
    stem = guided.removesuffix(".yaml")
    assert names == {
        guided,
        STEM.format("_saliency_mask").replace("_merge_config", "_uniform_merge_config"),
        *(f"{stem}_{name}_saliency.safetensors" for name in TEXTS),
        *(f"{stem}_{name}_density.png" for name in TEXTS),
        f"{stem}.manifest.json",
        f"{stem.replace('_merge_config', '_uniform_merge_config')}.manifest.json",
    }
    run("utils/merger.py", "--output_path", "merged", "--merge_config", f"out/{guided}", "--device", "cpu")
    assert len(tensors(folder / "merged")) == len(tensors(folder / "base"))


def test_refusals(pair):
    folder = pair()
    measured()
    with refused("flag-no-effect"):
        decided("saliency", merge_method="dare_ties")
    Path("dfs/math_saliency.safetensors").unlink()
    with refused("vectors-missing", "math_saliency.safetensors"):
        decided("saliency")
    text = Path("dfs/saliency_budget_histogram.csv").read_text().splitlines()
    Path("dfs/saliency_budget_histogram.csv").write_text("\n".join(text[:-1]) + "\n")
    refused_here("dataframes-edited", "lewis_merge.py", *DECIDE)
    refused_here("table-row-missing", "lewis_merge.py", *DECIDE, "--accept_edited")
    write_config(folder, {"components": ["q_proj"]})
    with refused("dataframes-other-config"):
        decided()


def test_a_base_without_a_head_is_refused_where_gradients_need_it(pair, capsys):
    pair()
    drop_head(Path("base"))
    with refused("model-no-head"):
        measured("base")
    assert not Path("dfs").exists()
    measured("expert")  # which needs the base's blocks only
    assert "not asked: the checkpoint of" in "".join(capsys.readouterr())


def test_weights_that_are_not_finite_are_refused(pair):
    pair()
    poison(Path("code"), "model.layers.1.mlp.up_proj.weight")
    with refused("measured-not-finite", "code"):
        measured("base")
    assert not Path("dfs/manifest.json").exists()


@pytest.mark.parametrize("point", few(["both", "base", "expert"], "both"))
def test_an_expert_that_is_no_better_on_its_own_text_is_refused_or_doubted(pair, capsys, point):
    """Of two models one is better on a text: with the other one as its expert there is no gain."""
    pair("llama")
    refused_or_doubted = []
    for base, expert in (("base", "math"), ("math", "base")):
        models = [{"name": f"./{base}", "type": "base"}, {"name": f"./{expert}", "type": "expert"}]
        write_config(Path(), {"model_info": models})
        measured(point, out=f"from_{base}")
        doubted = "expert has no sure gain over the base on its own text" in capsys.readouterr().err
        try:
            measured(point, out=f"refused_{base}", accept_useless_text=False)
        except UserError as error:
            assert error.codes == ("text-without-gain",) and doubted
            refused_or_doubted.append(True)
        else:
            assert not doubted
    assert refused_or_doubted
