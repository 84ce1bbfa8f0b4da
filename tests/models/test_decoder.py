"""Blocks and components are found from structure; what cannot be measured is refused with the reason.

python -m pytest tests/models/test_decoder.py
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from tests.architectures.shrinking import tiny_config
from tests.architectures.sweep import read_rows
from tests.refusals import refused
from tests.tiny_checkpoints import FAMILIES, LAYERS, block_prefix
from utils.models.decoder import Component, find_decoder, is_transposed, matching_paths, short_names, weight_matrix

SMALL = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip


def skeleton(model_type: str, **overrides) -> nn.Module:
    config = AutoConfig.for_model(model_type, **{**SMALL, **overrides})
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def family(name: str) -> nn.Module:
    model_type, own, _ = FAMILIES[name]
    extra = {"n_embd": 32, "n_layer": LAYERS, "n_head": 4} if model_type == "gpt2" else {}
    return skeleton(model_type, **own, **extra)


def refusal(code: str, model: nn.Module, components=None, prefixes=None) -> str:
    with refused(code) as caught:
        find_decoder(model, components, prefixes or {}, "model m")
    assert str(caught.value).startswith("model m")
    return str(caught.value)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_family_is_found_without_being_known(name):
    model = family(name)
    decoder = find_decoder(model, None, {}, "model m")
    assert decoder.blocks_path == block_prefix(name)
    assert len(decoder.blocks) == LAYERS
    paths = FAMILIES[name][2]
    assert {component.path for component in decoder.components} == set(paths) == set(decoder.linear_paths[0])
    assert decoder.body is model.base_model
    parameters = dict(model.named_parameters())
    for layer in range(LAYERS):
        for component in decoder.components:
            weight = parameters[decoder.weight_name(layer, component)]
            assert weight is decoder.blocks[layer].get_submodule(component.path).weight


def of_the_sweep(label: str) -> nn.Module:
    import transformers

    row = next(row for row in read_rows() if row.label == label)
    with torch.device("meta"):
        return getattr(transformers, row.architecture)._from_config(tiny_config(row))


def test_blocks_that_a_config_counts_twice():
    """Each block has two attentions, and the config's layers are those of the cache."""
    model = of_the_sweep("longcat_flash:causal")
    decoder = find_decoder(model, None, {}, "model m")
    assert model.config.num_hidden_layers == 8
    assert (decoder.blocks_path, len(decoder.blocks)) == ("model.layers", 4)


def test_a_vision_tower_with_as_many_blocks_and_wider_ones_is_none_of_the_language_s():
    wide = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
    model = skeleton("git", vision_config={**wide, "image_size": 16, "patch_size": 4})
    assert find_decoder(model, None, {}, "it").blocks_path == "git.encoder.layer"


def test_the_body_ends_before_a_head_that_is_inside_the_language_tower():
    model = of_the_sweep("llama4:image-text")
    decoder = find_decoder(model, None, {}, "model m")
    assert decoder.body is model.language_model.model
    assert decoder.blocks is model.language_model.model.layers


def test_names_are_the_shortest_that_are_unique_in_a_block():
    names = {c.path: c.name for c in find_decoder(family("gpt2"), None, {}, "m").components}
    assert names == {
        "attn.c_attn": "c_attn",
        "attn.c_proj": "attn.c_proj",
        "mlp.c_fc": "c_fc",
        "mlp.c_proj": "mlp.c_proj",
    }
    assert [c.name for c in find_decoder(family("llama"), None, {}, "m").components] == [
        path.rpartition(".")[2] for path in FAMILIES["llama"][2]
    ]


def test_components_by_short_name_by_path_and_by_mapping():
    model = family("llama")
    chosen = find_decoder(model, ["down_proj", "self_attn.q_proj", "gate"], {"gate": "mlp.gate_proj"}, "m").components
    assert chosen == (
        Component("down_proj", "mlp.down_proj"),
        Component("self_attn.q_proj", "self_attn.q_proj"),
        Component("gate", "mlp.gate_proj"),
    )


def test_conv1d_weights_are_seen_as_out_by_in():
    block = find_decoder(family("gpt2"), None, {}, "m").blocks[0]
    assert is_transposed(block.mlp.c_fc)
    assert block.mlp.c_fc.weight.shape == (32, 128)
    assert weight_matrix(block.mlp.c_fc).shape == (128, 32)
    linear = nn.Linear(3, 5)
    assert weight_matrix(linear).shape == (5, 3)
    assert weight_matrix(linear).data_ptr() == linear.weight.data_ptr()


