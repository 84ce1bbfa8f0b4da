"""What a merged folder says about itself: true, complete, and nothing about this machine."""

import hashlib
import json
import os
from pathlib import Path

import pytest
import yaml

from tests.commands_here import refused_here
from tests.tiny_checkpoints import VOCABULARY
from tests.tiny_merges import assert_same_tensors, merge_here, merge_stock, recipe, write_recipe
from tests.tiny_pairs import save_tokenizer
from utils.commands.merge import merge
from utils.merging.settings import MergeSettings
from utils.models.tokenizer_files import has_tokenizer


def card(folder: Path) -> tuple[dict, str]:
    """The metadata block and the text of a card."""
    _, metadata, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(metadata), text


@pytest.mark.parametrize("source", [None, "union"])
def test_no_path_of_this_machine_is_published(copies, source):
    # another vocabulary, so that mergekit builds a tokenizer
    save_tokenizer(copies / "math", chat_template="{{ messages }}", size=VOCABULARY - 1)
    merged = merge_here(copies, recipe(copies, tokenizer_source=source))
    assert has_tokenizer(merged)
    for path in merged.rglob("*"):
        content = path.read_bytes()
        assert str(copies).encode() not in content, path.name
        assert os.fsencode(Path.home()) + b"/" not in content, path.name


def test_absolute_names_become_folder_names_and_others_stay(copies, monkeypatch):
    monkeypatch.chdir(copies)
    data = recipe(copies)
    data["models"][2]["model"] = "./math"
    merged = merge_here(copies, data)
    manifest = json.loads((merged / "manifest.json").read_text())
    assert [entry["name"] for entry in manifest["inputs"]] == ["base", "code", "./math"]
    metadata, text = card(merged)
    assert "`code` and `./math` into `base`" in text and "base_model" not in metadata
    shown = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert [entry["model"] for entry in shown["models"]] == ["base", "code", "./math"] and shown["base_model"] == "base"


def test_the_card_has_the_recipe_as_it_was_written(copies, monkeypatch):
    monkeypatch.chdir(copies)
    text = "# my notes: ümläut\n" + yaml.safe_dump(recipe(Path()))
    (copies / "mine.yaml").write_text(text)
    merge(MergeSettings(output_path=Path("merged"), merge_config=Path("mine.yaml"), device="cpu"))
    assert text.rstrip() in (copies / "merged" / "README.md").read_text()
    assert (copies / "merged" / "mergekit_config.yml").read_text().startswith("# my notes: ümläut\n")


def test_the_published_recipe_runs_again_as_it_is_and_both_hashes_are_recorded(copies, tmp_path_factory, monkeypatch):
    monkeypatch.chdir(copies)
    write_recipe(copies / "mine.yaml", recipe(Path(), tokenizer_source="union"))
    merge(MergeSettings(output_path=Path("out/merged"), merge_config=Path("mine.yaml"), device="cpu", quiet=True))
    published = copies / "out/merged/mergekit_config.yml"
    recorded = json.loads((copies / "out/merged/manifest.json").read_text())["recipe"]
    assert recorded["sha256"] == hashlib.sha256((copies / "mine.yaml").read_bytes()).hexdigest()
    assert recorded["published"] == {
        "name": published.name,
        "sha256": hashlib.sha256(published.read_bytes()).hexdigest(),
    }
    for place in (tmp_path_factory.mktemp("elsewhere"), published.parent):
        monkeypatch.chdir(place)
        again = copies / "again" / place.name
        merge(MergeSettings(output_path=again, merge_config=published, device="cpu", quiet=True))
        assert_same_tensors(again, copies / "out/merged")
    assert_same_tensors(merge_stock(copies / "again", yaml.safe_load(published.read_text())), copies / "out/merged")


