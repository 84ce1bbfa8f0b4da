"""A merge recipe against mergekit's own schema and the merge method's own parameters.

The rules are those of `utils/merging/recipe_names.py`; what is known is asked of the installed mergekit. Importing it takes
seconds, so this room is imported late, and `utils/merging/quick_check.py` looks at the recipe before.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from utils.errors import raise_collected
from utils.mergekit_api import (
    MergeConfiguration,
    MergeMethod,
    ModelReference,
    ParameterScope,
    merge_method,
    registered_merge_methods,
    set_chat_template,
)
from utils.merging.guided.methods import register_methods
from utils.merging.recipe_file import MergeRecipe
from utils.merging.recipe_names import KnownMethod, KnownParameter, merged_models, parse_names, settings_blocks


class OrderedConfiguration(MergeConfiguration):
    """A `MergeConfiguration` whose models keep the order of the recipe, the base first.

    mergekit collects them in a set, so that the donor of a merge without `base_model` and the order of the tokens that
    a vocabulary union adds differ from run to run.
    """

    def referenced_models(self) -> list[ModelReference]:
        """The base and the merged models, each once."""
        return merged_models(self)


def parse_recipe(recipe: MergeRecipe) -> tuple[OrderedConfiguration, MergeMethod, list[str]]:
    """Check a recipe's names and turn it into mergekit's configuration.

    Returns:
        The configuration, the merge method, and warnings (sentences) about parameters without effect.

    Raises:
        UserError: unknown keys, methods, parameters or dtypes, each with the nearest known name; values that mergekit
            does not take; a method that needs a base without one. All problems are reported together.
    """
    config, problems = parse_names(recipe, OrderedConfiguration, known_methods())
    method = merge_method(config.merge_method)
    warnings: list[str] = []
    raise_collected([*problems, *_chat_template_slips(config)], recipe.where)
    for where, parameters, _, model in settings_blocks(config):
        warnings += _idle(where, parameters, method, model is not None and model == config.base_model)
    return config, method, warnings


def known_methods() -> dict[str, KnownMethod]:
    """The merge methods of the installed mergekit and of this project, by name."""
    register_methods()
    return {method.spec.name: _known(method) for method in registered_merge_methods()}


def _known(method: MergeMethod) -> KnownMethod:
    parameters = (
        KnownParameter(one.name, one.value_type, one.scope != ParameterScope.SHARED) for one in method.spec.parameters
    )
    return KnownMethod(method.spec.name, method.spec.contract.base.value, tuple(parameters))


def uses_density(method: MergeMethod) -> bool:
    """Whether a method keeps a share `density` of each change; task_arithmetic takes the parameter and ignores it."""
    named = any(parameter.name == "density" for parameter in method.spec.parameters)
    return named and getattr(method, "sparsification_method", method) is not None


def _idle(where: str, parameters: Mapping[str, Any], method: MergeMethod, of_base: bool) -> Iterator[str]:
    """Parameters that are accepted and do nothing."""
    scopes = {parameter.name: parameter.scope for parameter in method.spec.parameters}
    for name in parameters:
        if of_base and scopes[name] == ParameterScope.NON_BASE:
            yield f"{where}.{name} has no effect: that model is the base"
    if "density" in parameters and not uses_density(method):
        yield f"{where}.density has no effect: {method.spec.name} adds whole deltas; ties or dare_linear use densities"


class _TemplateHolder:
    """Stands in for a tokenizer while a recipe's chat template is checked."""

    chat_template: str | None = None


def _chat_template_slips(config: MergeConfiguration) -> Iterator[str]:
    if config.chat_template and config.chat_template != "auto":
        try:
            set_chat_template(_TemplateHolder(), config)
        except RuntimeError:
            yield (
                f"chat_template {config.chat_template!r} is neither auto, nor a template mergekit ships, nor a Jinja "
                "template"
            )
