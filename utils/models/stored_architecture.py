"""A merge planned by the names that the checkpoints store: each tensor as it is, experts each on their own.

mergekit's definitions and its inference describe one block and hold every block to it, and mixtures' experts in the
stacked form that transformers has in memory. Blocks of a hybrid differ, and most releases store each expert apart; there
the plan is the base's own list of tensors. What belongs to what in checkpoints that spell their names differently (of
another version, or of a language model beside one with a vision tower) is proven parameter by parameter.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from utils.errors import UserError
from utils.models.checkpoints import Checkpoint
from utils.models.decoder import find_blocks
from utils.models.headers import FLOAT_DTYPES
from utils.models.stored_layout import StoredLayout, stored_layout
from utils.models.weight_source import build_skeleton, tied_names

if TYPE_CHECKING:
    from utils.mergekit_api import ModelArchitecture, WeightInfo

_LAYER = re.compile(r"^(?P<prefix>.*?)\.(?P<layer>\d+)\.")
Place = tuple[str, int]  # a parameter, and which of the stored tensors it is made of


@dataclass(frozen=True)
class StoredTensor:
    """A tensor to merge: its name in the result, how each checkpoint may spell it, and the names it may be tied to."""

    name: str
    spellings: tuple[str, ...]
    tied: tuple[str, ...]
    vocabulary_axis: int | None
    everywhere: bool


@dataclass(frozen=True)
class ModelOnDisk:
    """A checkpoint with its skeleton; `renamed` gives a parameter's name in the base, where that is another class."""

    checkpoint: Checkpoint
    model: nn.Module = field(repr=False)
    layout: StoredLayout = field(repr=False)
    renamed: Mapping[str, str] = field(repr=False)

    def places(self) -> dict[Place, str]:
        """The stored name of each place, by the base's parameter names."""
        found = {(self.renamed[name], 0): header.name for name, header in self.layout.direct.items()}
        for one in self.layout.converted:
            target = self.renamed[one.targets[0]]
            for number, source in enumerate(one.sources):
                found[target, number if len(one.sources) > 1 else 0] = source.name
        return found


def read_models(base: Checkpoint, experts: Sequence[Checkpoint], trust_remote_code: bool) -> list[ModelOnDisk]:
    """The checkpoints with their skeletons, the base first.

    Raises:
        UserError: transformers cannot build one; one is incomplete; an expert is neither of the base's class nor of that
            of its language tower, or has other parameters than the base.
    """
    models: list[ModelOnDisk] = []
    for checkpoint in (base, *experts):
        same = checkpoint.architecture == base.architecture
        alike = models and same and _settings(checkpoint) == _settings(base)
        own = models[0].model if alike else build_skeleton(checkpoint, torch.float32, trust_remote_code)
        layout = stored_layout(own, checkpoint)
        _require_complete(checkpoint, own, layout)
        if models and same:
            _require_same_parameters(models[0], checkpoint, own)
        renamed = {name: name for name in own.state_dict()}
        if models and not same:
            _require_tower(models[0].model, base, checkpoint)
            renamed = tower_names(models[0].model, own, base, checkpoint)
        models.append(ModelOnDisk(checkpoint, own, layout, renamed))
    return models


def _settings(checkpoint: Checkpoint) -> dict[str, Any]:
    silent = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache")
    return {key: value for key, value in checkpoint.config.items() if key not in silent}


def _require_complete(checkpoint: Checkpoint, model: nn.Module, layout: StoredLayout) -> None:
    absent = list(layout.missing)
    if type(model).__name__ != checkpoint.architecture:  # a body alone has no head
        inside = {id(value) for value in [*model.base_model.parameters(), *model.base_model.buffers()]}
        named = [*model.named_parameters(), *model.named_buffers()]
        body = {name for name, value in named if id(value) in inside}
        absent = [name for name in absent if name in body]
    if absent:
        names = list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in absent))
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        raise UserError(
            f"model {checkpoint.name}: its weights lack {', '.join(names[:4])}{more}, which its architecture "
            f"({checkpoint.architecture}) has; is the checkpoint complete?",
            "model-incomplete",
        )


def _require_same_parameters(base: ModelOnDisk, expert: Checkpoint, model: nn.Module) -> None:
    """Refuse an expert that has more or fewer parameters than the base, of whose class it is."""
    ours, theirs = (dict.fromkeys(one.state_dict()) for one in (base.model, model))
    lacks, adds = [name for name in ours if name not in theirs], [name for name in theirs if name not in ours]
    if lacks or adds:
        what = f"lacks {lacks[0]}, which the base has" if lacks else f"has {adds[0]}, which the base lacks"
        raise UserError(
            f"model {expert.name} {what} ({base.checkpoint.name}); an expert must be a fine-tune of the base",
            "model-not-of-base",
        )


def _require_tower(base: nn.Module, where: Checkpoint, other: Checkpoint) -> None:
    """Refuse an expert of another class than the base's, where that has no language tower the expert could be like."""
    if base.config.get_text_config(decoder=True) is base.config:
        raise UserError(
            f"model {other.name} is a {other.architecture}, the base {where.name} a {where.architecture}; an expert must be "
            "a fine-tune of the base",
            "model-architectures-differ",
        )


