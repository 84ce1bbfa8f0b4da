"""What is merged in pieces and what is left to mergekit, on whole recipes; and a watch on the code that is replaced."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from mergekit import merge_methods
from safetensors.torch import load_file, save_file

from tests.conftest import ROOT
from tests.measured_merge import estimated_and_measured
from tests.refusals import refused
from tests.selected import few
from tests.tiny_checkpoints import poison
from tests.tiny_merges import assert_same_tensors, merge_here, merge_stock, recipe, save_models, tensors, write_recipe
from tests.tiny_pairs import contents
from utils.errors import UserError
from utils.merging.pieces import choice
from utils.merging.pieces.choice import REPLACED, replaced_code


def assert_same_files(ours: Path, theirs: Path) -> None:
    """Weight files and index are equal down to the byte."""
    names = sorted(path.name for path in theirs.glob("model*"))
    assert sorted(path.name for path in ours.glob("model*")) == names and names
    for name in names:
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name


def path_line(text: str) -> str:
    """The line that says which way was taken."""
    (line,) = (line for line in text.splitlines() if line.startswith("path: "))
    return line.removesuffix("; after a kill the merge begins anew")


# --- a mergekit that computes otherwise -------------------------------------------------------------------------------


def test_the_replaced_code_is_the_code_that_was_compared():
    """If this fails, mergekit has changed: read the comment at REPLACED."""
    assert replaced_code() in REPLACED


def test_with_other_code_mergekit_does_everything(copies, monkeypatch, capsys):
    monkeypatch.setattr(choice, "replaced_code", lambda: "0123456789abcdef")
    merge_here(copies, recipe(copies), quiet=False)
    assert "all tensors by mergekit: this mergekit computes ties by other code" in path_line(capsys.readouterr().out)


def test_the_digest_covers_what_is_replaced(monkeypatch):
    from mergekit import sparsify

    def magnitude(tensor, density, rescale_norm=None):
        return tensor

    before = replaced_code()
    monkeypatch.setattr(sparsify, "magnitude", magnitude)
    replaced_code.cache_clear()
    try:
        assert replaced_code() != before
    finally:
        replaced_code.cache_clear()


@pytest.mark.parametrize("name", ["ties", "breadcrumbs", "breadcrumbs_ties", "task_arithmetic"])
def test_parameters_of_the_replaced_methods(name):
    method = merge_methods.get(name)
    scopes = {parameter.name: parameter.scope.value for parameter in method.spec.parameters}
    expected = {"int8_mask": "shared", "normalize": "shared", "rescale": "shared", "lambda": "shared"}
    expected |= {"weight": "non_base", "density": "non_base"}
    assert scopes == expected | ({"gamma": "non_base"} if name.startswith("breadcrumbs") else {})
    assert method.spec.optional_tensor_policy.value == "error"


# --- whole recipes ----------------------------------------------------------------------------------------------------

VARIANTS = {
    "plain": {},
    "normalized": {"parameters": {"normalize": True, "int8_mask": True}},
    "not normalized": {"parameters": {"normalize": False, "lambda": 0.7}},
    "other dtypes": {"dtype": "float32", "out_dtype": "float16"},
    "no dtype": {"dtype": None},
    "lambda by layer": {"parameters": {"lambda": [{"filter": "layers.1.", "value": 0.2}, {"value": 1.1}]}},
}
ALL_HERE = "30 of 30 tensors by exact selection in pieces, without mergekit's sorting"


@pytest.mark.parametrize(
    ("method", "variant"),
    few(
        itertools.product(("ties", "breadcrumbs_ties"), VARIANTS),
        *(("ties", variant) for variant in VARIANTS),
        ("breadcrumbs_ties", "other dtypes"),
    ),
)
def test_files_equal_stock_mergekits(copies, method, variant, capsys):
    data = recipe(copies, method, **VARIANTS[variant])
    ours = merge_here(copies, data, quiet=False)
    assert_same_files(ours, merge_stock(copies, data))
    assert path_line(capsys.readouterr().out).endswith(ALL_HERE)


def test_norms_of_whole_tensors_are_left_to_mergekit(copies, capsys):
    data = recipe(copies, parameters={"rescale": True})
    assert_same_files(merge_here(copies, data, "a", quiet=False), merge_stock(copies, data, "b"))
    reason = "rescale: true takes norms of whole tensors"
    counting = "mergekit's executor selects by counting, without sorting"
    assert path_line(capsys.readouterr().out) == f"path: all tensors by mergekit: {reason}; {counting}"
    for model in data["models"][1:]:
        model["parameters"]["density"][-1]["value"] = 1
    assert_same_files(merge_here(copies, data, "c", quiet=False), merge_stock(copies, data, "d"))
    assert f"; 3 by mergekit ({reason})" in path_line(capsys.readouterr().out)


@pytest.mark.parametrize("method", ["breadcrumbs", "task_arithmetic", "linear"])
def test_files_of_other_methods_equal_stock_mergekits(copies, method):
    data = recipe(copies, method, experts=("code", "math", "law"), dtype="float32", out_dtype="bfloat16")
    assert_same_files(merge_here(copies, data), merge_stock(copies, data))


@pytest.mark.parametrize("size", few([0, 3_000, 20_000], 3_000))
def test_shards_and_index_equal_stock_mergekits(copies, size):
    data = recipe(copies, dtype="bfloat16", out_dtype="float32")
    assert_same_files(merge_here(copies, data, out_shard_size=size), merge_stock(copies, data, out_shard_size=size))


def test_inputs_in_several_dtypes_and_shards(copies):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(copies / "code", dtype=torch.float32)
    shutil.rmtree(copies / "code")
    model.save_pretrained(copies / "code", max_shard_size="20KB")
    shutil.copy(copies / "base" / "tokenizer.json", copies / "code")
    shutil.copy(copies / "base" / "tokenizer_config.json", copies / "code")
    assert len(list((copies / "code").glob("*.safetensors"))) > 2
    for keys in ({"dtype": None, "out_dtype": "bfloat16"}, {"dtype": "bfloat16"}):
        data = recipe(copies, **keys)
        ours, stock = merge_here(copies, data, f"a{len(keys)}"), merge_stock(copies, data, f"b{len(keys)}")
        assert_same_files(ours, stock)


@pytest.mark.parametrize("size", [0, 10_000])
def test_slices_that_move_and_repeat_layers(copies, size, capsys):
    """In several files, tensors made from the same input may lie in another order than mergekit's."""
    slices = []
    for first, stop in ((0, 2), (1, 3), (0, 1)):
        sources = [{"model": str(copies / "base"), "layer_range": [first, stop]}]
        for name in ("code", "math"):
            parameters = {"density": [{"filter": f"layers.{first}.", "value": 0.3}, {"value": 0.8}], "weight": 0.5}
            sources.append({"model": str(copies / name), "layer_range": [first, stop], "parameters": parameters})
        slices.append({"sources": sources})
    data = {"slices": slices, "merge_method": "ties", "base_model": str(copies / "base"), "dtype": "bfloat16"}
    ours = merge_here(copies, data, out_shard_size=size, quiet=False)
    assert "48 of 48 tensors by exact selection" in path_line(capsys.readouterr().out)
    stock = merge_stock(copies, data, out_shard_size=size)
    (assert_same_tensors if size else assert_same_files)(ours, stock)


