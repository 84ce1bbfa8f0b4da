"""The manifest beside a recipe: written, read again, and not taken for another recipe's."""

import dataclasses
import json
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from tests.refusals import refused
from tests.tiny_checkpoints import save_tiny
from utils.merging.recipe_check import Name
from utils.models.content_sample import content_sample
from utils.models.opening import open_checkpoint
from utils.pair.config import ModelEntry
from utils.recipes.named_model import NamedModel, named_model
from utils.recipes.recipe import model_key
from utils.recipes.recipe_manifest import RecipeManifest, manifest_name, read_recipe_manifest, refuse_other_weights

MANIFEST = RecipeManifest(
    recipe={"name": "a_merge_config.yaml", "sha256": "12"},
    vectors={"a.safetensors": "34"},
    guidance="lewis",
    guidance_options={"gamma": 0.3, "epsilon": 0.8},
    measure_options={},
    control=None,
    merge_method="ties",
    mean_density=None,
    lambda_=0.4,
    dtype="bfloat16",
    out_dtype=None,
    options={"nsamples": 15},
    samples={"rows": [3, 1, 2]},
    measurement={"sha256": "56", "versions": {"torch": "2"}},
    versions={"python": "3"},
)


@pytest.fixture
def recipe(tmp_path) -> Path:
    path = tmp_path / "a_merge_config.yaml"
    (tmp_path / manifest_name(path.name)).write_bytes(MANIFEST.as_bytes())
    return path


def test_what_is_written_is_read_again(recipe):
    assert read_recipe_manifest(recipe, "12") == (MANIFEST, "")
    data = json.loads((recipe.parent / "a_merge_config.manifest.json").read_text())
    assert data["command"] == "lewis_merge" and data["lambda"] == 0.4
    fields = {field.name.rstrip("_") for field in dataclasses.fields(RecipeManifest)}
    assert set(data) == {"command", *fields} - {"search"}


def test_beside_a_recipe_that_a_search_found_it_says_which_trial(recipe):
    found = dataclasses.replace(MANIFEST, search={"trial": 7, "trials": 64})
    path = recipe.parent / "a_merge_config.manifest.json"
    path.write_bytes(found.as_bytes())
    assert read_recipe_manifest(recipe, "12") == (found, "")
    assert json.loads(path.read_text())["command"] == "utils/searcher.py"
    path.write_text(path.read_text().replace('"search"', '"sought"'))
    with refused("recipe-manifest-malformed"):
        read_recipe_manifest(recipe, "12")


def test_the_docstring_names_every_key():
    from utils.recipes import recipe_manifest

    assert all(f"`{key}`" in recipe_manifest.__doc__ for key in [*json.loads(MANIFEST.as_bytes()), "search"])


def test_that_of_an_edited_recipe_says_so(recipe):
    found, said = read_recipe_manifest(recipe, "13")
    assert found == MANIFEST and "edited since" in said


def test_a_recipe_without_one(tmp_path):
    assert read_recipe_manifest(tmp_path / "other.yml", "12") == (None, "")


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("{", "recipe-manifest-unreadable"),
        ("\udcff", "recipe-manifest-unreadable"),
        ("[]", "recipe-manifest-unreadable"),
        ('{"command": "lewis_merge"}', "recipe-manifest-malformed"),
        ('{"command": "merger", "recipe": {}}', "recipe-manifest-malformed"),
    ],
)
def test_files_that_are_none(recipe, text, code):
    (recipe.parent / manifest_name(recipe.name)).write_bytes(text.encode(errors="surrogateescape"))
    with refused(code):
        read_recipe_manifest(recipe, "12")


@pytest.mark.parametrize(
    ("key", "value"),
    [("guidance", ["lewis"]), ("recipe", ["x"]), ("vectors", {"a": [1]}), ("versions", 5), ("guidance_options", "x")],
)
def test_values_of_another_kind_are_named(recipe, key, value):
    data = json.loads(MANIFEST.as_bytes()) | {key: value}
    (recipe.parent / manifest_name(recipe.name)).write_text(json.dumps(data))
    with refused("recipe-manifest-malformed") as caught:
        read_recipe_manifest(recipe, "12")
    assert f"write it: {key}" in str(caught.value)


def test_two_revisions_of_one_repository_are_two_models(tmp_path):
    """A base and an expert may be steps of one training; each is compared with what was recorded of it, if it is here."""
    names = [named_model(ModelEntry("org/m", one, one)) for one in ("step1", "step2", "step3")]
    here = [open_checkpoint(str(save_tiny("llama", tmp_path / one, seed=seed))) for seed, one in enumerate("ab")]
    models = [
        {"model": one.path, "revision": one.revision, "adapter": None, "sample_sha256": content_sample(checkpoint)}
        for one, checkpoint in zip(names, [*here, here[0]], strict=True)
    ]
    record = dataclasses.replace(MANIFEST, measurement={"models": models})
    found = dict(zip(names, [*here, None], strict=True))
    (line,) = refuse_other_weights(tmp_path / "recipe.yaml", record, found)
    assert "org/m@step3" in line
    with refused("recipe-other-weights") as caught:
        refuse_other_weights(tmp_path / "recipe.yaml", record, {names[0]: here[1], names[1]: here[1]})
    assert "org/m@step1" in str(caught.value) and "org/m@step2" not in str(caught.value)


def test_a_model_that_its_adapter_was_merged_into_is_not_compared(tmp_path):
    name = named_model(ModelEntry("org/m+org/a", "x", "v1"))
    assert name == NamedModel("org/m", "v1", "org/a")
    merged = open_checkpoint(str(save_tiny("llama", tmp_path / "merged")))
    models = [{"model": "org/m", "revision": "v1", "adapter": "org/a", "sample_sha256": "0"}]
    (line,) = refuse_other_weights(
        tmp_path / "recipe.yaml", dataclasses.replace(MANIFEST, measurement={"models": models}), {name: merged}
    )
    assert "org/m@v1+org/a" in line


@pytest.mark.parametrize("name", ["org/m", "org/m+org/a", "~/m", "./m+~/a"])
@pytest.mark.parametrize("revision", [None, "v1"])
def test_commands_2_and_3_know_a_model_by_the_same_name(name, revision):
    revision = None if name[0] in "~." else revision
    entry = ModelEntry(name, "x", revision)
    (found,) = TypeAdapter(list[Name]).validate_python([model_key(entry)])
    assert found.recorded == named_model(entry)
