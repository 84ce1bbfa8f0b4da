"""Values in a config.json that no model has are refused before anything is built by them.

python -m pytest tests/models/test_config_check.py
"""

import json

import pytest
from transformers import AutoConfig

from tests.refusals import refused
from tests.tiny_checkpoints import FAMILIES, OTHERS, save_any
from utils.models.checkpoints import read_model_config
from utils.models.config_check import check_config, check_layers
from utils.models.opening import open_checkpoint

LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}


@pytest.mark.parametrize(
    "change",
    [
        {"num_attention_heads": 0},
        {"num_attention_heads": True},
        {"num_key_value_heads": [2, 0]},
        {"head_dim": 10**9},
        {"hidden_size": 2**40},
        {"num_hidden_layers": -1},
        {"num_labels": 10**8},
        {"vocab_size": 2**31},
        {"eos_token_id": 2**31},
        {"rms_norm_eps": -1},
        {"rms_norm_eps": float("nan")},
        {"rms_norm_eps": "1e-5"},
        {"initializer_range": float("inf")},
        {"rope_theta": 0},
        {"rope_theta": float("nan")},
        {"rope_parameters": {"rope_theta": -5}},
        {"tie_word_embeddings": "no"},
        {"model_type": "../x"},
        {"model_type": 5},
        {"dtype": "float4"},
        {"torch_dtype": "os"},
        {"auto_map": 5},
        {"auto_map": {"AutoConfig": 5}},
        {"text_config": {"head_dim": 0}},
        {"anything": float("nan")},
    ],
    ids=json.dumps,
)
def test_refused(tmp_path, change):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | change))
    with refused("model-config-value") as caught:
        read_model_config(tmp_path, "some/model")
    assert str(caught.value).startswith("model some/model: config.json: ") and next(iter(change)) in str(caught.value)


def test_what_a_message_says():
    with refused("model-config-value") as caught:
        check_config({"head_dim": 0}, "m")
    assert str(caught.value) == "model m: config.json: head_dim must be a whole number from 1 to 65536, got 0"


@pytest.mark.parametrize("family", sorted({**FAMILIES, **OTHERS}))
def test_what_transformers_writes_of_a_family_passes(tmp_path, family):
    folder = save_any(family, tmp_path / family)
    open_checkpoint(str(folder))


@pytest.mark.parametrize(
    "family", ["llama", "gemma3", "qwen3_moe", "mamba2", "falcon_h1", "deepseek_v3", "gpt_oss", "nemotron"]
)
def test_the_defaults_of_a_family_pass(family):
    settings = json.loads(AutoConfig.for_model(family).to_json_string())
    check_config(settings, family)


def test_more_layers_than_tensors():
    with refused("model-config-value"):
        check_layers({"text_config": {"num_hidden_layers": 40}}, 39, "m")
    check_layers({"num_hidden_layers": 40}, 41, "m")