def test_without_the_switch_the_result_is_stock_mergekits(copies, capsys):
    data = recipe(copies)
    ours = merge_here(copies, data, fast_selection=False, quiet=False)
    assert path_line(capsys.readouterr().out) == "path: all tensors by mergekit: --fast_selection is off"
    assert_same_files(ours, merge_stock(copies, data))
    assert json.loads((ours / "manifest.json").read_text())["options"]["fast_selection"] is False


@pytest.mark.parametrize("method", ["dare_ties", "della", "dare_linear"])
def test_methods_that_draw_are_left_to_mergekit_with_its_masks(copies, method, capsys):
    data = recipe(copies, method)
    ours = merge_here(copies, data, quiet=False, random_seed=11)
    assert f"all tensors by mergekit: {method} draws random numbers" in path_line(capsys.readouterr().out)
    assert_same_files(ours, merge_stock(copies, data, seed=11))


def test_more_models_than_can_be_added_up_in_any_order(copies, capsys):
    for name in ("four", "five"):
        shutil.copytree(copies / "law", copies / name)
        found = load_file(copies / name / "model.safetensors")
        changed = {key: (value.float() * 1.25).to(value.dtype) for key, value in found.items()}
        save_file(changed, copies / name / "model.safetensors", metadata={"format": "pt"})
    data = recipe(copies, "task_arithmetic", experts=("code", "math", "law", "four", "five"))
    assert_same_files(merge_here(copies, data, quiet=False), merge_stock(copies, data))
    assert path_line(capsys.readouterr().out) == "path: all tensors by mergekit: more than 4 changed models"


