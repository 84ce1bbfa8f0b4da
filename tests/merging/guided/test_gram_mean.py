"""gram_mean from text to merged model: against dense formulas over plain forwards and gradients, its control, bad input.

python -m pytest tests/merging/guided/test_gram_mean.py
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from tests.commands_here import done_here
from tests.refusals import refused
from tests.selected import few
from tests.tiny_checkpoints import VOCABULARY
from tests.tiny_merges import merge_here, tensors
from tests.tiny_pairs import CALIBRATION, add_token, contents, sample_ids, write_config
from tests.tiny_recipes import decide_here, measure_here, pairs_by_family, read_here
from utils.guidance.gram_mean import rounds as gram_rounds
from utils.models.opening import open_checkpoint
from utils.publishing.kept import kept_work

NAMES = ("code", "math")
ROWS = ("model.embed_tokens.weight", "lm_head.weight")
FAMILIES = ("llama", "gemma3", "gpt2", "phi3")  # untied head; tied; transposed weights, biases, positions; fused


def measure(out="dfs", accept=True, rounds=1):
    return measure_here("gram_mean", out, accept_useless_text=accept, rounds=rounds)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Pairs by family, measured. Random models gain nothing on their texts."""
    return pairs_by_family(tmp_path_factory.mktemp, measure)


def decided(**asked):
    return [read_here(path) for path in decide_here("gram_mean", **asked)]


def merged(recipe, name="merged", **keys):
    return tensors(merge_here(Path(), {**recipe, **keys}, name))


def samples(expert):
    return sample_ids(Path(), expert)


class Plain:
    """One model by transformers on some samples: input Grams of every linear module, gradients of every parameter."""

    def __init__(self, folder, ids):
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.grams, self.squares, self.rows, self.losses = {}, {}, {}, []
        watched = {
            path: module for path, module in model.named_modules() if type(module).__name__ in ("Linear", "Conv1D")
        }

        def note(path):
            def hook(module, args):
                rows = args[0].detach().double().reshape(-1, args[0].shape[-1])
                self.grams[f"{path}.weight"] = self.grams.get(f"{path}.weight", 0) + rows.T @ rows

            return hook

        for path, module in watched.items():
            module.register_forward_pre_hook(note(path))
        for row in ids:
            model.zero_grad()
            logits = model(input_ids=torch.tensor([row])).logits[0, :-1]
            loss = -logits.log_softmax(-1)[range(len(row) - 1), row[1:]].mean()
            loss.backward()
            self.losses.append(float(loss.detach()))
            for name, value in model.named_parameters():
                gradient = value.grad.double()
                self.squares[name] = self.squares.get(name, 0) + gradient**2
                if name.endswith(("embed_tokens.weight", "lm_head.weight", "wte.weight")):
                    self.rows[name] = self.rows.get(name, 0) + gradient.T @ gradient
        tokens = sum(map(len, ids))
        self.grams = {name: gram / tokens for name, gram in self.grams.items()}


def guided(changes, fisher, weights):
    """The guided mean with power 1/2 and floor 0.1; F as the outer product of its sums."""
    above, below = 0, 0
    for name in NAMES:
        own = fisher[name]
        if own.dim() == 2:
            own = own.sum(1, keepdim=True) * own.sum(0, keepdim=True) / own.sum()
        q = (own / own.mean()) ** 0.5
        above, below = above + weights[name] * q * changes[name], below + weights[name] * q
    return above / (below + 0.1 * below.mean() / len(NAMES))


