"""A measurement that was stopped inside a model goes on there, to the same files.

python -m pytest tests/guidance/test_going_on.py
"""

import os
import re
import shutil

import pytest

from tests.architectures.shrinking import Row, save_changed, tiny_model
from tests.commands_here import done_here, run_here
from tests.faulty import Failing, full
from tests.refusals import refusal_code
from tests.tiny_pairs import edit_json, save_rows, save_tokenizer, write_config
from utils.commands import measure
from utils.passes import snapshots
from utils.recipes.gram_file import GramFileWriter
from utils.workers import local
from utils.workers.results import Keeping

HYBRID = Row("lfm2", "causal", {"layer_types": ["conv", "full_attention", "conv", "full_attention"]})


@pytest.fixture(autouse=True)
def at_every_block(monkeypatch):
    monkeypatch.setattr(snapshots, "SECONDS", -1.0)
    monkeypatch.setattr(snapshots, "MOST_SHARE", float("inf"))


@pytest.fixture(scope="module")
def hybrids(tmp_path_factory):
    """A pair of two kinds of blocks, of which one component is to be measured; read only."""
    folder = tmp_path_factory.mktemp("hybrids")
    base = tiny_model(HYBRID).bfloat16()
    for seed, name in enumerate(("base", "code", "math")):
        save_tokenizer(save_changed(base, folder / name, seed))
    save_rows(folder)
    write_config(folder, {"components": ["q_proj"]})
    return folder


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """What a command line publishes for a pair if nothing stops it: `unbroken(line, pair)`; run once."""
    found = {}

    def published(line, pair):
        if (line, pair) not in found:
            folder = shutil.copytree(pair, tmp_path_factory.mktemp("unbroken"), dirs_exist_ok=True)
            done_here(*line, "--out_dir", "out", cwd=folder)
            found[line, pair] = measured(folder / "out")
        return found[line, pair]

    return published


