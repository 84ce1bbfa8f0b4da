"""Which tensors a recipe's filters hit, and the proof that each hits what it means and nothing else.

mergekit takes the first filter of a list that is a plain substring of the tensor's name; a filter that matches nothing
is silent. A component's filter is its weight's name without `.weight`, the form the released code writes: it hits the
weight and its own bias. Where another tensor's name begins the same way, a trailing dot is added; where the name is the
end of another tensor's (`layers.0.wo` beside `vision.layers.0.wo`), that one's filter stands before.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from utils.errors import Problem, raise_collected
from utils.models.checkpoints import Checkpoint
from utils.models.headers import TensorHeader
from utils.recipes.group_filters import group_filters
from utils.recipes.matching import FilterList

if TYPE_CHECKING:
    from utils.models.planned_tensors import ArchitecturePlan

_WEIGHT = ".weight"
_BIASES = (".bias", "_bias")  # the latter where the matrices of experts are stacked

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
        targets: weight names, in the order in which their filters are to stand in the recipe.
        names: every name that filters will be matched on.
        where: the models, for the message.

    Returns:
        target name -> filter in their order in the recipe (the targets', but for those that others' filters would hit,
        which come first), and the filters that stand before them all, of tensors that are no targets: the first of all that
        matches a name is one of these, or belongs to that tensor or its weight.

    Raises:
        UserError: a filter cannot be made to hit its own tensors only.
    """
    twice = sorted(target for target, count in Counter(targets).items() if count > 1)
    raise_collected(
        [Problem(f"two components mean the same tensor {name}", "filter-of-two") for name in twice[:5]], where
    )
    filters = {target: target.removesuffix(_WEIGHT) for target in targets}
    owners = _owners(targets)
    misses = _misses(filters, names, owners)
    if dotted := [target for target, extra in misses.items() if extra and target.endswith(_WEIGHT)]:
        filters |= {target: target.removesuffix("weight") for target in dotted}
        misses = _misses(filters, names, owners)
    filters, misses = _ordered(filters, names, owners, misses)
    before: tuple[str, ...] = ()
    if longer := [
        name
        for target, extra in misses.items()
        for name in extra
        if name not in owners and f".{filters[target]}" in name
    ]:
        before = _before(filters, names, longer, where)
        misses = _misses(filters, names, owners, before)
    problems = []
    for target, extra in misses.items():
        hit = f"also hits {', '.join(extra[:3])}" if extra else "does not hit its tensor"
        problems.append(Problem(f"the filter {filters[target]!r}, meant for {target}, {hit}", "filter-inexact"))
    raise_collected(problems[:5], where)
    return filters, before


def _owners(targets: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The targets of which one's filter is to hit a name: itself, or the weight whose bias it is."""
    found: dict[str, tuple[str, ...]] = {}
    for target in targets:
        stem = target.removesuffix(_WEIGHT)
        found |= {f"{stem}{end}": (*found.get(f"{stem}{end}", ()), target) for end in _BIASES}
    return found | {target: (target,) for target in targets}


def _misses(
    filters: Mapping[str, str], names: Sequence[str], owners: Mapping[str, Sequence[str]], before: Sequence[str] = ()
) -> dict[str, list[str]]:
    """Targets whose filter is not exact, with the names it hits wrongly (none: it does not hit its own tensor)."""
    own, extra = set(), {}
    targets, found = [*filters], FilterList([*before, *filters.values()])
    for name in names:
        place = found.place(name)
        if place is None or place < len(before):
            continue
        target = targets[place - len(before)]
        if target == name:
            own.add(name)
        elif target not in owners.get(name, ()):
            extra.setdefault(target, []).append(name)
    return {target: extra.get(target, []) for target in targets if target in extra or target not in own}


def _ordered(
    filters: Mapping[str, str],
    names: Sequence[str],
    owners: Mapping[str, Sequence[str]],
    misses: Mapping[str, list[str]],
) -> tuple[dict[str, str], Mapping[str, list[str]]]:
    """The filters, those ahead whose targets hold another's filter, the longest first; and what they miss still."""
    ahead: set[str] = set()
    while new := {own for extra in misses.values() for name in extra for own in owners.get(name, ())} - ahead:
        ahead |= new
        first = [target for target in filters if target in ahead]
        first.sort(key=lambda target: (len(target.removesuffix(_WEIGHT)), len(target)), reverse=True)
        filters = {target: filters[target] for target in dict.fromkeys([*first, *filters])}
        misses = _misses(filters, names, owners)
    return dict(filters), misses


def _before(filters: Mapping[str, str], names: Sequence[str], longer: Sequence[str], where: str) -> tuple[str, ...]:
    """Filters of names that end as a target does (another tower's), which hit no target."""
    kept, found = set(longer), FilterList([*filters.values()])
    hit = [name for name in names if name not in kept and found.place(name) is not None]
    return tuple(dict.fromkeys(group_filters(dict.fromkeys(longer, ""), [*longer, *hit], where).values()))


def coverage(filters: Mapping[str, str], tensors: Sequence[NamedTensor], before: Sequence[str] = ()) -> Coverage:
    """Count what the filters hit that no filter `before` them does, and sort the rest by kind."""
    hit: list[NamedTensor] = []
    rest: dict[str, list[NamedTensor]] = {}
    found = FilterList([*before, *filters.values()])
    for tensor in tensors:
        place = found.place(tensor.name)
        if place is None or place < len(before):
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
