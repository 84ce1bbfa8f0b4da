"""The inputs of a mixture's experts, from text to file and recipe, against plain forwards by transformers.

python -m pytest tests/guidance/gram_mean/test_experts.py
"""

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from benchmarks.gram_sizes import Decoder
from tests.refusals import refused
from tests.tiny_merges import merge_here, tensors
from tests.tiny_mixtures import save_mixtures, save_stacked
from tests.tiny_pairs import CALIBRATION, sample_ids, write_config
from tests.tiny_recipes import decide_here, measure_here, read_here
from utils.guidance.gram_mean import measure as gram_measure
from utils.recipes.gram_file import input_gram
from utils.recipes.saliency_vectors import VectorKey, close_files


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Mixtures whose experts are stored apart, stacked, and (another family) stacked as [in, out]; measured."""
    made = {"apart": save_mixtures(tmp_path_factory.mktemp("apart"), num_hidden_layers=2)}
    made["stacked"] = save_stacked(made["apart"], tmp_path_factory.mktemp("stacked"))
    made["turned"] = save_mixtures(tmp_path_factory.mktemp("turned"), "gpt_oss")
    with pytest.MonkeyPatch.context() as patch:
        for folder in made.values():
            write_config(folder, {"calibration": CALIBRATION})
            patch.chdir(folder)
            measure_here("gram_mean")
            close_files()
    return made


def plain_grams(folder, ids):
    """By layer and expert the sums x x' / tokens of the first product's inputs and, gated by SiLU, of the second's."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()
    up, down, tokens = {}, {}, sum(map(len, ids))

    def note(layer, module, args):
        hidden, chosen = args[0].reshape(-1, args[0].shape[-1]), args[1]
        for expert in range(len(module.gate_up_proj)):
            rows = hidden[(chosen == expert).any(dim=1)].double()
            up[layer, expert] = up.get((layer, expert), 0) + rows.T @ rows / tokens
            if rows.shape[1] == module.gate_up_proj.shape[2]:
                gate, other = (rows @ module.gate_up_proj[expert].double().T).chunk(2, dim=1)
                inner = torch.nn.functional.silu(gate) * other
                down[layer, expert] = down.get((layer, expert), 0) + inner.T @ inner / tokens

    for layer, block in enumerate(model.model.layers):
        block.mlp.experts.register_forward_pre_hook(lambda module, args, layer=layer: note(layer, module, args))
    with torch.no_grad():
        for row in ids:
            model(input_ids=torch.tensor([row]))
    return up, down


@pytest.mark.parametrize("kind", ["apart", "stacked", "turned"])
def test_each_experts_matrices_are_those_of_its_own_tokens(folders, monkeypatch, kind):
    monkeypatch.chdir(folders[kind])
    table = pd.read_csv("dfs/gram_mean_tensors.csv").query("model == 'code' and tensor.str.contains('experts')")
    plain = [plain_grams(name, sample_ids(Path(), "code")) for name in ("base", "code")]
    checked = 0
    for row in table.itertuples():
        expert = int(row.tensor.split("experts.")[1].split(".")[0 if kind == "apart" else 1])
        is_down = "down_proj" in row.tensor
        both = [one[is_down].get((row.layer, expert)) for one in plain]
        if both[0] is None:
            continue
        found = input_gram(VectorKey(Path("dfs/code_grams.safetensors"), row.tensor))
        torch.testing.assert_close(found.gram.double(), sum(both), rtol=1e-4, atol=1e-6)
        assert found.axis == (0 if kind == "turned" else 1)
        checked += 1
    assert checked == len(table) if kind != "turned" else checked


def test_their_files_have_the_sizes_that_a_shape_says(folders):
    config = AutoConfig.from_pretrained(folders["apart"] / "base")
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shape = Decoder(
        hidden=config.hidden_size,
        attention=config.num_attention_heads * head,
        keys=2 * config.num_key_value_heads * head,
        intermediate=config.moe_intermediate_size,
        blocks=config.num_hidden_layers,
        vocabulary=config.vocab_size,
        tied=config.tie_word_embeddings,
        experts=config.num_experts,
    )
    weights = load_file(folders["apart"] / "base/model.safetensors")
    assert shape.weights == sum(value.numel() for value in weights.values() if value.dim() > 1)
    grams = load_file(folders["apart"] / "dfs/code_grams.safetensors")
    assert shape.gram_numbers == sum(value.numel() for key, value in grams.items() if ".axis" not in key)


def test_both_layouts_have_the_same_matrices_and_table(folders):
    found = {}
    for kind in ("apart", "stacked"):
        close_files()
        table = pd.read_csv(folders[kind] / "dfs/gram_mean_tensors.csv")
        experts = table[table["tensor"].str.contains("experts")]
        file = folders[kind] / "dfs/math_grams.safetensors"
        found[kind] = {}
        for row in experts[experts["model"] == "math"].itertuples():
            words = row.tensor.split("experts.")[1].removesuffix(".weight").split(".")
            number, part = (words[0], words[1]) if kind == "apart" else (words[1], words[-1])
            part = "down_proj" if "down_proj" in words else part
            found[kind][row.layer, int(number), part] = (row.tokens, input_gram(VectorKey(file, row.tensor)).gram)
    assert found["apart"].keys() == found["stacked"].keys()
    for place, (tokens, gram) in found["apart"].items():
        assert tokens == found["stacked"][place][0]
        assert torch.equal(gram, found["stacked"][place][1])
    assert {part for _, _, part in found["apart"]} == {"gate_proj", "up_proj", "down_proj"}


def test_experts_are_merged_by_them_unless_they_are_left_out(folders, monkeypatch):
    monkeypatch.chdir(folders["apart"])
    measure_here("gram_mean", "without", expert_inputs=False)
    merged = {}
    for name in ("dfs", "without"):
        (recipe,) = decide_here("gram_mean", name, f"{name}_out")
        merged[name] = tensors(merge_here(Path(), read_here(recipe), f"{name}_merged"))
    table = pd.read_csv("without/gram_mean_tensors.csv")
    assert not table["tensor"].str.contains("experts").any()
    differ = {name for name, value in merged["dfs"].items() if not torch.equal(value, merged["without"][name])}
    assert differ and all("experts" in name for name in differ)


def test_a_second_round_takes_experts_inputs_too(folders, monkeypatch):
    monkeypatch.chdir(folders["apart"])
    measure_here("gram_mean", "twice", rounds=2)
    once, twice = (pd.read_csv(f"{name}/gram_mean_tensors.csv") for name in ("dfs", "twice"))
    assert set(once["tensor"]) == set(twice["tensor"])


def test_matrices_that_do_not_fit_are_refused_with_the_flag_that_leaves_them_out(folders, monkeypatch):
    monkeypatch.chdir(folders["apart"])
    monkeypatch.setattr(gram_measure, "available_bytes", lambda device: 1000)
    with refused("measure-experts-too-large") as caught:
        measure_here("gram_mean", "large")
    assert "--no-expert_inputs" in str(caught.value) and not Path("large").exists()
    measure_here("gram_mean", "large", expert_inputs=False)
    assert json.loads(Path("large/manifest.json").read_text())["guidance_options"]["expert_inputs"] is False
