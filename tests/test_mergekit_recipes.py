"""The hand-written recipes in mergekit/: what their first line says works, and both mergekit and we accept them."""

import shlex

import pytest
import yaml

from tests.conftest import ROOT

RECIPES = sorted((ROOT / "mergekit").glob("*.yaml"))


def test_there_is_one_per_shipped_pair():
    assert {path.name for path in RECIPES} == {
        f"{kind}_{pair}.yaml"
        for kind in ("uniform_ties", "task_arithmetic")
        for pair in ("gemma_2b", "gemma_9b", "mathcoder_8b")
    }


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe(path, monkeypatch):
    from mergekit.config import MergeConfiguration

    from utils.merger import read_flags
    from utils.merging.recipe_check import check_recipe
    from utils.merging.recipe_file import read_recipe

    assert MergeConfiguration.model_validate(yaml.safe_load(path.read_text())).merge_method in path.stem
    checked = check_recipe(read_recipe(path))
    assert checked.method.name in path.stem and not list(checked.idle_parameters())
    words = shlex.split(path.read_text().splitlines()[0].removeprefix("# "))
    assert words[:2] == ["python3", "utils/merger.py"]
    monkeypatch.chdir(ROOT)
    settings = read_flags(words[2:])
    assert settings.merge_config.resolve() == path
    models = (ROOT / "configs" / f"{path.stem.split('_', 2)[2]}.yaml").read_text()
    for entry in yaml.safe_load(path.read_text())["models"]:
        assert entry["model"] in models  # the same pair as the shipped pair config
