"""Command 2 as a user meets it: golden recipes, flags, print-out, names and warnings."""

import json
import re
import shlex
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml

import lewis_merge
from tests.commands_here import done_here, run_here
from tests.deciding_here import TIES, call, edit_config, edit_csv, flags, refuses, write_norms
from tests.tiny_checkpoints import FAMILIES, LAYERS, block_prefix, save_tiny

DARE = "pair_0.3_0.8_generated_dare_ties_merge_config.yaml"


# --- golden -----------------------------------------------------------------------------------------------------------


def test_golden_recipes_come_out_byte_for_byte(golden, tmp_path, run_command_line):
    """The first as a process of its own."""
    common = ["--delta_dfs_in_dir", "sparsity50", "--config_file", "sparsity50/pair.yaml", "--out_dir", tmp_path]
    for run, more, name in (
        (run_command_line, ["--gamma", "0.3", "--epsilon", "0.8", "--merge_method", "ties"], TIES),
        (run_here, ["--gamma=0.3", "--merge-method", "dare_ties", "--apply_lewis_to_weights"], DARE),
    ):
        done = run("lewis_merge.py", *common, *more, cwd=golden)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / name).read_bytes() == (golden / "sparsity50" / name).read_bytes()
    names = [name.replace(".yaml", end) for name in (TIES, DARE) for end in (".yaml", ".manifest.json")]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


def test_golden_recipes_of_unpruned_models(golden, tmp_path, monkeypatch):
    monkeypatch.chdir(golden)
    _golden_recipes("sparsity0", golden, tmp_path)


@pytest.mark.parametrize("setting", ["gsm8k_sparsity0", "gsm8k_sparsity50"])
def test_golden_recipes_of_real_text(setting, real_data, tmp_path, monkeypatch):
    monkeypatch.chdir(real_data / "golden")
    _golden_recipes(setting, real_data / "golden", tmp_path)


def _golden_recipes(setting, folder, out):
    common = ["--delta_dfs_in_dir", setting, "--config_file", f"{setting}/pair.yaml", "--out_dir", out]
    assert call(*common)[0] == 0
    assert call(*common, "--merge_method", "dare_ties", "--apply_lewis_to_weights", "True")[0] == 0
    for name in (TIES, DARE):
        assert (out / name).read_bytes() == (folder / setting / name).read_bytes()


# --- what it says and writes ------------------------------------------------------------------------------------------


def test_the_printout_holds_what_a_person_wants(work):
    code, out, err = call(*flags(work, "--control", "uniform", "--plot"))
    assert code == 0
    assert "minmax: 0.3 for the smallest delta" in out
    assert "math (models/math)" in out and "code (models/code)" in out
    frame = pd.read_csv(work / "dfs" / "math_delta.csv")
    assert "density       min 0.3000" in out and "max 0.8000" in out
    assert "by layer" in out and "by component" in out
    assert f"filters: {frame.size} per expert; each hits its own tensors and nothing else" in out
    assert "covered: 21 of 29 tensors" in out
    assert "embeddings and head: 26.1%, model.embed_tokens.weight" in out
    assert "norms and biases" in out
    assert "has no manifest.json" in err and "has no manifest.json" not in out
    written = sorted(path.name for path in (work / "out").iterdir())
    stem = TIES.removesuffix(".yaml")
    uniform = TIES.replace("_ties_", "_ties_uniform_")
    pictures = [f"{stem}_math_density.png", f"{stem}_code_density.png"]
    manifests = [name.replace(".yaml", ".manifest.json") for name in (TIES, uniform)]
    assert written == sorted([TIES, uniform, *manifests, *pictures])


def test_the_mean_in_a_picture_is_the_printed_one(work, monkeypatch):
    from utils.commands import decide_pictures

    titles = []
    monkeypatch.setattr(decide_pictures, "heatmap", lambda table, title, *more: titles.append(title) or b"")
    _, out, _ = call(*flags(work, "--plot"))
    printed = re.findall(r"density +min \S+, mean (\S+),", out)
    assert len(printed) == 2 and re.findall(r"mean (\S+) over parameters", "\n".join(titles)) == printed


def test_the_next_commands_can_be_pasted_and_do_not_share_a_folder(work):
    """Each recipe's model has a folder of its own; the evaluator is named with the config."""
    _, out, _ = call(*flags(work, "--control", "uniform"))
    lines = [line for line in out.partition("next:\n")[2].replace("\\\n", " ").splitlines() if "--" in line]
    merges, (evaluation,) = lines[:-1], lines[-1:]
    assert "utils/evaluator.py" in evaluation and f"--config {work / 'pair.yaml'}" in evaluation
    assert evaluation.split()[-2:] == [
        str(work / "out" / TIES),
        str(work / "out" / TIES.replace("_ties_", "_ties_uniform_")),
    ]
    assert len({merge.partition("--output_path ")[2] for merge in merges}) == 2
    interpreter, script, *words = shlex.split(merges[0])
    assert interpreter == sys.executable and script.endswith("utils/merger.py")
    assert "dry run" in done_here("utils/merger.py", *words, "--dry_run", cwd=work).stdout


