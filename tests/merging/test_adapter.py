"""A merge as an adapter: peft must load it and answer like the folded model, and what no adapter holds is refused.

python -m pytest tests/merging/test_adapter.py
"""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.refusals import refused
from tests.tiny_merges import merge_here, tensors
from tests.tiny_mixtures import save_mixtures
from tests.tiny_pairs import write_config
from tests.tiny_recipes import decide_here, measure_here, pairs_by_family, read_here
from utils.commands.merge import merge
from utils.commands.verify import verify
from utils.merging.adapter import low_rank_parts
from utils.merging.guided.low_rank import rank_of
from utils.merging.settings import MergeSettings

ADAPTER = Path("adapter")


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Pairs by family, measured. Random models gain nothing on their texts."""
    return pairs_by_family(
        tmp_path_factory.mktemp, lambda: measure_here("gram_mean", accept_useless_text=True), nsamples=4
    )


@pytest.fixture
def pair(measured, tmp_path, monkeypatch):
    def enter(family):
        for path in measured(family).iterdir():
            (tmp_path / path.name).symlink_to(path)
        (tmp_path / "pair.yaml").unlink()
        config = yaml.safe_load((measured(family) / "pair.yaml").read_text())
        monkeypatch.chdir(tmp_path)
        write_config(tmp_path, config | {"target_model_names": {"math": "./math"}})

    return enter


def recipe_file(**asked):
    (path,) = decide_here("gram_mean", mean_density=0.2, **asked)
    return path


def write(recipe, **asked):
    merge(MergeSettings(ADAPTER, recipe, device="cpu", quiet=True, adapter=True, **asked))


def logits(model):
    ids = torch.arange(3, 40)[None]
    with torch.inference_mode():
        return model.eval()(input_ids=ids).logits


@pytest.mark.parametrize("family", ["llama", "gemma3"])  # an own head; a head that is the embedding
def test_peft_answers_like_the_folded_model(family, pair):
    peft = pytest.importorskip("peft", reason="peft comes with mergekit")
    from transformers import AutoModelForCausalLM

    pair(family)
    path = recipe_file(form="low_rank")
    recipe = read_here(path)
    assert recipe["parameters"]["low_rank"] is True
    write(path)
    folded = merge_here(Path(), {**recipe, "dtype": "float32", "out_dtype": "float32"}, "folded")
    base = AutoModelForCausalLM.from_pretrained("base", dtype=torch.float32)
    before = logits(base)
    loaded = logits(peft.PeftModel.from_pretrained(base, ADAPTER))
    expected = logits(AutoModelForCausalLM.from_pretrained(folded, dtype=torch.float32))
    assert float((expected - before).abs().max()) > 1e-2
    # whole modules are kept in the base's dtype
    torch.testing.assert_close(loaded, expected, rtol=0, atol=2e-2 * float((expected - before).abs().max()))
    assert json.loads((ADAPTER / "manifest.json").read_text())["command"] == "utils/merger.py"
    assert "library_name: peft" in (ADAPTER / "README.md").read_text()


@pytest.mark.parametrize(("family", "copies"), [("llama", 2), ("gemma3", 2)])  # two tables; one that is tied
def test_embeddings_may_stay_the_bases_by_the_line_that_is_printed(family, copies, pair, capsys):
    pair(family)
    path = recipe_file(form="low_rank")
    merge(MergeSettings(ADAPTER, path, device="cpu", adapter=True))
    said = capsys.readouterr().out
    assert ("tied ones twice" in said) == (family == "gemma3")
    found = load_file(ADAPTER / "adapter_model.safetensors")
    assert sum("embed_tokens" in name or "lm_head" in name for name in found) == copies
    (line,) = re.findall(r"^  (factor: .*)$", said, re.M)
    recipe = read_here(path)
    for model in recipe["models"][1:]:
        model["parameters"] |= yaml.safe_load(line)
    Path("kept.yaml").write_text(yaml.safe_dump(recipe))
    merge(MergeSettings(Path("kept"), Path("kept.yaml"), device="cpu", quiet=True, adapter=True))
    less = load_file("kept/adapter_model.safetensors")
    assert {*found} - {*less} == {name for name in found if "embed_tokens" in name or "lm_head" in name}


def test_factors_are_the_recipes_change_and_have_its_ranks(pair):
    pair("llama")
    path = recipe_file(form="low_rank")
    write(path)
    found = load_file(ADAPTER / "adapter_model.safetensors")
    config = json.loads((ADAPTER / "adapter_config.json").read_text())
    folded = tensors(merge_here(Path(), {**read_here(path), "dtype": "float32", "out_dtype": "float32"}, "folded"))
    base = tensors(Path("base"))
    assert len(config["target_modules"]) == 14
    for module in config["target_modules"]:
        change = folded[f"{module}.weight"].double() - base[f"{module}.weight"].double()
        down, up = (found[f"base_model.model.{module}.{end}.weight"].double() for end in ("lora_A", "lora_B"))
        assert len(down) == config["rank_pattern"][module] == rank_of(tuple(change.shape), 0.2)
        torch.testing.assert_close(up @ down, change, rtol=1e-4, atol=1e-6)


def test_the_folder_is_verified_found_again_and_a_model_is_not_written_over_it(pair, capsys):
    pair("llama")
    path = recipe_file(form="low_rank")
    write(path)
    verify(ADAPTER)
    capsys.readouterr()
    write(path)
    assert "already holds exactly this merge" in capsys.readouterr().out
    with refused("out-exists"):
        merge(MergeSettings(ADAPTER, path, device="cpu", quiet=True))


def test_a_change_of_full_rank_is_refused_with_the_flag_that_makes_another(pair):
    pair("llama")
    with refused("adapter-not-low-rank"):
        write(recipe_file())
    assert not ADAPTER.exists()


def test_biases_that_change_are_refused(pair):
    pair("gpt2")
    with refused("adapter-unfit"):
        write(recipe_file(form="low_rank"))
    assert not ADAPTER.exists()


def test_a_mixture_is_refused_for_its_experts(tmp_path, monkeypatch):
    save_mixtures(tmp_path, num_hidden_layers=2)
    monkeypatch.chdir(tmp_path)
    recipe = {"merge_method": "task_arithmetic", "base_model": "base", "dtype": "float32"}
    experts = [{"model": name, "parameters": {"weight": 0.5}} for name in ("code", "math")]
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe | {"models": experts}))
    with refused("adapter-of-mixture", "experts.0."):
        write(Path("recipe.yaml"))
    with refused("adapter-of-mixture"):  # before weights are read
        write(Path("recipe.yaml"), dry_run=True)
    assert not ADAPTER.exists()


def test_ranks_need_a_density(pair):
    pair("llama")
    with refused("flag-no-effect"):
        decide_here("gram_mean", form="low_rank")


def test_parts_have_no_more_rank_than_the_change():
    generator = torch.Generator().manual_seed(0)
    up, down = torch.randn(20, 3, generator=generator), torch.randn(3, 30, generator=generator)
    left, right = low_rank_parts(up @ down, 1e-4)
    assert left.shape == (3, 30)
    torch.testing.assert_close(right @ left, up @ down, rtol=1e-4, atol=1e-4)
    assert low_rank_parts(torch.randn(20, 30, generator=generator), 1e-4) is None
