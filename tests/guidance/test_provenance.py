"""Dataframes of another pair config are noticed."""

import dataclasses
import json
from pathlib import Path

import pytest
import yaml

from tests.refusals import refused
from utils.guidance.provenance import changed_checkpoints, compare_with_manifest
from utils.models.headers import header_hash
from utils.models.settings_digest import settings_digest
from utils.pair.config import read_pair_config
from utils.recipes.naming import LocalModels


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


def test_other_weights_are_refused_and_without_a_sample_of_them_headers_are_compared(config, golden, monkeypatch):
    monkeypatch.chdir(golden)
    models = LocalModels(config.base, config.experts[:1])
    same = [{"type": name, "sample_sha256": sample} for name, sample in models.samples.items()]
    assert changed_checkpoints({"models": same}, models, accepted=False) == []
    same[1]["sample_sha256"] = "0"
    with refused("measured-other-weights") as caught:
        changed_checkpoints({"models": same}, models, accepted=False)
    assert "models/math" in str(caught.value) and "models/base" not in str(caught.value)
    assert len(changed_checkpoints({"models": same}, models, accepted=True)) == 1
    old = {"models": [{"type": "base", "header_sha256": header_hash(models.stored["base"].tensors.values())}]}
    assert changed_checkpoints(old, models, accepted=False) == []
    old["models"][0]["header_sha256"] = "0"
    assert "saved again" in changed_checkpoints(old, models, accepted=False)[0]
    settings = {"models": [{"type": "math", "settings_sha256": settings_digest(models.stored["math"])}]}
    assert changed_checkpoints(settings, models, accepted=False) == []
    settings["models"][0]["settings_sha256"] = "0"
    assert "models/math ('math')" in changed_checkpoints(settings, models, accepted=False)[0]
    assert changed_checkpoints({"models": "?"}, models, accepted=False) == []
    assert changed_checkpoints(None, models, accepted=False) == []


def test_the_golden_config_is_the_one_meant(golden):
    names = yaml.safe_load((golden / "sparsity50" / "pair.yaml").read_text())["target_model_names"]
    assert list(names) == ["math", "code"]
