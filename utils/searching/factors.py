"""Factors on the weights of a recipe: one per expert, one per block. Plain data in, plain data out.

mergekit takes the first filter of a list that a tensor's name holds. A factor per block is put onto the filters that are
there, which are of one tensor or one block, and behind them, for what none of them hits, a filter per block is added. That
every tensor then has the weight it should have is proven name by name.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from utils.errors import UserError
from utils.recipes.matching import FilterList


@dataclass(frozen=True)
class Blocks:
    """The decoder blocks of a merge: `filters` hit the tensors of one block each, in order; `names` is every tensor's."""

    filters: tuple[str, ...]
    names: tuple[str, ...]

    def of(self, name: str) -> int | None:
        """The block of a tensor, None outside."""
        return next((place for place, text in enumerate(self.filters) if text in name), None)


def weighed(recipe: Mapping[str, Any], factors: Sequence[float]) -> dict[str, Any]:
    """The recipe with each expert's weights multiplied by its factor; the experts stand behind the base, in order."""
    found = copy.deepcopy(dict(recipe))
    for entry, factor in zip(found["models"][1:], factors, strict=True):
        entry["parameters"]["weight"] = [
            {**item, "value": item["value"] * factor} for item in entry["parameters"]["weight"]
        ]
    return found


def by_depth(recipe: Mapping[str, Any], factors: Sequence[float], blocks: Blocks) -> dict[str, Any]:
    """The recipe with all experts' weights multiplied by a factor per block; what lies outside the blocks keeps its own.

    Raises:
        UserError: a filter of the recipe hits tensors of several blocks, so that no factor fits it.
    """
    found = copy.deepcopy(dict(recipe))
    for entry in found["models"][1:]:
        before = entry["parameters"]["weight"]
        *filters, rest = before
        scaled = [{**item, "value": item["value"] * _factor(item["filter"], factors, blocks)} for item in filters]
        hit = FilterList([item["filter"] for item in filters])
        left = {blocks.of(name) for name in blocks.names if hit.place(name) is None}
        added = [
            {"filter": text, "value": rest["value"] * factor}
            for place, (text, factor) in enumerate(zip(blocks.filters, factors, strict=True))
            if place in left
        ]
        entry["parameters"]["weight"] = [*scaled, *added, rest]
        _prove(before, entry["parameters"]["weight"], factors, blocks)
    return found


def lines_factors(count: int) -> list[float]:
    """LiNeS (arXiv 2410.17146) as factors of mean 1: growing linearly from the first block to the last, threefold."""
    return [1.0] if count == 1 else [0.5 + place / (count - 1) for place in range(count)]


def spread(groups: Sequence[float], count: int) -> list[float]:
    """A factor per block from one per group of neighboring blocks; the groups are as equal in size as they can be."""
    return [groups[place * len(groups) // count] for place in range(count)]


def _factor(text: str, factors: Sequence[float], blocks: Blocks) -> float:
    place = blocks.of(text)
    return 1.0 if place is None else factors[place]


def _prove(
    before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]], factors: Sequence[float], blocks: Blocks
) -> None:
    lists = [FilterList([item.get("filter", "") for item in items]) for items in (before, after)]
    for name in blocks.names:
        place = blocks.of(name)
        old, new = (one.place(name) for one in lists)
        wanted = before[old]["value"] * (1.0 if place is None else factors[place])
        if after[new]["value"] != wanted:
            raise UserError(
                f"no factor per depth fits this recipe: one of its filters hits {name} and tensors of other blocks; set "
                "search.depth_groups: 1",
                "search-depth-filter",
            )
