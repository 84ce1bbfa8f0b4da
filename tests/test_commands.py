"""One run of each command on a tiny pair, each on what the one before wrote.

python -m pytest tests/test_commands.py
"""

import json
import subprocess

import pytest
import yaml

from tests.tiny_pairs import save_pair


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return save_pair(tmp_path_factory.mktemp("pair"))


def finished(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


def test_measure_decide_merge(pair, run_command_line):
    run = lambda script, *words: finished(run_command_line(script, *words, cwd=pair))  # noqa: E731
    run("lewis_importance.py", "--config", "pair.yaml", "--out_dir", "measured", "--device", "cpu")
    assert {path.name for path in (pair / "measured").iterdir()} == {
        "code_delta.csv",
        "math_delta.csv",
        "norms.csv",
        "manifest.json",
    }
    run("lewis_merge.py", "--delta_dfs_in_dir", "measured", "--config_file", "pair.yaml", "--out_dir", "recipes")
    (recipe,) = (pair / "recipes").glob("*.yaml")
    assert yaml.safe_load(recipe.read_text())["merge_method"] == "ties"
    run("utils/merger.py", "--merge_config", recipe, "--output_path", "merged", "--device", "cpu", "--quiet")
    written = json.loads((pair / "merged/manifest.json").read_text())
    assert "model.safetensors" in written["files"] and (pair / "merged/tokenizer.json").exists()
