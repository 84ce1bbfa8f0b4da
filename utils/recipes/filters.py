"""Which tensors a recipe's filters hit, and the proof that each hits what it means and nothing else.

mergekit takes the first filter of a list that is a plain substring of the tensor's name; a filter that matches nothing
is silent. A component's filter is its weight's name without `.weight`, the form the released code writes: it hits the
weight and its own bias. Where another tensor's name begins the same way, a trailing dot is added; where the name is the
end of another tensor's (`layers.0.wo` beside `vision.layers.0.wo`), a filter of that one stands before.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from utils.errors import Problem, raise_collected
from utils.models.checkpoints import Checkpoint
from utils.models.headers import TensorHeader
from utils.recipes.group_filters import first_match, group_filters

if TYPE_CHECKING:
    from utils.models.planned_tensors import ArchitecturePlan

_WEIGHT = ".weight"

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
    for planned in {one.name: one for one in plan.tensors}.values():  # a definition of mergekit's lists some twice
        tied = base.tensors.get(planned.stored_name(base.tensors) or "")
        headers = stored.get(planned.name) or ([tied] if tied else [])
        params = sum(math.prod(header.shape) for header in headers)
        axes = len(headers[0].shape) if headers else 0
        tensors.append(NamedTensor(planned.name, axes, params, planned.vocabulary_axis is not None))
    return tensors


def as_planned(names: Mapping[Key, str], plan: "ArchitecturePlan", where: str) -> dict[Key, str]:
    """Replace each name by the one mergekit plans the tensor under (they differ where a checkpoint uses an alias).

    Raises:
        UserError: mergekit plans no such tensor.
    """
    absent = [name for name in names.values() if name not in plan.spellings]
    code = "tensor-not-in-model"
    raise_collected(
        (Problem(f"{name!r} was measured, but the model does not have it", code) for name in absent[:5]), where
    )
    return {place: plan.spellings[name] for place, name in names.items()}


def exact_filters(targets: Sequence[str], names: Sequence[str], where: str) -> tuple[dict[str, str], tuple[str, ...]]:
    """The filter of each target tensor, proven against all names that a merge writes.

    Args:
        targets: weight names, in the order in which their filters will stand in the recipe.
        names: every name that filters will be matched on.
        where: the models, for the message.

    Returns:
        target name -> filter, and the filters that stand before them all, of tensors that are no targets: the first of all
        that matches a name is one of these, or belongs to that tensor or its weight.

    Raises:
        UserError: a filter cannot be made to hit its own tensors only.
    """
    twice = sorted({target for target in targets if list(targets).count(target) > 1})
    raise_collected(
        [Problem(f"two components mean the same tensor {name}", "filter-of-two") for name in twice[:5]], where
    )
    filters = {target: target.removesuffix(_WEIGHT) for target in targets}
    for target, extra in _misses(filters, names).items():
        if extra and target.endswith(_WEIGHT):
            filters[target] = target.removesuffix("weight")
    before = _before(filters, names, where)
    problems = []
    for target, extra in _misses(filters, names, before).items():
        hit = f"also hits {', '.join(extra[:3])}" if extra else "does not hit its tensor"
        problems.append(Problem(f"the filter {filters[target]!r}, meant for {target}, {hit}", "filter-inexact"))
    raise_collected(problems[:5], where)
    return filters, before


def _before(filters: Mapping[str, str], names: Sequence[str], where: str) -> tuple[str, ...]:
    """Filters of the names that end as a target does (another tower's), which hit no target."""
    misses = _misses(filters, names)
    longer = [name for target, extra in misses.items() for name in extra if f".{filters[target]}" in name]
    hit = [name for name in names if name not in longer and first_match(filters, name) is not None]
    found = group_filters(dict.fromkeys(longer, ""), [*longer, *hit], where)
    return tuple(dict.fromkeys(found.values()))


def _misses(filters: Mapping[str, str], names: Sequence[str], before: Sequence[str] = ()) -> dict[str, list[str]]:
    """Targets whose filter is not exact, with the names it hits wrongly (none: it does not hit its own tensor)."""
    hits: dict[str, list[str]] = {target: [] for target in filters}
    for name in names:
        if any(text in name for text in before):
            continue
        target = first_match(filters, name)
        if target is not None:
            hits[target].append(name)
    misses = {}
    for target, hit in hits.items():
        stem = target.removesuffix(_WEIGHT)
        own = {target, f"{stem}.bias", f"{stem}_bias"}  # the latter where the matrices of experts are stacked
        if target not in hit or not own.issuperset(hit):
            misses[target] = [name for name in hit if name not in own]
    return misses


def coverage(filters: Mapping[str, str], tensors: Sequence[NamedTensor], before: Sequence[str] = ()) -> Coverage:
    """Count what the filters hit that no filter `before` them does, and sort the rest by kind."""
    hit: list[NamedTensor] = []
    rest: dict[str, list[NamedTensor]] = {}
    for tensor in tensors:
        if first_match(filters, tensor.name) is None or any(text in tensor.name for text in before):
            rest.setdefault(_kind(tensor), []).append(tensor)
        else:
            hit.append(tensor)
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