def test_aligned_vocabularies_go_to_mergekit_and_the_rest_does_not(copies, capsys):
    place = copies / "math" / "tokenizer.json"
    tokenizer = json.loads(place.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = sorted(vocabulary, key=vocabulary.get)[10:12]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    place.write_text(json.dumps(tokenizer))
    data = recipe(copies, tokenizer_source="base")
    for model in data["models"][1:]:
        model["parameters"]["density"] = [*model["parameters"]["density"][:3], {"value": 1}]
    ours = merge_here(copies, data, quiet=False)
    line = path_line(capsys.readouterr().out)
    assert "; 2 by mergekit (vocabularies are aligned)" in line
    assert_same_files(ours, merge_stock(copies, data))


# --- what goes wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [("model.norm.weight", float("inf")), ("model.layers.1.mlp.down_proj.weight", float("nan"))],
)
def test_the_tensor_that_is_not_finite_is_named(copies, name, value):
    poison(copies / "math", name, value)
    with refused("merge-not-finite"):
        merge_here(copies, recipe(copies))
    assert not (copies / "merged").exists() and not list(copies.glob(".merged*"))


@pytest.mark.parametrize(
    ("error", "expected", "text"),
    [
        (OSError(28, "No space left on device"), UserError, "No space left.*make room"),
        (MemoryError(), UserError, "memory ran out"),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
    ],
)
def test_running_out_while_writing_publishes_nothing_and_the_next_run_goes_on(
    copies, monkeypatch, error, expected, text
):
    write, written = os.pwrite, []

    def fail_later(*arguments):
        written.append(threading.current_thread())
        if len(written) > 20:
            raise error
        return write(*arguments)

    monkeypatch.setattr(os, "pwrite", fail_later)
    with pytest.raises(expected, match=text):
        merge_here(copies, recipe(copies))
    assert not (copies / "merged").exists()
    assert not any(thread.is_alive() for thread in set(written) - {threading.main_thread()})
    (kept,) = copies.glob(".merged*")
    monkeypatch.undo()
    merge_here(copies, recipe(copies))
    assert (copies / "merged" / "config.json").exists() and not kept.exists()


@pytest.mark.parametrize("signum", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_killed_in_the_middle_leaves_nothing(copies, signum):
    write_recipe(copies / "recipe.yaml", recipe(copies))
    before = contents(copies)
    program = (
        "import os, sys, time, runpy\n"
        "write = os.pwrite\n"
        "def slow(*a):\n    print('PIECE', flush=True)\n    time.sleep(0.3)\n    return write(*a)\n"
        "os.pwrite = slow\n"
        "sys.argv = ['merger.py', '--output_path', 'out/model', '--merge_config', 'recipe.yaml']\n"
        f"sys.path[0] = {str(ROOT / 'utils')!r}\n"
        f"runpy.run_path({str(ROOT / 'utils' / 'merger.py')!r}, run_name='__main__')\n"
    )
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", program], cwd=copies, **pipes)
    next(line for line in process.stdout if line.startswith("PIECE"))
    process.send_signal(signum)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + signum and "Traceback" not in errors
    if "what is finished stays" in errors:  # a tensor was complete already
        (kept,) = (copies / "out").iterdir()
        assert kept.name.startswith(".model.") and str(kept) in errors
        shutil.rmtree(copies / "out")
    assert contents(copies) == before


def test_values_of_a_merge_by_hand(copies):
    """One tensor of `ties` computed from its description: trim, elect signs, average those that agree."""
    name = "model.layers.0.mlp.down_proj.weight"
    data = recipe(copies, dtype="float32", out_dtype="float32")
    merged = tensors(merge_here(copies, data))[name]
    base = tensors(copies / "base")[name].float()
    changes, weights = [], torch.tensor([1.0, 0.75])
    for model in ("code", "math"):
        change = tensors(copies / model)[name].float() - base
        threshold = change.abs().flatten().sort(descending=True).values[int(0.3 * change.numel()) - 1]
        changes.append(torch.where(change.abs() >= threshold, change, 0.0))
    weighted = torch.stack(changes) * weights.view(2, 1, 1)
    agree = weighted.sign() == torch.where(weighted.sum(0) >= 0, 1.0, -1.0)
    divisor = (agree * weights.view(2, 1, 1)).sum(0)
    expected = base + (weighted * agree).sum(0) / torch.where(divisor == 0, 1.0, divisor)
    torch.testing.assert_close(merged, expected)


@pytest.mark.slow
def test_memory_stays_within_the_estimate(tmp_path):
    save_models(tmp_path, names=("base", "code", "math"), vocab_size=400_000, hidden_size=96)
    for keys in ({"dtype": "bfloat16"}, {"dtype": "float32", "out_dtype": "bfloat16"}):
        write_recipe(tmp_path / "r.yaml", recipe(tmp_path, **keys))
        estimate, measured = estimated_and_measured(tmp_path, executor=False, counting=True)
        # the estimate leaves out what the runtime takes once; the tensors that are merged take 154 MB each in float32
        assert estimate / 1.5 < measured < min(2 * estimate + 100e6, 200e6), (estimate, measured)