def dense(plain, weights, name, transposed, rows=True, ridge=1e-5, anchored=True):
    """One tensor of the merge from whole gradients and inputs, float64."""
    base = tensors(Path("base"))[name].double()
    changes = {expert: tensors(Path(expert))[name].double() - base for expert in NAMES}
    fisher = {expert: sum(side.squares[name] for side in plain[expert]) for expert in NAMES}
    if rows and name in plain["code"][0].rows:
        metrics, pulls = {}, {}
        for expert in NAMES:
            gram = sum(side.rows[name] for side in plain[expert])
            metrics[expert] = gram / gram.diagonal().mean() + 0.1 * torch.eye(len(gram), dtype=torch.float64)
            worth = fisher[expert].sum(1)
            pulls[expert] = weights[expert] * (worth / worth.mean() + 0.1)
        solved = []
        for row in range(len(base)):
            matrix = sum(pulls[expert][row] * metrics[expert] for expert in NAMES)
            right = sum(pulls[expert][row] * metrics[expert] @ changes[expert][row] for expert in NAMES)
            solved.append(torch.linalg.solve(matrix, right))
        return base + torch.stack(solved)
    anchor = guided(changes, fisher, weights)
    if name not in plain["code"][0].grams or "embed" in name or "lm_head" in name or "wte" in name:
        return base + anchor
    anchor = anchor if anchored else torch.zeros_like(anchor)
    if transposed:
        anchor, changes = anchor.T, {expert: change.T for expert, change in changes.items()}
    grams = {expert: weights[expert] * sum(side.grams[name] for side in plain[expert]) for expert in NAMES}
    joint = sum(grams.values())
    r = ridge * joint.diagonal().mean() * torch.eye(len(joint), dtype=torch.float64)
    found = (sum(changes[expert] @ grams[expert] for expert in NAMES) + anchor @ r) @ torch.linalg.inv(joint + r)
    return base + (found.T if transposed else found)


# --- what it computes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", few(FAMILIES, "gemma3", "gpt2"))
def test_the_commands_make_the_dense_merge(family, pair):
    """Ridge 1e-2, so that rounding of nearly singular sums does not blur the comparison."""
    folder = pair(family)
    shutil.rmtree(folder / "dfs")
    write_config(folder, {"calibration": CALIBRATION, "global_parameters": {"ridge": 1e-2, "embedding_rows": True}})
    flags = ["--config", "pair.yaml", "--out_dir", "dfs", "--guidance", "gram_mean", "--device", "cpu"]
    done_here("lewis_importance.py", *flags, "--dtype", "float32", "--accept_useless_text", cwd=folder)
    assert {path.name for path in (folder / "dfs").iterdir()} == {
        "gram_mean_tensors.csv",
        "gram_mean_losses.csv",
        "code_grams.safetensors",
        "math_grams.safetensors",
        "manifest.json",
    }
    flags = ["--delta_dfs_in_dir", "dfs", "--config_file", "pair.yaml", "--out_dir", "out", "--guidance", "gram_mean"]
    done_here("lewis_merge.py", *flags, "--out_dtype", "float32", cwd=folder)
    (written,) = (folder / "out").glob("*.yaml")
    recipe = yaml.safe_load(written.read_text())
    assert recipe["merge_method"] == "gram_mean"
    recipe["dtype"] = "float32"
    written.write_text(yaml.safe_dump(recipe, sort_keys=False))
    assert [model["parameters"]["saliency"] for model in recipe["models"][1:]] == [
        f"../dfs/{name}_grams.safetensors" for name in NAMES
    ]
    flags = ["--output_path", "merged", "--merge_config", f"out/{written.name}", "--device", "cpu"]
    done_here("utils/merger.py", *flags, cwd=folder)
    found, base = tensors(folder / "merged"), tensors(folder / "base")
    assert sorted(found) == sorted(base)
    weights = {name: recipe["models"][place]["parameters"]["weight"][-1]["value"] for place, name in ((1, "code"), (2, "math"))}  # fmt: skip
    plain = {name: [Plain(folder / model, samples(name)) for model in ("base", name)] for name in NAMES}
    for name, value in found.items():
        transposed = family == "gpt2" and ".h." in name
        expected = dense(plain, weights, name, transposed, ridge=1e-2).float()
        torch.testing.assert_close(value, expected, rtol=2e-3, atol=5e-5, msg=lambda text, at=name: f"{at}: {text}")
    card = (folder / "merged/README.md").read_text()
    assert "by `gram_mean` (the change that answers as each expert does on its own inputs)" in card


def test_without_rows_embeddings_are_the_guided_means(pair):
    """As below fifteen samples."""
    folder = pair()
    (recipe,) = decided()
    assert recipe["parameters"] == {"embedding_rows": False, "power": 0.5, "floor": 0.1, "ridge": 1e-5}
    found = merged(recipe, dtype="float32")
    plain = {name: [Plain(folder / model, samples(name)) for model in ("base", name)] for name in NAMES}
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        expected = dense(plain, {"code": 0.5, "math": 0.5}, name, False, rows=False).float()
        torch.testing.assert_close(found[name], expected, rtol=1e-3, atol=1e-5)


