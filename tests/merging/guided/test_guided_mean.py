"""guided_mean from text to merged model: against a dense mean computed from the files, its control, and bad input.

python -m pytest tests/merging/guided/test_guided_mean.py
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from tests.commands_here import done_here, refused_here
from tests.refusals import refused
from tests.tiny_checkpoints import VOCABULARY
from tests.tiny_merges import merge_here, save_models, tensors
from tests.tiny_pairs import contents, save_tokenizer, write_config
from tests.tiny_recipes import decide_here, measure_here, pairs_by_family, read_here
from utils.recipes.saliency_vectors import FORMAT, vector_file_bytes

NAMES = ("code", "math")
STEM = "pair_generated_guided_mean_out_float32_saliency_budget_{}merge_config.yaml"
FAMILIES = ("llama", "gpt2")  # untied head; positions, biases, transposed weights, tied head


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Pairs by family, measured."""
    return pairs_by_family(
        tmp_path_factory.mktemp,
        lambda: measure_here("saliency_budget"),
        global_parameters={"normalize": True, "int8_mask": True},
    )


def decided(mask="magnitude", out="out", **settings):
    asked = {"merge_method": "guided_mean", "mask": mask, **settings}
    return [read_here(path) for path in decide_here("saliency_budget", out=out, **asked)]


def merged(recipe, name="merged", **keys):
    return tensors(merge_here(Path(), {**recipe, **keys}, name))


def density_of(model, name):
    """What a recipe's filters come to: the first that the name holds."""
    setting = model["parameters"].get("density", [{"value": 1}])
    return next(item["value"] for item in setting if item.get("filter", "") in name)


def dense(recipe, name, *, files, power=0.5, floor=0.1, scale=1.0):
    """One tensor from whole tensors and the vectors in the files, float64."""
    base = tensors(Path("base"))[name].double()
    above, below = torch.zeros_like(base), torch.zeros_like(base)
    for model in recipe["models"][1:]:
        label = Path(model["model"]).name
        file = load_file(files[label])
        fisher = file[f"{name}.axis0"].double()
        if base.dim() == 2:
            fisher = fisher[:, None] * file[f"{name}.axis1"].double()
        delta = tensors(Path(label))[name].double() - base
        worth = (delta**2 * fisher**power).flatten()
        k = max(1, int(density_of(model, name) * worth.numel()))
        delta = delta * torch.zeros(worth.numel()).index_fill_(0, worth.topk(k).indices, 1).view_as(base)
        q = (fisher / fisher.mean()) ** power
        above, below = above + q * delta, below + q
    return base + scale * above / (below + floor * below.mean() / len(files))


# --- what it computes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_commands_make_the_dense_mean(family, pair):
    """Norms, biases, embeddings and head included."""
    folder = pair(family)
    shutil.rmtree(folder / "dfs")
    flags = ["--config", "pair.yaml", "--out_dir", "dfs", "--guidance", "saliency_budget", "--device", "cpu"]
    done = done_here("lewis_importance.py", *flags, "--accept_useless_text", cwd=folder)
    assert "vectors of every parameter" in done.stdout
    flags = ["--delta_dfs_in_dir", "dfs", "--config_file", "pair.yaml", "--out_dir", "out", "--control", "uniform"]
    flags += ["--guidance", "saliency_budget", "--merge_method", "guided_mean", "--out_dtype", "float32"]
    done = done_here("lewis_merge.py", *flags, cwd=folder)
    assert "power 0.5; floor 0.1" in done.stdout and "needs this project's utils/merger.py" in done.stdout
    assert "left out: int8_mask, normalize of global_parameters, which guided_mean does not have" in done.stdout
    assert "filters: none" in done.stdout
    names = {path.name for path in (folder / "out").iterdir()}
    stem = STEM.format("").removesuffix(".yaml")
    assert names == {
        f"{stem}.yaml",
        STEM.format("uniform_"),
        *(f"{stem}_{name}_saliency.safetensors" for name in NAMES),
        f"{stem}.manifest.json",
        STEM.format("uniform_").replace(".yaml", ".manifest.json"),
    }
    for name in NAMES:  # F itself, of every tensor
        assert (folder / f"out/{stem}_{name}_saliency.safetensors").read_bytes() == (
            folder / f"dfs/{name}_saliency.safetensors"
        ).read_bytes()
    recipe = yaml.safe_load((folder / f"out/{stem}.yaml").read_text())
    assert recipe["parameters"] == {"power": 0.5, "floor": 0.1} and recipe["merge_method"] == "guided_mean"
    assert [set(model["parameters"]) for model in recipe["models"][1:]] == [{"weight", "saliency"}] * 2
    done = done_here(
        "utils/merger.py",
        "--output_path",
        "merged",
        "--merge_config",
        f"out/{stem}.yaml",
        "--device",
        "cpu",
        cwd=folder,
    )
    found, base = tensors(folder / "merged"), tensors(folder / "base")
    assert sorted(found) == sorted(base)
    assert f"saliency of ./math: {len(base)} tensors are merged by the vectors in {stem}_math" in done.stdout
    files = {name: f"dfs/{name}_saliency.safetensors" for name in NAMES}
    for name, value in found.items():
        expected = dense(recipe, name, files=files).float()
        assert value.dtype == torch.float32
        # computed in bfloat16's numbers, which the inputs are, and rounded to it once: the recipe's dtype
        torch.testing.assert_close(value, expected, rtol=2**-8, atol=1e-6, msg=lambda text, at=name: f"{at}: {text}")
    card = (folder / "merged/README.md").read_text()
    assert (
        "by `guided_mean` (the mean of the changes, with each entry weighed by a power of its squared gradient)" in card
    )
    effect = "each by how much the loss depends on it (the squared gradient to the power 0.5)"
    assert f"- `./code`: {effect} in {len(base)} tensors" in card
    record = json.loads((folder / "merged/manifest.json").read_text())["saliency"]
    assert [one["tensors"] for one in record] == [{f"./{name}": len(base)} for name in NAMES]


