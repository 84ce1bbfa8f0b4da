"""Which parts a network has at each level."""

import pytest
import torch
from torch import nn

from tests.architectures.shrinking import Row, tiny_model
from tests.architectures.sweep import read_rows
from tests.refusals import refused
from tests.tiny_checkpoints import FAMILIES, save_any, save_tiny
from utils.guidance.submodule_linearity.called_parts import walk_through_parts
from utils.guidance.submodule_linearity.method import LEVELS
from utils.guidance.submodule_linearity.parts import (
    Outside,
    block_submodules,
    outside_submodules,
    require_same_parameters,
)
from utils.models.decoder import find_decoder
from utils.models.opening import open_checkpoint
from utils.models.weight_source import build_skeleton

ROWS = {row.label: row for row in read_rows()}


def decoder_of(family, folder, **overrides):
    checkpoint = open_checkpoint(str(save_tiny(family, folder, **overrides)))
    return find_decoder(build_skeleton(checkpoint, torch.float32, False), [], {}, "test model")


def by_level(block):
    parts = block_submodules(block)
    return {level: {part.name: part.parameters for part in parts if level in part.levels} for level in LEVELS}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_level_has_every_parameter_once(family, tmp_path):
    decoder = decoder_of(family, tmp_path)
    for block in decoder.blocks:
        expected = sorted(name for name, _ in block.named_parameters())
        for level, parts in by_level(block).items():
            assert sorted(name for names in parts.values() for name in names) == expected, level


def test_the_parts_of_a_llama_block(tmp_path):
    block = decoder_of("llama_bias", tmp_path).blocks[0]
    parts = by_level(block)
    assert list(parts["block"]) == ["block"]
    assert set(parts["attention_mlp"]) == {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
    assert parts["tensor"]["self_attn.q_proj"] == ("self_attn.q_proj.weight", "self_attn.q_proj.bias")
    norm = next(part for part in block_submodules(block) if part.path == "input_layernorm")
    assert norm.levels == ("attention_mlp", "tensor")


def test_outside_the_blocks(tmp_path):
    llama, gpt2 = (outside_submodules(decoder_of(family, tmp_path / family)) for family in ("llama", "gpt2"))
    assert llama == Outside(("model.embed_tokens", "model.norm"), (), "lm_head")
    assert gpt2 == Outside(("transformer.wte", "transformer.wpe", "transformer.ln_f"), (), "lm_head")


def test_what_lies_between_body_and_head_is_on_the_way_to_it(tmp_path):
    tiny_model(Row("bert-generation", "causal")).save_pretrained(tmp_path / "bias")
    save_any("modernbert-decoder", tmp_path / "dense")
    found = {}
    for name in ("bias", "dense"):
        skeleton = build_skeleton(open_checkpoint(str(tmp_path / name)), torch.float32, False)
        found[name] = outside_submodules(find_decoder(skeleton, [], {}, "test model"))
    assert found["bias"].between == () and found["bias"].head == "lm_head.decoder"  # whose bias lm_head holds, too
    assert found["dense"].between == ("lm_head.dense", "lm_head.norm") and found["dense"].head == "decoder"


class Odd(nn.Module):
    """A block with parameters of its own, a container, and a child with parameters beside its own children."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2))
        self.layer = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
        self.attention = nn.Sequential(nn.Linear(2, 2))
        self.attention.sinks = nn.Parameter(torch.ones(2))
        self.silent = nn.SiLU()


def test_containers_are_opened_and_own_parameters_are_parts():
    parts = by_level(Odd())
    assert set(parts["attention_mlp"]) == {"layer.0", "layer.1", "attention", "block"}
    assert parts["attention_mlp"]["block"] == parts["tensor"]["block"] == ("scale",)
    assert parts["tensor"]["attention"] == ("attention.sinks",)
    assert set(parts["tensor"]) == {"block", "layer.0", "layer.1", "attention", "attention.0"}


def test_parameters_beside_body_and_head_are_refused(tmp_path):
    decoder = decoder_of("llama", tmp_path)
    decoder.model.value_head = nn.Linear(2, 1)
    with refused("model-unsupported", "value_head are neither body nor head"):
        outside_submodules(decoder)


def test_blocks_of_other_parameters_are_refused(tmp_path):
    base = decoder_of("llama", tmp_path / "base")
    require_same_parameters(base.blocks[0], base.blocks[1], "x")
    other = decoder_of("llama_bias", tmp_path / "other")
    with refused("model-not-of-base"):
        require_same_parameters(base.blocks[0], other.blocks[0], "x: block 0")


@pytest.mark.parametrize("label", ["bloom:causal", "qwen3_moe:causal"])
def test_a_trial_before_weights_are_read_calls_every_part_once(label, tmp_path):
    assert trial(label, tmp_path).outputs


def test_parts_that_are_never_called_are_refused_before_weights_are_read(tmp_path):
    with refused("model-unsupported", "it: altup of block 0 is called never"):
        trial("gemma3n_text:causal", tmp_path)


def trial(label, folder):
    tiny_model(ROWS[label]).save_pretrained(folder)
    model = build_skeleton(open_checkpoint(str(folder)), torch.float32, False)
    return walk_through_parts(find_decoder(model, None, {}, "it"), [5, 6, 7, 8, 9, 10], "it")