def measured(folder):
    """The published files, without the times and places in the manifest."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"}


def command(method, *words):
    """One model after the other, since steps are counted: with threads to share they would go side by side."""
    useless = () if method == "lewis" else ("--accept_useless_text",)  # random models gain nothing on it
    words = ("--guidance", method, *useless, *words, "--devices", "cpu", "--quiet")
    return ("lewis_importance.py", "--config", "pair.yaml", *words)


def stopped(folder, monkeypatch, line, stop_at):
    """Run a command that is interrupted after a number of steps."""
    steps = []

    def stop():
        steps.append(1)
        if len(steps) == stop_at:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(local, "return_freed_memory", stop)
        assert run_here(*line, "--out_dir", "out", cwd=folder).returncode == 130
    assert len(steps) == stop_at
    assert [path for path in (folder / "out").rglob("*.snapshot") if path.is_file()]


@pytest.mark.parametrize(
    ("method", "words", "at"),
    [
        ("lewis", (), 2),  # blocks: in the first model, in the second
        ("lewis", (), 4),
        ("sens_merging", (), 12),
        ("saliency_budget", ("--gradient_at", "both"), 21),
        ("gram_mean", (), 14),
    ],
)
def test_a_measurement_that_an_error_ends_goes_on(pair, pristine, unbroken, monkeypatch, method, words, at):
    """What stays is named, with what it takes; it is what an interrupt leaves, and gives the same bytes."""
    line = command(method, *words)
    with monkeypatch.context() as patched:
        patched.setattr(local, "return_freed_memory", Failing(local.return_freed_memory, at, full()))
        said = run_here(*line, "--out_dir", "out", cwd=pair).stderr
    (kept,) = (pair / "out" / ".measuring.part").iterdir()
    assert re.search(
        rf"what is finished stays in \S*{kept.name}, where it takes [0-9.]+ [MG]B: once what stopped it is mended, the same line goes on",
        said,
    )
    left = {path.name for path in kept.iterdir()}
    assert not any(name.startswith(".") or name.endswith(".writing") for name in left)
    goes_on(pair, line, unbroken(line, pristine))


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_at_the_end_costs_no_piece(pair, pristine, unbroken, monkeypatch, call):
    """Large files among what is published, too (gram_mean's)."""
    line, publish = command("gram_mean"), measure.publish_files

    def publish_in_vain(folder, files, **more):
        with monkeypatch.context() as patched:
            patched.setattr(os, call, Failing(getattr(os, call), len(files), full()))
            publish(folder, files, **more)

    with monkeypatch.context() as patched:
        patched.setattr(measure, "publish_files", publish_in_vain)
        assert refusal_code(run_here(*line, "--out_dir", "out", cwd=pair)) == "os-error"
    with monkeypatch.context() as patched:  # nothing is measured again
        patched.setattr(local, "run_piece", None)
        done_here(*line, "--out_dir", "out", cwd=pair)
    assert measured(pair / "out") == unbroken(line, pristine)
    assert not (pair / "out" / ".measuring.part").exists()


def test_weights_that_changed_while_they_were_measured_leave_nothing(pair, monkeypatch):

    def change(*given, **more):
        os.utime(pair / "code" / "model.safetensors", (1, 1))
        raise full()

    monkeypatch.setattr(measure, "publish_files", change)
    assert refusal_code(run_here(*command("lewis"), "--out_dir", "out", cwd=pair)) == "os-error"
    assert not (pair / "out").exists()


def goes_on(folder, line, whole):
    """The same command ends as one that was never interrupted."""
    done_here(*line, "--out_dir", "out", cwd=folder)
    assert measured(folder / "out") == whole
    assert not (folder / "out" / ".measuring.part").exists()


@pytest.mark.parametrize(
    ("method", "words", "stop_at"),
    [
        ("lewis", ("--dtype", "bfloat16"), 2),  # of 2 steps for each model and text
        ("lewis", ("--dtype", "bfloat16"), 4),
        ("saliency_budget", ("--gradient_at", "both"), 14),  # of 8 steps for each expert, behind 4 for its gain
        ("saliency_budget", ("--gradient_at", "expert"), 4),  # 2 of the base, on the expert's way there
        ("saliency_budget", ("--gradient_at", "expert"), 11),
        ("gram_mean", (), 2),  # of 4 for each expert's gain, then 8
        ("gram_mean", (), 7),
        ("gram_mean", (), 14),
        ("gram_mean", ("--rounds", "2"), 26),  # of 8, 16 and 4 in all
        ("sens_merging", (), 4),  # of 4 for each expert's gain, 2 of the base, then 6
        ("sens_merging", (), 12),
        ("sens_merging", (), 13),
        ("submodule_linearity", (), 10),  # of 2 steps, behind 4 for each expert's gain
        ("submodule_linearity", ("--no-nonlinearity",), 10),
    ],
)
def test_a_stopped_measurement_goes_on(pair, pristine, unbroken, monkeypatch, method, words, stop_at):
    line = command(method, *words)
    stopped(pair, monkeypatch, line, stop_at)
    goes_on(pair, line, unbroken(line, pristine))


@pytest.mark.parametrize("change", ["code", "a setting of a model"])
def test_what_other_code_has_begun_or_was_begun_of_another_model_is_made_anew(pair, monkeypatch, change):
    line = command("lewis", "--dtype", "bfloat16")
    stopped(pair, monkeypatch, line, 4)
    if change == "code":
        monkeypatch.setattr("utils.commands.measure_request.sources_sha256", lambda: "of another version")
    else:
        edit_json(pair / "code" / "config.json", rms_norm_eps=0.5)
    said = done_here(*(word for word in line if word != "--quiet"), "--out_dir", "out", cwd=pair).stdout
    assert "resumed" not in said and "removed what a killed run has left" in said


@pytest.mark.parametrize("stop_at", [2, 4])  # behind the blocks 0 and 2, in which nothing is measured
def test_rounding_is_gone_on_with_behind_a_block_without_a_component(hybrids, unbroken, tmp_path, monkeypatch, stop_at):
    shutil.copytree(hybrids, tmp_path, dirs_exist_ok=True)
    line = command("lewis", "--dtype", "bfloat16")
    stopped(tmp_path, monkeypatch, line, stop_at)
    goes_on(tmp_path, line, unbroken(line, hybrids))


def test_a_matrix_file_is_gone_on_with_until_the_result_is_kept(pair, pristine, unbroken, monkeypatch):
    """The disk takes minutes to hold the matrices of a large model; a kill then costs no more than at another time."""
    line, keep = command("gram_mean"), Keeping.keep

    def stop(keeping, value):
        if keeping.piece.name == "code":
            raise KeyboardInterrupt
        keep(keeping, value)

    with monkeypatch.context() as patched:
        patched.setattr(Keeping, "keep", stop)
        assert run_here(*line, "--out_dir", "out", cwd=pair).returncode == 130
    left = {path.suffix for path in (pair / "out").rglob("code.*")}
    assert {".snapshot", ".grams", ".model0", ".model1"} <= left
    goes_on(pair, line, unbroken(line, pristine))


def test_a_later_rounds_pass_is_kept_until_its_file_is_in_place(pair, monkeypatch):
    """Behind the pass come gigabytes of gradients of the round before."""
    line = command("gram_mean", "--rounds", "2")

    def stop(file, earlier):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(GramFileWriter, "add_gradients", stop)
        assert run_here(*line, "--out_dir", "out", cwd=pair).returncode == 130
    assert [path for path in (pair / "out").rglob("*.snapshot") if path.is_file()]