def test_densities_power_floor_and_lambda(pair):
    folder = pair("gpt2")
    write_config(folder, {"global_parameters": {"power": 1, "floor": 0.5, "normalize": True}})
    (recipe,) = decided(mean_density=0.2, lambda_=0.8)
    assert recipe["parameters"] == {"power": 1, "floor": 0.5, "lambda": 0.8}
    cut = [item["value"] for item in recipe["models"][1]["parameters"]["density"]]
    assert cut[-1] == 1 and len(cut) == 9 and max(cut[:-1]) > min(cut[:-1]) > 0
    found = merged(recipe, dtype="float32")
    files = {name: f"dfs/{name}_saliency.safetensors" for name in NAMES}
    for name, value in found.items():
        expected = dense(recipe, name, files=files, power=1, floor=0.5, scale=0.8).float()
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6, msg=lambda text, at=name: f"{at}: {text}")


def test_one_expert_is_enough(pair):
    folder = pair()
    write_config(folder, {"target_model_names": {"math": "./math"}})
    recipe, control = decided(control="uniform")
    found = merged(recipe, dtype="float32")
    files = {"math": "dfs/math_saliency.safetensors"}
    for name in found:
        torch.testing.assert_close(found[name], dense(recipe, name, files=files).float(), rtol=1e-5, atol=1e-6)
    assert control["models"][1]["parameters"]["weight"] == [{"value": 1.0}]


# --- its control ------------------------------------------------------------------------------------------------------


def test_the_control_is_the_plain_mean_for_any_mergekit(pair):
    pair()
    recipe, control = decided(control="uniform", lambda_=0.9)
    assert control["merge_method"] == "task_arithmetic"
    assert control["parameters"] == {"normalize": False, "lambda": 0.9}
    assert [model["parameters"] for model in control["models"][1:]] == [{"weight": [{"value": 0.5}]}] * 2
    from tests.tiny_merges import merge_stock

    ours, theirs = merged(control), tensors(merge_stock(Path(), control))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    # with equal squared gradients and no floor the guided recipe is the control
    for model, name in zip(recipe["models"][1:], NAMES, strict=True):
        file = load_file(model["parameters"]["saliency"])
        flat = {key: torch.ones_like(axis) for key, axis in file.items()}
        save_file(flat, f"{name}.flat", metadata={"format": FORMAT})
        model["parameters"]["saliency"] = f"{name}.flat"
    recipe["parameters"]["floor"] = 0.0
    guided, plain = merged(recipe, "flat", dtype="float32"), merged(control, "plain", dtype="float32")
    for name in plain:
        torch.testing.assert_close(guided[name], plain[name], rtol=1e-5, atol=1e-6)


