"""Guidance submodule_linearity through the commands: measured, decided, merged, and refused.

python -m pytest tests/guidance/submodule_linearity/test_commands.py
"""

import functools
import itertools
import re
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from tests.commands_here import done_here, refused_here
from tests.selected import few
from tests.tiny_checkpoints import drop_head
from tests.tiny_merges import assert_same_tensors, merge_here, merge_stock, tensors
from tests.tiny_pairs import CALIBRATION, contents, save_pair, write_config

FAMILIES = ("llama", "gemma3", "phi3", "gpt2")  # untied; tied with four norms; fused; Conv1D, positions, biases, tied
TEXTS = {"calibration": CALIBRATION}
GRAM, TENSORS, SCORES, FOLDS, LEVELS = (
    f"submodule_linearity_{end}.csv" for end in ("gram", "tensors", "nonlinearity", "folds", "levels")
)
DEFAULT = "pair_generated_task_arithmetic_submodule_linearity_merge_config.yaml"


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A measured pair of a family, `dfs` beside it; made once, not to be changed."""

    @functools.cache
    def make(family):
        folder = save_pair(tmp_path_factory.mktemp(family), family)
        write_config(folder, TEXTS)
        measure(folder)
        return folder

    return make


@pytest.fixture
def pair(measured, tmp_path):
    """A measured Llama pair of one's own."""
    return shutil.copytree(measured("llama"), tmp_path / "pair")


def measure(folder, *more, run=done_here):
    flags = ("--config", "pair.yaml", "--out_dir", "dfs", "--guidance", "submodule_linearity")
    return run("lewis_importance.py", *flags, "--accept_useless_text", *more, cwd=folder)


def decide(folder, *more, out="out", run=done_here):
    flags = ("--delta_dfs_in_dir", "dfs", "--config_file", "pair.yaml", "--out_dir", out)
    own = () if "--guidance" in more else ("--guidance", "submodule_linearity")
    method = () if "--merge_method" in more else ("--merge_method", "task_arithmetic")
    return run("lewis_merge.py", *flags, "--accept_edited", *own, *method, *more, cwd=folder)


def refusing(code):
    """Runs a command that must refuse with this code."""
    return functools.partial(refused_here, code)


def recipe_of(folder, name=DEFAULT, out="out"):
    return yaml.safe_load((folder / out / name).read_text())


def absolute(folder, recipe, **keys):
    """The recipe with absolute paths, so that it runs from anywhere."""
    data = {**recipe, "base_model": str(folder / recipe["base_model"]), **keys}
    data["models"] = [{**model, "model": str(folder / model["model"])} for model in recipe["models"]]
    return data


def weights_by_hand(folder, level, types=("code", "math"), weighting="equal", ridge=0.1):
    """Each tensor's weights from the CSV files, by plain numpy."""
    gram, own = (pd.read_csv(folder / "dfs" / name) for name in (GRAM, TENSORS))
    depth = own.loc[own["level"] == "block", "layer"].max() + 1
    inside = own["layer"].between(0, depth - 1)
    own = own[(inside & (own["level"] == level)) | (~inside & (own["level"] == "tensor"))]
    found = {}
    for tensor in own["tensor"].unique():
        A, b = np.zeros((len(types),) * 2), np.zeros(len(types))
        for part in own[own["tensor"] == tensor].itertuples():
            rows = gram[
                (gram["level"] == part.level) & (gram["layer"] == part.layer) & (gram["submodule"] == part.submodule)
            ]
            by_pair = {(row.text, *sorted((row.model, row.other))): row.value for row in rows.itertuples()}
            G = np.array([[[by_pair[(t, *sorted((m, s)))] for s in types] for m in types] for t in types])
            scale = (
                np.einsum("ttt->t", G) if weighting == "equal" else np.full(len(types), np.einsum("ttt->t", G).mean())
            )
            A += np.einsum("tms,t->ms", G, 1 / scale)
            b += np.einsum("tmt,t->m", G, 1 / scale)
        pull = ridge * np.trace(A) / len(types)
        found[tensor] = np.linalg.solve(A + pull * np.eye(len(types)), b + pull / len(types))
    return found


