"""What a recipe's parameters come to, tensor by tensor: filters that act, values a method can work with, densities.

mergekit takes the first filter of a list that is a plain substring of the tensor's name. A filter that is the first for
no tensor does nothing, silently: its tensors get another value. Here that is an error.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from utils.errors import Problem, raise_collected
from utils.mergekit_api import ConditionalParameter, ModelReference, ParameterScope
from utils.merging.filter_lookup import filter_texts
from utils.merging.plan import MergePlan, OutputTensor, gathered, shortened
from utils.merging.recipe_check import settings_blocks
from utils.recipes.matching import FilterList


@dataclass(frozen=True)
class DensitySummary:
    """Densities of one model over the tensors of a merge; `mean` is weighted by parameters.

    `guided` counts the tensors with a density below 1, of `tensors` in all.
    """

    label: str
    mean: float
    low: float
    high: float
    guided: int
    tensors: int


def check_parameters(plan: MergePlan) -> list[str]:
    """Check filters and values of a planned merge.

    Returns:
        Warnings (sentences) about parameters that cancel out.

    Raises:
        UserError: a filter decides nothing, or a value would stop the method in the middle of the merge.
    """
    raise_collected(shortened(list(_idle_filters(plan))), "merge recipe: filters")
    raise_collected(shortened(list(_bad_values(plan))), "merge recipe: values")
    return list(_cancelling_weights(plan))


def density_summaries(plan: MergePlan) -> list[DensitySummary]:
    """Densities by model, for a method that uses them; parameters of unknown shape count as one."""
    summaries = []
    for model in plan.inputs.models:
        found = [
            (values["density"], max(tensor.params, 1))
            for tensor in plan.tensors
            if "density" in (values := input_values(tensor, model.reference))
        ]
        if found:
            total = sum(params for _, params in found)
            values = [density for density, _ in found]
            summaries.append(
                DensitySummary(
                    model.label,
                    math.fsum(density * params for density, params in found) / total,
                    min(values),
                    max(values),
                    sum(density < 1 for density in values),
                    len(values),
                )
            )
    return summaries


def idle_conditions(setting: Any, names: Sequence[str]) -> list[tuple[str, bool]]:
    """Filters of one parameter that decide for none of the names, each with whether it would match one at all."""
    conditions = [setting] if isinstance(setting, ConditionalParameter) else setting
    if not isinstance(conditions, list) or not any(isinstance(one, ConditionalParameter) for one in conditions):
        return []
    texts = filter_texts(conditions)
    filters = FilterList(texts)
    acting = {filters.place(name) for name in names}
    idle = [text for place, text in enumerate(texts) if text and place not in acting]
    held = set().union(*(filters.held(name) for name in names)) if idle else set()
    return [(text, text in held) for text in idle]


def _idle_filters(plan: MergePlan) -> Iterator[Problem]:
    config = plan.inputs.config
    scopes = {parameter.name: parameter.scope for parameter in plan.method.spec.parameters}
    for where, parameters, of_input, model in settings_blocks(config):
        if of_input:
            inputs = [tensor.task for tensor in plan.tensors if model in tensor.task.model_order]
            names = [gathered(task).weight_info[model].name for task in inputs]
        else:
            names = [tensor.name for tensor in plan.tensors]
        for name, setting in parameters.items():
            if of_input and model == config.base_model and scopes[name] == ParameterScope.NON_BASE:
                continue  # without effect as a whole, which a warning says
            for text, hidden in idle_conditions(setting, names) if names else ():
                why = "is hidden behind an earlier one that matches the same tensors" if hidden else "matches no tensor"
                example = names[len(names) // 2]
                found = f"{where}.{name}: the filter {text!r} {why}; tensors are called like {example}"
                yield Problem(found, "recipe-idle-filter")


def input_values(tensor: OutputTensor, reference: ModelReference) -> Mapping[str, Any]:
    """A model's own parameters for one tensor, resolved; empty for the base and for models that lack the tensor."""
    task = tensor.task
    if reference not in tensor.stored_dtypes or reference not in dict(task.input_parameters.items()):
        return {}
    return task.input_parameters[reference]


def _bad_values(plan: MergePlan) -> Iterator[Problem]:
    for tensor in plan.tensors:
        for model in plan.inputs.models:
            for text in _bad_numbers(input_values(tensor, model.reference), tensor.merged_shape):
                yield Problem(f"{model.label}, {tensor.name}: {text}", "recipe-bad-value")


def _bad_numbers(values: Mapping[str, Any], shape: tuple[int, ...] | None) -> Iterator[str]:
    """What a method would stop at in one model's parameters for one tensor."""
    density, epsilon, gamma = (values.get(name) for name in ("density", "epsilon", "gamma"))
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            yield f"{name} is {value}"
    if density is not None and not 0 <= density <= 1:
        yield f"density {density} is outside [0, 1]"
    elif density is not None and epsilon is not None and 0 < density < 1:
        if not density - epsilon > 0 or not density + epsilon < 1:
            yield (
                f"density {density:g} with epsilon {epsilon:g}; this method needs both density - epsilon and density + "
                "epsilon strictly between 0 and 1: give epsilon the same filters with smaller values"
            )
        elif shape and shape[min(1, len(shape) - 1)] == 1:
            yield f"shape {list(shape)} cannot be ranked by this method; give it density 1"
    if gamma is not None and not 0 <= gamma <= 1:
        yield f"gamma {gamma} is outside [0, 1]"


def _cancelling_weights(plan: MergePlan) -> Iterator[str]:
    """One expert and `normalize`: the weighted change is divided by its own weight again."""
    experts = [model for model in plan.inputs.models if model.reference != plan.inputs.config.base_model]
    if len(experts) != 1 or not plan.tensors or not plan.tensors[0].task.base_model:
        return
    weights = set()
    for tensor in plan.tensors:
        shared = dict(tensor.task.parameters.items())
        values = input_values(tensor, experts[0].reference)
        if shared.get("normalize") is True and "density" in values:
            weights.add(values.get("weight"))
    if weights - {None, 1.0}:
        yield (
            f"the weights of {experts[0].label} have no effect: with one expert, normalize: true divides by them "
            "again; set normalize: false to use them"
        )
