"""Command 3 when something goes wrong: nothing is left, nothing is lost, and the same line goes on.

python -m pytest tests/test_merger_failures.py
"""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT
from tests.faulty import Failing, full
from tests.refusals import refused
from tests.tiny_checkpoints import edit_tensors, poison
from tests.tiny_merges import assert_refused, assert_same_tensors, merge_here, merge_stock, recipe, write_recipe
from tests.tiny_pairs import contents, edit_json, save_tokenizer
from utils.merging.plan import forget_inputs
from utils.merging.run import run_merge
from utils.publishing.kept import kept_work
from utils.publishing.siblings import PROGRESS

# --- what goes wrong while it merges ----------------------------------------------------------------------------------


def change(folder: Path, name: str, edit) -> None:
    """Edit one tensor of a single-file model."""
    edit_tensors(folder, lambda tensors: tensors.update({name: edit(tensors[name])}))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("async_write", [False, True])
def test_a_value_that_is_not_finite_stops_the_merge(copies, value, async_write):
    name = "model.layers.1.self_attn.v_proj.weight"
    poison(copies / "math", name, value)
    assert_refused(
        copies,
        recipe(copies, "task_arithmetic"),
        "merge-not-finite",
        name,
        async_write=async_write,
        out_shard_size=10_000,
    )


def test_overflow_of_the_saved_dtype_is_noticed(copies):
    change(copies / "code", "model.norm.weight", lambda tensor: tensor + 1e6)
    data = recipe(copies, "task_arithmetic", dtype="float32", out_dtype="float16")
    assert_refused(copies, data, "merge-not-finite", "model.norm.weight")


@pytest.mark.parametrize("error", ["full", "memory", "gpu"])
def test_running_out_while_writing_leaves_nothing(copies, monkeypatch, error):
    import safetensors.torch
    from safetensors import SafetensorError

    failures = {
        "full": SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        "memory": MemoryError(),
        "gpu": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    }
    written = []
    save = safetensors.torch.save_file

    def fail_third(*arguments, **keywords):
        written.append(1)
        if len(written) == 3:
            raise failures[error]
        save(*arguments, **keywords)

    monkeypatch.setattr(safetensors.torch, "save_file", fail_third)
    code, words = {
        "full": ("merge-weights-io", "make room"),
        "memory": ("memory-host", "memory ran out"),
        "gpu": ("memory-gpu", "--device cpu"),
    }[error]
    assert_refused(
        copies,
        recipe(copies),
        code,
        words,
        out_shard_size=10_000,
        fast_selection=False,
    )


def test_a_disk_that_is_full_for_the_config_is_no_fault_of_the_model(copies, monkeypatch):
    from transformers import LlamaConfig

    save = Failing(LlamaConfig.save_pretrained, 1, full())
    monkeypatch.setattr(LlamaConfig, "save_pretrained", lambda config, folder: save(config, folder))
    with pytest.raises(OSError, match="No space left") as caught:
        merge_here(copies, recipe(copies), "part")
    assert Path(caught.value.filename).name == "config.json"


def test_memory_that_runs_out_in_the_check_is_no_fault_of_the_result(copies, monkeypatch):
    from utils.merging import result_check

    report = Failing(result_check.loading_report, 1, RuntimeError("can't start new thread"))
    monkeypatch.setattr(result_check, "loading_report", report)
    with pytest.raises(RuntimeError, match="can't start new thread") as caught:
        merge_here(copies, recipe(copies), "part")
    assert kept_work(caught.value)


def test_values_that_transformers_does_not_write_are_the_models_fault(copies, monkeypatch):
    from transformers import LlamaConfig

    save = Failing(LlamaConfig.save_pretrained, 1, OSError("this config cannot be saved"))
    monkeypatch.setattr(LlamaConfig, "save_pretrained", lambda config, folder: save(config, folder))
    with refused("merge-config-unwritable"):
        merge_here(copies, recipe(copies), "part")


