"""Which stored tensors a model's parameters are made of, by transformers' own rules. No weights are read here.

A checkpoint may store a parameter under the parameter's name, under another one (older names, the bare body's), or in
pieces: the experts of a mixture each on their own, where the model has them stacked. transformers knows all of this
while it loads a whole model; here the same rules are asked parameter by parameter, so that a block's weights can be
read when its turn comes, and so that what was measured of a parameter can be told to the stored tensors it is made of.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    apply_renamings,
    dot_natural_key,
    rename_source_key,
)

from utils.errors import UserError, brief
from utils.models.checkpoints import Checkpoint
from utils.models.headers import TensorHeader
from utils.models.stacks import Stack


@dataclass(frozen=True)
class Conversion:
    """Parameters that are computed from stored tensors by one of transformers' converters.

    Attributes:
        targets: names of the parameters, the one first that the converter is asked for.
        sources: the stored tensors, in the order in which the converter takes them.
        patterns: for each source the pattern of the converter's that it fits.
        between: for each source its name after renaming, which is what the reverse converter gives.
        converter: transformers' rule; it is copied before use.
        model: the model, for the sizes that some rules ask for.
    """

    targets: tuple[str, ...]
    sources: tuple[TensorHeader, ...]
    patterns: tuple[str, ...]
    between: tuple[str, ...]
    converter: WeightConverter = field(repr=False)
    model: nn.Module = field(repr=False)

    @property
    def ordinals(self) -> list[int]:
        """For each source its place among those of its pattern: which expert it belongs to, where they are stacked."""
        seen: dict[str, int] = {}
        found = []
        for pattern in self.patterns:
            found.append(seen.get(pattern, 0))
            seen[pattern] = found[-1] + 1
        return found

    def of_expert(self, expert: int) -> "Conversion":
        """What makes one expert's matrix of a stack: of each pattern the source of that place alone."""
        own = [place for place, number in enumerate(self.ordinals) if number == expert]
        sources, patterns, between = (
            tuple(all_of_them[place] for place in own) for all_of_them in (self.sources, self.patterns, self.between)
        )
        return replace(self, sources=sources, patterns=patterns, between=between)

    def convert(self, stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The parameters by name, from all `sources` by their stored names, which are taken out as they are used."""
        rule, first = deepcopy(self.converter), self.targets[0]
        for header, pattern in zip(self.sources, self.patterns, strict=True):
            rule.add_tensor(first, header.name, pattern, stored.pop(header.name))
        made = rule.convert(first, model=self.model, config=self.model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def revert(self, parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tensors of the parameters' layout as the checkpoint would store them, by stored names.

        Raises:
            ValueError: transformers cannot undo this conversion.
        """
        rule = self.converter.reverse_transform()
        for target, pattern in zip(self.targets, rule.source_patterns, strict=True):
            renamed, _ = rule.rename_source_key(target)
            rule.add_tensor(renamed, target, pattern, parameters[target])
        made = rule.convert(renamed, model=self.model, config=self.model.config)
        names = dict(zip(self.between, (header.name for header in self.sources), strict=True))
        if set(made) != set(names):
            raise ValueError(f"{', '.join(self.targets)}: its conversion cannot be undone")
        return {names[name]: value[0] if isinstance(value, list) else value for name, value in made.items()}

    @cached_property
    def is_reversible(self) -> bool:
        """Whether `revert` undoes `convert`, as far as names and shapes show."""
        try:
            empty = {header.name: torch.empty(header.shape, device="meta") for header in self.sources}
            back = self.revert(self.convert(empty))
        except Exception:  # rules raise whatever torch does when shapes do not fit
            return False
        return all(back[header.name].shape == header.shape for header in self.sources)


@dataclass(frozen=True)
class StoredLayout:
    """What a checkpoint's tensors are to a model.

    Attributes:
        direct: by parameter (or stored buffer), the tensor that holds it as it is.
        converted: the parameters that are made of other tensors.
        missing: parameters and stored buffers that the checkpoint lacks; those aside that are tied to others.
        unread: stored names that the model does not read (older buffers, heads that predict more tokens).
    """

    direct: Mapping[str, TensorHeader]
    converted: tuple[Conversion, ...]
    missing: tuple[str, ...]
    unread: tuple[str, ...]

    @cached_property
    def conversions(self) -> Mapping[str, Conversion]:
        """The conversion of each parameter that has one."""
        return {target: one for one in self.converted for target in one.targets}

    @cached_property
    def files(self) -> set[Path]:
        """The files that hold any of it."""
        headers = [*self.direct.values(), *(header for one in self.converted for header in one.sources)]
        return {file for header in headers for file in header.files}

    def __contains__(self, parameter: object) -> bool:
        return parameter in self.direct or parameter in self.conversions

    def headers(self, parameter: str) -> tuple[TensorHeader, ...]:
        """The stored tensors of a parameter, none if the checkpoint lacks it."""
        if parameter in self.direct:
            return (self.direct[parameter],)
        return self.conversions[parameter].sources if parameter in self.conversions else ()

    def stored_names(self, parameter: str) -> tuple[str, ...]:
        """The stored names of a parameter."""
        return tuple(header.name for header in self.headers(parameter))

    def split(self, parameter: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
        """A tensor of a parameter's shape as the checkpoint stores it: whole, or in pieces, by stored names.

        Raises:
            ValueError: the pieces cannot be told apart.
        """
        if parameter in self.direct:
            return {self.direct[parameter].name: value}
        conversion = self.conversions[parameter]
        if len(conversion.targets) > 1:
            raise ValueError(f"{parameter} is only a part of {', '.join(self.stored_names(parameter))}")
        return conversion.revert({parameter: value})

    def can_take_expert(self, parameter: str) -> bool:
        """Whether one expert's matrix can be read of a stack of several, without the others'."""
        if parameter in self.direct:
            header = self.direct[parameter]
            return len(header.shape) == 3 and header.change is None
        conversion = self.conversions.get(parameter)
        if conversion is None or len(conversion.targets) > 1 or not conversion.is_reversible:
            return False
        try:
            first = conversion.of_expert(0)
            empty = {header.name: torch.empty(header.shape, device="meta") for header in first.sources}
            made = first.convert(empty)[parameter]
            back = first.revert({parameter: made})
        except Exception:  # rules raise whatever torch does when shapes do not fit
            return False
        return made.ndim == 3 and made.shape[0] == 1 and len(back) == len(first.sources)

    def expert_headers(self, parameter: str, expert: int) -> tuple[TensorHeader, ...]:
        """The stored tensors, or the slice of one, that an expert's matrix is made of."""
        if parameter in self.direct:
            return (Stack(self.direct[parameter]).slices[expert],)
        return self.conversions[parameter].of_expert(expert).sources

    def expert_matrix(self, parameter: str, expert: int, stored: dict[str, torch.Tensor]) -> torch.Tensor:
        """An expert's matrix from what `expert_headers` names."""
        if parameter in self.direct:
            (matrix,) = stored.values()
            return matrix
        return self.conversions[parameter].of_expert(expert).convert(stored)[parameter][0]

    def split_expert(self, parameter: str, expert: int, value: torch.Tensor) -> dict[str, torch.Tensor]:
        """`split` of one expert's matrix: by the stored names of its pieces, or of the tensor that holds all experts."""
        if parameter in self.direct:
            return {self.direct[parameter].name: value}
        first, own = (self.conversions[parameter].of_expert(number) for number in (0, expert))  # numbers begin at 0
        names = {one.name: other.name for one, other in zip(first.sources, own.sources, strict=True)}
        return {names[name]: piece for name, piece in first.revert({parameter: value[None]}).items()}

    def by_expert(self, parameter: str) -> list[tuple[str, ...]]:
        """The stored pieces of a stack, those of one kind (all gates, all that go up) together in the order of the experts;
        none where it is stored as it is, or only a part of other tensors."""
        conversion = self.conversions.get(parameter)
        groups: dict[str, list[str]] = {}
        if conversion is not None and len(conversion.targets) == 1:
            for header, pattern in zip(conversion.sources, conversion.patterns, strict=True):
                groups.setdefault(pattern, []).append(header.name)
        return [tuple(names) for names in groups.values()]

    def pieces(self, parameter: str, value: torch.Tensor) -> Mapping[str, torch.Tensor]:
        """`split` of a parameter that is stored in several pieces; another one as it is, by its own name."""
        in_pieces = parameter in self.conversions and self.can_split(parameter)
        return self.split(parameter, value) if in_pieces else {parameter: value}

    def is_part(self, parameter: str) -> bool:
        """Whether a parameter is one of several that are made of the same stored tensors (of a fused q, k and v, say)."""
        conversion = self.conversions.get(parameter)
        return conversion is not None and len(conversion.targets) > 1

    def can_split(self, parameter: str) -> bool:
        """Whether `split` works."""
        conversion = self.conversions.get(parameter)
        return conversion is None or (len(conversion.targets) == 1 and conversion.is_reversible)


def stored_layout(model: nn.Module, checkpoint: Checkpoint) -> StoredLayout:
    """Find out what each parameter and stored buffer of a model is made of.

    Args:
        model: the model, parameters on the meta device.
        checkpoint: its checkpoint.

    Raises:
        UserError: a tensor's shape is not what config.json makes of the model.
    """
    renamings, converters = _rules(model)
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    state = model.state_dict()
    direct: dict[str, TensorHeader] = {}
    groups: dict[str, list[tuple[TensorHeader, str, str]]] = {}
    unread = []
    stacked = []
    for stored in sorted(checkpoint.stored, key=dot_natural_key):
        header = checkpoint.stored[stored]
        name, pattern = rename_source_key(stored, renamings, converters, model.base_model_prefix, state)
        if name not in state and stored in state:  # stored in the model's own layout already
            name, pattern = rename_source_key(stored, [], [], model.base_model_prefix, state)
        if name not in state:
            unread.append(stored)
        elif stored in checkpoint.stacks:
            turned = pattern is not None and header.shape != tuple(state[name].shape)
            stacked.append(_stacked(model, name, checkpoint.stacks[stored], by_pattern[pattern] if turned else None))
        elif pattern is None:
            direct[name] = header
        else:
            groups.setdefault(name, []).append((header, pattern, apply_renamings(stored, renamings)))
    converted = (*(_conversion(model, state, first, own, by_pattern) for first, own in groups.items()), *stacked)
    made = set(direct) | {target for one in converted for target in one.targets}
    layout = StoredLayout(direct, converted, tuple(_missing(model, state, made)), tuple(unread))
    _check_shapes(layout, state, checkpoint)
    return layout


def parameter_finder(model: nn.Module) -> Callable[[str], str | None]:
    """A function from a stored tensor's name to the parameter or buffer that it would be as it is; None where it is none, or
    a part of one."""
    (renamings, converters), state = _rules(model), model.state_dict()

    def find(stored: str) -> str | None:
        name, pattern = rename_source_key(stored, renamings, converters, model.base_model_prefix, state)
        return name if pattern is None and name in state else None

    return find


def _rules(model: nn.Module) -> tuple[list[WeightRenaming], list[WeightConverter]]:
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    return renamings, [rule for rule in rules if isinstance(rule, WeightConverter)]


def _conversion(
    model: nn.Module,
    state: Mapping[str, Any],
    first: str,
    own: Sequence[tuple[TensorHeader, str, str]],
    by_pattern: Mapping[str, WeightConverter],
) -> Conversion:
    headers, patterns, between = zip(*own, strict=True)
    rule = by_pattern[patterns[0]]
    targets = dict.fromkeys(first.replace(rule.target_patterns[0], other, 1) for other in rule.target_patterns)
    known = tuple(name for name in targets if name in state)
    return Conversion(known, headers, patterns, between, rule, model)


def _stacked(model: nn.Module, parameter: str, stack: Stack, rule: WeightConverter | None) -> Conversion:
    """What makes a parameter of a stack's slices; `rule` is what turns the stack's axes, None where nothing does."""
    by_part = stack.patterns(parameter)
    operations = [MergeModulelist(dim=0), *([Concatenate(dim=1)] if len(by_part) > 1 else [])]
    operations += [Transpose(one.dim0, one.dim1) for one in (rule.operations if rule else ())]
    converter = WeightConverter(list(by_part.values()), [parameter], operations)
    experts, parts = range(stack.header.shape[0]), sorted(stack.parts)
    patterns = tuple(by_part[part] for _ in experts for part in parts)
    between = tuple(stack.slice_name(parameter, str(expert), part) for expert in experts for part in parts)
    return Conversion((parameter,), stack.slices, patterns, between, converter, model)


def _missing(model: nn.Module, state: Mapping[str, Any], made: set[str]) -> Iterator[str]:
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    shared: dict[int, list[str]] = {}
    for name, value in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
        shared.setdefault(id(value), []).append(name)
    same = {name: names for names in shared.values() for name in names}
    ignored = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    partners: dict[str, set[str]] = {}
    for name, other in tied.items():
        partners.setdefault(name, set()).add(other)
        partners.setdefault(other, set()).add(name)
    for name in state:
        if name in made or any(re.search(pattern, name) for pattern in ignored):
            continue
        if made.intersection(same.get(name, ())) or made.intersection(partners.get(name, ())):
            continue
        yield name


def _check_shapes(layout: StoredLayout, state: Mapping[str, torch.Tensor], checkpoint: Checkpoint) -> None:
    for name, header in layout.direct.items():
        if header.shape != tuple(state[name].shape):
            raise _misshapen(checkpoint, header.name, list(header.shape), list(state[name].shape))
    for conversion in layout.converted:
        try:
            empty = {header.name: torch.empty(header.shape, device="meta") for header in conversion.sources}
            made = {name: tuple(value.shape) for name, value in conversion.convert(empty).items()}
        except Exception as error:  # rules raise whatever torch does when shapes do not fit
            names = f"{conversion.sources[0].name} and {len(conversion.sources) - 1} more"
            raise UserError(
                f"model {checkpoint.name}: {names} cannot be made {conversion.targets[0]}: {brief(error)}; is the "
                "checkpoint complete?",
                "model-shape",
            ) from error
        for name in conversion.targets:
            if made.get(name) != tuple(state[name].shape):
                raise _misshapen(checkpoint, name, list(made.get(name, ())), list(state[name].shape))


def _misshapen(checkpoint: Checkpoint, name: str, found: list[int], wanted: list[int]) -> UserError:
    return UserError(
        f"model {checkpoint.name}: tensor {name} is {found} in the checkpoint but config.json makes it {wanted}",
        "model-shape",
    )
