"""Command 3 from recipe to published folder: bits equal to stock mergekit's, every family, and what goes wrong."""

import hashlib
import itertools
import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.commands_here import refused_here
from tests.conftest import ROOT
from tests.refusals import refusal_code
from tests.selected import few
from tests.tiny_checkpoints import FAMILIES, VOCABULARY
from tests.tiny_merges import (
    assert_same_tensors,
    merge_here,
    merge_stock,
    plain_recipe,
    recipe,
    save_models,
    tensors,
    write_recipe,
)
from tests.tiny_pairs import contents

# --- the same bits as stock mergekit ----------------------------------------------------------------------------------


METHODS = ("ties", "dare_ties", "della", "task_arithmetic", "linear", "breadcrumbs")


@pytest.mark.parametrize(
    ("method", "dtype"),
    few(
        itertools.product(METHODS, ("bfloat16", "float32")),
        *((method, "bfloat16") for method in METHODS),
        ("ties", "float32"),
    ),
)
def test_tensors_equal_stock_mergekits(copies, method, dtype):
    data = recipe(copies, method, dtype=dtype)
    assert_same_tensors(merge_here(copies, data, random_seed=7), merge_stock(copies, data, seed=7))


@pytest.mark.parametrize("method", ["dare_ties", "ties"])
def test_the_skipped_tokenizer_block_changes_no_bit(copies, method, capsys):
    data = recipe(copies, method, tokenizer_source="union")
    ours = merge_here(copies, data, random_seed=3, quiet=False)
    assert "byte-identical" in capsys.readouterr().out
    assert_same_tensors(ours, merge_stock(copies, data, seed=3))
    assert (ours / "tokenizer.json").read_bytes() == (copies / "base" / "tokenizer.json").read_bytes()


def test_out_dtype_and_shards_equal_stock_mergekits(copies):
    data = recipe(copies, dtype="float32", out_dtype="float16")
    ours = merge_here(copies, data, out_shard_size=20_000, async_write=True, write_threads=2)
    stock = merge_stock(copies, data, out_shard_size=20_000)
    assert len(list(ours.glob("model-*-of-*.safetensors"))) > 3
    assert {path.name for path in ours.glob("model*")} == {path.name for path in stock.glob("model*")}
    assert_same_tensors(ours, stock)


def test_one_seed_gives_one_result_and_another_gives_another(copies):
    data = recipe(copies, "dare_ties")
    first = tensors(merge_here(copies, data, "a", random_seed=1))
    again = tensors(merge_here(copies, data, "b", random_seed=1))
    other = tensors(merge_here(copies, data, "c", random_seed=2))
    name = "model.layers.0.mlp.down_proj.weight"
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first[name], other[name])


def test_slices_and_gradients_go_through(copies):
    data = {
        "slices": [
            {"sources": [{"model": str(copies / "base"), "layer_range": [0, 2]}]},
            {"sources": [{"model": str(copies / "code"), "layer_range": [1, 3]}]},
        ],
        "merge_method": "passthrough",
        "parameters": {"scale": [{"filter": "down_proj", "value": 0.5}, {"value": 1.0}]},
        "dtype": "bfloat16",
        "base_model": str(copies / "base"),
    }
    ours = merge_here(copies, data)
    assert json.loads((ours / "config.json").read_text())["num_hidden_layers"] == 4
    assert_same_tensors(ours, merge_stock(copies, data))


# --- every family -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", few(FAMILIES, "llama", "qwen2", "gemma3", "gpt2", "gpt_neox", "phi3_tied"))
def test_every_family_merges_whole(tmp_path, family, capsys):
    save_models(tmp_path, family, ("base", "code"))
    models = [{"model": str(tmp_path / name), "parameters": {"weight": 0.5}} for name in ("base", "code")]
    data = {"models": models, "merge_method": "linear", "dtype": "float32", "base_model": str(tmp_path / "base")}
    ours = tensors(merge_here(tmp_path, data, quiet=False))
    base, code = tensors(tmp_path / "base"), tensors(tmp_path / "code")
    assert sorted(ours) == sorted(base)
    for name in base:
        torch.testing.assert_close(ours[name], (base[name].float() + code[name].float()) / 2)
    total = 2 * len(base)
    assert f"coverage: {total} of {total} tensors of the inputs are read" in capsys.readouterr().out
    _generates(tmp_path / "merged", base)