def test_quiet_leaves_warnings_and_the_last_lines(work):
    code, out, err = call(*flags(work, "--quiet"))
    assert code == 0 and "warning: " in err
    assert (
        out.startswith(f"wrote {work / 'out' / TIES}\n")
        and "next:\n" in out
        and "density" not in out.split("next:")[0].replace("_density", "")
    )


def _densities(path, expert=1):
    parameters = yaml.safe_load(path.read_text())["models"][expert]["parameters"]
    return [item["value"] for item in parameters["density"][:-1]]


def _mean(work, path, expert=1):
    """The mean density over parameters, from the recipe and the checkpoint alone."""
    from utils.models.opening import open_checkpoint

    tensors = open_checkpoint(str(work / "models" / "base")).tensors
    parameters = yaml.safe_load(path.read_text())["models"][expert]["parameters"]
    sizes = []
    for item in parameters["density"][:-1]:
        (name,) = [name for name in tensors if name.startswith(item["filter"] + ".")]
        sizes.append(tensors[name].shape[0] * tensors[name].shape[1])
    values = _densities(path, expert)
    return sum(size * value for size, value in zip(sizes, values, strict=True)) / sum(sizes)


def test_the_uniform_control_has_the_guided_mean(work):
    assert call(*flags(work, "--control", "uniform"))[0] == 0
    guided, uniform = work / "out" / TIES, work / "out" / TIES.replace("_ties_", "_ties_uniform_")
    for expert in (1, 2):
        assert len(set(_densities(uniform, expert))) == 1
        assert _mean(work, uniform, expert) == pytest.approx(_mean(work, guided, expert), abs=1e-12)
    assert _densities(uniform, 1) != _densities(uniform, 2)


def test_a_mean_density_is_hit_by_both_recipes(work):
    code, out, _ = call(*flags(work, "--mean_density", "0.1", "--bound", "clip", "--control", "uniform"))
    assert code == 0 and "no longer bind" in out
    for tags in ("clip_mean0.1", "clip_mean0.1_uniform"):
        path = work / "out" / TIES.replace("_ties_", f"_ties_{tags}_")
        for expert in (1, 2):
            assert _mean(work, path, expert) == pytest.approx(0.1, abs=1e-9)


def test_clip_says_how_much_is_at_its_bounds(work):
    _, out, _ = call(*flags(work, "--bound", "clip"))
    values = _densities(work / "out" / TIES.replace("_ties_", "_ties_clip_"))
    low, high = (sum(value == bound for value in values) / len(values) for bound in (0.3, 0.8))
    assert f"at the bounds {low:.0%} of the tensors at 0.3, {high:.0%} at 0.8" in out


def test_lambda_and_out_dtype_reach_the_recipe(work):
    assert call(*flags(work, "--lambda", "0.7", "--out-dtype", "float32"))[0] == 0
    recipe = yaml.safe_load((work / "out" / TIES.replace("_ties_", "_ties_lambda0.7_out_float32_")).read_text())
    assert recipe["parameters"] == {"normalize": True, "int8_mask": True, "lambda": 0.7}
    assert recipe["out_dtype"] == "float32"


def test_the_order_of_csv_columns_does_not_matter(work):
    call(*flags(work))
    first = (work / "out" / TIES).read_bytes()
    edit_csv(work, lambda frame: frame[list(reversed(frame.columns))])
    code, out, _ = call(*flags(work))
    assert code == 0 and "already holds exactly this" in out
    assert (work / "out" / TIES).read_bytes() == first


def test_a_repeated_run_succeeds_and_changes_nothing(work):
    words = flags(work, "--plot", "--control", "uniform")
    assert call(*words)[0] == 0
    before = {path.name: path.stat().st_mtime_ns for path in (work / "out").iterdir()}
    code, out, _ = call(*words)
    assert code == 0 and out.count("already holds exactly this") == 6
    assert {path.name: path.stat().st_mtime_ns for path in (work / "out").iterdir()} == before


def test_other_content_needs_overwrite(work):
    call(*flags(work))
    (work / "out" / TIES).write_text("mine")
    assert TIES in refuses("out-exists", work, "--control", "uniform")  # the control is not written either
    assert call(*flags(work, "--overwrite"))[0] == 0
    assert yaml.safe_load((work / "out" / TIES).read_text())["merge_method"] == "ties"


def test_a_manifest_is_brought_up_to_date_with_its_recipe_only(work):
    """The same recipe of another measurement: its manifest changes, unless it is a file of the user's."""
    call(*flags(work))
    manifest = work / "out" / TIES.replace(".yaml", ".manifest.json")
    before = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**before, "versions": {}}))
    assert call(*flags(work))[0] == 0
    assert json.loads(manifest.read_text()) == before
    manifest.write_text("mine")
    assert manifest.name in refuses("out-exists", work)


