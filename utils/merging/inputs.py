"""The models a recipe names, found and opened: hub ids and relative paths become absolute folders.

mergekit gets absolute folders only, so that it neither asks the hub about local names nor misses files there. The
names the user wrote stay with each input, for messages and for the model card.

Finding comes first and needs no mergekit, which takes seconds to import: every folder, the small files of hub ids, the
headers of local models. Opening downloads weights and merges adapters.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from utils.errors import Problem, UserError, raise_collected
from utils.merging.recipe_check import CheckedRecipe, ModelName, ModelPath, check_recipe
from utils.merging.recipe_file import MergeRecipe
from utils.merging.settings import MergeSettings
from utils.models.adapters import changed_checkpoint, check_adapter, merged_folder, refuse_adapter
from utils.models.checkpoints import Checkpoint, find_small_files, is_local, read_model_config
from utils.models.mergekit_inputs import model_reference
from utils.models.opening import open_checkpoint
from utils.named_paths import without_folders

if TYPE_CHECKING:
    from utils.mergekit_api import ModelReference
    from utils.merging.configuration import OrderedConfiguration


@dataclass(frozen=True)
class FoundModels:
    """A recipe whose models were found: the folder of each, and the checkpoints of those that lie on this machine."""

    recipe: CheckedRecipe
    folders: Mapping[ModelName, Path]
    checkpoints: Mapping[ModelName, Checkpoint] = field(repr=False)


@dataclass(frozen=True)
class MergeInput:
    """One model of a merge: how mergekit refers to it, the open checkpoint, and a name fit to be published.

    The checkpoint's own `name` is what the user wrote. `label` is the same, but the last part alone of an absolute
    path. `name` is what the recipe and its manifest have. `hub_ids` are the repositories it comes from: none, the model, or
    the model and its adapter.
    """

    reference: "ModelReference"
    checkpoint: Checkpoint
    label: str
    name: ModelName
    hub_ids: tuple[str, ...] = ()


@dataclass(frozen=True)
class MergeInputs:
    """All models of a merge, the donor of config and tokenizer (the base, if there is one) first.

    `config` is the recipe as mergekit gets it, with absolute folders.
    """

    config: "OrderedConfiguration"
    models: tuple[MergeInput, ...]

    @property
    def donor(self) -> MergeInput:
        """The model whose config, tokenizer and small files the result gets."""
        return self.models[0]

    def label(self, reference: "ModelReference") -> str:
        """The publishable name of an input."""
        return next(model.label for model in self.models if model.reference == reference)


def find_models(recipe: CheckedRecipe) -> FoundModels:
    """Find every model that a recipe names, and open those that are folders here; hub ids get their small files.

    Raises:
        UserError: a model is missing, malformed, quantized, not a decoder; two entries are the
            same folder; nothing but the base would be merged.
    """
    folders, checkpoints = {}, {}
    merged = recipe.models
    for name in (*merged, *recipe.donors):
        if name.override_architecture:
            text = f"model {name}: override_architecture is not supported here; use mergekit-yaml"
            raise UserError(text, "recipe-override")
        if name.lora:
            check_adapter(str(name), recipe.file.locate(name.lora.path))
        place = recipe.file.locate(name.model.path)
        refuse_adapter(place, str(name))
        folders[name] = find_small_files(place, name.model.revision)
        read_model_config(folders[name], str(name))
        if name in merged and not name.lora and is_local(place):
            checkpoints[name] = _open(recipe, name)
    _refuse_repeats(recipe, folders)
    return FoundModels(recipe, folders, checkpoints)


def token_donors(recipe: MergeRecipe) -> dict[str, Path]:
    """By name, the folders of the models that a recipe takes tokens of and merges nothing of; hub ids get their small files.

    Raises:
        UserError: the recipe is malformed, or one is not there.
    """
    if not recipe.data.get("tokenizer") and recipe.data.get("tokenizer_source") in (None, "union", "base"):
        return {}  # as most are, which need no second look
    donors = check_recipe(recipe).donors
    return {str(name): find_small_files(recipe.locate(name.model.path), name.model.revision) for name in donors}


def open_inputs(found: FoundModels, settings: MergeSettings) -> MergeInputs:
    """Open every model to merge: hub ids are downloaded, adapters change their models as these are read (or are merged
    into them, where there is a cache for that).

    Raises:
        UserError: a model is malformed, quantized, or an adapter cannot be merged.
    """
    from utils.merging.configuration import configuration
    from utils.models.experts_apart import with_experts_apart

    recipe, inputs = found.recipe, {}
    places: dict[ModelName, tuple[Path, Path | None]] = {name: (folder, None) for name, folder in found.folders.items()}
    for name in recipe.models:
        checkpoint = found.checkpoints.get(name) or _open(recipe, name)
        if name.lora:
            checkpoint = _with_adapter(recipe, name, checkpoint, settings)
        if not settings.fused_experts:
            checkpoint = with_experts_apart(checkpoint, settings.trust_remote_code)
        places[name] = checkpoint.place
        local = model_reference(checkpoint)
        if checkpoint.adapter is not None:
            local = local.model_copy(update={"lora": local.model.model_copy(update={"path": str(checkpoint.adapter)})})
        own = MergeInput(local, checkpoint, published_name(name), name, tuple(_hub_ids(recipe, name)))
        inputs.setdefault(local, own)
    config = configuration(recipe, places)
    return MergeInputs(config, tuple(inputs[reference] for reference in config.referenced_models()))


def published_name(name: ModelName) -> str:
    """A model's name as the user wrote it, without the folders of an absolute path."""
    return "+".join(_published(part) for part in (name.model, name.lora) if part)


