"""Which modules of a model are its decoder blocks, and which of their parts are components.

One answer for every architecture, found from structure alone: the blocks are the module list of the language tower with
as many entries as its config has hidden layers; the components are the linear modules inside a block, and the stacked
matrices of a mixture's experts. Blocks may differ: a component is in those that have it.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from utils.errors import UserError


@dataclass(frozen=True)
class Component:
    """A part of decoder blocks that is measured: what it is called, its module path inside a block, its parameter.

    The parameter is a linear module's `weight`, or matrices of all experts of a mixture stacked along the first axis.
    """

    name: str
    path: str
    parameter: str = "weight"

    @property
    def is_stacked(self) -> bool:
        """Whether it is the matrices of a mixture's experts."""
        return self.parameter != "weight"

    @property
    def own_path(self) -> str:
        """The path by which it is told apart: the module's, with the parameter's name where that is no `weight`."""
        return f"{self.path}.{self.parameter}" if self.is_stacked else self.path


@dataclass(frozen=True)
class Decoder:
    """A language model seen as what runs before, inside and after its decoder blocks.

    `model` is the whole model, `body` the part that ends before the language-model head, `blocks` the list of decoder
    blocks and `blocks_path` its module path in `model` (`model.layers`, `transformer.h` ...). `components` are what is
    measured, each in the blocks that have it; `linear_paths` are the linear parts of each block.
    """

    model: nn.Module
    body: nn.Module
    blocks: nn.ModuleList
    blocks_path: str
    components: tuple[Component, ...]
    linear_paths: tuple[tuple[str, ...], ...]

    def components_of(self, layer: int) -> tuple[Component, ...]:
        """The components that a block has."""
        own = {(path, name) for path, module in self.blocks[layer].named_modules() for name in _own_parameters(module)}
        return tuple(one for one in self.components if (one.path, one.parameter) in own)

    def weight_name(self, layer: int, component: Component) -> str:
        """The name, in the model, of the weight of one component of one block."""
        return f"{self.blocks_path}.{layer}.{component.path}.{component.parameter}"

    @property
    def partial(self) -> tuple[Component, ...]:
        """The components that some blocks lack."""
        blocks = [self.components_of(layer) for layer in range(len(self.blocks))]
        return tuple(one for one in self.components if not all(one in own for own in blocks))

    def copied(self) -> "Decoder":
        """One that shares nothing with this one, so that other weights can be placed into it at the same time.

        What a model's code has kept on its modules of an earlier pass, recurrent states for example, comes without the graph
        behind it, which `deepcopy` refuses.
        """
        kept = [value for module in self.model.modules() for value in vars(module).values() if torch.is_tensor(value)]
        return copy.deepcopy(self, {id(value): value.detach() for value in kept if not value.is_leaf})

    def without_model(self) -> dict[str, Any]:
        """What was found, as plain data, for `on_model`."""
        names = [one.name for one in fields(self)]
        return {name: getattr(self, name) for name in names if name not in ("model", "body", "blocks")}

    @classmethod
    def on_model(cls, model: nn.Module, found: Mapping[str, Any]) -> "Decoder":
        """What was found in a model, seen in another one that was built alike."""
        path = found["blocks_path"]
        return cls(model=model, body=_body(model, path), blocks=model.get_submodule(path), **found)


def find_decoder(
    model: nn.Module, components: Sequence[str] | None, prefix_mapping: Mapping[str, str], where: str
) -> Decoder:
    """Find a model's decoder blocks and the components asked for.

    Args:
        model: a language model (weights may be on the meta device).
        components: names from the pair config, or None for every linear part of a block and every expert of a mixture.
        prefix_mapping: component name to module path inside a block; optional.
        where: what to call the model in messages.

    Raises:
        UserError: an encoder; no list of decoder blocks; a component that no block has, or that is ambiguous.
    """
    _refuse_encoder(model, where)
    blocks_path, blocks = find_blocks(model, where)
    found = list(dict.fromkeys(part for block in blocks for part in _parts(block)))
    if not found:
        raise UserError(f"{where}: its blocks have no linear modules; it is not supported", "model-no-linear")
    parts = {Component("", path, parameter).own_path: (path, parameter) for path, parameter in found}
    if components is None:
        chosen = [Component(name, *parts[own]) for own, name in short_names(list(parts)).items()]
    else:
        chosen = [_resolve(name, prefix_mapping.get(name), parts, where) for name in components]
    linear = tuple(tuple(path for path, parameter in _parts(block) if parameter == "weight") for block in blocks)
    return Decoder(model, _body(model, blocks_path), blocks, blocks_path, tuple(chosen), linear)


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


