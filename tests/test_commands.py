"""One run of each command on a tiny pair, each on what the one before wrote.

In this process, which is quicker. As processes they are run by `test_lewis_importance_processes.py`, `test_lewis_merge.py`,
`test_merger.py`, `test_evaluator.py` and `test_searcher.py`.

python -m pytest tests/test_commands.py
"""

import json

import pytest
import yaml

from tests.commands_here import done_here
from tests.tiny_pairs import save_pair, write_config


def test_every_command_once(tmp_path):
    pair = save_pair(tmp_path)
    write_config(pair, {"search": {"guidance": ["uniform"], "depth_groups": 1}})

    done_here("lewis_importance.py", "--config", "pair.yaml", "--out_dir", "measured", "--device", "cpu", cwd=pair)
    assert {path.name for path in (pair / "measured").iterdir()} == {
        "code_delta.csv",
        "math_delta.csv",
        "norms.csv",
        "lewis_noise.csv",
        "manifest.json",
    }
    words = ("--delta_dfs_in_dir", "measured", "--config_file", "pair.yaml", "--out_dir", "recipes")
    done_here("lewis_merge.py", *words, cwd=pair)
    (recipe,) = (pair / "recipes").glob("*.yaml")
    assert yaml.safe_load(recipe.read_text())["merge_method"] == "ties"
    words = ("--merge_config", recipe, "--output_path", "merged", "--device", "cpu", "--quiet")
    done_here("utils/merger.py", *words, cwd=pair)
    written = json.loads((pair / "merged/manifest.json").read_text())
    assert "model.safetensors" in written["files"] and (pair / "merged/tokenizer.json").exists()
    few = ("--validation_rows", 4, "--test_rows", 4, "--device", "cpu", "--quiet")
    done_here(
        "utils/evaluator.py", "--config", "pair.yaml", "--out_dir", "scores", recipe, "--no-controls", *few, cwd=pair
    )
    assert (pair / "scores/report.html").exists() and "loss" in (pair / "scores/scores.csv").read_text()
    pytest.importorskip("optuna")
    done_here(
        "utils/searcher.py",
        "--config",
        "pair.yaml",
        "--out_dir",
        "search",
        "--trials",
        6,
        "--first_rows",
        4,
        *few,
        cwd=pair,
    )
    assert yaml.safe_load((pair / "search/best.yaml").read_text())["base_model"] == "./base"