def _generates(folder: Path, like: dict) -> None:
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and like
    logits = model(torch.arange(3, 13)[None]).logits
    assert logits.shape == (1, 10, VOCABULARY) and torch.isfinite(logits).all()


# Where mergekit's own reading of an architecture works, the bits are its own.
@pytest.mark.parametrize("family", few(["mistral", "qwen2", "gemma2", "phi3", "gpt2"], "gemma2", "gpt2"))
def test_families_equal_stock_mergekit(tmp_path, family):
    save_models(tmp_path, family, ("base", "code"))
    data = plain_recipe(tmp_path, family)
    assert_same_tensors(merge_here(tmp_path, data), merge_stock(tmp_path, data))


def test_a_tied_base_and_an_expert_with_a_head_of_its_own(tmp_path):
    save_models(tmp_path, names=("base",), tie_word_embeddings=True)
    save_models(tmp_path, names=("code",))
    data = recipe(tmp_path, experts=("code",))
    assert_same_tensors(merge_here(tmp_path, data, fast_selection=False), merge_stock(tmp_path, data))


# --- the command as a user types it -----------------------------------------------------------------------------------


def test_the_command_of_the_reference(copies, run_command_line, monkeypatch):
    for name in ("base", "code", "math"):
        (copies / "m").mkdir(exist_ok=True)
        (copies / name).rename(copies / "m" / name)
    data = recipe(Path("m"), tokenizer_source="union", parameters={"normalize": True, "int8_mask": True})
    write_recipe(copies / "recipe.yaml", data)
    done = run_command_line(
        "utils/merger.py", "--output_path", "output/merged_models", "--merge_config", "recipe.yaml",
        "--copy_tokenizer", "True", "--lazy_unpickle", "False", "--low_cpu_memory", "False",
        "--trust_remote_code", "True", "--allow_crimes", "True", cwd=copies,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "merging: 100%" in done.stderr and "\r" not in done.stderr  # no terminal: a log file, say
    assert "mergekit 0.1" in done.stdout and "seed 0" in done.stdout
    target = copies / "output" / "merged_models"
    absolute = recipe(copies / "m", tokenizer_source="union", parameters={"normalize": True, "int8_mask": True})
    assert_same_tensors(target, merge_stock(copies, absolute))
    # the last lines load it
    lines = [line.strip() for line in done.stdout.splitlines()[-2:]]
    monkeypatch.chdir(copies)
    loaded: dict = {}
    exec("\n".join(lines), loaded)
    assert loaded["model"].config.architectures == ["LlamaForCausalLM"]


def test_help_and_wrong_input_answer_at_once(copies, run_command_line):
    bad = recipe(copies)
    bad["models"][1]["parameters"]["density"] = 1.5
    write_recipe(copies / "bad.yaml", bad)
    before = _seconds_of_processes()
    assert run_command_line("utils/merger.py", "--help").returncode == 0
    done = run_command_line("utils/merger.py", "--output_path", copies / "out", "--merge_config", copies / "bad.yaml")
    assert _seconds_of_processes() - before < 3  # both; importing mergekit alone takes longer
    assert refusal_code(done) == "recipe-out-of-range"
    assert not (copies / "out").exists()


def _seconds_of_processes() -> float:
    """The processor time of all processes that have ended; the time on a clock depends on what else runs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


BOTH = ("--output_path", "o", "--merge_config", "x.yaml")


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ((), "flag-invalid"),
        (("--merge_config", "x.yaml"), "flag-invalid"),
        ((*BOTH, "--allow_crime", "True"), "flag-unknown"),
        ((*BOTH, "--copy_tokenizer", "maybe"), "flag-invalid"),
        ((*BOTH, "--out_shard_size", "many"), "flag-invalid"),
        ((*BOTH, "--random_seed", "-1"), "flag-invalid"),
        ((*BOTH, "--safe_serialization", "False"), "flag-pickles"),
        ((*BOTH, "--cuda", "--device", "cpu"), "flag-device-contradiction"),
        ((*BOTH, "--multi_gpu", "--device", "cuda:1"), "flag-device-contradiction"),
        (BOTH, "file-missing"),
        ((*BOTH, "--output-path", "p"), "flag-twice"),
    ],
)
def test_wrong_flags(tmp_path, arguments, code):
    refused_here(code, "utils/merger.py", *arguments, cwd=tmp_path)


def test_dry_run_writes_nothing(copies, capsys):
    from utils.merger import main

    write_recipe(copies / "recipe.yaml", recipe(copies))
    before = contents(copies)
    sys_argv = [
        "merger.py",
        "--output-path",
        copies / "new" / "out",
        "--merge-config",
        copies / "recipe.yaml",
        "--dry-run",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(word) for word in sys_argv])
        main()
    printed = capsys.readouterr().out
    assert "nothing was written" in printed and "disk:" in printed and "memory:" in printed
    assert contents(copies) == before


def test_manifest_and_hashes_of_inputs(copies):
    target = merge_here(copies, recipe(copies), hash_inputs=True, random_seed=5)
    data = json.loads((target / "manifest.json").read_text())
    assert data["seed"] == 5 and data["versions"]["mergekit"] == "0.1.5"
    assert data["recipe"]["sha256"] == hashlib.sha256((copies / "merged.yaml").read_bytes()).hexdigest()
    for entry, name in zip(data["inputs"], ("base", "code", "math"), strict=True):
        weights = copies / name / "model.safetensors"
        assert entry["name"] == name and entry["files"] == {"model.safetensors": weights.stat().st_size}
        assert entry["sha256"] == {"model.safetensors": hashlib.sha256(weights.read_bytes()).hexdigest()}
    files = [path for path in target.iterdir() if path.name != "manifest.json"]
    assert data["bytes"] == {path.name: path.stat().st_size for path in files}
    assert data["files"] == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    assert all((path.stat().st_mode & 0o777) == 0o644 for path in target.iterdir())


def test_only_the_script_itself_changes_the_path():
    program = "import sys; before = list(sys.path); import utils.merger; assert sys.path == before"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    script = (
        "import sys, runpy, pathlib\n"
        f"root = {str(ROOT)!r}\n"
        "sys.path[0], sys.argv = root + '/utils', ['merger.py', '--help']\n"
        "try: runpy.run_path(root + '/utils/merger.py', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "assert sys.path[0] == root and root + '/utils' not in sys.path, sys.path\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_verify_names_each_deviation(copies, run_command_line):
    target = merge_here(copies, recipe(copies))
    fine = run_command_line("utils/merger.py", "--verify", target)
    assert fine.returncode == 0 and "have the SHA-256" in fine.stdout, fine.stderr
    with open(target / "model.safetensors", "r+b") as file:
        file.seek(5000)
        file.write(b"\0\1\2\3")
    (target / "README.md").unlink()
    bad = run_command_line("utils/merger.py", "--verify", target)
    assert refusal_code(bad) == "verify-deviation"
    assert "README.md is missing" in bad.stderr and "model.safetensors has other content" in bad.stderr
    assert refusal_code(run_command_line("utils/merger.py", "--verify", copies)) == "verify-no-manifest"
    assert refusal_code(run_command_line("utils/merger.py", "--verify", target, "--overwrite")) == "verify-not-alone"