@pytest.mark.parametrize(
    ("family", "level"),
    few(
        itertools.product(FAMILIES, ("block", "attention_mlp", "tensor")),
        ("llama", "block"),
        ("gemma3", "attention_mlp"),
        ("phi3", "tensor"),
        ("gpt2", "tensor"),
    ),
)
def test_the_merge_is_the_dense_sum_of_every_tensor(family, level, measured, tmp_path):
    folder = measured(family)
    ended = decide(folder, "--level", level, out=f"out_{level}")
    tag = "" if level == "attention_mlp" else f"{level}_"
    name = f"pair_generated_task_arithmetic_{tag}submodule_linearity_merge_config.yaml"
    recipe = recipe_of(folder, name, f"out_{level}")
    assert recipe["parameters"] == {"normalize": False, "lambda": 1.0}
    merged = tensors(merge_here(tmp_path, absolute(folder, recipe, dtype="float32")))
    base, code, math = (tensors(folder / one) for one in ("base", "code", "math"))
    by_hand = weights_by_hand(folder, level)
    assert set(by_hand) == set(base)  # no tensor is left to a constant
    assert "100.0% of" in ended.stdout
    for tensor, (one, other) in by_hand.items():
        deltas = [changed[tensor].float() - base[tensor].float() for changed in (code, math)]
        expected = base[tensor].float() + one * deltas[0] + other * deltas[1]
        torch.testing.assert_close(
            merged[tensor].float(), expected, atol=1e-5, rtol=0, msg=lambda m, t=tensor: f"{t}: {m}"
        )
    assert len({tuple(np.round(pair, 9)) for pair in by_hand.values()}) > 3


@pytest.mark.parametrize("family", few(FAMILIES, "llama", "gpt2"))
def test_stock_mergekit_runs_the_recipe(family, measured, tmp_path):
    folder = measured(family)
    decide(folder, out="out_stock")
    recipe = absolute(folder, recipe_of(folder, out="out_stock"))
    assert_same_tensors(merge_here(tmp_path, recipe), merge_stock(tmp_path, recipe))


def test_the_three_commands(tmp_path):
    save_pair(tmp_path)
    write_config(tmp_path, {**TEXTS, "guidance": "submodule_linearity"})
    steps = [
        ("lewis_importance.py", "--config", "pair.yaml", "--out_dir", "dfs", "--accept_useless_text"),
        ("lewis_merge.py", "--delta_dfs_in_dir", "dfs", "--config_file", "pair.yaml", "--out_dir", "out", "--merge_method",
         "task_arithmetic", "--plot", "--control", "uniform"),
        ("utils/merger.py", "--output_path", "merged", "--merge_config", f"out/{DEFAULT}"),
    ]  # fmt: skip
    printed = ""
    for step in steps:
        done = done_here(*step, cwd=tmp_path)
        # the pair is random: its experts are no fine-tunes of its base, and gain nothing on their text
        warnings = [line for line in done.stderr.splitlines() if "warning" in line]
        known = ("does not look like a fine-tune", "has no sure gain over the base")
        assert all(any(words in line for words in known) for line in warnings)
        printed += done.stdout
    assert "--guidance submodule_linearity --merge_method task_arithmetic" in printed
    assert "in float32" in printed and "covered: 21 of 21 tensors" in printed
    for expert in ("code", "math"):
        assert (
            f"{expert}: weights of 11 parts from " in printed
            and f"{expert}: non-linearity (0 is linear): block" in printed
            and f"{expert}: the whole model's non-linearity is " in printed
        )
        assert f"{expert}: " in printed and "of 11 weights are undecided: their 95% interval" in printed
    assert "0 negative (0%)" in printed and "fit: were all parts linear, " in printed
    stem = DEFAULT.removesuffix(".yaml")
    kinds = ("weight", "nonlinearity", "interval")
    pictures = {f"{stem}_{expert}_{what}.png" for expert in ("code", "math") for what in kinds}
    assert pictures < {path.name for path in (tmp_path / "out").iterdir()}
    assert (tmp_path / "merged/model.safetensors").exists() and set(contents(tmp_path / "dfs")) == {
        GRAM, TENSORS, SCORES, FOLDS, LEVELS, "manifest.json",
    }  # fmt: skip
    guided, control = (
        recipe_of(tmp_path, DEFAULT.replace("merge_config", tag)) for tag in ("merge_config", "uniform_merge_config")
    )
    values = [{entry["value"] for entry in one["models"][1]["parameters"]["weight"][:-1]} for one in (guided, control)]
    assert len(values[0]) == 11 and len(values[1]) == 1


