"""A planned merge as the values that a report shows: its facts, a heatmap for each expert, and the models that went in.

planned = plan_recipe(settings, recipe, say)          # utils.merging.planning: headers alone are read
page = Page(..., recipe=planned_recipe(planned), run=Run(models=model_records(planned), ...))
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

from utils.merging.model_card import OWN_METHOD_WORDS, shown_recipe
from utils.merging.parameters import input_values
from utils.merging.plan import MergePlan, OutputTensor
from utils.merging.planning import PlannedMerge
from utils.models.checkpoints import Checkpoint, weight_file_record
from utils.models.content_sample import content_sample
from utils.models.license import stated_license
from utils.reports.values import Heatmap, ModelRecord, Page, Recipe, Run, Verdict

_LAYER = re.compile(r"(?:^|\.)(\d+)\.")
_WEIGHT = ".weight"
_SHOWN = 4  # significant digits of a fact


def planned_recipe(
    planned: PlannedMerge,
    called: Mapping[Path, str] = MappingProxyType({}),
    written: Mapping[Path, str] = MappingProxyType({}),
) -> Recipe:
    """What a recipe comes to, tensor by tensor: its settings, and heatmaps of what differs between tensors.

    Args:
        planned: the merge.
        called: what to call its models, by their folders; the others are called as the recipe does.
        written: what files of vectors are called once they lie beside the recipe, where that is not yet so.
    """
    plan = planned.plan
    method = plan.method
    facts = [("merge method", method.spec.name)]
    if words := OWN_METHOD_WORDS.get(method.spec.name):
        facts.append(("what it does", words[0]))
    shared = dict(plan.tensors[0].task.parameters.items()) if plan.tensors else {}
    facts += [(name, _shown(value)) for name, value in shared.items() if _is_setting(value)]
    facts += [("computed in", plan.dtype or "the inputs' dtype"), ("saved in", plan.out_dtype)]
    heatmaps = []
    for label, name, tensors in _numbers(plan, called):
        if len({value for _, value in tensors}) == 1:
            facts.append((f"{name}, {label}", _shown(tensors[0][1])))
            continue
        heatmap = layer_heatmap(label, name, ((tensor.name, tensor.merged_shape, value) for tensor, value in tensors))
        if heatmap is not None:
            heatmaps.append(heatmap)
        facts += [
            (f"{name}, {label}, {tensor.name.removesuffix(_WEIGHT)}", _shown(value))
            for tensor, value in tensors
            if _LAYER.search(tensor.name) is None and len(tensor.merged_shape or ()) > 1
        ]
    facts += [
        (f"vectors, {name}", written.get(file.path.resolve(), file.label))
        for file in planned.saliency
        for name in file.tensors
    ]
    return Recipe(tuple(facts), tuple(heatmaps), shown_recipe(planned))


def model_records(planned: PlannedMerge) -> tuple[ModelRecord, ...]:
    """The models that went in, with revision and license where they are known."""
    base = planned.plan.inputs.config.base_model
    return tuple(
        ModelRecord(
            model.label,
            "base" if model.reference == base else "expert",
            _fingerprint(model.checkpoint),
            stated_license(model.checkpoint.folder),
        )
        for model in planned.plan.inputs.models
    )


def merge_page(planned: PlannedMerge, run: Run) -> Page:
    """The page of a merged folder, which nothing has been measured of.

    Args:
        planned: the merge.
        run: what was run; its models are added here.
    """
    name = planned.settings.output_path.resolve().name
    inputs = planned.plan.inputs
    experts = [model.label for model in inputs.models if model.reference != inputs.config.base_model]
    onto = f" into {inputs.label(inputs.config.base_model)}" if inputs.config.base_model else ""
    sentence = f"{name} is a merge of {', '.join(experts)}{onto} by {planned.plan.method.spec.name}."
    details = ("Nothing on this page says how well it does: that takes an evaluation.",)
    return Page(
        title=name,
        verdict=Verdict(sentence, None, details),
        recipe=planned_recipe(planned),
        run=Run(**{**vars(run), "models": model_records(planned)}),
        warnings=planned.warnings,
    )


def _numbers(
    plan: MergePlan, called: Mapping[Path, str]
) -> Iterator[tuple[str, str, list[tuple[OutputTensor, float]]]]:
    """Each expert's own numeric parameters: its label, the parameter's name, and the tensors with their values."""
    for model in plan.inputs.models:
        if model.reference == plan.inputs.config.base_model:
            continue
        found: dict[str, list[tuple[OutputTensor, float]]] = {}
        for tensor in plan.tensors:
            for name, value in input_values(tensor, model.reference).items():
                if isinstance(value, int | float) and not isinstance(value, bool):
                    found.setdefault(name, []).append((tensor, float(value)))
        for name, tensors in sorted(found.items()):
            yield called.get(model.checkpoint.folder, model.label), name, tensors


def is_drawn(name: str, shape: tuple[int, ...] | None) -> bool:
    """Whether a tensor has a place in heatmaps: of a layer, and neither a norm nor a bias."""
    return _LAYER.search(name) is not None and (shape is None or len(shape) > 1)


def layer_heatmap(
    title: str, quantity: str, values: Iterable[tuple[str, tuple[int, ...] | None, float]]
) -> Heatmap | None:
    """Layers by components; tensors of one place, such as a layer's many experts, are averaged by their parameters.

    Norms and biases are left out: they are a thousandth of a model and would take half of the columns.

    Args:
        title, quantity: as the heatmap has them.
        values: name, shape (None if unknown) and number of each tensor; those outside the layers are passed over.
    """
    cells: dict[tuple[int, str], list[tuple[float, int]]] = {}
    for name, shape, value in values:
        if not is_drawn(name, shape):
            continue
        place = _LAYER.search(name)
        component = re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name[place.end() :].removesuffix(_WEIGHT))
        cells.setdefault((int(place[1]), component), []).append((value, math.prod(shape or (1,))))
    if not cells:
        return None
    layers = sorted({layer for layer, _ in cells})
    components = list(dict.fromkeys(component for _, component in cells))
    rows = tuple(tuple(_mean(cells.get((layer, component))) for component in components) for layer in layers)
    return Heatmap(title, quantity, tuple(map(str, layers)), tuple(_short_names(components)), rows)


def _short_names(components: list[str]) -> list[str]:
    """The last parts of the names, as few as tell them apart: `q_proj`, but `self_attn.dense` beside `mlp.dense`."""
    parts = [component.split(".") for component in components]
    for count in range(1, max(map(len, parts)) + 1):
        short = [".".join(part[-count:]) for part in parts]
        if len(set(short)) == len(short):
            return short
    return components


def _mean(values: list[tuple[float, int]] | None) -> float | None:
    if not values:
        return None
    total = sum(params for _, params in values)
    return math.fsum(value * params for value, params in values) / total


def _fingerprint(checkpoint: Checkpoint) -> str:
    """The commit of a model from the hub; of one on disk the hash of a sample of its content: fine-tunes share headers."""
    revision = weight_file_record(checkpoint)["revision"]
    return f"revision {revision}" if revision else f"content {content_sample(checkpoint)[:16]}"


def _is_setting(value: object) -> bool:
    return isinstance(value, bool | int | float | str)


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"{value:.{_SHOWN}g}" if isinstance(value, float) else str(value)