def tower_names(base: nn.Module, expert: nn.Module, where: Checkpoint, other: Checkpoint) -> dict[str, str]:
    """The base's name of each parameter of a language model that is like the language tower of the base.

    Raises:
        UserError: a parameter has no counterpart of its shape there.
    """
    ours, theirs = (find_blocks(model, f"model {one.name}")[0] for model, one in ((base, where), (expert, other)))
    ends = 0
    while ours.split(".")[-1 - ends :] == theirs.split(".")[-1 - ends :] and ends < theirs.count("."):
        ends += 1
    before, after = (".".join(path.split(".")[:-ends] if ends else path.split(".")) for path in (theirs, ours))
    state, found = base.state_dict(), {}
    for name, value in expert.state_dict().items():
        inside = name.startswith(f"{before}.") if before else True
        candidates = [f"{after}.{name.removeprefix(before).lstrip('.')}"] if inside else []
        fitting = [one for one in (*candidates, name) if one in state and state[one].shape == value.shape]
        if not fitting:
            raise UserError(
                f"model {other.name} is a {other.architecture}, the base {where.name} a {where.architecture}, and its "
                f"{name} {list(value.shape)} is nothing that the base has; an expert must be a fine-tune of the base or of "
                "its language tower",
                "model-architectures-differ",
            )
        found[name] = fitting[0]
    return found


def stored_tensors(models: Sequence[ModelOnDisk]) -> list[StoredTensor] | None:
    """What a merge by stored names will merge; None where a checkpoint stores in pieces what another one has whole."""
    base = models[0]
    tables = [one.places() for one in models]
    counts = [piece_counts(table) for table in tables]
    for other in counts[1:]:
        if any(count != counts[0][name] for name, count in other.items() if name in counts[0]):
            return None
    tied = tied_names(base.model)
    axes = _vocabulary(base.model)
    found = []
    for place in dict.fromkeys(place for table in tables for place in table):
        names = [table.get(place) for table in tables]
        spelled = tuple(dict.fromkeys(name for name in names if name is not None))
        others = [tied.get(place[0]), *(name for name, other in tied.items() if other == place[0])]
        shared = [table[other, 0] for table in tables for other in others if (other, 0) in table]
        shared = tuple(dict.fromkeys(name for name in shared if name not in spelled))
        found.append(StoredTensor(spelled[0], spelled[1:], shared, axes.get(place[0]), None not in names))
    for name in _numbers(base):  # what only another one has belongs to nothing, and to merge it there is no base
        found.append(StoredTensor(name, (), (), None, all(name in one.checkpoint.tensors for one in models)))
    return found


def _numbers(one: ModelOnDisk) -> Iterator[str]:
    """The stored names that the model does not read but that hold numbers; masks of older versions do not."""
    yield from (name for name in one.layout.unread if one.checkpoint.tensors[name].dtype in FLOAT_DTYPES)


def piece_counts(table: Mapping[Place, str]) -> dict[str, int]:
    """In how many tensors each parameter of `ModelOnDisk.places` is stored."""
    found: dict[str, int] = {}
    for name, _ in table:
        found[name] = found.get(name, 0) + 1
    return found


def _vocabulary(model: nn.Module) -> dict[str, int]:
    """The axis of tokens of the embeddings and the head, by parameter."""
    ends = [module for module in (model.get_input_embeddings(), model.get_output_embeddings()) if module is not None]
    held = {id(value) for module in ends for value in module._parameters.values() if value is not None}
    return {name: 0 for name, value in model.named_parameters(remove_duplicate=False) if id(value) in held}


def stored_architecture(models: Sequence[ModelOnDisk], tensors: Sequence[StoredTensor]) -> "ModelArchitecture":
    """mergekit's description of just these tensors: the blocks of the language tower as layers, everything else before."""
    from utils.mergekit_api import ModelArchitecture, ModuleArchitecture, ModuleDefinition, WeightInfo

    base = models[0]
    path, blocks = find_blocks(base.model, f"model {base.checkpoint.name}")
    layer_of = dict(_layers(base.places(), path, len(blocks)))
    infos = {one.name: _info(one, WeightInfo) for one in tensors}
    outside = [infos[one.name] for one in tensors if one.name not in layer_of]
    inside: list[list[WeightInfo]] = [[] for _ in blocks]
    for one in tensors:
        if one.name in layer_of:
            inside[layer_of[one.name]].append(infos[one.name])

    class StoredNames(ModuleArchitecture):
        def pre_weights(self, config: Any) -> list[WeightInfo]:
            return list(outside)

        def post_weights(self, config: Any) -> list[WeightInfo]:
            return []

        def layer_weights(self, index: int, config: Any) -> list[WeightInfo]:
            return list(inside[index])

        def num_layers(self, config: Any) -> int:
            return len(inside)

    definition = ModuleDefinition(architecture=StoredNames())
    return ModelArchitecture(modules={"default": definition}, architectures=[], model_type="")


def _layers(places: Mapping[Place, str], path: str, blocks: int) -> Iterator[tuple[str, int]]:
    for (parameter, _), stored in places.items():
        if not parameter.startswith(f"{path}."):
            continue
        number = parameter.removeprefix(f"{path}.").partition(".")[0]
        if number.isdigit() and int(number) < blocks:
            yield stored, int(number)


def _info(one: StoredTensor, weight_info: Any) -> "WeightInfo":
    # Other spellings stand with the tied names: mergekit's planner fails on an optional tensor that has aliases.
    return weight_info(
        name=one.name,
        optional=not one.everywhere,
        vocabulary_axis=one.vocabulary_axis,
        tied_names=(*one.spellings, *one.tied) or None,
    )
