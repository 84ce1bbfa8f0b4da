"""LoRA adapters as changes of a checkpoint's tensors: nothing is merged or written, each matrix is changed as it is read.

What is read is peft's format: `adapter_config.json` and `adapter_model.safetensors`. A matrix W becomes W + s B A, with
s = alpha / r, or alpha / sqrt(r) (rsLoRA, arXiv 2312.03732); with DoRA (arXiv 2402.09353) each row is then brought to a
length of its own. What an adapter holds whole (a trained head, biases) takes the place of the model's. Kinds of adapters
that are anything else are refused.
"""

import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from utils.bounded_files import read_json
from utils.errors import UserError
from utils.models.headers import FLOAT_DTYPES, INDEX, SINGLE, LowRank, TensorHeader, file_headers, same_content

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_PARTS = {
    "lora_A.weight": "down",
    "lora_B.weight": "up",
    "lora_embedding_A": "down",
    "lora_embedding_B": "up",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
}
# settings of peft that make an adapter more than a change of rank r
_OTHER = (
    "lora_bias",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
    "use_qalora",
    "alora_invocation_tokens",
)
_CHANGES_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")  # ways to begin that change the model itself
_MOST_ALPHA = 1e30
_MERGE = "merge it with peft (merge_and_unload) and give the result"


@dataclass(frozen=True)
class AdapterName:
    """A model and an adapter on it, as two names; `model_revision` and `revision` are on the hub."""

    model: str
    adapter: str


def adapter_name(name: str) -> AdapterName | None:
    """Read `model+adapter`, or a folder that holds an adapter alone (its config names the model); None for a model.

    Raises:
        UserError: the folder's config is malformed or names no model.
    """
    path = Path(os.path.expanduser(name))
    if path.exists():
        if not _is_adapter(path):
            return None
        model = read_json(path / CONFIG, f"LoRA adapter {name}: {CONFIG}").get("base_model_name_or_path")
        if not isinstance(model, str) or not model or "+" in model:
            raise UserError(
                f"model {name} is a LoRA adapter whose {CONFIG} names no model (base_model_name_or_path); write model+{name}",
                "adapter-no-model",
            )
        if _is_adapter(Path(os.path.expanduser(model))):  # itself, say
            raise UserError(
                f"LoRA adapter {name}: {CONFIG} names {model}, which is an adapter itself, as its model",
                "adapter-no-model",
            )
        return AdapterName(model, name)
    model, found, adapter = name.partition("+")
    if not found:
        return None
    if not model or not adapter or "+" in adapter:
        raise UserError(f"model {name}: write model+adapter, one of each", "adapter-name")
    return AdapterName(model, adapter)


def _is_adapter(path: Path) -> bool:
    """Whether a folder holds an adapter alone."""
    return (path / CONFIG).is_file() and not any(os.path.lexists(path / file) for file in (SINGLE, INDEX))


def with_adapter(
    tensors: Mapping[str, TensorHeader],
    adapter: Path,
    name: str,
    stored_name: Callable[[str], str | None] = lambda own: None,
) -> dict[str, TensorHeader]:
    """The tensors of a model with an adapter's changes.

    Args:
        tensors: the model's, by name.
        adapter: the adapter's folder.
        name: what to call both in messages.
        stored_name: finds which tensor a name of the adapter's means that is none of the model's, None where none.

    Raises:
        UserError: a file is missing or malformed; the adapter is of another kind, or does not fit the model.
    """
    for file in (CONFIG, WEIGHTS):
        if not (adapter / file).is_file():
            raise UserError(f"LoRA adapter {name}: {adapter} has no {file} that is a regular file", "adapter-no-files")
    config = read_json(adapter / CONFIG, f"LoRA adapter {name}: {CONFIG}")
    _refuse_other_kinds(config, name)
    parts: dict[str, dict[str, TensorHeader]] = {}
    whole: dict[str, TensorHeader] = {}
    changed = dict(tensors)
    for header in file_headers(adapter / WEIGHTS, name):
        path = header.name.removeprefix(_PREFIX)
        end = next((end for end in _PARTS if path.endswith(f".{end}")), None)
        if end is not None:
            parts.setdefault(path.removesuffix(f".{end}"), {})[_PARTS[end]] = header
        elif ".lora_" in path or "lora_" in path.rpartition(".")[2]:
            raise UserError(
                f"LoRA adapter {name}: {header.name} is of an unknown kind; {_MERGE}", "adapter-unsupported"
            )
        else:
            whole[path.replace(".base_layer.", ".")] = header
    targets = {path: _stored(path, tensors, stored_name) for path in whole}
    for path, header in whole.items():
        if targets[path] is None and any(same_content(header, whole[other]) for other in whole if targets[other]):
            continue  # a tied embedding, which is kept for it and for the head
        target = targets[path] or _target(path, tensors, name, stored_name)
        _require(header.shape == target.shape, name, header, target)
        changed[target.name] = replace(header, name=target.name)
    if not parts and changed == dict(tensors):
        raise UserError(f"LoRA adapter {name}: {WEIGHTS} holds nothing", "adapter-unfit")
    for path, own in parts.items():
        target = _target(f"{path}.weight", tensors, name, stored_name)
        if not {"down", "up"} <= own.keys():
            raise UserError(f"LoRA adapter {name}: {path} has only one of its two matrices", "adapter-unfit")
        before = changed[target.name]  # which may be the adapter's own
        changed[target.name] = replace(before, change=_change(config, path, own, before, name))
    return changed