def test_measuring_again_gives_the_same_bytes(pair):
    before = contents(pair / "dfs")
    shutil.rmtree(pair / "dfs")
    measure(pair)
    assert contents(pair / "dfs") == before


def test_the_tied_head_is_its_own_use_of_the_embedding(measured):
    folder = measured("gemma3")
    own = pd.read_csv(folder / "dfs" / TENSORS)
    uses = own[own["tensor"] == "model.embed_tokens.weight"]
    assert uses[["level", "layer", "submodule"]].values.tolist() == [
        ["tensor", -1, "model.embed_tokens"],
        ["tensor", 2, "lm_head"],
    ]


def test_options_reach_the_weights_and_the_name(pair):
    flags = ("--task_weighting", "raw", "--ridge", "0", "--clip", "0.49", "--level", "tensor")
    ended = decide(pair, *flags)
    name = "pair_generated_task_arithmetic_tensor_raw_ridge0_clip0.49_submodule_linearity_merge_config.yaml"
    found = {
        entry.get("filter"): entry["value"] for entry in recipe_of(pair, name)["models"][1]["parameters"]["weight"]
    }
    for tensor, (one, _) in weights_by_hand(pair, "tensor", weighting="raw", ridge=0).items():
        assert found[tensor.removesuffix("weight")] == pytest.approx(min(one, 0.49), rel=1e-6)
    assert 0.49 in found.values() and len(set(found.values())) > 3
    assert "clipped to [0, 0.49]" in ended.stdout


def test_one_expert_of_two_is_merged_with_weight_one(pair):
    write_config(pair, {**TEXTS, "target_model_names": {"math": "./math"}})
    decide(pair, "--ridge", "0.5")
    (expert,) = recipe_of(pair, DEFAULT.replace("_sub", "_ridge0.5_sub"))["models"][1:]
    assert expert["model"] == "./math"
    assert all(entry["value"] == pytest.approx(1.0, abs=1e-12) for entry in expert["parameters"]["weight"])
    assert len(expert["parameters"]["weight"]) == 12


def copied(folder, source, target):
    shutil.rmtree(folder / target)
    shutil.copytree(folder / source, folder / target)
    shutil.rmtree(folder / "dfs")


def test_identical_experts_share_and_one_equal_to_the_base_gets_nothing(pair):
    copied(pair, "math", "code")
    measure(pair)
    decide(pair)
    for expert in recipe_of(pair)["models"][1:]:
        assert [entry["value"] for entry in expert["parameters"]["weight"][:-1]] == pytest.approx([0.5] * 11, abs=1e-6)
    copied(pair, "base", "code")
    measure(pair)
    decide(pair, out="equal")
    code, math = (
        [entry["value"] for entry in expert["parameters"]["weight"][:-1]]
        for expert in recipe_of(pair, out="equal")["models"][1:]
    )
    assert set(code) == {0.0} and math == pytest.approx([1.0] * 11, abs=1e-12)


def test_an_expert_equal_to_the_base_is_warned_of(pair):
    copied(pair, "base", "code")
    ended = measure(pair)
    assert "warning: ./code changes nothing on this text; is it the base?" in ended.stderr


def test_without_scores(pair):
    shutil.rmtree(pair / "dfs")
    measure(pair, "--no-nonlinearity")
    assert (pair / "dfs" / SCORES).read_text() == "level,layer,submodule,model,score\n"
    ended = decide(pair, "--plot")
    assert "non-linearity" not in ended.stdout
    assert not list((pair / "out").glob("*nonlinearity*")) and len(list((pair / "out").glob("*_weight.png"))) == 2


