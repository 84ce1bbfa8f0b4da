"""What command 2 recorded beside a recipe stands in what command 3 writes: manifest, card, and beside its recipe."""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

from tests.commands_here import done_here
from tests.refusals import refused
from tests.tiny_merges import merge_here, recipe, write_recipe
from utils.commands.merge import merge
from utils.merging.settings import MergeSettings
from utils.recipes.recipe_manifest import RecipeManifest, manifest_name, read_recipe_manifest


def record(recipe_path: Path) -> RecipeManifest:
    return RecipeManifest(
        recipe={"name": recipe_path.name, "sha256": hashlib.sha256(recipe_path.read_bytes()).hexdigest()},
        vectors={},
        guidance="lewis",
        guidance_options={"gamma": 0.3, "epsilon": 0.8, "nothing": None},
        measure_options={"sparsity_ratio": 0.5},
        control=None,
        merge_method="ties",
        mean_density=None,
        lambda_=0.4,
        dtype="bfloat16",
        out_dtype=None,
        options={"nsamples": 3, "dataset": {"path": "/home/somebody/secret/rows.jsonl"}},
        samples={"path": "/home/somebody/secret/rows.jsonl", "subset": None, "split": "train", "rows": [3, 1, 2]},
        measurement={"sha256": "5" * 64, "versions": {"torch": "2"}},
        versions={"python": "3"},
    )


def with_record(tmp_path: Path, llamas: Path) -> Path:
    """A recipe with a manifest beside it."""
    path = write_recipe(tmp_path / "made.yaml", recipe(llamas))
    (tmp_path / manifest_name(path.name)).write_bytes(record(path).as_bytes())
    return path


def merged(path: Path, name: str = "merged") -> Path:
    output = path.parent / name
    merge(MergeSettings(output_path=output, merge_config=path, device="cpu", quiet=True))
    return output


def test_manifest_card_and_published_recipe_say_what_the_recipe_was_made_of(llamas, tmp_path):
    path = with_record(tmp_path, llamas)
    output = merged(path)
    found = json.loads((output / "manifest.json").read_text())
    assert found["origin"]["guidance"] == "lewis"
    assert found["origin"]["guidance_options"] == {"gamma": 0.3, "epsilon": 0.8, "nothing": None}
    assert found["origin"]["measurement"]["sha256"] == "5" * 64
    assert found["origin"]["samples"]["path"] == "rows.jsonl"
    card = (output / "README.md").read_text()
    assert "- Guidance `lewis` with gamma 0.3, epsilon 0.8.\n" in card
    assert "- Measured with sparsity_ratio 0.5.\n" in card
    assert "- Measured on 3 samples of `rows.jsonl` (split train).\n" in card and "5" * 64 in card
    for file in output.iterdir():
        assert b"somebody" not in file.read_bytes(), file
    published = output / "mergekit_config.yml"
    origin, doubt = read_recipe_manifest(published, hashlib.sha256(published.read_bytes()).hexdigest())
    assert doubt == "" and origin.guidance_options["gamma"] == 0.3
    assert set(found["files"]) == {file.name for file in output.iterdir()} - {"manifest.json"}


def test_it_goes_on_through_a_merge_by_the_published_recipe(llamas, tmp_path):
    first = merged(with_record(tmp_path, llamas))
    again = tmp_path / "again"
    merge(MergeSettings(output_path=again, merge_config=first / "mergekit_config.yml", device="cpu", quiet=True))
    before, after = (json.loads((folder / "manifest.json").read_text())["origin"] for folder in (first, again))
    assert before.pop("recipe") != after.pop("recipe") and before == after
    assert after["guidance_options"]["gamma"] == 0.3


def test_an_edited_recipe_loses_it_with_a_warning(llamas, tmp_path, capsys):
    path = with_record(tmp_path, llamas)
    path.write_text(path.read_text() + "# edited\n")
    output = merged(path)
    assert "made.manifest.json was written for other content of made.yaml" in capsys.readouterr().err
    assert json.loads((output / "manifest.json").read_text())["origin"] is None
    assert "lewis" not in (output / "README.md").read_text()


def test_a_recipe_of_the_users_own_has_none(llamas, tmp_path):
    output = merge_here(tmp_path, recipe(llamas))
    assert json.loads((output / "manifest.json").read_text())["origin"] is None
    assert not (output / manifest_name("mergekit_config.yml")).exists()


def test_a_damaged_manifest_is_refused(llamas, tmp_path):
    path = with_record(tmp_path, llamas)
    (tmp_path / manifest_name(path.name)).write_text("{")
    with refused("recipe-manifest-unreadable"):
        merged(path)
    assert not (tmp_path / "merged").exists()


def test_a_control_is_called_one(llamas, tmp_path):
    path = with_record(tmp_path, llamas)
    content = dataclasses.replace(record(path), control="uniform").as_bytes()
    (tmp_path / manifest_name(path.name)).write_bytes(content)
    assert "- An unguided control (`uniform`) beside guidance `lewis`" in (merged(path) / "README.md").read_text()


def test_from_command_2_itself(golden, tmp_path):
    shutil.copytree(golden / "sparsity50", tmp_path / "dfs")
    shutil.copytree(golden / "models", tmp_path / "models")
    words = ["--delta_dfs_in_dir", "dfs", "--config_file", "dfs/pair.yaml", "--out_dir", "made"]
    done_here("lewis_merge.py", *words, "--gamma", "0.25", "--epsilon", "0.7", cwd=tmp_path)
    (path,) = (tmp_path / "made").glob("*.yaml")
    words = ["--merge_config", path.relative_to(tmp_path), "--output_path", "merged", "--device", "cpu"]
    done_here("utils/merger.py", *words, cwd=tmp_path)
    origin = json.loads((tmp_path / "merged" / "manifest.json").read_text())["origin"]
    assert origin["guidance_options"]["gamma"] == 0.25 and origin["guidance_options"]["epsilon"] == 0.7
    assert "Guidance `lewis` with" in (tmp_path / "merged" / "README.md").read_text()