def find_blocks(model: nn.Module, where: str) -> tuple[str, nn.ModuleList]:
    """The path and the list of a model's decoder blocks.

    Raises:
        UserError: there is no list of as many blocks as the config has layers.
    """
    config = model.config.get_text_config(decoder=True)
    wanted = getattr(config, "num_hidden_layers", None)
    lists = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == wanted and any(True for _ in module.parameters())
    }
    if not lists:
        lists = _lists_that_stay_whole(model)
    if not lists:
        missing = f"has no list of {wanted} decoder blocks"
        if wanted is None:
            missing = "cannot be taken apart into decoder blocks: its config.json says no num_hidden_layers"
        raise UserError(
            f"{where}: {type(model).__name__} {missing}; it is not supported",
            "model-no-blocks",
        )
    configs = {path: getattr(module, "config", None) for path, module in model.named_modules() if path}
    towers = [path for path, own in configs.items() if own is config]
    others = [path for path, own in configs.items() if isinstance(own, PreTrainedConfig) and own is not config]
    inside = [path for path in lists if _lies_in(path, towers)] or list(lists)  # a vision tower may have as many layers
    chosen = [path for path in inside if not _lies_in(path, others)] or inside
    path = max(chosen, key=lambda key: sum(parameter.numel() for parameter in lists[key].parameters()))
    return path, lists[path]


def _lies_in(path: str, towers: Sequence[str]) -> bool:
    return any(path.startswith(f"{tower}.") for tower in towers)


def _lists_that_stay_whole(model: nn.Module) -> dict[str, nn.ModuleList]:
    """The lists of what the model's class calls its blocks, where the config counts layers in another way.

    Some configs count a block with two attentions twice, for the sake of a cache.
    """
    names = set(getattr(model, "_no_split_modules", None) or ())
    settings = vars(model.config.get_text_config(decoder=True)).items()
    counts = {value for key, value in settings if "layers" in key and type(value) is int}
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) in counts
        and all(type(one).__name__ in names for one in module)
    }


def _body(model: nn.Module, blocks_path: str) -> nn.Module:
    """The part of a model that ends before its head."""
    parents = blocks_path.split(".")
    around = [model.get_submodule(".".join(parents[:end])) for end in range(1, max(2, len(parents)))]
    if model.base_model is not model:
        around.insert(0, model.base_model)
    # A class whose base_model_prefix names no part of it; a model of towers, of which one is a language model with a head.
    return next((module for module in around if not holds_head(module, model)), around[0])


def holds_head(module: nn.Module, model: nn.Module) -> bool:
    """Whether a part of a model has the model's head inside."""
    head = model.get_output_embeddings()
    return head is not None and any(one is head for one in module.modules())


def _parts(block: nn.Module) -> Iterator[tuple[str, str]]:
    """The (module path, parameter) of every linear module's weight and of every stack of experts' matrices."""
    for path, module in block.named_modules():
        if is_linear(module):
            yield path, "weight"
        elif is_experts(module):
            for name, value in _own_parameters(module).items():
                if value.ndim == 3:
                    yield path, name


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds the matrices of a mixture's experts stacked, as transformers' experts modules do.

    They go up, with or without a gate beside in the same matrix, and down again. Other stacks (of an attention's heads,
    of experts that every token passes) have other parameters, or more.
    """
    stacks = {name for name, value in _own_parameters(module).items() if value.ndim == 3}
    return "down_proj" in stacks and ("gate_up_proj" in stacks or ("up_proj" in stacks and "gate_proj" not in stacks))


def _own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: value for name, value in module._parameters.items() if value is not None}


def _resolve(name: str, path: str | None, parts: Mapping[str, tuple[str, str]], where: str) -> Component:
    candidates = matching_paths(path or name, list(parts))
    asked = f"component {name!r}" + (f" (prefix_mapping: {path})" if path else "")
    if not candidates or (path and candidates != [path]):
        raise UserError(
            f"{where}: {asked} is not a linear part of its blocks; they have {', '.join(parts)}",
            "component-unknown",
        )
    if len(candidates) > 1:
        raise UserError(
            f"{where}: {asked} may mean {' or '.join(candidates)}; write the longer name", "component-ambiguous"
        )
    return Component(name, *parts[candidates[0]])