def test_auto_takes_the_level_that_misses_least_in_each_block(pair):
    table = pd.read_csv(pair / "dfs" / LEVELS)
    assert len(table) == 2 * 3 * 2 and (table["missed"] > 0).all()
    wide = table.pivot_table(index="layer", columns="level", values="missed")
    for layer, level in ((0, "tensor"), (1, "block")):  # not the same in both, whatever was measured
        wide.loc[layer, level] = wide.loc[layer].min() / 2
    edited = [(row.layer, row.level, row.model, wide.loc[row.layer, row.level]) for row in table.itertuples()]
    pd.DataFrame(edited, columns=table.columns).to_csv(pair / "dfs" / LEVELS, index=False)
    ended = decide(pair, "--level", "auto")
    assert (
        "block in 1 (mean" in ended.stdout
        and "tensor in 1 (mean" in ended.stdout
        and "attention_mlp in 0" in ended.stdout
    )
    recipe = recipe_of(pair, "pair_generated_task_arithmetic_auto_submodule_linearity_merge_config.yaml")
    found = {entry.get("filter"): entry["value"] for entry in recipe["models"][1]["parameters"]["weight"]}
    tensor, block = (weights_by_hand(pair, level) for level in ("tensor", "block"))
    assert found["model.layers.0.mlp.up_proj."] == pytest.approx(
        tensor["model.layers.0.mlp.up_proj.weight"][0], rel=1e-6
    )
    assert found["model.layers.1."] == pytest.approx(block["model.layers.1.mlp.up_proj.weight"][0], rel=1e-6)
    assert not any(text and text.startswith("model.layers.1.mlp") for text in found)


def test_a_folder_of_an_earlier_version_is_read_for_all_but_what_it_lacks(pair):
    decide(pair, out="now")
    scores = pd.read_csv(pair / "dfs" / SCORES)
    scores[scores["level"] != "model"].to_csv(pair / "dfs" / SCORES, index=False)
    for name in (FOLDS, LEVELS):
        (pair / "dfs" / name).unlink()
    ended = decide(pair, "--plot")
    assert recipe_of(pair) == recipe_of(pair, out="now")
    assert f"intervals: none, for {FOLDS} is not there (an earlier version measured" in ended.stdout
    assert "the whole model's" not in ended.stdout and not list((pair / "out").glob("*interval*"))
    decide(pair, "--level", "auto", run=refusing("level-not-measured"))


def test_the_whole_models_score_is_in_the_table(pair):
    scores = pd.read_csv(pair / "dfs" / SCORES)
    whole = scores[scores["level"] == "model"]
    assert whole[["layer", "submodule", "model"]].values.tolist() == [[-1, "model", "code"], [-1, "model", "math"]]
    assert (whole["score"] > 0).all()


def test_a_picture_shows_the_root_of_the_score_that_is_printed(pair, monkeypatch):
    from utils.guidance.submodule_linearity import report

    drawn = []
    monkeypatch.setattr(report, "curves", lambda table, title, *more, **keys: drawn.append((title, table)) or b"")
    printed = re.findall(r"most \S+ \(root (\S+)%\)", decide(pair, "--plot").stdout)
    shown = [float(table.max().max()) for title, table in drawn if "root of the non-linearity" in title]
    assert len(shown) == 2 and max(map(float, printed)) == pytest.approx(max(shown), abs=0.006)


def test_ties_keeps_its_density_beside_the_weights(pair):
    decide(pair, "--merge_method", "ties", "--mean_density", "0.3")
    recipe = recipe_of(pair, "pair_generated_ties_mean0.3_submodule_linearity_merge_config.yaml")
    parameters = recipe["models"][1]["parameters"]
    assert {entry["value"] for entry in parameters["density"][:-1]} == {0.3} and len(parameters["density"]) == 15
    assert len(parameters["weight"]) == 12 and recipe["parameters"] == {"normalize": False, "lambda": 1.0}