def _change(
    config: Mapping[str, Any], path: str, own: Mapping[str, TensorHeader], target: TensorHeader, name: str
) -> LowRank:
    down, up, magnitude = own["down"], own["up"], own.get("magnitude")
    embedding = "lora_embedding" in down.name
    transposed = embedding or bool(config.get("fan_in_fan_out"))
    _require(len(down.shape) == 2 and len(up.shape) == 2 and down.shape[0] == up.shape[1], name, down, up)
    shape = (down.shape[1], up.shape[0]) if transposed else (up.shape[0], down.shape[1])
    _require(shape == target.shape, name, up, target)
    for header in (down, up, target, *([magnitude] if magnitude else [])):
        if header.dtype not in FLOAT_DTYPES:
            raise UserError(f"LoRA adapter {name}: {header.name} is stored as {header.dtype}", "adapter-unfit")
    if bool(config.get("use_dora")) != (magnitude is not None) or (magnitude is not None and transposed):
        raise UserError(f"LoRA adapter {name}: DoRA of {path} is not supported; {_MERGE}", "adapter-unsupported")
    _require(magnitude is None or math.prod(magnitude.shape) == up.shape[0], name, magnitude or up, target)
    rank = down.shape[0]
    _require(rank > 0, name, down, target)
    alpha = _by_pattern(config.get("alpha_pattern"), path, config.get("lora_alpha", 8), name)
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool) or not abs(alpha) <= _MOST_ALPHA:
        raise UserError(
            f"LoRA adapter {name}: {CONFIG} has lora_alpha {repr(alpha)[:40]}, where a finite number belongs; mend it",
            "adapter-unfit",
        )
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    return LowRank(down, up, scale, transposed, magnitude)


def _by_pattern(patterns: Any, path: str, usual: Any, name: str) -> Any:
    """The value of the first pattern that a module's path ends with, as in peft; but patterns are names alone.

    In peft they are regular expressions, and one from a stranger may take for ever.
    """
    if not isinstance(patterns, Mapping | None):
        raise UserError(f"LoRA adapter {name}: {CONFIG} has alpha_pattern {str(patterns)[:40]!r}", "adapter-unfit")
    for key, value in (patterns or {}).items():
        if not re.fullmatch(r"\^?[\w.-]+", key):
            raise UserError(
                f"LoRA adapter {name}: alpha_pattern {key[:40]!r} is no name of a module; {_MERGE}",
                "adapter-unsupported",
            )
        if path == key.removeprefix("^") or path.endswith(f".{key}"):
            return value
    return usual


def _target(
    path: str, tensors: Mapping[str, TensorHeader], name: str, stored_name: Callable[[str], str | None]
) -> TensorHeader:
    """The stored tensor that an adapter means. Raises a `UserError` if there is none."""
    found = _stored(path, tensors, stored_name)
    if found is None:
        raise UserError(
            f"LoRA adapter {name} changes {path}, which the model does not store as a tensor of its own; {_MERGE}",
            "adapter-unfit",
        )
    return found


def _stored(
    path: str, tensors: Mapping[str, TensorHeader], stored_name: Callable[[str], str | None]
) -> TensorHeader | None:
    """The stored tensor of a name; bare bodies are stored without its first part, or with it."""
    for candidate in (path, path.partition(".")[2], f"model.{path}"):
        if candidate in tensors:
            return tensors[candidate]
    other = stored_name(path)
    return None if other is None else tensors[other]


def _require(holds: bool, name: str, one: TensorHeader, other: TensorHeader) -> None:
    if not holds:
        raise UserError(
            f"LoRA adapter {name}: {one.name} {list(one.shape)} does not fit {other.name} {list(other.shape)}; is the model "
            "the one that it was trained on?",
            "adapter-unfit",
        )


def _refuse_other_kinds(config: Mapping[str, Any], name: str) -> None:
    kind = config.get("peft_type")
    begun = config.get("init_lora_weights")
    other = next((key for key in _OTHER if config.get(key)), None)
    if kind != "LORA":
        other = f"peft_type {kind}"
    elif isinstance(begun, str) and begun.lower().startswith(_CHANGES_BASE):
        other = f"init_lora_weights {begun}, which changes the model itself,"
    if other is not None:
        raise UserError(f"LoRA adapter {name}: {other} is not supported; {_MERGE}", "adapter-unsupported")