def test_without_an_anchor_the_ridge_pulls_to_no_change(pair):
    folder = pair()
    write_config(folder, {"calibration": CALIBRATION, "global_parameters": {"ridge": 0.1, "anchor": False}})
    (recipe,) = decided()
    assert recipe["parameters"]["anchor"] is False
    found = merged(recipe, dtype="float32")
    plain = {name: [Plain(folder / model, samples(name)) for model in ("base", name)] for name in NAMES}
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight"):
        expected = dense(plain, {"code": 0.5, "math": 0.5}, name, False, ridge=0.1, anchored=False).float()
        torch.testing.assert_close(found[name], expected, rtol=2e-3, atol=5e-5)


def test_one_expert_gives_itself(pair):
    folder = pair("gpt2")
    write_config(folder, {"target_model_names": {"math": "./math"}})
    (recipe,) = decided()
    found, expert = merged(recipe, dtype="float32"), tensors(Path("math"))
    for name, value in found.items():
        torch.testing.assert_close(value, expert[name].float(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("rounds", [2, 3])
def test_a_round_takes_the_inputs_of_what_the_one_before_merges(pair, rounds):
    folder = pair("gemma3")
    own = {"global_parameters": {"ridge": 1e-2, "embedding_rows": True}}
    write_config(folder, yaml.safe_load(Path("pair.yaml").read_text()) | own)
    for number in range(1, rounds):
        (recipe,) = decided(measured=f"dfs{number}" if number > 1 else "dfs", out=f"out{number}")
        stored = {"dtype": "float32", "out_dtype": open_checkpoint("base", None).float_dtype}
        merge_here(folder, {**recipe, **stored}, f"merged{number}")
        measure(f"dfs{number + 1}", rounds=number + 1)
    name = "gram_mean_losses.csv"  # what experts gain is asked of base and experts
    assert Path(f"dfs{rounds}", name).read_bytes() == Path("dfs", name).read_bytes()
    assert not [path for path in Path(f"dfs{rounds}").iterdir() if path.name.startswith(".")]
    (recipe,) = decided(measured=f"dfs{rounds}", out="last")
    found = merged(recipe, "refined", dtype="float32")
    plain = {name: [Plain(folder / model, samples(name)) for model in ("base", name)] for name in NAMES}
    for name, sides in plain.items():
        sides[0].grams = Plain(folder / f"merged{rounds - 1}", samples(name)).grams
        sides[1].grams = {key: 0 * gram for key, gram in sides[0].grams.items()}
    for name, value in found.items():
        expected = dense(plain, {"code": 0.5, "math": 0.5}, name, False, ridge=1e-2).float()
        torch.testing.assert_close(value, expected, rtol=2e-3, atol=5e-5, msg=lambda text, at=name: f"{at}: {text}")


def test_a_second_round_that_was_stopped_goes_on(pair, monkeypatch, capsys):
    pair()
    measure("whole", rounds=2)
    with monkeypatch.context() as stopping, pytest.raises(KeyboardInterrupt):
        stopping.setattr(gram_rounds, "run_merge", interrupted)
        measure("again", rounds=2)
    capsys.readouterr()
    measure("again", rounds=2)
    assert "had finished 4 (" in capsys.readouterr().out
    assert contents(Path("again")) == contents(Path("whole"))


def interrupted(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("keys", "code"),
    [
        ({"target_model_names": {"math": "./math"}}, "measure-rounds-one-expert"),
        ({"global_parameters": {"gamma": 0.01}}, "global-parameter-unknown"),
        ({"global_parameters": {"ridge": -1}}, "global-parameter-value"),
    ],
)
def test_a_second_round_that_cannot_be_merged_is_refused_before_the_first(pair, keys, code):
    write_config(pair(), yaml.safe_load(Path("pair.yaml").read_text()) | keys)
    with refused(code):
        measure("again", rounds=2)
    assert not Path("again").exists()


@pytest.fixture
def of_two_vocabularies(pair):
    """A pair of which one expert knows one token more."""
    add_token(pair() / "math")


def test_a_second_round_needs_one_vocabulary(of_two_vocabularies):
    with refused("measure-rounds-vocabulary"):
        measure("again", rounds=2)


def test_embeddings_of_several_vocabularies_are_merged_without_what_was_measured_of_rows(of_two_vocabularies):
    measure("apart")
    flags = ("--delta_dfs_in_dir", "apart", "--config_file", "pair.yaml", "--out_dir", "recipes", "--dtype", "float32")
    said = done_here("lewis_merge.py", *flags, "--guidance", "gram_mean")
    assert all(name in said.stderr for name in ROWS) and "--start_recipe" not in said.stdout
    (path,) = Path("recipes").glob("*.yaml")
    done_here("utils/merger.py", "--merge_config", path, "--output_path", "merged")
    found = tensors(Path("merged"))
    for name in ROWS:
        base, code, math = (tensors(Path(one))[name].double() for one in ("base", *NAMES))
        assert found[name].shape[0] == VOCABULARY + 1
        mean = (code + math[:VOCABULARY]) / 2 - base
        torch.testing.assert_close(found[name][:VOCABULARY].double(), base + mean / 1.05, rtol=1e-5, atol=1e-6)


def test_rounds_are_measured_again_where_their_merge_is_another(pair, capsys):
    folder = pair()
    config = yaml.safe_load(Path("pair.yaml").read_text())
    for ridge in (1e-2, 1e-2, 1e-1):
        write_config(folder, config | {"global_parameters": {"ridge": ridge}})
        if ridge == 1e-1:
            with refused("out-exists"):
                measure("again", rounds=2)
        else:
            measure("again", rounds=2)
    assert capsys.readouterr().out.count("nothing to do") == 1
    for keys, said in (({}, False), ({"target_model_names": {"math": "./math"}}, True)):
        write_config(folder, config | keys)
        decide_here("gram_mean", measured="again", mean_density=0.5 if said else None)
        assert ("inputs of linear layers are those of a merge of" in capsys.readouterr().err) == said


@pytest.mark.parametrize("method", ["gram_mean", "guided_mean"])
def test_a_factor_scales_what_an_expert_adds_and_nothing_else(pair, method):
    pair()
    (recipe,) = decided()
    recipe["merge_method"] = method
    if method == "guided_mean":
        recipe["parameters"] = {key: recipe["parameters"][key] for key in ("power", "floor")}
    base = tensors(Path("base"))

    def with_factors(*factors):
        for model, factor in zip(recipe["models"][1:], factors, strict=True):
            model["parameters"]["factor"] = factor
        return merged(recipe, "x" + "_".join(map(str, factors)).replace(" ", ""), dtype="float32")

    layers = {"filter": "layers.0.", "value": 0.5}
    whole, code, math = with_factors(1.0, 1.0), with_factors(1.0, 0.0), with_factors(0.0, 1.0)
    found = with_factors([layers, {"value": 2.0}], -1.0)
    for name, before in base.items():
        parts = [one[name] - before.float() for one in (code, math)]
        torch.testing.assert_close(whole[name] - before.float(), sum(parts), rtol=1e-4, atol=1e-6)
        expected = (0.5 if "layers.0." in name else 2.0) * parts[0] - parts[1]
        torch.testing.assert_close(found[name] - before.float(), expected, rtol=1e-4, atol=1e-6)


def test_losses_are_those_of_a_plain_forward_and_decide_the_weights(pair):
    import pandas as pd

    folder = pair()
    table = pd.read_csv("dfs/gram_mean_losses.csv")
    for name in NAMES:
        own = table[table["model"] == name]
        for column, model in (("base_loss", "base"), ("expert_loss", name)):
            assert own[column].tolist() == pytest.approx(Plain(folder / model, samples(name)).losses, rel=1e-4)
        assert own["tokens"].tolist() == [len(ids) - 1 for ids in samples(name)]
    # gains of 0.5 and 0.25 nats: weights 1 to 2
    table["expert_loss"] = table["base_loss"] - table["model"].map({"code": 0.5, "math": 0.25})
    table.to_csv("dfs/gram_mean_losses.csv", index=False)
    (recipe,) = decided()
    assert [model["parameters"]["weight"] for model in recipe["models"][1:]] == [
        [{"value": pytest.approx(share, abs=1e-5)}] for share in (1 / 3, 2 / 3)
    ]


def test_its_control_is_the_plain_mean(pair):
    pair()
    _, control = decided(control="uniform", lambda_=0.9)
    assert control["merge_method"] == "task_arithmetic"
    assert control["parameters"] == {"normalize": False, "lambda": 0.9}
    assert [model["parameters"] for model in control["models"][1:]] == [{"weight": [{"value": 0.5}]}] * 2


def test_a_model_without_matrices_has_the_guided_mean_everywhere(pair):
    """A file of vectors alone, as saliency_budget writes it, is the method guided_mean."""
    pair()
    (recipe,) = decided()
    for model, name in zip(recipe["models"][1:], NAMES, strict=True):
        file = load_file(model["parameters"]["saliency"])
        bare = {key: value for key, value in file.items() if key.endswith(("axis0", "axis1"))}
        save_file(bare, f"{name}.bare", metadata={"format": "lewis saliency 1"})
        model["parameters"]["saliency"] = f"{name}.bare"
    ours = merged(recipe, dtype="float32")
    kept = {key: recipe["parameters"][key] for key in ("power", "floor")}
    theirs = merged({**recipe, "merge_method": "guided_mean", "parameters": kept}, "mean", dtype="float32")
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-6)


def test_measuring_again_gives_the_same_bytes(pair):
    pair()
    measure("again")
    for path in Path("again").iterdir():
        if path.suffix != ".json":
            assert path.read_bytes() == (Path("dfs") / path.name).read_bytes(), path.name


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_an_expert_without_gain_is_refused_with_both_losses(pair):
    pair()
    with refused("text-without-gain"):
        measure("none", accept=False)
    assert [path.name for path in Path("none").iterdir()] == [".measuring.part"]
    manifest = json.loads(Path("dfs/manifest.json").read_text())
    manifest["guidance_options"]["accept_useless_text"] = False
    Path("dfs/manifest.json").write_text(json.dumps(manifest))
    with refused("text-without-gain"):
        decided()


def test_an_expert_whose_losses_are_not_finite_is_refused(pair):
    folder = pair()
    own = load_file(folder / "math/model.safetensors")
    own["model.norm.weight"] = torch.full_like(own["model.norm.weight"], float("inf"))
    shutil.copytree("math", "broken")
    save_file(own, "broken/model.safetensors", metadata={"format": "pt"})
    config = yaml.safe_load(Path("pair.yaml").read_text())
    models = [one | {"name": "./broken"} if one["type"] == "math" else one for one in config["model_info"]]
    write_config(folder, {**config, "model_info": models, "target_model_names": {"math": "./broken", "code": "./code"}})
    with refused("measured-not-finite", "model ./broken") as caught:
        measure("other")
    results = [path.name for path in kept_work(caught.value).folder.iterdir() if path.is_dir()]
    assert results == ["code+gain"]
    assert [path.name for path in Path("other").iterdir()] == [".measuring.part"]


def test_too_little_text_says_how_many_tokens_are_needed(pair, capsys):
    folder = pair()
    write_config(folder, yaml.safe_load(Path("pair.yaml").read_text()) | {"nsamples": 1})
    measure("other")
    said = capsys.readouterr().out
    assert "tokens are fewer than the input channels of" in said and "from 48 tokens on there need be none" in said
    decide_here("gram_mean", measured="other")
    assert "layers with fewer tokens than input channels" in capsys.readouterr().out


def test_command_2_refuses(pair):
    pair()
    with refused("merge-method-unfit"):
        decided(merge_method="task_arithmetic")
    shutil.copytree("dfs", "spare")

    def spoiled(name, change):
        shutil.rmtree("dfs")
        shutil.copytree("spare", "dfs")
        path = Path("dfs") / name
        if name.endswith("csv"):
            path.write_text(change(path.read_text()))
        else:
            file = load_file(path)
            metadata = {"format": "lewis saliency 1", "shared": "{}"}
            save_file(change(file) or file, path, metadata=metadata)

    first = "model.layers.0.self_attn.q_proj.weight"
    spoiled("gram_mean_losses.csv", lambda text: text[: text.index("math")])
    with refused("grams-absent"):
        decided()
    spoiled("gram_mean_losses.csv", lambda text: text.replace("code,0,", "code,0,-", 1))
    with refused("table-bad-value"):
        decided()
    spoiled("gram_mean_tensors.csv", lambda text: text.replace("code,0,q_proj", "code,0,p_proj"))
    with refused("grams-differ"):
        decided()
    spoiled("code_grams.safetensors", lambda file: {**file, f"{first}.inputs1": file[f"{first}.inputs1"][:-1].clone()})
    with refused("grams-misfit"):
        decided()
    assert not Path("out").exists()


def test_command_3_refuses_matrices_of_another_model(pair):
    pair()
    (recipe,) = decided()
    name = "model.layers.0.self_attn.q_proj.weight"
    file = load_file("dfs/math_grams.safetensors")
    file[f"{name}.inputs1"] = torch.zeros(20 * 21 // 2)
    shared = json.dumps({})
    save_file(file, "dfs/math_grams.safetensors", metadata={"format": "lewis saliency 1", "shared": shared})
    with refused("grams-misfit"):
        merged(recipe)
    file[f"{name}.inputs1"] = torch.full((32 * 33 // 2,), float("nan"))
    save_file(file, "dfs/math_grams.safetensors", metadata={"format": "lewis saliency 1", "shared": shared})
    with refused("grams-damaged"):
        merged(recipe)
    assert not Path("merged").exists()


def fitted_anew(change, kept, gram):
    """Row by row what is kept takes over the rest, with a ridge."""
    fitted, ridge = torch.zeros_like(change), 1e-3 * gram.diagonal().mean()
    for row, chosen in enumerate(kept):
        own = gram[chosen][:, chosen] + ridge * torch.eye(int(chosen.sum()), dtype=torch.float64)
        taken = torch.linalg.solve(own, gram[chosen][:, ~chosen] @ change[row, ~chosen])
        fitted[row, chosen] = change[row, chosen] + taken
    return fitted


SPARSE = {
    "llama": ("model.layers.1.self_attn.o_proj.weight", "model.layers.0.mlp.down_proj.weight"),
    "gpt2": ("transformer.h.0.mlp.c_fc.weight", "transformer.h.1.mlp.c_proj.weight"),
}


@pytest.mark.parametrize(("family", "joint"), [("llama", False), ("llama", True), ("gpt2", True)])
def test_one_expert_sparse_is_masked_and_fitted_anew(pair, family, joint):
    """What is kept answers like the whole change on the layer's inputs: chosen for that, or by each entry's saliency."""
    folder = pair(family)
    write_config(folder, {"target_model_names": {"math": "./math"}})
    (recipe,) = decided(mean_density=0.2)
    assert recipe["parameters"].pop("joint_support") is True
    if joint:
        recipe["parameters"]["joint_support"] = True  # earlier recipes have none
    cuts = recipe["models"][1]["parameters"]["density"]
    assert {cut["value"] for cut in cuts[:-1]} == {0.2} and cuts[-1] == {"value": 1}
    found, base, expert = merged(recipe, dtype="float32"), tensors(Path("base")), tensors(Path("math"))
    file = load_file("dfs/math_grams.safetensors")
    plain = [Plain(folder / model, samples("math")) for model in ("base", "math")]
    for name in SPARSE[family]:
        axes, gram = [file[f"{name}.axis{axis}"].double() for axis in (0, 1)], sum(side.grams[name] for side in plain)
        before, after, result = (one[name].double() for one in (base, expert, found))
        if family == "gpt2":
            axes, before, after, result = axes[::-1], before.t(), after.t(), result.t()
        change, count = after - before, int(0.2 * before.numel())
        worth = (change**2 * (axes[0][:, None] * axes[1]) ** 0.5).flatten()
        alone = (
            torch.zeros_like(worth, dtype=torch.bool).index_fill_(0, worth.topk(count).indices, True).view_as(change)
        )
        kept = result != before if joint else alone
        assert int(kept.sum()) == count
        torch.testing.assert_close(result, before + fitted_anew(change, kept, gram), rtol=1e-3, atol=1e-5)
        missed = [one - change for one in (result - before, fitted_anew(change, alone, gram))]
        costs = [float((axes[0].sqrt() * ((one @ gram) * one).sum(1)).sum()) for one in missed]
        assert costs[0] < 0.9 * costs[1] if joint else costs[0] == pytest.approx(costs[1], rel=1e-3)
    embedding = next(name for name in ("model.embed_tokens.weight", "transformer.wte.weight") if name in found)
    assert torch.equal(found[embedding], expert[embedding].float())


def test_biases_of_one_expert_are_its_own_where_weights_are_cut(pair):
    folder = pair("gpt2")
    write_config(folder, {"target_model_names": {"math": "./math"}})
    (recipe,) = decided(mean_density=0.2)
    found, expert = merged(recipe, dtype="float32"), tensors(Path("math"))
    biases = [name for name in found if name.endswith(".bias")]
    assert "transformer.h.0.attn.c_attn.bias" in biases
    for name in biases:
        torch.testing.assert_close(found[name], expert[name].float(), rtol=0, atol=1e-7)
    assert not torch.allclose(
        found["transformer.h.0.attn.c_attn.weight"], expert["transformer.h.0.attn.c_attn.weight"].float()
    )
