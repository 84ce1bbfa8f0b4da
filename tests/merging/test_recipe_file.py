"""A recipe as a file: what is no recipe for this command, where names lead, and its text with other names."""

import hashlib
from pathlib import Path

import pytest
import yaml

from tests.refusals import refused
from utils.merging.recipe_file import read_recipe

GOOD = "merge_method: linear\nmodels: [{model: a}]\n"


def written(tmp_path: Path, text: str):
    (tmp_path / "recipe.yaml").write_text(text)
    return read_recipe(tmp_path / "recipe.yaml")


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ("", "yaml-empty", "is empty"),
        ("- a\n- b\n", "yaml-no-mapping", "must be a mapping"),
        ("merge_method: [ties\n", "yaml-invalid", "not valid YAML"),
        ("model_info: []\n", "recipe-pair-config", "is a pair config"),
        ("models: [{model: a}]\n", "recipe-no-method", "merge_method must name a method"),
        ("merge_method: 3\nmodels: [{model: a}]\n", "recipe-no-method", "merge_method must name a method"),
        ("merge_method: ties\n", "recipe-inputs", "exactly one of models, slices and modules, got none"),
        ("merge_method: ties\nmodels: []\n", "recipe-inputs", "got none"),
        ("merge_method: ties\nmodels: [{model: a}]\nslices: [{sources: []}]\n", "recipe-inputs", "models and slices"),
        (
            "base_model: a\ngate_mode: hidden\nexperts:\n- source_model: b\n  positive_prompts: [x]\n",
            "recipe-moe",
            "mergekit-moe takes it",
        ),
        (f"name: one\n{GOOD}---\nname: two\n{GOOD}", "recipe-many-documents", "mergekit-multi takes"),
        (f"---\nname: one\n{GOOD}---\n{GOOD}", "recipe-many-documents", "mergekit-multi takes"),
    ],
)
def test_what_is_no_recipe_for_this_command(tmp_path, text, code, words):
    with refused(code) as caught:
        written(tmp_path, text)
    assert words in str(caught.value)


def test_the_commands_that_are_named_are_mergekits(tmp_path):
    from importlib.metadata import distribution

    commands = {entry.name for entry in distribution("mergekit").entry_points}
    assert {"mergekit-moe", "mergekit-multi", "mergekit-yaml"} <= commands


def test_one_document_may_have_its_mark_and_text_may_hold_one(tmp_path):
    assert written(tmp_path, f"---\n{GOOD}").data["merge_method"] == "linear"
    assert written(tmp_path, GOOD + "chat_template: |\n  ---\n  {{ messages }}\n  ---\n").data


def test_a_missing_file_and_a_folder(tmp_path):
    with refused("file-missing"):
        read_recipe(tmp_path / "none.yaml")
    with refused("file-is-folder"):
        read_recipe(tmp_path)


def test_the_hash_is_of_the_files_bytes(tmp_path):
    text = "# ümläut\n" + GOOD
    assert written(tmp_path, text).sha256 == hashlib.sha256((tmp_path / "recipe.yaml").read_bytes()).hexdigest()


# --- names ------------------------------------------------------------------------------------------------------------


def test_names_lead_to_what_is_here_or_beside_the_recipe(tmp_path, monkeypatch):
    here, beside = tmp_path / "here", tmp_path / "beside"
    for folder in (here / "a", here / "both", beside / "b", beside / "both"):
        folder.mkdir(parents=True)
    monkeypatch.chdir(here)
    recipe = written(beside, GOOD)
    assert recipe.locate("a") == "a"
    assert recipe.locate("b") == str(beside / "b")
    assert recipe.locate("org/model") == "org/model" and recipe.locate("") == ""
    assert recipe.locate(str(here / "a")) == str(here / "a")
    assert recipe.locate("a+b") == f"a+{beside / 'b'}" and recipe.locate("org/model+b") == f"org/model+{beside / 'b'}"
    with refused("recipe-ambiguous-name") as caught:
        recipe.locate("both")
    assert str(here / "both") in str(caught.value) and str(beside / "both") in str(caught.value)
    monkeypatch.chdir(beside)
    assert recipe.locate("both") == "both"


def test_a_rewritten_text_has_other_names_and_nothing_else_changed(tmp_path):
    text = (
        "# models of mine: old\n"
        "models:\n"
        "  - model: old  # the base, not old_fashioned\n"
        "  - {model: 'old+adapter', parameters: {weight: 1, saliency: old.safetensors}}\n"
        '  - model: {model: {path: "old"}, lora: {path: old}}\n'
        "    parameters:\n"
        "      saliency: [{filter: old, value: old}, {value: ''}]\n"
        "merge_method: ties\n"
        "base_model: old\n"
        "tokenizer: {source: base, tokens: {old: {source: old}}}\n"
    )
    recipe = written(tmp_path, text)
    assert recipe.rewritten(lambda name: name) == text
    seen = []
    new = recipe.rewritten(lambda name: seen.append(name) or name.replace("old", "../n: w"))
    assert seen.count("old") == 6 and "old+adapter" in seen and "old.safetensors" in seen and "base" not in seen
    assert new.startswith("# models of mine: old\n") and "# the base, not old_fashioned\n" in new

    def renamed(node, key=None):
        if isinstance(node, dict):
            return {name: renamed(value, name) for name, value in node.items()}
        if isinstance(node, list):
            return [renamed(value, key) for value in node]
        names = key in ("model", "path", "base_model", "source", "saliency", "value")
        return node.replace("old", "../n: w") if isinstance(node, str) and names else node

    assert yaml.safe_load(new) == renamed(yaml.safe_load(text))