@pytest.mark.parametrize(
    ("components", "prefixes"),
    [
        (["q_prj"], {}),
        (["proj"], {}),  # a suffix of a name is not a name
        (["input_layernorm"], {}),
        (["q"], {"q": "attn.q_proj"}),
        (["q"], {"q": "q_proj"}),  # needs the whole path
        (["q_proj"], {"q_proj": "self_attn"}),
        (["lm_head"], {}),
    ],
)
def test_components_that_are_not_there(components, prefixes):
    said = refusal("component-unknown", family("llama"), components, prefixes)
    named = f"{components[0]!r}" + "".join(f" (prefix_mapping: {path})" for path in prefixes.values())
    assert f"component {named} is not a linear part of its blocks; they have self_attn.q_proj" in said


def test_an_ambiguous_component():
    said = refusal("component-ambiguous", family("gpt2"), ["c_proj"])
    assert "component 'c_proj' may mean attn.c_proj or mlp.c_proj; write the longer name" in said


JAMBA = {"mamba_d_state": 4, "num_experts": 1, "attn_layer_period": 2, "attn_layer_offset": 1}


def test_a_hybrids_blocks_have_components_of_their_own():
    decoder = find_decoder(skeleton("jamba", **JAMBA), None, {}, "m")
    names = [{part.name for part in decoder.components_of(layer)} for layer in range(LAYERS)]
    assert "in_proj" in names[0] and "q_proj" not in names[0] and "q_proj" in names[1] and "in_proj" not in names[1]
    assert {part.name for part in decoder.partial} == (names[0] | names[1]) - (names[0] & names[1])
    chosen = find_decoder(skeleton("jamba", **JAMBA), ["q_proj"], {}, "m")
    assert [len(chosen.components_of(layer)) for layer in range(LAYERS)] == [0, 1, 0]


def test_the_experts_of_a_mixture_are_components():
    decoder = find_decoder(skeleton("mixtral", num_local_experts=2), None, {}, "m")
    stacked = {part.name: decoder.weight_name(1, part) for part in decoder.components if part.is_stacked}
    assert stacked == {
        "gate_up_proj": "model.layers.1.mlp.experts.gate_up_proj",
        "down_proj": "model.layers.1.mlp.experts.down_proj",
    }
    by_name = find_decoder(skeleton("mixtral", num_local_experts=2), ["experts.down_proj"], {}, "m").components
    assert [(part.path, part.parameter) for part in by_name] == [("mlp.experts", "down_proj")]


def test_a_copy_has_weights_of_its_own_and_no_graph_of_an_earlier_pass():
    """RecurrentGemma keeps its states on its modules."""
    decoder = find_decoder(of_the_sweep("recurrent_gemma:causal").to_empty(device="cpu"), None, {}, "model m")
    decoder.model(torch.tensor([[1, 2, 3]]))
    kept = [one for part in decoder.model.modules() for one in vars(part).values() if torch.is_tensor(one)]
    assert not all(one.is_leaf for one in kept)
    other = decoder.copied()
    assert other.model is not decoder.model and other.blocks[0] is other.model.get_submodule(other.blocks_path)[0]
    for ours, theirs in zip(decoder.model.parameters(), other.model.parameters(), strict=True):
        assert theirs.requires_grad and ours.data_ptr() != theirs.data_ptr()


@pytest.mark.parametrize("model_type", ["bert", "roberta"])
def test_encoders_are_refused(model_type):
    refusal("model-encoder", skeleton(model_type))
    assert find_decoder(skeleton(model_type, is_decoder=True), ["query"], {}, "m").components


def test_the_same_last_word_at_two_depths_gets_two_names():
    decoder = find_decoder(skeleton("bert", is_decoder=True), None, {}, "m")
    names = {component.name: component.path for component in decoder.components}
    assert len(names) == len(decoder.components)
    assert names["attention.output.dense"] == "attention.output.dense"
    assert names["output.dense"] == "output.dense"


def test_a_model_without_blocks():
    model = family("llama")
    model.model.layers = model.model.layers[:1]
    assert f"LlamaForCausalLM has no list of {LAYERS} decoder blocks; it is not supported" in refusal(
        "model-no-blocks", model
    )
    model.config = PreTrainedConfig()
    assert "its config.json says no num_hidden_layers" in refusal("model-no-blocks", model)


def test_blocks_without_linear_modules():
    model = family("llama")
    for index in range(LAYERS):
        model.model.layers[index] = nn.LayerNorm(4, device="meta")
    refusal("model-no-linear", model)


PART = st.sampled_from(["a", "b", "c", "proj", "a_proj"])
PATHS = st.lists(st.lists(PART, min_size=1, max_size=4).map(".".join), min_size=1, max_size=8, unique=True)


@settings(max_examples=100)
@given(PATHS)
def test_short_names_are_unique_and_lead_back(paths):
    names = short_names(paths)
    assert list(names) == paths
    assert len(set(names.values())) == len(paths)
    for path, name in names.items():
        assert path == name or path.endswith("." + name)
        assert matching_paths(name, paths) == [path]
        shorter = name.partition(".")[2]
        assert not shorter or matching_paths(shorter, paths) != [path]
