"""Mappings that a model hands to its blocks, in which one block may leave values for later ones.

Keys and values of the attention that later blocks use again come this way, and tables of positions by kind of block. Whoever
calls a block a second time (with other weights, or with a graph) gives it copies, so that it leaves nothing behind.
"""

import copy
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

Left = dict[tuple[int, Any], Any]
"""What a block has left in its mappings: by the mapping's place among them, and the key there."""


def mappings(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[MutableMapping]:
    """The mappings among a call's arguments, in order."""
    return [value for value in (*args, *kwargs.values()) if isinstance(value, MutableMapping)]


def with_copies(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call's arguments with mappings of their own, which hold the same values."""
    return tuple(map(_copied, args)), {key: _copied(value) for key, value in kwargs.items()}


def left_behind(before: list[MutableMapping], after: list[MutableMapping]) -> Left:
    """The entries that a block has added or replaced, from its mappings (copies of them) before and as they are now."""
    return {
        (place, key): value
        for place, (old, new) in enumerate(zip(before, after, strict=True))
        for key, value in new.items()
        if key not in old or old[key] is not value
    }


def put_back(left: Left, into: list[MutableMapping]) -> None:
    """Leave the same entries in other mappings."""
    for (place, key), value in left.items():
        into[place][key] = value


def entries(found: list[MutableMapping]) -> Iterator[Any]:
    """All values of all mappings, in the order of their keys as text."""
    for one in found:
        yield from (one[key] for key in sorted(one, key=str))


def _copied(value: Any) -> Any:
    return copy.copy(value) if isinstance(value, MutableMapping) else value
