"""The values of a `config.json` that somebody else wrote, held to what a model can be before one is built by them.

transformers builds what it is told to: a list of 10**8 labels, a table of 10**9 rotations, a norm of NaN. Only keys whose
meaning is the same in every architecture are looked at.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from utils.errors import Problem, UserError, collected
from utils.validation import key_path, show

_DTYPES = ("float16", "bfloat16", "float32", "float64", "auto")
_MODEL_TYPE = re.compile(r"[A-Za-z0-9][\w.-]{0,99}")
_HEADING = "model {}: config.json"


def check_config(config: Mapping[str, Any], name: str) -> None:
    """Check a model's config.

    Args:
        config: what `config.json` holds.
        name: what to call the model.

    Raises:
        UserError: values that no model has; all of them are in the one message.
    """
    if problems := [Problem(text, "model-config-value") for text in _problems(config, ())]:
        raise collected(problems, _HEADING.format(name))


def check_layers(config: Mapping[str, Any], tensors: int, name: str) -> None:
    """Refuse a config that asks for more layers than the weights hold tensors: building them would take minutes."""
    for part in (config, config.get("text_config")):
        for key in _LAYERS:
            layers = part.get(key) if isinstance(part, Mapping) else None
            if isinstance(layers, int) and layers > tensors:
                text = f"{key} is {layers}, but the weights hold {tensors} tensors in all"
                raise UserError(f"{_HEADING.format(name)}: {text}", "model-config-value")


def _problems(config: Mapping[str, Any], place: tuple[Any, ...]) -> Iterator[str]:
    for key, value in config.items():
        here = (*place, key)
        if isinstance(value, Mapping) and len(here) < 8:
            if key == "auto_map":
                if not all(_is_class_path(one) for one in value.values()):
                    yield f"{key_path(here)} must map names to module.Class, got {show(value)}"
                continue
            yield from _problems(value, here)
        elif isinstance(value, float) and math.isnan(value):
            yield f"{key_path(here)} is not a number"
        elif value is not None and key in _RULES:
            if key == "model_type" and place and value == "":
                continue  # transformers writes no name for parts of a config that have none
            fits, wanted = _RULES[key]
            if not fits(value):
                yield f"{key_path(here)} must be {wanted}, got {show(value)}"


def _is_class_path(value: Any) -> bool:
    several = value if isinstance(value, list) else [value]
    return all(one is None or isinstance(one, str) for one in several)


def _whole(low: int, high: int) -> tuple[Callable[[Any], bool], str]:
    return lambda value: type(value) is int and low <= value <= high, f"a whole number from {low} to {high}"


def _per_layer(low: int, high: int) -> tuple[Callable[[Any], bool], str]:
    """Whole numbers, one for all layers or one for each."""
    one, wanted = _whole(low, high)

    def fits(value: Any) -> bool:
        return all(item is None or one(item) for item in value) if isinstance(value, list) else one(value)

    return fits, wanted


def _number(low: float, high: float, *, open_low: bool = False) -> tuple[Callable[[Any], bool], str]:
    def fits(value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return False
        return low <= value <= high and not (open_low and value == low)

    return fits, f"a number {'above' if open_low else 'from'} {low:g} to {high:g}".replace(
        "above 0 to", "above 0, up to"
    )


_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_key_value_heads", "num_kv_heads", "num_heads")
_WIDTHS = ("hidden_size", "intermediate_size", "n_embd", "d_model", "ffn_dim", "moe_intermediate_size")
_POSITIONS = ("max_position_embeddings", "n_positions", "n_ctx")
_EPSILONS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon")
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "sep_token_id")
_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(_LAYERS, _whole(1, 10_000)),
    **dict.fromkeys(_HEADS, _per_layer(1, 2**16)),
    **dict.fromkeys(_WIDTHS, _per_layer(1, 2**24)),
    **dict.fromkeys(_POSITIONS, _whole(1, 2**31)),
    **dict.fromkeys(_EPSILONS, _number(0, 1)),
    **dict.fromkeys(_TOKENS, _per_layer(-1, 2**31 - 1)),
    "head_dim": _whole(1, 2**16),
    "num_labels": _whole(0, 10**5),
    "vocab_size": _whole(1, 2**27),
    "initializer_range": _number(0, 1000),
    "rope_theta": _number(0, 1e15, open_low=True),
    "tie_word_embeddings": (lambda value: isinstance(value, bool), "true or false"),
    "model_type": (
        lambda value: isinstance(value, str) and bool(_MODEL_TYPE.fullmatch(value)),
        "the name of an architecture",
    ),
    "auto_map": (lambda value: False, "a mapping of names to module.Class"),
    **dict.fromkeys(
        ("dtype", "torch_dtype"),
        (
            lambda value: isinstance(value, str) and value.removeprefix("torch.") in _DTYPES,
            f"one of {', '.join(_DTYPES)}",
        ),
    ),
}