def test_files_of_others_stay(work):
    (work / "out").mkdir()
    (work / "out" / "notes.txt").write_text("mine")
    assert call(*flags(work, "--overwrite"))[0] == 0
    assert (work / "out" / "notes.txt").read_text() == "mine"


# --- names ------------------------------------------------------------------------------------------------------------


def test_recorded_names_are_used_where_the_models_are_not_here(work, golden):
    write_norms(work, golden)
    (work / "models").unlink()
    code, out, err = call(*flags(work, "--control", "uniform"))
    assert code == 0, err
    assert "proven only against each other" in out and "no manifest.json" not in err
    assert (work / "out" / TIES).read_bytes() == (golden / "sparsity50" / TIES).read_bytes()


def test_without_names_or_models_nothing_is_proven_and_that_is_said(work, golden):
    (work / "models").unlink()
    code, _, err = call(*flags(work))
    assert code == 0 and "nothing could be proven" in err
    assert (work / "out" / TIES).read_bytes() == (golden / "sparsity50" / TIES).read_bytes()
    for more in (["--mean_density", "0.1"], ["--control", "uniform"]):
        assert more[0] in refuses("tensor-sizes-unknown", work, *more)


def test_a_full_folder_is_silent(work, golden):
    write_norms(work, golden)
    code, out, err = call(*flags(work, "--lambda", "0.4"))
    assert (code, err) == (0, "")
    assert "15 samples of gsm8k, sparsity_ratio 0.5" in out


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "gpt_neox", "phi3_tied", "llama_bias"])
def test_other_architectures_with_components_from_the_csv(family, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("base", "expert_1")):
        save_tiny(family, tmp_path / name, seed)
    paths = FAMILIES[family][2]
    (tmp_path / "dfs").mkdir()
    frame = pd.DataFrame({f"{path}_delta_expert_1_base": [0.2, 0.5, 0.3] for path in paths})
    frame.to_csv(tmp_path / "dfs" / "expert_1_delta.csv", index=False)
    models = [{"name": "./base", "type": "base"}, {"name": "./expert_1", "type": "expert_1"}]
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({"model_info": models}))
    code, out, err = call("--delta_dfs_in_dir", "dfs", "--config_file", "tiny.yaml", "--out_dir", "out", "--plot")
    assert code == 0, err
    recipe = yaml.safe_load((tmp_path / "out" / TIES.replace("pair", "tiny")).read_text())
    filters = [item["filter"] for item in recipe["models"][1]["parameters"]["density"][:-1]]
    assert filters == [f"{block_prefix(family)}.{layer}.{path}" for path in paths for layer in range(LAYERS)]
    assert ("by mergekit's definition\n" in out) == (family in ("qwen2", "gpt2"))


# --- warnings ---------------------------------------------------------------------------------------------------------


def test_weights_of_one_normalized_expert_get_a_warning(work):
    edit_config(work, target_model_names={"math": "models/math"})
    code, _, err = call(*flags(work, "--apply_lewis_to_weights"))
    assert code == 0 and "no effect" in err and "normalize: false" in err
    assert len(yaml.safe_load((work / "out" / TIES).read_text())["models"]) == 2
    _, _, err = call(*flags(work))
    assert "no effect" not in err


def test_an_edited_csv_is_taken_where_that_is_said(work, golden):
    write_norms(work, golden)
    edit_csv(work, lambda frame: frame * 0.5)
    code, _, err = call(*flags(work))
    assert code == 2 and "math_delta.csv differ" in err and "--accept_edited" in err
    code, _, err = call(*flags(work), "--accept_edited")
    assert code == 0 and "math_delta.csv differs" in err


def test_other_settings_get_a_warning(work, golden):
    write_norms(work, golden)
    edit_config(work, sparsity_ratio=0.1, nsamples=3)
    code, _, err = call(*flags(work))
    assert code == 0 and "sparsity_ratio 0.5" in err and "nsamples 15" in err


# --- help ------------------------------------------------------------------------------------------------------------


def test_help_and_mistakes_do_not_load_the_big_libraries(work, run_command_line):
    probe = (
        "import sys, lewis_merge; from utils.errors import run_command\n"
        "try: run_command(lewis_merge.main)\n"
        "except SystemExit as end: code = end.code\n"
        "heavy = {'torch', 'transformers', 'mergekit', 'pandas', 'matplotlib'} & set(sys.modules)\n"
        "print(code, heavy or 'light')"
    )
    (work / "probe.py").write_text(probe)
    root = str(Path(lewis_merge.__file__).parent)
    for arguments, code in ((["--help"], 0), (flags(work, "--merge_method", "tie"), 2)):
        done = run_command_line(work / "probe.py", *arguments, PYTHONPATH=root)
        assert done.stdout.splitlines()[-1] == f"{code} light", done.stderr


def test_help_names_every_flag_once():
    code, out, _ = call("--help")
    assert code == 0
    for flag in ("gamma", "epsilon", "merge_method", "bound", "mean_density", "control", "lambda", "out_dtype", "plot"):
        assert out.count(f"\n  --{flag} ") == 1
