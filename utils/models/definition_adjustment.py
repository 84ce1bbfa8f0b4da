"""Changing one thing in an architecture definition of mergekit's: that some tensors need not be there."""

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from utils.mergekit_api import ModelArchitecture, WeightInfo


def with_optional(info: "ModelArchitecture", config: Any, names: Collection[str]) -> "ModelArchitecture | None":
    """A copy of `info` in which the tensors called `names` are optional; mergekit skips those that nobody stores.

    A tensor of the layers is one template for all of them, so it becomes optional only if every layer's is in `names`.
    None if the definition is not one of mergekit's JSON files, or prefixes its names.

    Args:
        info: the definition.
        config: the base model's transformers config, which fills in the number of layers.
        names: tensor names in full.
    """
    from utils.mergekit_api import JsonModuleArchitecture

    modules = {}
    for key, module in info.modules.items():
        if module.weight_prefix or not isinstance(module.architecture, JsonModuleArchitecture):
            return None
        modules[key] = module.model_copy(update={"architecture": _relaxed(module.architecture, config, names)})
    return info.model_copy(update={"modules": modules})


def _relaxed(architecture: Any, config: Any, names: Collection[str]) -> Any:
    definition = architecture.definition
    templates = definition.layer_templates
    layers = [architecture.layer_weights(index, config) for index in range(architecture.num_layers(config))]
    update = {
        "pre_weights": _with_flags(definition.pre_weights, [architecture.pre_weights(config)], names),
        "post_weights": _with_flags(definition.post_weights, [architecture.post_weights(config)], names),
        "layer_templates": templates.model_copy(update={"weights": _with_flags(templates.weights, layers, names)}),
    }
    return architecture.model_copy(update={"definition": definition.model_copy(update=update)})


def _with_flags(
    templates: Sequence["WeightInfo"], instances: Sequence[Sequence["WeightInfo"]], names: Collection[str]
) -> list["WeightInfo"]:
    """`templates`, optional where all their `instances` (same order, one row per layer) are in `names`."""
    return [
        template.model_copy(update={"optional": True})
        if instances and all(row[place].name in names for row in instances)
        else template
        for place, template in enumerate(templates)
    ]
