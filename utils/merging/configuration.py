"""A checked recipe as mergekit's own configuration, with the models where they lie on this machine."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from utils.errors import UserError, brief
from utils.mergekit_api import MergeConfiguration, ModelReference, set_chat_template
from utils.merging.recipe_check import CheckedRecipe, ModelName, is_keyword, merged_models


class OrderedConfiguration(MergeConfiguration):
    """A `MergeConfiguration` whose models keep the order of the recipe, the base first.

    mergekit collects them in a set, so that the donor of a merge without `base_model` and the order of the tokens that
    a vocabulary union adds differ from run to run.
    """

    def referenced_models(self) -> list[ModelReference]:
        """The base and the merged models, each once."""
        return merged_models(self)


def configuration(recipe: CheckedRecipe, places: Mapping[ModelName, tuple[Path, Path | None]]) -> OrderedConfiguration:
    """Make mergekit's configuration of a recipe, in which every model is an absolute folder, and so is its adapter.

    Raises:
        UserError: mergekit does not take it; a chat template that is none.
    """
    try:
        config = OrderedConfiguration.model_validate(_plain(recipe.content, places))
    except (ValueError, RuntimeError) as error:  # what this project's own check lets pass
        text = f"{recipe.file.where}: mergekit does not accept it: {brief(error, 1000)}"
        raise UserError(text, "recipe-not-mergekits") from error
    if config.chat_template and config.chat_template != "auto":
        try:
            set_chat_template(_TemplateHolder(), config)
        except RuntimeError as error:
            raise UserError(
                f"{recipe.file.where}: chat_template {config.chat_template!r} must be auto, the name of a template that "
                "mergekit ships, or a Jinja template",
                "recipe-chat-template",
            ) from error
    return config


class _TemplateHolder:
    """Stands in for a tokenizer while a recipe's chat template is checked."""

    chat_template: str | None = None


def _plain(value: Any, places: Mapping[ModelName, tuple[Path, Path | None]]) -> Any:
    """A recipe's value as plain data without the keys that are not given, models by their folders."""
    if isinstance(value, ModelName):
        folder, adapter = places[value]
        return {"model": {"path": str(folder)}, **({} if adapter is None else {"lora": {"path": str(adapter)}})}
    if is_dataclass(value):
        given = {field.name: getattr(value, field.name) for field in fields(value)}
        return {
            name: str(one) if is_keyword(value, name) else _plain(one, places)
            for name, one in given.items()
            if one is not None
        }
    if isinstance(value, dict):
        return {key: _plain(one, places) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one, places) for one in value]
    return value
