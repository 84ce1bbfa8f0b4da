"""Slices of a recipe, before mergekit plans them: blocks in each other's places must have the same tensors.

mergekit pairs a block's tensors with those of the block whose place it takes one after the other, by their order. In a
hybrid (attention here, a state space there; experts here, none there) that would pair what has nothing to do with each
other.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from utils.errors import Problem, raise_collected
from utils.models.mergekit_inputs import quiet_mergekit
from utils.models.planned_tensors import STORED, ArchitecturePlan
from utils.recipes.filters import name_template

if TYPE_CHECKING:
    from utils.mergekit_api import MergeConfiguration
    from utils.merging.inputs import MergeInput, MergeInputs

_SHOWN = 3


def refuse_missing_layers(inputs: "MergeInputs", trust_remote_code: bool) -> None:
    """Refuse slices of layers that a model does not have: mergekit plans them all, and stops in the middle of the merge.

    Raises:
        UserError: a range ends behind the last layer of its model.
    """
    if not inputs.config.slices:
        return
    known = {model.reference: model for model in inputs.models}
    problems = []
    for number, one in enumerate(inputs.config.slices):
        for source in one.sources:
            model, (first, stop) = known.get(source.model), source.layer_range
            layers = _layers(model, trust_remote_code) if model else None
            if layers is not None and stop > layers:
                text = f"slices[{number}]: {model.label} has {layers} layers, not [{first}, {stop}]"
                problems.append(Problem(text, "recipe-no-such-layer"))
    raise_collected(problems, "merge recipe")


def _layers(model: "MergeInput", trust_remote_code: bool) -> int | None:
    with quiet_mergekit():
        config = model.reference.config(trust_remote_code)
    return getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)


def refuse_unlike_blocks(recipe: "MergeConfiguration", plan: ArchitecturePlan, config: Any) -> None:
    """Refuse slices that put blocks in the places of blocks with other tensors.

    Args:
        recipe: as mergekit gets it.
        plan: the architecture's.
        config: the result's config.

    Raises:
        UserError: a block lacks, or has beside, tensors of the block whose place it takes; or the place is none.
    """
    if recipe.slices and len(plan.info.modules) == 1:
        problems = list(_problems(recipe, plan, config))
        raise_collected(problems[:_SHOWN], "merge recipe: slices")


def _problems(recipe: "MergeConfiguration", plan: ArchitecturePlan, config: Any) -> Iterator[Problem]:
    place = 0
    for number, one in enumerate(recipe.slices):
        for step in range(one.sources[0].layer_range[1] - one.sources[0].layer_range[0]):
            for source in one.sources:
                layer = source.layer_range[0] + step
                if why := _unlike(plan, config, layer, place):
                    yield Problem(
                        f"slices[{number}]: layer {layer} in the place of layer {place}: {why}", "recipe-slices-unlike"
                    )
            place += 1


def _unlike(plan: ArchitecturePlan, config: Any, layer: int, place: int) -> str:
    """Why a block cannot take a place, as a clause; "" if it can."""
    kinds = []
    for index in (layer, place):
        (module,) = plan.info.modules.values()
        if plan.origin == STORED and index >= module.architecture.num_layers(config):
            return (
                "the base has no such layer, whose tensors it could be called like; more layers than the base's need blocks "
                "that are all alike (of a mixture, try --fused_experts)"
            )
        names = [weight.name for weight in module.architecture.layer_weights(index, config)]
        kinds.append([name_template(name) for name in names])
    own, there = kinds
    if own == there:
        return ""
    lacks = [name for name in there if name not in own]
    beside = [name for name in own if name not in there]
    words = [
        *([f"it lacks {lacks[0]}"] if lacks else []),
        *([f"it has {beside[0]}, which has no place there"] if beside else []),
    ]
    return f"{' and '.join(words) or 'their tensors are in another order'}; take slices of blocks of one kind"
