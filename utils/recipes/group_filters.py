"""Filters for groups of tensors that share a value: as few as hit every tensor of a group and nothing else.

A filter hits every tensor whose name holds it (`utils/recipes/filters.py`). A group's filters are prefixes of its names, cut at
dots and ended with one (`model.layers.3.self_attn.`), or whole names where no prefix belongs to one group alone.
"""

from collections.abc import Hashable, Mapping, Sequence

from utils.errors import Problem, raise_collected
from utils.recipes.matching import FilterList

_SEVERAL = object()  # in place of a group, where names of several or of none hold a prefix


def group_filters(groups: Mapping[str, Hashable], names: Sequence[str], where: str) -> dict[str, str]:
    """The filter of each tensor; tensors of one group share theirs.

    Args:
        groups: the group of each tensor, by name, in the order in which the filters will stand in the recipe.
        names: every name that filters will be matched on.
        where: the models, for the message.

    Returns:
        name -> filter; the first filter of the list that a name holds is its own, and a name without a group holds none.

    Raises:
        UserError: no filters can tell the groups apart.
    """
    members: dict[Hashable, list[str]] = {}
    for name, group in groups.items():
        members.setdefault(group, []).append(name)
    chosen: dict[str, str] = {}
    owners = _owners(groups, names)
    for group, own in members.items():
        chosen |= _split(own, group, owners, 0)
    # Prefixes first, which hit their own group only; then whole names, the longest first: `a.weight` hits `b.a.weight`.
    order = sorted(groups, key=lambda name: 0 if chosen[name].endswith(".") else -len(chosen[name]))
    order.sort(key=lambda name: not chosen[name].endswith("."))
    filters = {name: chosen[name] for name in order}
    problems, texts = [], [*filters.values()]
    found = FilterList(texts)
    for name in names:
        place = found.place(name)
        if (None if place is None else texts[place]) != chosen.get(name):
            meant = f"no filter is meant for {name}" if name not in chosen else f"{name} is meant for {chosen[name]!r}"
            but = "none hits it" if place is None else f"{texts[place]!r} hits it"
            problems.append(Problem(f"{meant}, but {but}", "filter-inexact"))
    raise_collected(problems[:5], where)
    return filters


def _owners(groups: Mapping[str, Hashable], names: Sequence[str]) -> dict[str, Hashable]:
    """The group that all names with a prefix in them are of, or `_SEVERAL`; by the prefixes of grouped names."""
    prefixes = set()
    for name in groups:
        end = name.find(".")
        while end >= 0:
            prefixes.add(name[: end + 1])
            end = name.find(".", end + 1)
    found, owners = FilterList([*prefixes]), {}
    for name in names:
        group = groups.get(name, _SEVERAL)
        for prefix in found.held(name):
            if owners.setdefault(prefix, group) != group:
                owners[prefix] = _SEVERAL
    return owners


def _split(own: Sequence[str], group: Hashable, owners: Mapping[str, Hashable], depth: int) -> dict[str, str]:
    """Filters for names of a group that have their first `depth` dotted parts in common."""
    parts = own[0].split(".")
    prefix = ".".join(parts[:depth]) + "."
    if depth and owners.get(prefix, group) == group:
        return dict.fromkeys(own, prefix)
    if len(own) == 1 and depth >= len(parts) - 1:
        return {own[0]: own[0]}
    branches: dict[tuple[str, ...], list[str]] = {}
    for name in own:
        branches.setdefault(tuple(name.split(".")[: depth + 1]), []).append(name)
    found = {}
    for branch in branches.values():
        ends = [name for name in branch if len(name.split(".")) <= depth + 1]
        found |= {name: name for name in ends}
        rest = [name for name in branch if name not in ends]
        if rest:
            found |= _split(rest, group, owners, depth + 1)
    return found
