"""Dataframes of another pair config are noticed."""

import dataclasses
import json
from pathlib import Path

import pytest
import yaml

from tests.refusals import refused
from utils.guidance.provenance import changed_checkpoints, compare_with_manifest
from utils.models.checkpoints import open_checkpoint
from utils.models.headers import header_hash
from utils.pair.config import read_pair_config


@pytest.fixture
def config(golden):
    return read_pair_config(golden / "sparsity50" / "pair.yaml")


@pytest.fixture
def manifest(config):
    return json.loads(json.dumps({"options": config.options()}))


def test_the_same_config_is_silent(config, manifest):
    assert compare_with_manifest(config, config.experts, manifest) == []
    assert compare_with_manifest(config, config.experts, None) == []


def test_other_models_are_an_error(config, manifest):
    manifest["options"]["model_info"][1]["name"] = "models/other"
    with refused("measured-other-model") as caught:
        compare_with_manifest(config, config.experts, manifest)
    assert "'math' was measured as 'models/other', the config says 'models/math'" in str(caught.value)


def test_another_revision_is_an_error(config, manifest):
    manifest["options"]["model_info"][0]["revision"] = "abc"
    with refused("measured-other-model"):
        compare_with_manifest(config, config.experts, manifest)


def test_an_expert_that_was_not_measured_is_an_error(config, manifest):
    del manifest["options"]["model_info"][2]
    with refused("measured-without"):
        compare_with_manifest(config, config.experts, manifest)
    assert compare_with_manifest(config, config.experts[:1], manifest) == []  # it is not merged


def test_another_base_type_is_an_error(config, manifest):
    manifest["options"]["base_model_type"] = "math"
    with refused("measured-other-base"):
        compare_with_manifest(config, config.experts, manifest)


def test_the_same_folder_under_another_spelling_is_the_same_model(config, manifest, golden, monkeypatch):
    monkeypatch.chdir(golden)
    manifest["options"]["model_info"][0]["name"] = str(Path("models/base").resolve())
    manifest["options"]["model_info"][1]["name"] = "./models/math"
    assert compare_with_manifest(config, config.experts, manifest) == []


def test_other_settings_are_warnings_that_name_them(config, manifest):
    changed = dataclasses.replace(
        config, sparsity_ratio=0.0, dataset=dataclasses.replace(config.dataset, name="mbpp", seed=1)
    )
    warnings = compare_with_manifest(changed, changed.experts, manifest)
    assert [warning.split()[2] for warning in warnings] == ["dataset.name", "dataset.seed", "sparsity_ratio"]


@pytest.mark.parametrize("options", [None, [], {}, {"model_info": "x"}, {"model_info": [1]}])
def test_a_manifest_without_models_is_a_warning(config, options):
    assert "cannot be checked" in compare_with_manifest(config, config.experts, {"options": options})[0]


def test_checkpoints_saved_anew_are_a_warning(golden):
    checkpoint = open_checkpoint(str(golden / "models" / "base"))
    local = {"base": checkpoint}
    same = {"models": [{"type": "base", "header_sha256": header_hash(checkpoint.tensors.values())}]}
    assert changed_checkpoints(same, local) == []
    same["models"][0]["header_sha256"] = "0"
    assert "saved anew" in changed_checkpoints(same, local)[0]
    assert changed_checkpoints({"models": "?"}, local) == [] == changed_checkpoints(None, local)


def test_the_golden_config_is_the_one_meant(golden):
    names = yaml.safe_load((golden / "sparsity50" / "pair.yaml").read_text())["target_model_names"]
    assert list(names) == ["math", "code"]
