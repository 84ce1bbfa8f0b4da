"""Tiny random checkpoints of real architectures, saved by transformers itself. Built in a second, no network."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

VOCABULARY = 96
LAYERS = 3
HIDDEN = 32

_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
_COMMON = {**_SIZES, "intermediate_size": 48, "num_key_value_heads": 2}
_LLAMA_PATHS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
                "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip

# family: (model_type of transformers, config overrides, linear module paths inside a block)
FAMILIES: Mapping[str, tuple[str, Mapping[str, Any], tuple[str, ...]]] = {
    "llama": ("llama", {}, _LLAMA_PATHS),
    "llama_bias": ("llama", {"attention_bias": True}, _LLAMA_PATHS),
    "mistral": ("mistral", {}, _LLAMA_PATHS),
    "qwen2": ("qwen2", {}, _LLAMA_PATHS),
    "qwen3": ("qwen3", {"head_dim": 8}, _LLAMA_PATHS),
    "gemma": ("gemma", {"head_dim": 8, "tie_word_embeddings": True}, _LLAMA_PATHS),
    "gemma2": ("gemma2", {"head_dim": 8, "sliding_window": 8, "tie_word_embeddings": True}, _LLAMA_PATHS),
    "gemma3": ("gemma3_text", {"head_dim": 8, "sliding_window": 8, "tie_word_embeddings": True}, _LLAMA_PATHS),
    "phi3": ("phi3", {}, ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")),
    "phi3_tied": (
        "phi3",
        {"tie_word_embeddings": True},
        ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"),
    ),
    "gpt2": ("gpt2", {}, ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")),
    "gpt_neox": (
        "gpt_neox",
        {},
        ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    ),
    "olmo2": ("olmo2", {}, _LLAMA_PATHS),
}


# model_type: what it needs. Other positions, projections around the blocks or before the head, scaled logits, experts.
OTHERS: Mapping[str, Mapping[str, Any]] = {
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
    "granite": {
        "intermediate_size": 48,
        "logits_scaling": 4.0,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
    },
    "cohere": {"intermediate_size": 48, "logit_scale": 0.25},
    "bloom": {"n_head": 4},
    "modernbert-decoder": {"intermediate_size": 48, "local_attention": 16, "sep_token_id": 1, "cls_token_id": 0},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "qwen3_moe": {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
}


def block_prefix(family: str) -> str:
    """What stands before the layer number in a tensor name."""
    return {"gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers"}.get(family, "model.layers")


def save_tiny(family: str, folder: Path, seed: int = 0, layers: int = LAYERS, **overrides: Any) -> Path:
    """Save a random model of `family` into `folder` (bfloat16 safetensors) and return the folder."""
    model_type, own, _ = FAMILIES[family]
    settings = {**_COMMON, "num_hidden_layers": layers, **own, **overrides}
    if model_type == "gpt2":
        settings |= {"n_embd": HIDDEN, "n_layer": layers, "n_head": 4, "n_positions": 64}
    return _save_random(model_type, settings, folder, seed)


def save_any(family: str, folder: Path, **overrides: Any) -> Path:
    """The same for a family of `FAMILIES`, or a model type of `OTHERS` (without overrides)."""
    if family in FAMILIES:
        return save_tiny(family, folder, **overrides)
    assert not overrides
    return _save_random(family, {**_SIZES, **OTHERS[family]}, folder, seed=0)


def _save_random(model_type: str, settings: Mapping[str, Any], folder: Path, seed: int) -> Path:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings))
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms start out constant: make every tensor differ
            parameter.add_(torch.randn_like(parameter) * 0.02)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def resave(folder: Path, shard_size: str) -> Path:
    """Save a folder's weights again in several files of at most this size, with an index."""
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    loaded.save_pretrained(folder, max_shard_size=shard_size)
    return folder


def edit_tensors(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Edit the tensors of a folder with one weight file; `edit` changes the dictionary of them by name."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    file = folder / "model.safetensors"
    with safe_open(file, "pt") as stored:  # not load_file, which tests forbid where no weight is to be read
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (not a mapping)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def poison(folder: Path, name: str, value: float = float("nan")) -> None:
    """Put a value among the entries of one tensor."""
    edit_tensors(folder, lambda tensors: tensors[name].view(-1)[3].fill_(value))


def drop_head(folder: Path) -> None:
    """Take the language-model head out of a folder's weights."""
    edit_tensors(folder, lambda tensors: tensors.pop("lm_head.weight"))
