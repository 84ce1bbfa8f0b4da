"""What a careful user tries by hand, tried before the search chooses anything: what comes later races the best of it."""

from collections.abc import Sequence
from dataclasses import dataclass

from utils.evaluation.controls import SCALES, TIES_SETTINGS
from utils.guidance.method import guidance_methods
from utils.recipes.method_rules import TASK_ARITHMETIC
from utils.searching.points import DENSITY, LAMBDA, LINES, UNIFORM, Point, Way
from utils.searching.recipes import RecipeMaker
from utils.searching.space import Space

_NEAR = 0.04  # of 1 / experts: nothing new would be tried
_LINES_LAMBDAS = (0.5, 0.3)


@dataclass(frozen=True)
class Known:
    """A recipe to try first: its point, and what to call it."""

    name: str
    point: Point


def knowns(space: Space, maker: RecipeMaker, most: int) -> list[Known]:
    """Uniform task arithmetic at several lambdas (1 / experts first), uniform TIES, LiNeS, each guided way of the space at
    its defaults; the most telling first (of each guidance one way, then LiNeS), `most` at most. The uniform ones are tried
    whatever the space holds: they are what a winner is compared with, at the evaluator's settings, so that both compare
    with as good a uniform merge."""
    share = round(1 / max(1, len(space.experts)), 3)
    arithmetic = [
        Known(f"uniform task arithmetic, lambda {value:g}", Point(TASK_ARITHMETIC.name, UNIFORM, {LAMBDA: value}))
        for value in (share, *(value for value in SCALES if abs(value - share) > _NEAR))
    ]
    ties = [
        Known(
            f"uniform TIES, density {density:g}, lambda {scale:g}",
            Point("ties", UNIFORM, {LAMBDA: scale, DENSITY: density}),
        )
        for density, scale in TIES_SETTINGS
    ]
    lines = [
        Known(f"LiNeS, lambda {value:g}", Point(TASK_ARITHMETIC.name, LINES, {LAMBDA: value}))
        for value in _LINES_LAMBDAS
        if space.blocks > 1
    ]
    first = [*arithmetic[:2], ties[0], arithmetic[2]]
    guided = sorted((way for way in space.ways if way.guided), key=_preferred)
    leading: dict[str, Way] = {}
    for way in guided:
        leading.setdefault(way.guidance, way)
    others = [way for way in guided if way not in leading.values()]
    ordered = [*first, *leading.values(), *lines[:1], *others, ties[1], *arithmetic[3:], *lines[1:], *ties[2:]][:most]
    return [
        Known(f"{one.label} at its defaults", maker.default(one)) if isinstance(one, Way) else one for one in ordered
    ]


def untried(space: Space, tried: Sequence[Known]) -> list[str]:
    """The guided ways of a space, and LiNeS, that none of the knowns takes, as people call them."""
    there = {(known.point.merge_method, known.point.guidance) for known in tried}
    asked = [way for way in space.ways if way.guidance != UNIFORM]
    return [way.label for way in asked if (way.merge_method, way.guidance) not in there]


def _preferred(way: Way) -> bool:
    """Sorts a guidance's ways: first the one by a merge method that only this guidance has, or by its default."""
    method = guidance_methods()[way.guidance]
    return way.merge_method not in (method.own_merge_methods or (method.merge_method,))
