"""Filters for groups of tensors that share a value: as few as hit every tensor of a group and nothing else.

A filter hits every tensor whose name holds it (`utils/recipes/filters.py`). A group's filters are prefixes of its names, cut at
dots and ended with one (`model.layers.3.self_attn.`), or whole names where no prefix belongs to one group alone.
"""

from collections.abc import Hashable, Mapping, Sequence

from utils.errors import Problem, raise_collected


def first_match(filters: Mapping[str, str], name: str) -> str | None:
    """The key of the first filter that mergekit would apply to `name` (plain substring, in order), or None."""
    return next((key for key, text in filters.items() if text in name), None)


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
    for own in members.values():
        foreign = [name for name in names if name not in set(own)]
        chosen |= _split(own, foreign, 0)
    # Prefixes first, which hit their own group only; then whole names, the longest first: `a.weight` hits `b.a.weight`.
    order = sorted(groups, key=lambda name: 0 if chosen[name].endswith(".") else -len(chosen[name]))
    order.sort(key=lambda name: not chosen[name].endswith("."))
    filters = {name: chosen[name] for name in order}
    problems = []
    for name in names:
        hit = first_match(filters, name)
        if (filters[hit] if hit else None) != chosen.get(name):
            meant = f"no filter is meant for {name}" if name not in chosen else f"{name} is meant for {chosen[name]!r}"
            but = "none hits it" if hit is None else f"{filters[hit]!r} hits it"
            problems.append(Problem(f"{meant}, but {but}", "filter-inexact"))
    raise_collected(problems[:5], where)
    return filters


def _split(own: Sequence[str], foreign: Sequence[str], depth: int) -> dict[str, str]:
    """Filters for names that have their first `depth` dotted parts in common."""
    parts = own[0].split(".")
    prefix = ".".join(parts[:depth]) + "."
    if depth and not any(prefix in name for name in foreign):
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
            found |= _split(rest, foreign, depth + 1)
    return found