def test_experts_may_share_a_text(pair):
    write_config(pair)
    shutil.rmtree(pair / "dfs")
    measure(pair)
    gram = pd.read_csv(pair / "dfs" / GRAM)
    code, math = (gram.loc[gram["text"] == text, "value"].to_numpy() for text in ("code", "math"))
    assert len(code) and (code == math).all()
    assert set(pd.read_csv(pair / "dfs" / SCORES)["model"]) == {"code", "math"}


# --- what is refused --------------------------------------------------------------------------------------------------


def edit(name, change):
    def apply(folder):
        path = folder / "dfs" / name
        change(pd.read_csv(path, keep_default_na=False)).to_csv(path, index=False)

    return apply


def first_value(value):
    return lambda table: table.assign(value=[value, *table["value"][1:]])


def without(mask):
    return lambda table: table[~mask(table)]


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (edit(GRAM, first_value(-1.0)), "table-bad-value"),
        (edit(GRAM, lambda table: table[1:]), "table-row-missing"),
        (edit(GRAM, lambda table: pd.concat([table, table[:1]])), "table-row-twice"),
        (edit(GRAM, lambda table: table.assign(text="law")), "table-unknown-expert"),
        (edit(GRAM, without(lambda table: (table["level"] == "attention_mlp") & (table["layer"] == 1))), "table-row-missing"),
        (edit(TENSORS, without(lambda table: table["layer"] == 0)), "table-row-missing"),
        (edit(TENSORS, without(lambda table: table["layer"] == 1)), "table-row-missing"),
        (edit(TENSORS, without(lambda table: table["submodule"] == "self_attn")), "table-row-missing"),
        (edit(TENSORS, without(lambda table: table["level"] == "block")), "table-row-missing"),
        (edit(TENSORS, lambda table: pd.concat([table, table[table["level"] == "attention_mlp"]])), "table-row-twice"),
        (edit(TENSORS, lambda table: table.assign(level="head")), "table-bad-value"),
        (edit(TENSORS, lambda table: table.assign(tensor=table["tensor"] + "x")), "tensor-not-in-model"),
        (edit(SCORES, lambda table: table.assign(score=-1)), "table-bad-value"),
        (edit(FOLDS, lambda table: table[3:]), "table-row-missing"),
        (edit(FOLDS, lambda table: table.assign(value=2 * table["value"])), "table-other-sum"),
        (edit(FOLDS, lambda table: table.assign(fold=30)), "table-bad-value"),
        (edit(SCORES, lambda table: table.assign(model="law")), "table-unknown-expert"),
        (edit(SCORES, lambda table: pd.concat([table, table])), "table-row-twice"),
        (lambda folder: (folder / "dfs" / GRAM).unlink(), "table-missing"),
        (lambda folder: (folder / "dfs" / SCORES).unlink(), "table-missing"),
        (lambda folder: write_config(folder, {**TEXTS, "guidance": "lewis"}), None),
    ],
)  # fmt: skip
def test_edited_tables_are_refused(pair, change, code):
    change(pair)
    if code is None:  # a control: the flag outranks the config, so nothing is wrong
        decide(pair)
    else:
        decide(pair, run=refusing(code))


@pytest.mark.parametrize(
    ("flags", "code"),
    [
        (("--ridge", "-1"), "flag-invalid"),
        (("--clip", "-0.5"), "flag-invalid"),
        (("--level", "head"), "flag-invalid"),
        (("--gamma", "0.3"), "flag-no-effect"),
        (("--mean_density", "0.5"), "flag-no-effect"),
        (("--merge_method", "slerp"), "merge-method-unfit"),
        (("--guidance", "lewis"), "dataframes-other-guidance"),
    ],
)
def test_wrong_flags_are_refused(pair, flags, code):
    method = ("--merge_method", "ties") if "lewis" in flags else ()
    decide(pair, *flags, *method, run=refusing(code))


def test_a_checkpoint_without_its_head_is_refused_before_weights_are_read(pair, unread):
    drop_head(pair / "math")
    shutil.rmtree(pair / "dfs")
    measure(pair, run=refusing("model-no-head"))
