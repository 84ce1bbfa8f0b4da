"""What command 2 refuses: exit code 2, one message, nothing written.

python -m pytest tests/test_lewis_merge_refusals.py
"""

import shutil
import sys

import pytest
import yaml

from tests.deciding_here import edit_config, refuses, write_norms
from tests.tiny_checkpoints import save_tiny


@pytest.mark.parametrize(
    ("more", "code"),
    [
        (["--gamma", "0.9"], "flag-invalid"),
        (["--epsilon", "1.5"], "flag-invalid"),
        (["--epsilon", "0", "--gamma", "0"], "flag-invalid"),
        (["--mean_density", "0"], "flag-invalid"),
        (["--mean_density", "1.01"], "flag-invalid"),
        (["--lambda", "0"], "flag-invalid"),
        (["--out_dtype", "bf16"], "flag-invalid"),
        (["--bound", "max"], "flag-invalid"),
        (["--control", "random"], "flag-invalid"),
        (["--merge_method", "dare-ties"], "merge-method-unknown"),
        (["--merge_method", "task_arithmetic"], "merge-method-unfit"),
        (["--mean_density", "1", "--gamma", "0"], "mean-density-unreachable"),
    ],
)
def test_wrong_flags(more, code, work):
    refuses(code, work, *more)


def _drop_csv(work):
    (work / "dfs" / "math_delta.csv").unlink()


def _endless_csv(work):
    (work / "dfs" / "math_delta.csv").unlink()
    (work / "dfs" / "math_delta.csv").symlink_to("/dev/zero")


def _wide_csv(work):
    path = work / "dfs" / "math_delta.csv"
    header, _, rest = path.read_text().partition("\n")
    path.write_text(header + "".join(f",column{number}" for number in range(10_000)) + "\n" + rest)


def _foreign_csv(work):
    shutil.copy(work / "dfs" / "math_delta.csv", work / "dfs" / "other_delta.csv")


def _swap_csvs(work):
    math, code = (work / "dfs" / f"{name}_delta.csv" for name in ("math", "code"))
    text = math.read_text()
    math.write_text(code.read_text())
    code.write_text(text)


def _config(**changes):
    return lambda work: edit_config(work, **changes)


def _no_folder(work):
    shutil.rmtree(work / "dfs")


def _empty_folder(work):
    _no_folder(work)
    (work / "dfs").mkdir()


def _out_is_a_file(work):
    (work / "out").write_text("mine")


def _broken_manifest(work):
    (work / "dfs" / "manifest.json").write_text("{")


def _broken_model(work):
    source = (work / "models").resolve()
    (work / "models").unlink()
    shutil.copytree(source, work / "models")
    path = work / "models" / "base" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def _other_layers(work):
    source = (work / "models").resolve()
    (work / "models").unlink()
    shutil.copytree(source, work / "models")
    shutil.rmtree(work / "models" / "math")
    save_tiny("llama", work / "models" / "math", layers=2)


@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (_no_folder, "dataframes-missing"),
        (_empty_folder, "table-missing"),
        (_drop_csv, "table-missing"),
        (_endless_csv, "file-not-regular"),
        (_wide_csv, "table-unreadable"),
        (_foreign_csv, "table-unknown-expert"),
        (_swap_csvs, "table-columns"),
        (_out_is_a_file, "out-is-file"),
        (_broken_manifest, "manifest-unreadable"),
        (_broken_model, "weights-truncated"),
        (_other_layers, "model-not-of-base"),
        (_config(global_parameters={"normalise": True}), "global-parameter-unknown"),
        (_config(global_parameters={"density": 0.5}), "global-parameter-no-effect"),
        (_config(components=["q_proj", "z_proj"], prefix_mapping=None), "table-columns"),
        (_config(model_info=None), "config-missing-key"),
        (_config(nonsense=1), "config-unknown-key"),
    ],
)
def test_wrong_input(spoil, code, work):
    spoil(work)
    refuses(code, work)


def test_dataframes_of_another_config(work, golden):
    write_norms(work, golden)
    config = yaml.safe_load((work / "pair.yaml").read_text())
    config["model_info"][1]["name"] = config["target_model_names"]["math"] = "models/code2"
    (work / "pair.yaml").write_text(yaml.safe_dump(config))
    assert "'models/math'" in refuses("measured-other-model", work)


def test_a_missing_matplotlib_is_found_before_any_work(work, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    refuses("no-matplotlib", work, "--plot")