def _published(part: ModelPath) -> str:
    shown = without_folders(part.path)
    return f"{shown}@{part.revision}" if part.revision else shown


def _hub_ids(recipe: CheckedRecipe, name: ModelName) -> Iterator[str]:
    for part in (name.model, name.lora):
        if part and not is_local(recipe.file.locate(part.path)):
            yield part.path


def _open(recipe: CheckedRecipe, name: ModelName) -> Checkpoint:
    """Open the checkpoint that a recipe names; a message about it says how '@' is read if there is one."""
    place = recipe.file.locate(name.model.path)
    try:
        opened = open_checkpoint(place, name.model.revision)
    except UserError as error:
        if "@" in str(name) and is_local(place):
            raise UserError(f"{error} (mergekit reads '@' as 'model@revision')", error.code) from error
        raise
    return replace(opened, name=name.model.path)


def _with_adapter(recipe: CheckedRecipe, name: ModelName, model: Checkpoint, settings: MergeSettings) -> Checkpoint:
    assert name.lora is not None
    adapter, revision = recipe.file.locate(name.lora.path), name.lora.revision
    if settings.lora_merge_cache is None:
        return changed_checkpoint(model, adapter, revision, str(name))
    folder = merged_folder(model, adapter, revision, settings.lora_merge_cache, settings.lora_merge_dtype)
    return replace(open_checkpoint(str(folder)), name=str(name))


def _refuse_repeats(recipe: CheckedRecipe, folders: Mapping[ModelName, Path]) -> None:
    content = recipe.content
    if content.models is None:
        return
    seen: dict[tuple[Path, ModelPath | None], ModelName] = {}
    problems = []
    for entry in content.models:
        place = folders[entry.model].resolve(), entry.model.lora
        if place in seen:
            text = f"{seen[place]} and {entry.model} are the same model; name it once"
            problems.append(Problem(text, "recipe-model-twice"))
        seen[place] = entry.model
    base = content.base_model
    if base is not None and set(seen) == {(folders[base].resolve(), base.lora)}:
        text = f"{base} is both the base and the only model; there is nothing to merge into it"
        problems.append(Problem(text, "recipe-only-base"))
    raise_collected(problems, "merge recipe: models")