def test_card_says_method_densities_versions_and_seed(copies):
    _, text = card(merge_here(copies, recipe(copies, "dare_ties"), random_seed=42))
    assert text.lstrip().startswith("# merged\n")
    assert "`dare_ties`, computed in bfloat16 and saved in bfloat16" in text
    assert "Seed 42" in text and "mergekit 0.1.5" in text and "transformers 5." in text
    # 3 of 30 tensors have densities of their own, all others 0.6
    rows = [line for line in text.splitlines() if line.startswith("| `code`")]
    assert len(rows) == 1 and rows[0].endswith("| 0.300 | 0.600 | 30 of 30 |")


def test_a_method_without_densities_shows_none(copies):
    _, text = card(merge_here(copies, recipe(copies, "task_arithmetic")))
    assert "density" not in text and "`task_arithmetic`" in text


def test_mean_density_is_weighted_by_parameters(copies):
    from safetensors.torch import load_file

    _, text = card(merge_here(copies, recipe(copies)))
    sizes = {name: tensor.numel() for name, tensor in load_file(copies / "base" / "model.safetensors").items()}
    densities = dict.fromkeys(sizes, 0.6)
    densities |= {f"model.layers.{i}.mlp.down_proj.weight": 0.3 + 0.1 * i for i in range(3)}
    mean = sum(densities[name] * size for name, size in sizes.items()) / sum(sizes.values())
    assert f"| `code` | {mean:.3f} |" in text


def test_hub_models_are_named_in_the_metadata(copies, monkeypatch):
    """A hub id is found in the cache; here the cache is a folder that the download would have filled."""
    from utils.models import checkpoints, opening

    hub = {"org/base": copies / "base", "org/code": copies / "code"}
    for module in (checkpoints, opening):
        monkeypatch.setattr(module, "download", lambda name, revision, patterns: hub[name])
    data = {
        "models": [{"model": "org/base"}, {"model": "org/code@v2", "parameters": {"weight": 1}}],
        "merge_method": "task_arithmetic",
        "base_model": "org/base",
    }
    merged = merge_here(copies, data)
    metadata, text = card(merged)
    assert metadata["base_model"] == ["org/base", "org/code"]
    assert "`org/code@v2` into `org/base`" in text
    inputs = json.loads((merged / "manifest.json").read_text())["inputs"]
    assert [(entry["name"], entry["revision"]) for entry in inputs] == [("org/base", None), ("org/code@v2", "v2")]


def test_the_card_can_be_left_out(copies):
    merged = merge_here(copies, recipe(copies), write_model_card=False)
    assert not (merged / "README.md").exists() and (merged / "mergekit_config.yml").exists()


def test_relative_names_with_one_slash_work_offline(copies, monkeypatch):
    """Stock mergekit asks the hub about such names after the merge, and fails without network."""
    import socket

    def no_network(*_arguments):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    (copies / "m").mkdir()
    for name in ("base", "code", "math"):
        (copies / name).rename(copies / "m" / name)
    monkeypatch.chdir(copies)
    write_recipe(copies / "r.yaml", recipe(Path("m")))
    merged = merge_here(copies, recipe(Path("m")))
    assert "`m/code` and `m/math` into `m/base`" in card(merged)[1] and has_tokenizer(merged)


@pytest.mark.slow
def test_models_come_from_the_cache_that_is_named(copies, run_command_line):
    """A hub cache as the hub's own client lays it out, found without network."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    for name in ("base", "code", "math"):
        folder = copies / "cache" / f"models--org--{name}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text(commit)
        (folder / "snapshots").mkdir()
        (copies / name).rename(folder / "snapshots" / commit)
    write_recipe(copies / "r.yaml", recipe(Path("org"), tokenizer_source="union"))
    words = ["--output_path", "out", "--merge_config", "r.yaml"]
    refused_here("hub-offline", "utils/merger.py", *words, cwd=copies)
    done = run_command_line("utils/merger.py", *words, "--transformers_cache", "cache", cwd=copies)
    assert done.returncode == 0, done.stderr
    inputs = json.loads((copies / "out" / "manifest.json").read_text())["inputs"]
    assert (inputs[0]["name"], inputs[0]["revision"]) == ("org/base", commit)
    assert card(copies / "out")[0]["base_model"] == ["org/base", "org/code", "org/math"]
