"""The models a recipe names, opened: hub ids and relative paths become absolute folders, mergekit's config follows.

mergekit gets absolute folders only, so that it neither asks the hub about local names nor misses files there. The
names the user wrote stay with each input, for messages and for the model card.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from utils.errors import raise_collected
from utils.mergekit_api import ModelPath, ModelReference
from utils.merging.quick_check import find_folders, open_named
from utils.merging.recipe_schema import OrderedConfiguration
from utils.merging.settings import MergeSettings
from utils.models.adapters import merged_folder
from utils.models.checkpoints import Checkpoint, is_local, open_checkpoint


@dataclass(frozen=True)
class MergeInput:
    """One model of a merge: how mergekit refers to it, the open checkpoint, and a name fit to be published.

    The checkpoint's own `name` is what the user wrote. `label` is the same, but the last part alone of an absolute
    path. `hub_ids` are the repositories it comes from: none, the model, or the model and its adapter.
    """

    reference: ModelReference
    checkpoint: Checkpoint
    label: str
    hub_ids: tuple[str, ...] = ()


@dataclass(frozen=True)
class MergeInputs:
    """All models of a merge, the donor of config and tokenizer (the base, if there is one) first.

    `config` is the recipe as mergekit gets it, with absolute folders; nothing in it is shared with the recipe's own.
    """

    config: OrderedConfiguration
    models: tuple[MergeInput, ...]

    @property
    def donor(self) -> MergeInput:
        """The model whose config, tokenizer and small files the result gets."""
        return self.models[0]

    def label(self, reference: ModelReference) -> str:
        """The publishable name of an input."""
        return next(model.label for model in self.models if model.reference == reference)


def open_inputs(config: OrderedConfiguration, settings: MergeSettings) -> MergeInputs:
    """Open every model that a recipe names.

    The small files of all come first, so that a mistake in one shows before gigabytes have moved.

    Raises:
        UserError: a model is missing, malformed, quantized, not a decoder; an adapter cannot be merged; two entries
            are the same folder; nothing but the base would be merged.
    """
    merged = config.referenced_models()
    others = [reference for reference in dict.fromkeys(_references(config)) if reference not in merged]
    folders = find_folders((*merged, *others), settings.lora_merge_cache)
    places, inputs = {}, {}
    for reference in others:  # tokenizer donors: no weights needed
        places[reference] = ModelReference(model=ModelPath(path=str(folders[reference])))
    for reference in merged:
        checkpoint = _open(reference, settings)
        places[reference] = ModelReference(model=ModelPath(path=str(checkpoint.folder)))
        local = places[reference]
        inputs.setdefault(local, MergeInput(local, checkpoint, published_name(reference), tuple(_hub_ids(reference))))
    _refuse_repeats(config, places)
    config = replace_references(config, places)
    return MergeInputs(config, tuple(inputs[reference] for reference in config.referenced_models()))


def published_name(reference: ModelReference) -> str:
    """A model's name as the user wrote it, without the folders of an absolute path."""
    parts = [reference.model, *([reference.lora] if reference.lora else [])]
    return "+".join(_published(part) for part in parts)


def _hub_ids(reference: ModelReference) -> Iterator[str]:
    for part in (reference.model, reference.lora):
        if part and not is_local(part.path):
            yield part.path


def _published(part: ModelPath) -> str:
    path = Path(part.path).expanduser()
    name = path.name if path.is_absolute() else part.path
    return f"{name}@{part.revision}" if part.revision else name


def absolute_paths(config: OrderedConfiguration) -> dict[str, str]:
    """Absolute paths in a recipe's model names, with what to publish in their place."""
    paths = [part for reference in _references(config) for part in (reference.model, reference.lora) if part]
    return {part.path: Path(part.path).name for part in paths if Path(part.path).expanduser().is_absolute()}


def replace_references(value: Any, places: Mapping[ModelReference, ModelReference]) -> Any:
    """A deep copy of (a part of) a configuration with every model reference replaced."""
    if isinstance(value, ModelReference):
        return places[value]
    if isinstance(value, BaseModel):
        parts = {name: replace_references(getattr(value, name), places) for name in type(value).model_fields}
        return value.model_copy(update=parts)
    if isinstance(value, dict):
        return {key: replace_references(item, places) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(replace_references(item, places) for item in value)
    return value


def _references(value: Any) -> Iterator[ModelReference]:
    if isinstance(value, ModelReference):
        yield value
    elif isinstance(value, BaseModel):
        for name in type(value).model_fields:
            yield from _references(getattr(value, name))
    elif isinstance(value, dict):
        for item in value.values():
            yield from _references(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _references(item)


def _open(reference: ModelReference, settings: MergeSettings) -> Checkpoint:
    path, revision = reference.model.path, reference.model.revision
    checkpoint = open_named(path, revision, str(reference))
    if not reference.lora:
        return checkpoint
    assert settings.lora_merge_cache is not None
    folder = merged_folder(
        checkpoint,
        reference.lora.path,
        reference.lora.revision,
        settings.lora_merge_cache,
        settings.lora_merge_dtype,
    )
    merged = open_checkpoint(str(folder))
    return Checkpoint(str(reference), None, merged.folder, merged.config, merged.tensors)


def _refuse_repeats(config: OrderedConfiguration, places: Mapping[ModelReference, ModelReference]) -> None:
    if config.models is None:
        return
    seen: dict[ModelReference, ModelReference] = {}
    problems = []
    for entry in config.models:
        place = places[entry.model]
        if place in seen:
            problems.append(f"{seen[place]} and {entry.model} are the same model; name it once")
        seen[place] = entry.model
    base = places[config.base_model] if config.base_model else None
    if base is not None and set(seen) == {base}:
        problems.append(f"{config.base_model} is both the base and the only model; there is nothing to merge into it")
    raise_collected(problems, "merge recipe: models")
