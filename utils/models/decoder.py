"""Which modules of a model are its decoder blocks, and which of their parts are components.

One answer for every architecture, found from structure alone: the blocks are the module list with as many entries as
the config has hidden layers; the components are the linear modules inside a block.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from utils.errors import UserError


@dataclass(frozen=True)
class Component:
    """A linear part of every decoder block: what it is called, and its module path inside a block."""

    name: str
    path: str


@dataclass(frozen=True)
class Decoder:
    """A causal language model seen as what runs before, inside and after its decoder blocks.

    `model` is the causal language model, `body` the part that ends before the language-model head, `blocks` the list
    of decoder blocks and `blocks_path` its module path in `model` (`model.layers`, `transformer.h` ...). `components`
    are what is measured; `linear_paths` every linear part that all blocks have.
    """

    model: nn.Module
    body: nn.Module
    blocks: nn.ModuleList
    blocks_path: str
    components: tuple[Component, ...]
    linear_paths: tuple[str, ...]

    def weight_name(self, layer: int, component: Component) -> str:
        """The name, in the model, of the weight of one component of one block."""
        return f"{self.blocks_path}.{layer}.{component.path}.weight"

    def without_model(self) -> dict[str, Any]:
        """What was found, as plain data, for `on_model`."""
        names = (one.name for one in fields(self))
        return {name: getattr(self, name) for name in names if name not in ("model", "body", "blocks")}

    @classmethod
    def on_model(cls, model: nn.Module, found: Mapping[str, Any]) -> "Decoder":
        """What was found in a model, seen in another one that was built alike."""
        return cls(model=model, body=model.base_model, blocks=model.get_submodule(found["blocks_path"]), **found)


def find_decoder(
    model: nn.Module, components: Sequence[str] | None, prefix_mapping: Mapping[str, str], where: str
) -> Decoder:
    """Find a model's decoder blocks and the components asked for.

    Args:
        model: a causal language model (weights may be on the meta device).
        components: names from the pair config, or None for every linear part of a block.
        prefix_mapping: component name to module path inside a block; optional.
        where: what to call the model in messages.

    Raises:
        UserError: an encoder; no list of decoder blocks; a component that is missing, ambiguous, not linear, or only
            in some blocks; with `components` None, a block with matrices that are not linear modules (mixture of
            experts).
    """
    _refuse_encoder(model, where)
    body = model.base_model
    blocks_path, blocks = _find_blocks(model, where)
    in_each = [_linear_paths(block) for block in blocks]
    everywhere = [path for path in in_each[0] if all(path in paths for paths in in_each)]
    somewhere = list(dict.fromkeys(path for paths in in_each for path in paths))
    if components is None:
        _refuse_uncovered(blocks, somewhere, everywhere, where)
        chosen = [Component(name, path) for path, name in short_names(everywhere).items()]
    else:
        chosen = [_resolve(name, prefix_mapping.get(name), somewhere, everywhere, where) for name in components]
    return Decoder(model, body, blocks, blocks_path, tuple(chosen), tuple(everywhere))


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear map with its own weight matrix (`nn.Linear`, or GPT-2's transposed `Conv1D`)."""
    return isinstance(module, (nn.Linear, Conv1D))


def is_transposed(module: nn.Module) -> bool:
    """Whether a linear module stores its weight as [in, out]."""
    return isinstance(module, Conv1D)


def weight_matrix(module: nn.Module) -> torch.Tensor:
    """A linear module's weight as [out, in], a view."""
    return module.weight.t() if is_transposed(module) else module.weight


def short_names(paths: Sequence[str]) -> dict[str, str]:
    """The shortest dotted suffix of each path that no other path ends with, by path (`q_proj`, `attn.c_proj`)."""
    names = {}
    for path in paths:
        parts = path.split(".")
        suffixes = [".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1)]
        names[path] = next(name for name in suffixes if matching_paths(name, paths) == [path])
    return names


def matching_paths(name: str, paths: Sequence[str]) -> list[str]:
    """The module paths that a component name may mean: the path itself, else every path that ends with it."""
    return [path for path in paths if path == name] or [path for path in paths if path.endswith("." + name)]


def _refuse_encoder(model: nn.Module, where: str) -> None:
    config = model.config
    if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False):
        raise UserError(f"{where} is an encoder ({config.model_type}); only decoders are supported", "model-encoder")


def _find_blocks(model: nn.Module, where: str) -> tuple[str, nn.ModuleList]:
    wanted = model.config.get_text_config(decoder=True).num_hidden_layers
    lists = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == wanted and any(True for _ in module.parameters())
    }
    if not lists:
        raise UserError(
            f"{where}: {type(model).__name__} has no list of {wanted} decoder blocks; it is not supported",
            "model-no-blocks",
        )
    path = max(lists, key=lambda key: sum(parameter.numel() for parameter in lists[key].parameters()))
    return path, lists[path]


def _linear_paths(block: nn.Module) -> list[str]:
    return [path for path, module in block.named_modules() if is_linear(module)]


def _resolve(name: str, path: str | None, somewhere: Sequence[str], everywhere: Sequence[str], where: str) -> Component:
    candidates = matching_paths(path or name, somewhere)
    asked = f"component {name!r}" + (f" (prefix_mapping: {path})" if path else "")
    if not candidates or (path and candidates != [path]):
        raise UserError(
            f"{where}: {asked} is not a linear part of its blocks; they have {', '.join(somewhere)}",
            "component-unknown",
        )
    if len(candidates) > 1:
        raise UserError(
            f"{where}: {asked} may mean {' or '.join(candidates)}; write the longer name", "component-ambiguous"
        )
    if candidates[0] not in everywhere:
        raise UserError(
            f"{where}: {asked} is in some blocks only; choose components that every block has", "component-partial"
        )
    return Component(name, candidates[0])


def _refuse_uncovered(blocks: nn.ModuleList, somewhere: Sequence[str], everywhere: Sequence[str], where: str) -> None:
    partial = [path for path in somewhere if path not in everywhere]
    if partial:
        raise UserError(
            f"{where}: {', '.join(partial[:4])} exist in some blocks only (a hybrid model); list under components "
            f"the ones every block has: {', '.join(everywhere) or 'none'}",
            "model-hybrid",
        )
    if not everywhere:
        raise UserError(f"{where}: its blocks have no linear modules; it is not supported", "model-no-linear")
    covered = {f"{path}.weight" for path in everywhere}
    left = [name for name, value in blocks[0].named_parameters() if value.ndim >= 2 and name not in covered]
    if left:
        raise UserError(
            f"{where}: {', '.join(left[:4])} are matrices outside linear modules (mixture-of-experts layers are not "
            f"measured); list under components the parts to measure: {', '.join(everywhere)}",
            "model-moe",
        )