@pytest.mark.parametrize("fast_selection", [True, False])
@pytest.mark.parametrize("step", ["write_small_files", "describe_result"])
def test_a_full_disk_after_the_weights_costs_no_weights(copies, monkeypatch, step, fast_selection, capsys):
    from utils.merging import small_files as result_files

    how = {"out_shard_size": 20_000, "fast_selection": fast_selection}
    whole = merge_here(copies, recipe(copies), "whole", **how)
    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space left") as caught:
        patched.setattr(result_files, step, Failing(getattr(result_files, step), 1, full()))
        merge_here(copies, recipe(copies), "part", **how)
    kept = kept_work(caught.value).folder
    assert {path.name for path in copies.glob(".*")} == {kept.name} and not (copies / "part").exists()
    inodes = {path.name: path.stat().st_ino for path in kept.glob("*.safetensors")}
    capsys.readouterr()
    part = merge_here(copies, recipe(copies), "part", quiet=False, **how)
    said = re.search(r"resumed: (\d+) of (\d+) tensors", capsys.readouterr().out)
    assert said[1] == said[2]
    assert inodes == {path.name: path.stat().st_ino for path in part.glob("*.safetensors")}
    assert_same_model(part, whole)
    assert not list(copies.glob(".*"))


@pytest.mark.parametrize(
    ("spoil", "ending", "words"),
    [
        (lambda folder: (folder / "config.json").write_text("{}"), "unloadable", "cannot load it"),
        (lambda folder: edit_json(folder / "config.json", hidden_size=64), "wrong", "do not fit config.json"),
        (lambda folder: edit_json(folder / "config.json", num_hidden_layers=4), "wrong", "missing for the model class"),
        (lambda folder: edit_json(folder / "config.json", vocab_size=90), "wrong", "do not fit config.json"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "unloadable", "tokenizer cannot be loaded"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "wrong", "tokenizer of the base is missing"),
        (lambda folder: (folder / "generation_config.json").unlink(), "wrong", "generation_config.json of the base is missing"),
        (lambda folder: change(folder, "model.norm.weight", lambda tensor: tensor[:5]), "wrong", "has shape [5]"),
        (lambda folder: change(folder, "model.norm.weight", lambda tensor: tensor.float()), "wrong", "planned was bfloat16"),
    ],
)  # fmt: skip
def test_a_result_that_fails_its_checks_is_not_published(copies, monkeypatch, spoil, ending, words):
    from utils.merging import small_files as result_files

    write = result_files.write_small_files

    def write_and_spoil(ready, folder):
        write(ready, folder)
        spoil(folder)

    monkeypatch.setattr(result_files, "write_small_files", write_and_spoil)
    assert_refused(copies, recipe(copies), f"merge-result-{ending}", words)


# --- overwriting ------------------------------------------------------------------------------------------------------


def test_smaller_shards_leave_no_stale_file(copies):
    merge_here(copies, recipe(copies))
    target = merge_here(copies, recipe(copies, "task_arithmetic"), overwrite=True, out_shard_size=20_000)
    assert not (target / "model.safetensors").exists()
    assert set(contents(target)) == {*json.loads((target / "manifest.json").read_text())["files"], "manifest.json"}
    assert_same_tensors(target, merge_stock(copies, recipe(copies, "task_arithmetic")))


def test_an_earlier_merge_is_kept_unless_asked_and_if_the_new_one_fails(copies):
    target = merge_here(copies, recipe(copies))
    assert_refused(copies, recipe(copies, "linear"), "out-exists", "give --overwrite")
    poison(copies / "code", "model.norm.weight")
    assert_refused(copies, recipe(copies), "merge-not-finite", "model.norm.weight", overwrite=True)
    (target / "notes.txt").write_text("mine")
    assert_refused(copies, recipe(copies), "out-foreign-files", "notes.txt", overwrite=True)


def test_a_file_that_appears_during_the_merge_survives(copies, monkeypatch):
    from utils.merging import small_files as result_files

    target = merge_here(copies, recipe(copies))
    describe = result_files.describe_result

    def meanwhile(*arguments):
        (target / "notes.txt").write_text("mine")
        return describe(*arguments)

    monkeypatch.setattr(result_files, "describe_result", meanwhile)
    with refused("out-foreign-files"):
        merge_here(copies, recipe(copies), overwrite=True)
    assert (target / "notes.txt").read_text() == "mine"
    assert (target / "model.safetensors").exists()
    monkeypatch.setattr(result_files, "describe_result", describe)
    (target / "notes.txt").rename(copies / "notes.txt")
    merge_here(copies, recipe(copies), overwrite=True)
    assert not list(copies.glob(".*"))


