"""What can be said of a merge before mergekit is imported, which takes seconds: names in the recipe, folders of models."""

from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

from utils.errors import UserError, raise_collected
from utils.merging.recipe_file import MergeRecipe
from utils.merging.recipe_names import merged_models, parse_names
from utils.models.adapters import check_adapter
from utils.models.checkpoints import Checkpoint, find_small_files, is_local, open_checkpoint, read_model_config


def check_quickly(recipe: MergeRecipe, adapter_cache: Path | None = None) -> list[Checkpoint]:
    """Check a recipe by what is written down of the mergekit release it goes to.

    Everything is checked again, against mergekit itself, by the preflight, which knows more.

    Args:
        recipe: the recipe, checked in itself.
        adapter_cache: `--lora_merge_cache`.

    Returns:
        The models to merge that are folders on this machine, opened; empty if the installed mergekit is another
        release. Models with adapters and hub ids are left out.

    Raises:
        UserError: unknown names or values of other types in the recipe; a model folder that is missing or damaged; an
            adapter without a cache.
    """
    from utils.merging.known_names import METHODS, RELEASE, MergeConfiguration

    if metadata.version("mergekit") != RELEASE:
        return []
    config, problems = parse_names(recipe, MergeConfiguration, METHODS)
    raise_collected(problems, recipe.where)
    models = merged_models(config)
    asked = [config.tokenizer_source, config.tokenizer and config.tokenizer.source]
    donors = [one for one in asked if one not in (None, "union", "base")]
    here = [one for one in (*models, *donors) if is_local(one.model.path)]
    find_folders(here, adapter_cache)
    return [open_named(one.model.path, one.model.revision, str(one)) for one in models if one in here and not one.lora]


def find_folders(references: Iterable[Any], adapter_cache: Path | None) -> dict[Any, Path]:
    """The folders with config and tokenizer of the models a recipe names, by reference; hub ids are fetched.

    Raises:
        UserError: a model is missing, its config is malformed or not of a decoder; an adapter has no cache.
    """
    folders = {}
    for reference in references:
        if reference.override_architecture:
            raise UserError(f"model {reference}: override_architecture is not supported here; use mergekit-yaml")
        if reference.lora:
            check_adapter(str(reference), adapter_cache)
        folders[reference] = find_small_files(reference.model.path, reference.model.revision)
        read_model_config(folders[reference], str(reference))
    return folders


def open_named(path: str, revision: str | None, written: str) -> Checkpoint:
    """Open the checkpoint that a recipe names; `written` is the whole name there.

    Raises:
        UserError: as `open_checkpoint`; the message says how '@' is read if there is one.
    """
    try:
        return open_checkpoint(path, revision)
    except UserError as error:
        if "@" in written and is_local(path):
            raise UserError(f"{error} (mergekit reads '@' as 'model@revision')") from None
        raise
