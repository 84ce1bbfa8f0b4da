"""Which tensors a recipe's filters hit, and the proof that each hits what it means and nothing else.

mergekit takes the first filter of a list that is a plain substring of the tensor's name; a filter that matches nothing
is silent. A component's filter is its weight's name without `.weight`, the form the released code writes: it hits the
weight and its own bias. Where another tensor's name begins the same way, a trailing dot is added.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from utils.errors import raise_collected
from utils.models.checkpoints import Checkpoint, TensorHeader

if TYPE_CHECKING:
    import pandas as pd

    from utils.models.architecture import ArchitecturePlan

_WEIGHT = ".weight"
_BLOCK_TENSOR = re.compile(r"(?P<prefix>.+?)\.(?P<layer>\d+)\.(?P<path>.+)\.weight")

Place = tuple[int, str]  # layer, component
Key = TypeVar("Key")


@dataclass(frozen=True)
class NamedTensor:
    """A tensor that a merge writes: its name, as filters see it, its number of axes and of parameters."""

    name: str
    axes: int
    params: int
    vocabulary: bool = False


@dataclass(frozen=True)
class Coverage:
    """What carries a guided density: counts and parameters, and the names of what does not, by kind."""

    tensors: int
    all_tensors: int
    params: int
    all_params: int
    uncovered: Mapping[str, tuple[NamedTensor, ...]]


def planned_tensors(plan: "ArchitecturePlan", base: Checkpoint) -> list[NamedTensor]:
    """The tensors that a merge will write, with the sizes they have in the base checkpoint."""
    stored: dict[str, list[TensorHeader]] = {}
    for name, header in base.tensors.items():
        stored.setdefault(plan.spellings.get(name, name), []).append(header)
    tensors = []
    for planned in plan.tensors:
        tied = base.tensors.get(planned.stored_name(base.tensors) or "")
        headers = stored.get(planned.name) or ([tied] if tied else [])
        params = sum(math.prod(header.shape) for header in headers)
        axes = len(headers[0].shape) if headers else 0
        tensors.append(NamedTensor(planned.name, axes, params, planned.vocabulary_axis is not None))
    return tensors


def measured_names(
    norms: "pd.DataFrame", base: str, layers: int, components: Sequence[str]
) -> tuple[dict[Place, str], dict[str, int]]:
    """Tensor names by (layer, component), and sizes by tensor name, from the base's rows of `norms.csv`.

    Raises:
        UserError: a place is missing or given twice, a name is not text, or a layer or size not a whole number.
    """
    own = norms[norms["model"].astype(str) == base]
    if "text" in own.columns:  # the base was measured on several texts
        own = own[own["text"] == own["text"].iloc[0]] if len(own) else own
    names: dict[Place, str] = {}
    params: dict[str, int] = {}
    problems = []
    for layer, component, tensor, size in zip(
        own["layer"], own["component"], own["tensor"], own["params"], strict=True
    ):
        place = (layer, component)
        if not _is_whole(layer) or not _is_whole(size) or not isinstance(tensor, str) or place in names:
            problems.append(
                f"layer {layer}, component {component}: a value is missing or wrong, or the row is there twice"
            )
            continue
        names[int(layer), component] = tensor
        params[tensor] = int(size)
    wanted = [(layer, component) for component in components for layer in range(layers)]
    problems += [f"layer {layer}, component {name} is missing" for layer, name in wanted if (layer, name) not in names]
    deeper = [layer for layer, component in names if component in components and layer >= layers]
    if deeper:
        problems.append(f"it has layer {max(deeper)}, but the delta tables have {layers} rows: a row was lost")
    raise_collected(problems[:5], f"norms.csv, rows of {base!r}")
    return {place: names[place] for place in wanted}, params


def _is_whole(value: object) -> bool:
    try:
        return float(value) == int(value) >= 0
    except (TypeError, ValueError, OverflowError):
        return False


def found_names(
    tensors: Iterable[NamedTensor], layers: int, components: Sequence[str], prefixes: Mapping[str, str], where: str
) -> dict[Place, str]:
    """Tensor names by (layer, component) from a checkpoint's own names: `<block prefix>.<layer>.<path>.weight`.

    A component means the path that `prefixes` gives, else the path that equals it or ends with it.

    Raises:
        UserError: a component fits no path or several (all candidates are listed), or not every layer has it.
    """
    found: dict[tuple[str, str], dict[int, str]] = {}  # (block prefix, path) -> layer -> name
    for tensor in tensors:
        match = _BLOCK_TENSOR.fullmatch(tensor.name)
        if match and tensor.axes > 1:
            found.setdefault((match["prefix"], match["path"]), {})[int(match["layer"])] = tensor.name
    names: dict[Place, str] = {}
    problems = []
    for component in components:
        wanted = prefixes.get(component, component)
        fitting = [key for key in found if key[1] == wanted]
        if component not in prefixes:
            fitting = fitting or [key for key in found if key[1].endswith("." + wanted)]
        if len(fitting) != 1:
            listed = [f"{prefix}.*.{path}" for prefix, path in (fitting or found)]
            state = "means several tensors" if fitting else f"({wanted}) names no tensor"
            problems.append(f"component {component!r} {state}; there are {', '.join(listed)}. Use prefix_mapping")
            continue
        there = found[fitting[0]]
        if sorted(there) != list(range(layers)):
            problems.append(
                f"component {component!r}: the delta tables have {layers} rows, the model has "
                f"{'.'.join([fitting[0][0], '*', fitting[0][1]])} in {len(there)} layers"
            )
        names |= {(layer, component): there[layer] for layer in range(layers) if layer in there}
    raise_collected(problems, where)
    return names


def assumed_names(layers: int, components: Sequence[str], prefixes: Mapping[str, str]) -> dict[Place, str]:
    """Tensor names as the released code assumes them: `model.layers.<layer>.<path>.weight`."""
    return {
        (layer, component): f"model.layers.{layer}.{prefixes.get(component, component)}{_WEIGHT}"
        for component in components
        for layer in range(layers)
    }


def as_planned(names: Mapping[Key, str], plan: "ArchitecturePlan", where: str) -> dict[Key, str]:
    """Replace each name by the one mergekit plans the tensor under (they differ where a checkpoint uses an alias).

    Raises:
        UserError: mergekit plans no such tensor.
    """
    absent = [name for name in names.values() if name not in plan.spellings]
    raise_collected([f"{name!r} was measured, but the model does not have it" for name in absent[:5]], where)
    return {place: plan.spellings[name] for place, name in names.items()}


def exact_filters(targets: Sequence[str], names: Sequence[str], where: str) -> dict[str, str]:
    """The filter of each target tensor, proven against all names that a merge writes.

    Args:
        targets: weight names, in the order in which their filters will stand in the recipe.
        names: every name that filters will be matched on.
        where: the models, for the message.

    Returns:
        target name -> filter; the first filter of the list that matches a name belongs to that tensor or its weight.

    Raises:
        UserError: a filter cannot be made to hit its own tensors only.
    """
    twice = sorted({target for target in targets if list(targets).count(target) > 1})
    raise_collected([f"two components mean the same tensor {name}" for name in twice[:5]], where)
    filters = {target: target.removesuffix(_WEIGHT) for target in targets}
    for target, extra in _misses(filters, names).items():
        if extra and target.endswith(_WEIGHT):
            filters[target] = target.removesuffix("weight")
    problems = []
    for target, extra in _misses(filters, names).items():
        hit = f"also hits {', '.join(extra[:3])}" if extra else "does not hit its tensor"
        problems.append(f"the filter {filters[target]!r}, meant for {target}, {hit}")
    raise_collected(problems[:5], where)
    return filters


def _misses(filters: Mapping[str, str], names: Sequence[str]) -> dict[str, list[str]]:
    """Targets whose filter is not exact, with the names it hits wrongly (none: it does not hit its own tensor)."""
    hits: dict[str, list[str]] = {target: [] for target in filters}
    for name in names:
        target = first_match(filters, name)
        if target is not None:
            hits[target].append(name)
    misses = {}
    for target, hit in hits.items():
        own = {target, target.removesuffix(_WEIGHT) + ".bias"}
        if target not in hit or not own.issuperset(hit):
            misses[target] = [name for name in hit if name not in own]
    return misses


def first_match(filters: Mapping[str, str], name: str) -> str | None:
    """The key of the first filter that mergekit would apply to `name` (plain substring, in order), or None."""
    return next((key for key, text in filters.items() if text in name), None)


def coverage(filters: Mapping[str, str], tensors: Sequence[NamedTensor]) -> Coverage:
    """Count what the filters hit, and sort the rest by kind."""
    hit = [tensor for tensor in tensors if first_match(filters, tensor.name) is not None]
    rest: dict[str, list[NamedTensor]] = {}
    for tensor in tensors:
        if first_match(filters, tensor.name) is None:
            rest.setdefault(_kind(tensor), []).append(tensor)
    return Coverage(
        len(hit),
        len(tensors),
        sum(tensor.params for tensor in hit),
        sum(tensor.params for tensor in tensors),
        {kind: tuple(rest[kind]) for kind in sorted(rest)},
    )


def name_template(name: str) -> str:
    """A tensor name with its layer number replaced by `*`."""
    return re.sub(r"\.\d+\.", ".*.", name, count=1)


def _kind(tensor: NamedTensor) -> str:
    if tensor.vocabulary:
        return "embeddings and head"
    return "norms and biases" if tensor.axes < 2 else "other matrices"