def start_merge(copies: Path, *arguments: str) -> subprocess.Popen:
    """The command with a merge that lasts: it waits before every shard until killed."""
    program = (
        "import sys, time, runpy, safetensors.torch as s\n"
        "save = s.save_file\n"
        "def slow(*a, **k):\n    save(*a, **k)\n    print('SHARD', flush=True)\n    time.sleep(30)\n"
        "s.save_file = slow\n"
        f"sys.argv = ['merger.py', *{[str(a) for a in arguments]!r}]\n"
        f"sys.path[0] = {str(ROOT / 'utils')!r}\n"
        f"runpy.run_path({str(ROOT / 'utils' / 'merger.py')!r}, run_name='__main__')\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", program], cwd=copies, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize(
    "signum", [*(pytest.param(one, marks=pytest.mark.slow) for one in (signal.SIGTERM, signal.SIGINT)), signal.SIGKILL]
)
def test_killed_in_the_middle(copies, signum, capsys):
    write_recipe(copies / "recipe.yaml", recipe(copies))
    before = contents(copies)
    process = start_merge(
        copies, "--output_path", "out/model", "--merge_config", "recipe.yaml", "--out_shard_size", "10000",
        "--fast_selection", "False",
    )  # fmt: skip
    for line in process.stdout:
        if line.startswith("SHARD"):
            break
    if signum == signal.SIGKILL:  # meanwhile a second run of the same output is refused
        with refused("out-in-use"):
            merge_here(copies, recipe(copies), "out/model", random_seed=1)
        (copies / "out" / "model.yaml").unlink()
    process.send_signal(signum)
    _, errors = process.communicate(timeout=30)
    if signum == signal.SIGKILL:
        (stage,) = (copies / "out").iterdir()
        assert stage.name.startswith(".model.") and stage.name.endswith(".part")
        target = merge_here(copies, recipe(copies), "out/model")
        assert f"removed what a killed run has left: {stage}" in capsys.readouterr().err
        assert [path.name for path in (copies / "out").iterdir()] == ["model", "model.yaml"]
        assert (target / "manifest.json").exists()
    else:
        assert process.returncode == 128 + signum and "Traceback" not in errors
        assert contents(copies) == before


# --- the same line again ----------------------------------------------------------------------------------------------


def test_a_finished_merge_is_not_made_again(copies, capsys):
    target = merge_here(copies, recipe(copies))
    before = contents(copies)
    merge_here(copies, recipe(copies))
    assert f"{target} already holds exactly this merge" in capsys.readouterr().out
    assert contents(copies) == before
    assert_refused(copies, recipe(copies), "out-exists", random_seed=1)
    assert_refused(copies, recipe(copies), "out-exists", out_shard_size=20_000)
    (copies / "code" / "model.safetensors").touch()
    assert_refused(copies, recipe(copies), "out-exists")


def test_a_merge_with_other_tokens_is_another_one(copies):
    """Of a model that gives its tokens alone, too."""
    donor = save_tokenizer(shutil.copytree(copies / "code", copies / "donor"))
    data = recipe(copies, tokenizer={"source": str(donor)})
    merge_here(copies, data)
    (donor / "tokenizer.json").touch()
    assert_refused(copies, data, "out-exists")


def test_a_tokenizer_that_changed_while_weights_were_merged_is_not_published(copies, monkeypatch):
    def merged_meanwhile(*given):
        run_merge(*given)
        save_tokenizer(copies / "base", bos=False)

    monkeypatch.setattr("utils.merging.run.run_merge", merged_meanwhile)
    with refused("merge-settings-changed"):
        merge_here(copies, recipe(copies))
    assert not (copies / "merged").exists() and not list(copies.glob(".*"))