def test_the_control_of_a_cut_mean_is_cut_by_magnitude(pair):
    pair()
    recipe, control = decided(control="uniform", mean_density=0.25)
    assert control["merge_method"] == "breadcrumbs" and control["parameters"] == {"normalize": False, "gamma": 0.0}
    parameters = control["models"][1]["parameters"]
    assert parameters["weight"] == [{"value": 0.5}]
    assert {item["value"] for item in parameters["gamma"]} == {0.0}
    assert [item["value"] for item in parameters["density"]] == [pytest.approx(0.25)] * 14 + [1]
    assert [item["filter"] for item in parameters["density"][:-1]] == [
        item["filter"] for item in recipe["models"][1]["parameters"]["density"][:-1]
    ]
    found, base = merged(control, dtype="float32"), tensors(Path("base"))
    name = "model.layers.1.mlp.up_proj.weight"
    expected = base[name].float()
    for expert in NAMES:
        change = tensors(Path(expert))[name].float() - base[name].float()
        kept = change.flatten().abs().topk(int(0.25 * change.numel())).indices
        expected = expected + 0.5 * torch.zeros_like(change).flatten().index_copy_(0, kept, change.flatten()[kept]).view_as(change)  # fmt: skip
    wrong = (found[name] - expected).abs() > 1e-6
    assert wrong.float().mean() < 0.01  # ties of magnitude at the cut


def test_the_other_control_grows_with_depth(pair):
    pair()
    _, control = decided(control="lines")
    weights = control["models"][1]["parameters"]["weight"]
    assert control["merge_method"] == "task_arithmetic" and weights[-1] == {"value": 0.5}
    assert sorted({round(item["value"], 6) for item in weights[:-1]}) == [0.25, 0.75]


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_command_2_refuses(pair):
    folder = pair()
    before = contents(folder)
    with refused("flag-no-effect"):
        decided("saliency")
    with refused("merge-method-unknown"):
        decided(merge_method="guided_maen")
    for parameters, code in (({"power": 2}, "global-parameter-value"),
                             ({"floor": -1}, "global-parameter-value"),
                             ({"epsilon": 1}, "global-parameter-unknown")):  # fmt: skip
        write_config(folder, {"global_parameters": parameters})
        with refused(code):
            decided()
    write_config(folder)
    shutil.copy("dfs/math_saliency.safetensors", "spare")
    file = load_file("spare")
    file["model.norm.weight.axis0"][2] = -1
    save_file(file, "dfs/math_saliency.safetensors", metadata={"format": FORMAT})
    with refused("vectors-not-finite", "model.norm.weight.axis0"):
        decided()
    del file["model.norm.weight.axis0"], file["model.layers.0.mlp.up_proj.weight.axis0"]
    save_file(file, "dfs/math_saliency.safetensors", metadata={"format": FORMAT})
    with refused("vectors-lack-tensor", "model.layers.0.mlp.up_proj.weight.axis0"):
        decided()
    Path("dfs/math_saliency.safetensors").unlink()
    with refused("vectors-missing", "math_saliency.safetensors"):
        decided()
    shutil.copy("spare", "dfs/math_saliency.safetensors")
    manifest = json.loads(Path("dfs/manifest.json").read_text())
    manifest["guidance_options"]["saliency_power"] = "half"
    Path("dfs/manifest.json").write_text(json.dumps(manifest))
    with refused("manifest-value"):
        decided()
    assert contents(folder).keys() == {*before, "spare"}  # nothing is written


def test_other_guidance_has_no_vectors(pair):
    folder = pair()
    flags = ("--delta_dfs_in_dir", "dfs", "--config_file", "pair.yaml", "--out_dir", "out")
    refused_here("merge-method-unfit", "lewis_merge.py", *flags, "--merge_method", "guided_mean", cwd=folder)


def by_hand(**changes):
    """A recipe over `save_models` with vectors of every tensor of `code`; None removes one of its parameters."""
    parameters = {"weight": 1.0, "saliency": "code.vectors", **changes.pop("own", {})}
    parameters = {key: value for key, value in parameters.items() if value is not None}
    models = [{"model": "base"}, {"model": "code", "parameters": parameters}]
    data = {"models": models, "merge_method": "guided_mean", "base_model": "base", "dtype": "float32"}
    return {**data, **changes}


