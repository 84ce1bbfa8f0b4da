"""Checkpoints of mixtures that store experts stacked, seen as if each expert were stored on its own. No weights are read.

Most releases store each expert's matrices apart, transformers has them stacked in memory, and some releases store them so,
too. What is measured and merged of an expert is the same either way: here a stack's place in the file becomes its experts'
places, split further where the model's class would store a matrix in parts (gate and up).
"""

import re
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import nn
from transformers.core_model_loading import Transpose, WeightConverter

from utils.models.checkpoints import Checkpoint
from utils.models.headers import FLOAT_DTYPES, TensorHeader
from utils.models.routers import mixtures_of
from utils.models.stacks import Stack
from utils.models.stored_layout import StoredLayout, stored_layout
from utils.models.weight_source import build_skeleton


def with_experts_apart(checkpoint: Checkpoint, trust_remote_code: bool = False) -> Checkpoint:
    """The checkpoint with every stack of experts in slices; itself where none is stored.

    Raises:
        UserError: transformers cannot build the model; a tensor's shape is not what config.json makes of it.
    """
    if checkpoint.stacks or not any(_may_be_stack(header) for header in checkpoint.tensors.values()):
        return checkpoint
    model = build_skeleton(checkpoint, torch.float32, trust_remote_code)
    return with_slices(checkpoint, model, stored_layout(model, checkpoint))


def with_slices(checkpoint: Checkpoint, model: nn.Module, layout: StoredLayout) -> Checkpoint:
    """The same of a checkpoint whose model is built already; `layout` is what the checkpoint stores of it."""
    found = {stack.header.name: stack for stack in _stacks(model, layout, f"model {checkpoint.name}")}
    if not found:
        return checkpoint
    tensors: dict[str, TensorHeader] = {}
    for name, header in checkpoint.tensors.items():
        tensors |= {one.name: one for one in found[name].slices} if name in found else {name: header}
    return replace(checkpoint, tensors=tensors, stacks=found)


def _may_be_stack(header: TensorHeader) -> bool:
    return len(header.shape) == 3 and min(header.shape) > 1 and header.dtype in FLOAT_DTYPES


def _stacks(model: nn.Module, layout: StoredLayout, where: str) -> Iterator[Stack]:
    for path, mixture in mixtures_of(model, where):
        for module in (f"{path}.{experts}" for experts in mixture.experts):
            own = {name: value for name, value in model.get_submodule(module)._parameters.items() if value is not None}
            matrices = {name: value.shape[0] for name, value in own.items() if value.ndim == 3 and value.shape[0] > 1}
            for name, value in own.items():
                header = _only_source(layout, f"{module}.{name}")
                if header is None or header.change is not None or header.dtype not in FLOAT_DTYPES:
                    continue
                if name in matrices and len(header.shape) == 3 and header.shape[0] == matrices[name]:
                    as_it_is = header.shape == tuple(value.shape)
                    yield Stack(header, _parts(model, f"{module}.{name}") if as_it_is else ("",))
                elif value.ndim == 2 and matrices.get(name.removesuffix("_bias")) == value.shape[0]:
                    yield Stack(header)


def _only_source(layout: StoredLayout, parameter: str) -> TensorHeader | None:
    """The one tensor that a parameter is stored as, as it is or transposed."""
    if parameter in layout.direct:
        return layout.direct[parameter]
    conversion = layout.conversions.get(parameter)
    if conversion is None or len(conversion.sources) > 1 or len(conversion.targets) > 1:
        return None
    turned = all(isinstance(operation, Transpose) for operation in conversion.converter.operations)
    return conversion.sources[0] if turned else None


def _parts(model: nn.Module, parameter: str) -> tuple[str, ...]:
    """The parts in which the model's class would store an expert's matrix, in their order along its first axis.

    Tried on a small stack of counted entries, so that nothing is taken for a part that is not one stretch of it.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping

    for rule in get_model_conversion_mapping(model):
        if not isinstance(rule, WeightConverter) or len(rule.target_patterns) > 1 or len(rule.source_patterns) < 2:
            continue
        names = [re.sub(r"[^\w.]", "", one.rpartition("*.")[2]).removesuffix(".weight") for one in rule.source_patterns]
        if len(set(names)) == len(names) and _divides(model, parameter, rule, names):
            return tuple(names)
    return ("",)


def _divides(model: nn.Module, parameter: str, rule: WeightConverter, names: list[str]) -> bool:
    """Whether a converter's reverse cuts an expert's matrix into parts of these names, one behind the other."""
    try:
        back = rule.reverse_transform()
        renamed, pattern = back.rename_source_key(parameter)
        if pattern is None:
            return False
        small = torch.arange(8 * len(names)).view(2, 2 * len(names), 2)
        back.add_tensor(renamed, parameter, pattern, small)
        made = back.convert(renamed, model=model, config=model.config)
    except Exception:  # rules raise whatever torch does when shapes do not fit
        return False
    wanted = [matrix for expert in small for matrix in expert.chunk(len(names))]
    order = [next((key for key in made if f".{expert}.{name}" in key), "") for expert in range(2) for name in names]
    found = [value[0] if isinstance(value, list) else value for value in (made.get(key) for key in order)]
    return all(one is not None and torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