def test_a_merge_with_other_code_of_its_base_is_another_one(copies, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    code = copies / "base" / "modeling_own.py"
    code.write_text("from transformers import LlamaForCausalLM\n\n\nclass Own(LlamaForCausalLM):\n    pass\n")
    edit_json(copies / "base" / "config.json", auto_map={"AutoModelForCausalLM": "modeling_own.Own"})
    target = merge_here(copies, recipe(copies), trust_remote_code=True)
    assert (target / code.name).read_text() == code.read_text()
    code.touch()
    assert_refused(copies, recipe(copies), "out-exists", trust_remote_code=True)


@pytest.mark.parametrize("change", ["config", "gone", "cut", "added"])
def test_a_finished_merge_that_was_changed_is_not_called_finished(copies, change):
    target = merge_here(copies, recipe(copies))
    whole = contents(target)
    if change == "config":
        (target / "config.json").write_text("{}")
    elif change == "gone":
        (target / "model.safetensors").unlink()
    elif change == "cut":
        os.truncate(target / "model.safetensors", 100)
    else:
        (target / "notes.txt").write_text("mine")
    for more in ({}, {"restart": True}, {"dry_run": True}):
        assert_refused(copies, recipe(copies), "out-changed", "--overwrite", **more)
    if change != "gone":
        assert_refused(copies, recipe(copies), "out-foreign-files", overwrite=True)
        for name in {name for name in contents(target) if contents(target)[name] != whole.get(name)}:
            (target / name).unlink()  # as the message says
    merge_here(copies, recipe(copies), overwrite=True)
    assert set(contents(target)) == set(whole) and contents(target)["config.json"] == whole["config.json"]


def assert_same_model(part: Path, whole: Path) -> None:
    """The same files with the same bytes; a card and a manifest have names and times in them."""
    ours, theirs = contents(part), contents(whole)
    assert set(ours) == set(theirs)
    differing = {name for name in ours if ours[name] != theirs[name]}
    assert differing <= {"README.md", "manifest.json"}


@pytest.mark.parametrize("at", [2, 8, 15, 25, 30])
@pytest.mark.parametrize(("call", "code"), [("pwrite", errno.ENOSPC), ("fdatasync", errno.EIO)])
def test_a_merge_that_a_disk_stops_goes_on_to_the_same_bytes(copies, monkeypatch, call, code, at):
    """Tensor by tensor noted; what the disk has refused once is made again."""
    from utils.merging.pieces import finished

    monkeypatch.setattr(finished, "SECONDS", -1.0)
    whole = merge_here(copies, recipe(copies), "whole", out_shard_size=20_000)
    with monkeypatch.context() as patched:
        patched.setattr(os, call, failing := Failing(getattr(os, call), at, full(code)))
        try:
            with refused("weights-unwritable") as caught:
                merge_here(copies, recipe(copies), "part", out_shard_size=20_000)
        finally:
            if failing.calls < at:
                pytest.skip(f"there are {failing.calls} such calls")
    kept = kept_work(caught.value)
    assert [path.name for path in copies.glob(".*")] == ([kept.folder.name] if kept else [])
    part = merge_here(copies, recipe(copies), "part", out_shard_size=20_000)
    assert_same_model(part, whole)
    assert not list(copies.glob(".*"))


def test_weights_that_changed_meanwhile_leave_nothing(copies, monkeypatch):
    from utils.merging import small_files as result_files

    def touch(*arguments):
        (copies / "code" / "model.safetensors").touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(result_files, "write_small_files", touch)
    with pytest.raises(OSError, match="No space left") as caught:
        merge_here(copies, recipe(copies), "part")
    assert kept_work(caught.value) is None and not list(copies.glob(".*"))


@pytest.mark.parametrize("shards", [0, 20_000])
def test_an_interrupted_merge_goes_on_to_the_same_bytes(copies, monkeypatch, shards, capsys):
    from utils.merging.pieces import finished

    whole = contents(merge_here(copies, recipe(copies), "whole", out_shard_size=shards))
    monkeypatch.setattr(finished, "SECONDS", 0.0)
    pwrite, calls = os.pwrite, []

    def interrupt(*arguments):
        calls.append(1)
        if len(calls) == 15:  # of some 30
            signal.raise_signal(signal.SIGINT)
        if len(calls) > 15:
            time.sleep(0.05)  # the main thread learns of it a little later
        return pwrite(*arguments)

    monkeypatch.setattr(os, "pwrite", interrupt)
    with pytest.raises(KeyboardInterrupt) as caught:
        merge_here(copies, recipe(copies), "part", out_shard_size=shards)
    assert caught.value.kept.folder.name.startswith(".part.") and not (copies / "part").exists()
    monkeypatch.setattr(os, "pwrite", pwrite)
    capsys.readouterr()
    part = contents(merge_here(copies, recipe(copies), "part", out_shard_size=shards, quiet=False))
    said = re.search(r"resumed: (\d+) of (\d+) tensors", capsys.readouterr().out)
    assert 0 < int(said[1]) < int(said[2])
    weights = [name for name in whole if name.startswith("model")]
    assert {name: part[name] for name in weights} == {name: whole[name] for name in weights} and set(part) == set(whole)
    assert not list(copies.glob(".*"))


def test_another_request_other_code_or_restart_does_not_go_on(copies, monkeypatch, capsys):
    from utils.merging.pieces import finished

    for change_of_request in ({"restart": True}, {"out_shard_size": 20_000}, {}):
        monkeypatch.setattr(finished, "SECONDS", 0.0)
        with monkeypatch.context() as patch:
            patch.setattr("utils.merging.run.forget_inputs", Failing(forget_inputs, 2, KeyboardInterrupt()))
            with pytest.raises(KeyboardInterrupt):
                merge_here(copies, recipe(copies), "part")
        assert len(list(copies.glob(".part.*"))) == 1
        capsys.readouterr()
        if not change_of_request:
            monkeypatch.setattr("utils.merging.request.sources_sha256", lambda: "of another version")
        merge_here(copies, recipe(copies), "part", quiet=False, **change_of_request)
        printed = capsys.readouterr()
        assert "resumed" not in printed.out and "removed what a killed run has left" in printed.err
        assert not list(copies.glob(".*"))
        shutil.rmtree(copies / "part")


def not_json(stage: Path) -> None:
    with open(stage / PROGRESS, "ab") as file:
        file.write(b"hello\n")


def not_text(stage: Path) -> None:
    with open(stage / PROGRESS, "ab") as file:
        file.write(b"\xff\xfe\n")


def no_name(stage: Path) -> None:
    with open(stage / PROGRESS, "ab") as file:
        file.write(b"[1]\n")


def gone(stage: Path) -> None:
    sorted(stage.glob("*.safetensors"))[-1].unlink()


def cut(stage: Path) -> None:
    os.truncate(sorted(stage.glob("*.safetensors"))[0], 3000)


def linked(stage: Path) -> None:
    """A copy of the very same bytes, elsewhere."""
    file = sorted(stage.glob("*.safetensors"))[0]
    shutil.copy(file, stage.parent / "mine")
    file.unlink()
    file.symlink_to(stage.parent / "mine")


def flipped(stage: Path) -> None:
    """One bit of a number that is finished."""
    file = sorted(stage.glob("*.safetensors"))[0]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("fast_selection", [True, False])
@pytest.mark.parametrize("damage", [not_json, not_text, no_name, gone, cut, linked, flipped])
def test_finished_work_that_is_damaged_is_made_again(copies, monkeypatch, capsys, damage, fast_selection):
    from utils.merging import small_files as result_files

    how = {"out_shard_size": 20_000, "fast_selection": fast_selection}
    whole = merge_here(copies, recipe(copies), "whole", **how)
    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space left") as caught:
        patched.setattr(result_files, "write_small_files", Failing(None, 1, full()))
        merge_here(copies, recipe(copies), "part", **how)
    damage(kept_work(caught.value).folder)
    mine = (copies / "mine").read_bytes() if damage is linked else None
    part = merge_here(copies, recipe(copies), "part", **how)
    assert capsys.readouterr().err.count("is not as it was left") == 1
    assert_same_model(part, whole)
    assert not list(copies.glob(".*")) and (mine is None or (copies / "mine").read_bytes() == mine)
