"""LoRA adapters in a recipe: explained, merged once, never half."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.refusals import refused
from tests.tiny_merges import assert_same_tensors, merge_here, merge_stock, recipe, save_models, tensors
from tests.tiny_pairs import contents, edit_json
from utils import trial


@pytest.fixture(scope="module")
def llamas(tmp_path_factory) -> Path:
    """A base, and `adapter`, a LoRA adapter on it with weights that are not zero."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = save_models(tmp_path_factory.mktemp("lora"), names=("base", "code"))
    torch.manual_seed(9)
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    adapted.save_pretrained(folder / "adapter")
    return folder


def with_adapter(copies: Path, **keys):
    data = recipe(copies, "task_arithmetic", **keys)
    data["models"][2]["model"] = f"{copies / 'base'}+{copies / 'adapter'}"
    return data


def test_without_a_cache_nothing_is_merged_beside_the_result(copies):
    before = contents(copies)
    data = with_adapter(copies, dtype="float32", tokenizer_source="union")
    ours = merge_here(copies, data, "ours")
    assert {name for name in contents(copies) if not name.startswith("ours")} - {"recipe.yaml"} <= before.keys()
    cached = merge_here(copies, data, "cached", lora_merge_cache=copies / "cache", lora_merge_dtype="float32")
    for name, value in tensors(cached).items():
        torch.testing.assert_close(tensors(ours)[name], value, atol=4e-3, rtol=2**-8)  # the cache is not rounded


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare_ties"])
def test_changed_while_read_equals_a_folder_with_these_numbers(copies, method):
    """By this project's own pieces (ties) and by mergekit's executor (dare_ties)."""
    from safetensors.torch import save_file

    from utils.models.opening import open_checkpoint
    from utils.models.tensor_files import TensorFiles

    both = f"{copies / 'base'}+{copies / 'adapter'}"
    checkpoint = open_checkpoint(both)
    shutil.copytree(copies / "base", copies / "whole")
    with TensorFiles(checkpoint.files) as files:
        read = {name: files.read_whole(header) for name, header in checkpoint.tensors.items()}
    save_file(read, copies / "whole" / "model.safetensors", {"format": "pt"})
    data = recipe(copies, method)
    for entry in data["models"][1:]:
        entry["parameters"] = {"weight": 0.5, **({} if method == "task_arithmetic" else {"density": 0.4})}
    for name, model in (("a", both), ("b", str(copies / "whole"))):
        data["models"][2]["model"] = model
        merge_here(copies, data, name)
    assert_same_tensors(copies / "a", copies / "b")


def test_an_adapter_alone_is_explained(copies):
    data = recipe(copies, experts=("code", "adapter"))
    with refused("model-is-adapter"):
        merge_here(copies, data)


def test_the_adapter_is_merged_as_stock_mergekit_does(copies):
    data = with_adapter(copies, dtype="float32", tokenizer_source="union")
    ours = merge_here(copies, data, lora_merge_cache=copies / "cache", lora_merge_dtype="float32")
    stock = merge_stock(copies, data, lora_merge_cache=str(copies / "stock_cache"), lora_merge_dtype="float32")
    assert_same_tensors(ours, stock)
    names = [entry["name"] for entry in json.loads((ours / "manifest.json").read_text())["inputs"]]
    assert names == ["base", "code", "base+adapter"]
    assert str(copies) not in (ours / "README.md").read_text() + (ours / "mergekit_config.yml").read_text()
    # and the oracle: base + code + B A scale on an adapted tensor
    name = "model.layers.0.self_attn.q_proj"
    low = {key: value for key, value in tensors(copies / "adapter").items() if f"{name[6:]}.lora" in key}
    config = json.loads((copies / "adapter" / "adapter_config.json").read_text())
    product = next(v for k, v in low.items() if "lora_B" in k) @ next(v for k, v in low.items() if "lora_A" in k)
    delta = product * config["lora_alpha"] / config["r"]
    base, code = (tensors(copies / key)[f"{name}.weight"].float() for key in ("base", "code"))
    expected = base + (code - base) + 0.75 * delta
    torch.testing.assert_close(tensors(ours)[f"{name}.weight"], expected, atol=1e-5, rtol=1e-5)


def test_the_cache_is_used_again_until_the_adapter_changes(copies, monkeypatch):
    data = with_adapter(copies)
    merge_here(copies, data, "first", lora_merge_cache=copies / "cache")
    (cached,) = (copies / "cache").iterdir()
    stamp = (cached / "model.safetensors").stat().st_mtime_ns
    merge_here(copies, data, "second", lora_merge_cache=copies / "cache")
    assert (cached / "model.safetensors").stat().st_mtime_ns == stamp
    assert_same_tensors(copies / "first", copies / "second")
    config = json.loads((copies / "adapter" / "adapter_config.json").read_text())
    (copies / "adapter" / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 1}))
    merge_here(copies, data, "third", lora_merge_cache=copies / "cache")
    assert len(list((copies / "cache").iterdir())) == 2


def test_a_failure_leaves_no_cache_entry(copies, monkeypatch):
    import peft

    def fail(*_arguments, **_keywords):
        raise ValueError("does not fit")

    monkeypatch.setattr(peft.PeftModel, "from_pretrained", fail)
    with refused("adapter-unfit"):
        merge_here(copies, with_adapter(copies), lora_merge_cache=copies / "cache")
    assert not contents(copies / "cache")


@pytest.mark.parametrize("ranks", [{"r": 10**9}, {"r": 0}, {"rank_pattern": {"q_proj": 10**9}}])
def test_a_rank_that_the_weights_do_not_have_is_not_allocated(copies, ranks):
    edit_json(copies / "adapter/adapter_config.json", **ranks)
    with refused("adapter-unfit"):
        merge_here(copies, with_adapter(copies), lora_merge_cache=copies / "cache")
    assert not (copies / "cache").exists()


def test_a_pattern_that_takes_for_ever_is_not_searched_by(copies, monkeypatch):
    monkeypatch.setattr(trial, "CPU_SECONDS", 1)
    trial.allow_trials()
    edit_json(copies / "adapter/adapter_config.json", target_modules="([a-z._0-9]+)+!")
    try:
        with refused("model-breaks-libraries"):
            merge_here(copies, with_adapter(copies), lora_merge_cache=copies / "cache")
    finally:
        trial.allow_trials(False)


def test_an_adapter_without_safetensors(copies):
    (copies / "adapter" / "adapter_model.safetensors").unlink()
    with refused("adapter-no-files"):
        merge_here(copies, with_adapter(copies), lora_merge_cache=copies / "cache")
