"""Tiny random models of any architecture that transformers knows: its own config class, every size made small.

A size is found by the name of its setting. Nested configs (a vision tower, a language tower) are shrunken alike.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

LAYERS, HIDDEN, HEADS, VOCABULARY = 4, 32, 4, 96
_NAMES = {"causal": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "image-text": MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}
_SMALL: Mapping[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embedding_size", "word_embed_proj_dim", "width"), HIDDEN),
    **dict.fromkeys(("embed_dim", "dim", "emb_dim", "out_hidden_size", "projection_dim", "mm_hidden_size"), HIDDEN),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "depth", "layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads", "heads"), HEADS),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "kv_n_heads", "swa_num_key_value_heads"), 2),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "text_vocab_size"), VOCABULARY),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "n_inner", "d_ff", "dff", "dim_ff", "inner_dim", "ffn_hidden_size"), 48
    ),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 24),
    **dict.fromkeys(("shared_intermediate_size", "moe_shared_expert_intermediate_size", "intermediate_size_mlp"), 24),
    **dict.fromkeys(("moe_ffn_hidden_size", "expert_intermediate_size", "routed_intermediate_size"), 24),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_moe_experts"), 4),
    **dict.fromkeys(
        ("num_experts_per_tok", "moe_top_k", "moe_k", "num_experts_per_token", "moe_topk", "top_k_experts"), 2
    ),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "n_group", "topk_group"), 1),
    **dict.fromkeys(("head_dim", "attention_head_dim", "kv_channels", "global_head_dim", "d_kv", "swa_head_dim"), 8),
    **dict.fromkeys(("qk_nope_head_dim", "v_head_dim", "qk_rope_head_dim", "swa_v_head_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 64),
    **dict.fromkeys(("sliding_window", "attention_chunk_size", "attention_window_size", "sliding_window_size"), 8),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"), 1),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "mamba_n_heads", "mamba_num_heads"), 4),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "mamba_d_head", "mamba_head_dim"), 8),
    **dict.fromkeys(("mamba_d_state", "state_size", "mamba_dt_rank", "time_step_rank", "ssm_state_size"), 8),
    **dict.fromkeys(("mamba_n_groups", "n_groups", "mamba_ngroups"), 1),
    **dict.fromkeys(("bos_token_id",), 0),
    **dict.fromkeys(("eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id"), 1),
    **dict.fromkeys(("image_size",), 16),
    **dict.fromkeys(("patch_size", "temporal_patch_size"), 4),
    **dict.fromkeys(("lru_width", "hidden_size_per_layer_input", "audio_hidden_size"), HIDDEN),
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One architecture of the sweep: transformers' model type, which of its mappings names the class, and settings.

    Its random numbers are drawn by `seed`.
    """

    model_type: str
    kind: str
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    seed: int = 0

    @property
    def architecture(self) -> str:
        """The class that transformers' mapping names."""
        name = _NAMES[self.kind][self.model_type]
        return name if isinstance(name, str) else name[0]

    @property
    def label(self) -> str:
        """What the row is called."""
        return f"{self.model_type}:{self.kind}"


def all_rows() -> list[Row]:
    """Every class of transformers' two mappings, once."""
    rows, seen = [], set()
    for kind, names in _NAMES.items():
        for model_type in names:
            row = Row(model_type, kind)
            if (row.model_type, row.architecture) not in seen:
                seen.add((row.model_type, row.architecture))
                rows.append(row)
    return rows


def tiny_config(row: Row) -> Any:
    """The row's config with every size small."""
    return _shrunken(CONFIG_MAPPING[row.model_type], row.settings)


def tiny_model(row: Row) -> nn.Module:
    """A random float32 model in which no two entries of a tensor are alike."""
    torch.manual_seed(row.seed)
    model = getattr(transformers, row.architecture)._from_config(tiny_config(row), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
        for buffer in model.buffers():  # ranges that a release has learned begin at infinity
            if buffer.is_floating_point() and buffer.isinf().any():
                buffer.clamp_(-8, 8)
    return model.eval()


def save_changed(model: nn.Module, folder: Path, seed: int) -> Path:
    """Save a copy of a model with small changes everywhere; the model itself stays as it is."""
    generator = torch.Generator().manual_seed(seed)
    kept = [parameter.detach().clone() for parameter in model.parameters()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.01)
        model.save_pretrained(folder)
        for parameter, before in zip(model.parameters(), kept, strict=True):
            parameter.copy_(before)
    return folder


def _shrunken(config_class: Any, settings: Mapping[str, Any]) -> Any:
    known = {item.name for item in dataclasses.fields(config_class)}
    values = {name: value for name, value in _SMALL.items() if name in known and _is_whole(config_class, name)}
    for name, nested in (config_class.sub_configs or {}).items():
        own = settings.get(name, {})
        chosen = CONFIG_MAPPING[own["model_type"]] if "model_type" in own else _nested_class(config_class, name, nested)
        if chosen is not None:
            values[name] = _shrunken(chosen, {key: value for key, value in own.items() if key != "model_type"})
    values |= {name: value for name, value in settings.items() if name not in (config_class.sub_configs or {})}
    return config_class(**values)


def _is_whole(config_class: Any, name: str) -> bool:
    """Whether a setting's default is a whole number (some classes have lists under these names) or nothing."""
    default = getattr(config_class, name, None)
    return default is None or (isinstance(default, int) and not isinstance(default, bool))


def _nested_class(config_class: Any, name: str, nested: Any) -> Any:
    """The class of a nested config; where any is allowed, the one that the default config has."""
    if hasattr(nested, "sub_configs") and nested is not transformers.AutoConfig:
        return nested
    default = getattr(config_class(), name, None)
    return type(default) if default is not None else None