@pytest.fixture(scope="module")
def llamas(llamas, tmp_path_factory):
    """With vectors of one."""
    folder = shutil.copytree(llamas, tmp_path_factory.mktemp("llamas"), dirs_exist_ok=True)
    vectors = {name: tuple(map(torch.rand, value.shape)) for name, value in tensors(folder / "code").items()}
    (folder / "code.vectors").write_bytes(vector_file_bytes(vectors))
    return folder


@pytest.fixture
def copies(copies, monkeypatch):
    """As the current folder."""
    monkeypatch.chdir(copies)
    return copies


def without(*keys):
    file = {key: value for key, value in load_file("code.vectors").items() if key not in keys}
    save_file(file, "code.vectors", metadata={"format": FORMAT})


NORM, HEAD = "model.norm.weight", "lm_head.weight"


@pytest.mark.parametrize(
    ("spoil", "data", "code"),
    [
        (lambda: without(f"{NORM}.axis0"), {}, "saliency-missing-tensor"),
        (lambda: without(f"{HEAD}.axis1"), {}, "saliency-shape"),
        (lambda: Path("code.vectors").unlink(), {}, "vectors-missing"),
        (None, {"own": {"saliency": None}}, "recipe-not-mergekits"),
        (None, {"own": {"weight": -0.5}}, "recipe-bad-value"),
        (None, {"parameters": {"power": 0}}, "recipe-bad-value"),
        (None, {"parameters": {"power": float("nan")}}, "recipe-not-finite"),
        (None, {"parameters": {"floor": -0.1}}, "recipe-bad-value"),
        (None, {"parameters": {"normalize": True}}, "recipe-unknown-parameter"),
    ],
)
def test_command_3_refuses_before_weights_are_read(copies, spoil, data, code, no_weights):
    if spoil is not None:
        spoil()
    with refused(code):
        merge_here(Path(), by_hand(**data))
    assert not Path("merged").exists()


def test_an_aligned_vocabulary_is_refused_and_may_count_alike(copies):
    save_tokenizer(copies / "code", chat_template="{{ messages }}", size=VOCABULARY - 1)
    with refused("saliency-vocabulary"):
        merge_here(Path(), by_hand(tokenizer_source="union"))
    alike = [{"filter": one, "value": ""} for one in ("embed_tokens", "lm_head")]
    data = by_hand(tokenizer_source="union", own={"saliency": [*alike, {"value": "code.vectors"}]})
    assert set(tensors(merge_here(Path(), data))) == set(tensors(Path("base")))


def test_what_does_nothing_is_said(copies, capsys):
    merge_here(Path(), by_hand(own={"weight": 0.0}), dry_run=True)
    assert (
        "the saliency file code.vectors is not used: where it applies, every density is 0 or 1, or every weight 0"
        in capsys.readouterr().err
    )
    merge_here(Path(), by_hand(own={"saliency": ""}), dry_run=True)
    assert (
        "no model names a file of saliency vectors (saliency), so nothing guides this merge" in capsys.readouterr().err
    )


def test_a_head_that_is_tied_in_one_expert_has_the_embeddings_vectors(tmp_path, monkeypatch):
    """Base and `code` tied, `math` with a head of its own: of `code`, the head is its embedding."""
    monkeypatch.chdir(tmp_path)
    for folder in (save_models(tmp_path, "qwen2", ("base", "code"), tie_word_embeddings=True),):
        save_models(folder, "qwen2", ("base2", "math"), tie_word_embeddings=False)
    data = by_hand()
    data["models"].append({"model": "math", "parameters": {"weight": 1.0, "saliency": "math.vectors"}})
    for name in NAMES:
        stored = tensors(tmp_path / name)
        assert (HEAD in stored) == (name == "math")
        vectors = {key: tuple(map(torch.rand, value.shape)) for key, value in stored.items()}
        (tmp_path / f"{name}.vectors").write_bytes(vector_file_bytes(vectors))
    found = tensors(merge_here(Path(), data))[HEAD]
    embedding = "model.embed_tokens.weight"
    base = tensors(Path("base"))[embedding].double()
    above, below = 0, 0
    for name, at in (("code", embedding), ("math", HEAD)):
        file = load_file(f"{name}.vectors")
        fisher = file[f"{at}.axis0"].double()[:, None] * file[f"{at}.axis1"].double()
        q = (fisher / fisher.mean()) ** 0.5
        above, below = above + q * (tensors(Path(name))[at].double() - base), below + q
    expected = base + above / (below + 0.1 * below.mean() / 2)
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-6)
